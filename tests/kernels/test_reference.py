"""The reference of every operation on the CPU: correct, differentiable, traceable, and raising for bad input."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.contract import (
    KernelRecord,
    all_records,
    all_tensors,
    deviations,
    in_float64,
    map_tensors,
    named_outputs,
    present,
    relative_error,
    run,
)

CPU = torch.device("cpu")
RECORDS = all_records()
by_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
SAMPLES = [pytest.param(r, s.label, id=f"{r.name}-{s.label}") for r in RECORDS for s in r.samples(CPU, torch.float32)]
by_sample = pytest.mark.parametrize(("record", "label"), SAMPLES)
by_differentiable_sample = pytest.mark.parametrize(
    ("record", "label"), [sample for sample in SAMPLES if sample.values[0].differentiable]
)


def _arguments(record: KernelRecord, label: str, dtype: torch.dtype) -> dict:
    return next(sample.arguments for sample in record.samples(CPU, dtype) if sample.label == label)


def _reference(record: KernelRecord):
    return functools.partial(record.api, backend="reference")


@by_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_the_reference_keeps_its_own_tolerances(record: KernelRecord, label: str, dtype: torch.dtype) -> None:
    arguments = _arguments(record, label, dtype)
    before = map_tensors(torch.clone, arguments)
    wrong = [d for d in deviations(record, _reference(record), arguments) if not d.acceptable]
    assert not wrong, wrong
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(before), all_tensors(arguments), strict=True))


@by_differentiable_sample
def test_derivatives_of_the_reference_are_the_numerical_ones(record: KernelRecord, label: str) -> None:
    arguments = in_float64(_arguments(record, label, torch.float64))
    if all(out.numel() == 0 for out in named_outputs(record.reference(**arguments)).values()):
        return  # nothing to differentiate: that the call works is the test
    names = present(arguments, record.differentiable)
    # Numerical differentiation moves one element at a time, which overlapping elements do not allow.
    values = tuple(arguments[name].detach().contiguous().requires_grad_() for name in names)

    def function(*changed: Tensor) -> Tensor | tuple[Tensor, ...]:
        return record.reference(**{**arguments, **dict(zip(names, changed, strict=True))})

    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@by_record
def test_bad_input_is_named_with_its_remedy(record: KernelRecord) -> None:
    for bad in record.bad_inputs(CPU):
        with pytest.raises(bad.error) as caught:
            record.api(**bad.arguments)
        assert isinstance(caught.value, HFEError)
        assert caught.value.remedy, f"{bad.label} names no remedy"
        missing = [word for word in bad.words if word not in str(caught.value)]
        assert not missing, f"{bad.label}: {caught.value} lacks {missing}"


@by_record
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_public_function_compiles_into_one_graph(record: KernelRecord, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(record.api, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sample in record.samples(CPU, torch.float32)[:3]:
        expected = run(record.api, sample.arguments, record.differentiable, record.mutates)
        actual = run(compiled, sample.arguments, record.differentiable, record.mutates)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@by_record
def test_tensors_without_data_give_tensors_without_data(record: KernelRecord) -> None:
    """Models are built on the meta device, and traced with fake tensors, before any weight exists."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = record.samples(CPU, torch.float32)[0].arguments
    expected = named_outputs(record.api(**map_tensors(torch.clone, arguments)))
    on_meta = named_outputs(record.api(**map_tensors(lambda tensor: tensor.to("meta"), arguments)))
    assert {name: out.shape for name, out in on_meta.items()} == {name: out.shape for name, out in expected.items()}
    with FakeTensorMode() as mode:
        fake = named_outputs(record.api(**map_tensors(mode.from_tensor, arguments)))
    for name, out in expected.items():
        assert (fake[name].shape, fake[name].dtype, fake[name].stride()) == (out.shape, out.dtype, out.stride())


@by_record
def test_every_peer_computes_the_same(record: KernelRecord) -> None:
    arguments = record.samples(CPU, torch.float32)[0].arguments
    expected = run(record.reference, arguments, mutates=record.mutates)
    for name, peer in record.peers.items():
        actual = run(peer, arguments, mutates=record.mutates)
        assert actual.keys() == expected.keys(), name
        assert all(relative_error(actual[result], expected[result]) < 1e-5 for result in expected), name


@by_record
def test_a_record_is_named_as_its_folder_and_documented(record: KernelRecord, repository_root: Path) -> None:
    folder = repository_root / "kernels" / record.name
    held = {path.name for path in folder.iterdir()}
    assert {"__init__.py", "api.py", "op.py", "reference.py", "record.py", "triton_kernels.py", "README.md"} <= held
    assert record.api.__name__ == record.name
    documentation = record.api.__doc__ or ""
    assert all(part in documentation for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:"))


@by_record
def test_the_example_in_the_documentation_runs(record: KernelRecord) -> None:
    import doctest

    finder = doctest.DocTestFinder(recurse=False)
    examples = finder.find(record.api, record.name, globs={record.name: record.api})
    assert examples and examples[0].examples
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0


def test_an_operation_works_where_triton_cannot_be_imported(repository_root: Path) -> None:
    """Its import does not even load the file of its Triton kernels."""
    folders = [record.name for record in RECORDS]
    code = f"""
import sys
sys.modules["triton"] = None  # makes every import of it fail
import torch
from importlib import import_module
from hf_efficient.errors import BackendError
for name in {folders!r}:
    folder = "hf_efficient.kernels." + name
    api, _ = import_module(folder + ".api"), import_module(folder + ".op")
    assert folder + ".triton_kernels" not in sys.modules, "loaded too early"
    record = import_module(folder + ".record").RECORD
    arguments = record.samples(torch.device("cpu"), torch.float32)[0].arguments
    result = record.api(**arguments)
    assert all(out.isfinite().all() for out in (result if isinstance(result, tuple) else (result,)))
    try:
        record.api(**arguments, backend="triton")
    except BackendError as error:
        assert "importing triton failed" in str(error), error
    else:
        raise AssertionError("ran without triton")
    import_module(folder + ".triton_kernels")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_relative_error_lets_nothing_pass_that_is_not_a_number() -> None:
    one = torch.ones(3)
    assert relative_error(one, one) == 0
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), one) == float("inf")
    assert relative_error(one, torch.zeros(3)) == float("inf")
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(2), one) == float("inf")
