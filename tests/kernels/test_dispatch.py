"""The choice of a backend: its order, its reasons, and its errors and warnings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import torch

from hf_efficient.errors import BackendError
from hf_efficient.kernels import dispatch
from hf_efficient.kernels.dispatch import choose_backend, explain, select_backend
from hf_efficient.logging import get_logger, warn_once

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choices are cached for the process; each test starts and ends with an empty cache and no override."""
    remembered = (
        dispatch.triton_import_problem,
        dispatch.triton_problem,
        dispatch.preferred_backend,
        warn_once,
    )
    for name in ("HFE_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that seems to have a GPU of capability 9.0."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    return monkeypatch


def test_the_cpu_gets_the_reference() -> None:
    assert select_backend("stem_gate", None, CPU) == "reference"


def test_a_gpu_gets_triton(gpu: pytest.MonkeyPatch) -> None:
    assert select_backend("stem_gate", None, CUDA) == "triton"


def test_the_argument_beats_the_environment_which_beats_the_default(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("HFE_BACKEND", "reference")
    assert choose_backend(None, CUDA).backend == "reference"
    assert choose_backend("triton", CUDA).backend == "triton"


@pytest.mark.parametrize("origin", ["backend", "HFE_BACKEND"])
def test_an_impossible_wish_is_an_error_that_names_its_origin(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argument = "triton" if origin == "backend" else None
    if argument is None:
        monkeypatch.setenv("HFE_BACKEND", "triton")
    with pytest.raises(BackendError, match=f"{origin}='triton' cannot run: .*the tensors are on cpu"):
        select_backend("stem_gate", argument, CPU)


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFE_BACKEND", "tritn")
    with pytest.raises(BackendError, match="HFE_BACKEND='tritn' is no backend; choose from reference, triton"):
        select_backend("stem_gate", None, CPU)


def test_the_interpreter_runs_on_the_cpu_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(None, CPU).backend == "reference"
    assert choose_backend("triton", CPU).backend == "triton"


def test_a_broken_triton_is_shown_and_not_swallowed(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu.setitem(sys.modules, "triton", None)  # makes the import fail
    reason = r"importing triton failed with \w+Error: .*triton"
    with pytest.raises(BackendError, match=reason):
        select_backend("stem_gate", "triton", CUDA)
    gpu.setattr(get_logger(), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="hf_efficient"):
        assert [select_backend("stem_gate", None, CUDA) for _ in range(3)] == ["reference"] * 3
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1, "the reference on a GPU is worth one warning, not one for each call"
    assert "stem_gate" in warnings[0] and "importing triton failed" in warnings[0]


def test_a_gpu_that_is_too_old_gets_the_reference_and_a_reason(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert select_backend("stem_gate", None, CUDA) == "reference"
    with pytest.raises(BackendError, match=r"Some GPU has compute capability 7\.5; 8\.0 is the oldest supported"):
        select_backend("stem_gate", "triton", CUDA)


def test_other_devices_get_the_reference() -> None:
    assert select_backend("stem_gate", None, torch.device("meta")) == "reference"


def test_explain_says_what_and_why(gpu: pytest.MonkeyPatch) -> None:
    assert explain("stem_gate", "cuda") == "triton: the tensors are on cuda"
    assert explain("stem_gate", "cpu").startswith("reference: the tensors are on cpu")
    gpu.setenv("HFE_BACKEND", "reference")
    assert explain("stem_gate", "cuda") == "reference: HFE_BACKEND='reference' asks for it"
    gpu.setenv("HFE_BACKEND", "nonsense")
    assert explain("stem_gate", "cuda").startswith("error: HFE_BACKEND='nonsense'")


def test_a_compiled_call_that_cannot_run_names_the_reason() -> None:
    from hf_efficient.kernels.stem_gate.api import stem_gate

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: stem_gate(*a, backend="triton"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="the tensors are on cpu"):
        compiled(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))
