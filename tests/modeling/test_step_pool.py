"""The pool of captured steps: one bound on number and memory for ordinary and parallel generation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_efficient.modeling.decoder.graph_capture import StepPool


class Steps:
    """Stands in for a cache with captured steps."""

    def __init__(self, signature: tuple, size: int = 1, name: str = "") -> None:
        self.signature: tuple | None = signature
        self.device = torch.device("cpu")
        self.size, self.name = size, name

    def nbytes(self) -> int:
        return self.size

    def report(self) -> list[dict[str, Any]]:
        return [{"name": self.name}]


class OtherSteps(Steps):
    """Those of the other kind of generation."""


@pytest.fixture(autouse=True)
def _memory_of_100_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))


def names(pool: StepPool) -> list[str]:
    return [entry["name"] for entry in pool.report()]


def test_steps_are_taken_by_class_and_shape_and_wait_again_once_put_back() -> None:
    pool = StepPool(4, 0.5)
    for steps in (Steps(("m",), name="a"), OtherSteps(("m",), name="b"), Steps(("m",), name="c")):
        pool.put(steps)
    assert names(pool) == ["a", "b", "c"]
    assert pool.take(OtherSteps, ("m",), lambda steps: steps.name == "c") is None
    taken = pool.take(Steps, ("m",), lambda steps: steps.name == "c")
    assert taken is not None and taken.name == "c" and names(pool) == ["a", "b"]
    pool.put(taken)
    assert names(pool) == ["a", "b", "c"]


def test_a_model_of_another_signature_frees_the_steps_of_both_kinds() -> None:
    pool = StepPool(4, 0.5)
    pool.put(Steps(("old",)))
    pool.put(OtherSteps(("old",)))
    assert pool.take(Steps, ("new",), lambda steps: True) is None
    assert pool.report() == []


def test_the_longest_unused_steps_are_freed_beyond_the_number_and_the_memory() -> None:
    pool = StepPool(3, 0.5)
    for name in "abcd":
        pool.put((Steps if name in "ac" else OtherSteps)(("m",), 10, name))
    assert names(pool) == ["b", "c", "d"] and pool.nbytes() == 30
    pool.put(Steps(("m",), 35, "large"))
    assert names(pool) == ["d", "large"]
    pool.put(OtherSteps(("m",), 51, "too large"))
    assert names(pool) == []


def test_one_kind_is_cleared_alone() -> None:
    pool = StepPool(4, 0.5)
    pool.put(Steps(("m",), name="a"))
    pool.put(OtherSteps(("m",), name="b"))
    pool.clear(OtherSteps)
    assert names(pool) == ["a"]
    pool.clear()
    assert names(pool) == []
