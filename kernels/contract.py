"""What every operation states about itself: one record drives its tests, its benchmarks and `hf-efficient env`.

A record lives in `record.py` of the operation's folder and is called `RECORD`. Adding an operation touches no list: the
folders are searched. Nothing that runs in a model imports this module, so no checkpoint carries it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, by name; `label` says what is special about them."""

    label: str
    arguments: Arguments


@dataclass(frozen=True)
class BadInput:
    """Arguments that must be refused with `error`, whose text holds every one of `words`."""

    label: str
    arguments: Arguments
    error: type[Exception]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error, ‖x - r‖ / ‖r‖ with r in float64, of the outputs and of each gradient."""

    forward: float
    gradient: float


@dataclass(frozen=True)
class Cost:
    """Fewest bytes of device memory that must move (each input read once, each output written once), and operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Compilation:
    """One Triton kernel with the types and constants of one configuration, to be compiled without a GPU.

    Attributes:
        label: readable name of the configuration.
        kernel: the jitted function.
        types: type of each argument in Triton's spelling (`*bf16`, `i32`), constants left out.
        constants: compile-time arguments.
        num_warps: warps of a program.
        aligned: arguments whose value is a multiple of 16, as the launcher sees it for well-shaped tensors.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelRecord:
    """One operation.

    Attributes:
        name: name of the public function and of its folder.
        api: the public function; takes `backend`.
        reference: the definition, with the same arguments but `backend`.
        samples: arguments on a device in a dtype. The first is a typical small call, its sizes prime; the others cover
            odd sizes, strides, empty and size-1 tensors, and every branch of the kernels.
        bad_inputs: arguments that must be refused.
        tolerances: bounds for each dtype that the kernels take.
        operators: (operator, arguments) of every PyTorch operator that a call with these arguments may reach.
        compilations: every kernel configuration that a device of this capability (80, 86, …) may pick.
        forward_cost, backward_cost: byte and operation model of a call with these arguments.
        peers: other ways to get the same result, by name: what a user would write without us.
        differentiable: names of the arguments that get a gradient; empty for inference-only operations.
        interpreted: dtypes that Triton's interpreter computes rightly: not bfloat16, which it truncates where a GPU
            rounds, and has altogether wrong in `tl.dot`.
    """

    name: str
    api: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], list[Sample]]
    bad_inputs: Callable[[torch.device], list[BadInput]]
    tolerances: dict[torch.dtype, Tolerance]
    operators: Callable[[Arguments], list[tuple[Any, tuple[Any, ...]]]]
    compilations: Callable[[int], Iterable[Compilation]]
    forward_cost: Callable[[Arguments], Cost]
    backward_cost: Callable[[Arguments], Cost]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    interpreted: tuple[torch.dtype, ...] = (torch.float32, torch.float16)


@functools.cache
def all_records() -> tuple[KernelRecord, ...]:
    """The records of all operations, in the order of their names."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/record.py"))
    return tuple(import_module(f"hf_efficient.kernels.{folder}.record").RECORD for folder in folders)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖`` in float64; infinite where anything is not finite or a zero is missed."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    missed = torch.linalg.vector_norm(actual.double() - expected).item()
    size = torch.linalg.vector_norm(expected).item()
    error = missed / size if size else (0.0 if missed == 0.0 else float("inf"))
    return error if error == error else float("inf")  # a NaN never passes


def run(function: Callable[..., Any], arguments: Arguments, differentiable: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Output of `function`, under the name `out`, and the gradients of its differentiable arguments, under theirs.

    The gradient that flows into the output is drawn from a fixed seed, rounded to the output's dtype.
    """
    arguments = {
        name: value.detach().requires_grad_() if name in differentiable else value for name, value in arguments.items()
    }
    out = function(**arguments)
    results = {"out": out.detach()}
    if differentiable:
        upstream = upstream_gradient(out)
        leaves = [arguments[name] for name in differentiable]
        results.update(zip(differentiable, torch.autograd.grad(out, leaves, upstream), strict=True))
    return results


def upstream_gradient(out: Tensor) -> Tensor:
    """A fixed random gradient for `out`: the same values for every dtype, up to rounding."""
    generator = torch.Generator(out.device).manual_seed(0)
    # Drawn in bfloat16, which every other dtype holds exactly, so that all see the same numbers.
    values = torch.empty(out.shape, dtype=torch.bfloat16, device=out.device).normal_(generator=generator)
    return values.to(out.dtype)


def in_float64(arguments: Arguments) -> Arguments:
    """The same arguments with every floating-point tensor widened to float64, exactly."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@dataclass(frozen=True)
class Deviation:
    """Relative error of one result, an output or a gradient, and the bound that the record sets for its dtype."""

    result: str
    error: float
    bound: float

    @property
    def acceptable(self) -> bool:
        return self.error <= self.bound


def deviations(
    record: KernelRecord, function: Callable[..., Any], arguments: Arguments, gradients: bool = True
) -> list[Deviation]:
    """How far the results of `function`, which has the arguments of `record.api`, are from the reference in float64."""
    differentiable = record.differentiable if gradients else ()
    expected = run(record.reference, in_float64(arguments), differentiable)
    found = []
    for name, actual in run(function, arguments, differentiable).items():
        tolerance = record.tolerances[actual.dtype]
        bound = tolerance.forward if name == "out" else tolerance.gradient
        found.append(Deviation(name, relative_error(actual, expected[name]), bound))
    return found
