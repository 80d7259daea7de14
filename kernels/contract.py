"""The record of an operation, which drives its tests and benchmarks.

It is called `RECORD` and lies in `record.py` of the operation's folder; `all_records` searches the folders, so that a
new operation needs no entry in a list. Only tests, benchmarks and records import this module: neither a wheel nor an
exported checkpoint contains it or a record.
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
    """Arguments of one call, by name; `label` says what they test."""

    label: str
    arguments: Arguments


@dataclass(frozen=True)
class BadInput:
    """Arguments that must be refused with `error`, whose text holds every one of `words`."""

    label: str
    arguments: Arguments
    error: type[Exception]
    words: tuple[str, ...]


# Upstream gradients of at most this many elements are drawn on the CPU.
_MAX_DRAWN_ON_CPU = 1 << 20


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
        types: type of each argument that is no constant, as Triton spells it (`*bf16`, `i32`).
        constants: compile-time arguments.
        num_warps: warps of a program.
        num_stages: pipeline stages of the loops; None for Triton's default.
        aligned: arguments whose value is a multiple of 16, as Triton specialises them for well-shaped tensors.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = ()
    num_stages: int | None = None


def no_backward_cost(arguments: Arguments) -> Cost:
    """Cost of the backward pass of an inference-only operation: none."""
    return Cost(bytes=0, flops=0)


@dataclass(frozen=True)
class KernelRecord:
    """One operation.

    Attributes:
        name: name of the public function and of its folder.
        api: the public function; takes `backend`. Its arguments are tensors, sequences of tensors and plain values; it
            returns a tensor or a tuple of tensors.
        reference: the definition, with the same arguments but `backend`.
        samples: arguments on a device in a dtype. The first is a typical small call, its sizes prime; the others cover
            odd sizes, strides, empty and size-1 tensors, and every branch of the kernels.
        bad_inputs: arguments that must be refused.
        tolerances: bounds for each dtype that the kernels take.
        operators: (operator, arguments) of every PyTorch operator that a call with these arguments may run.
        compilations: every kernel configuration that a device of this capability (80, 86, …) may pick.
        forward_cost, backward_cost: byte and operation model of a call with these arguments; an inference-only
            operation has no backward cost.
        peers: other functions with the same result, by name: what a user would write without this package.
        differentiable: names of the arguments that get a gradient, where a call has them; empty for inference-only
            operations, which raise for tensors that require one.
        mutates: names of the arguments that a call changes in place; their new contents are results too.
        after_rounding: names of results that are computed from a value rounded to the dtype of the first argument,
            so that they are only as accurate as that dtype.
        interpreted: dtypes that Triton's interpreter computes correctly: not bfloat16, which it truncates where a GPU
            rounds, and for which its `tl.dot` is wrong.
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
    backward_cost: Callable[[Arguments], Cost] = no_backward_cost
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    after_rounding: tuple[str, ...] = ()
    interpreted: tuple[torch.dtype, ...] = (torch.float32, torch.float16)


@functools.cache
def all_records() -> tuple[KernelRecord, ...]:
    """The records of all operations, sorted by name."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/record.py"))
    return tuple(import_module(f"hf_efficient.kernels.{folder}.record").RECORD for folder in folders)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖`` in float64; infinite for NaN, infinity, and non-zeros in place of zero."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    missed = torch.linalg.vector_norm(actual.double() - expected).item()
    size = torch.linalg.vector_norm(expected).item()
    error = missed / size if size else (0.0 if missed == 0.0 else float("inf"))
    return error if error == error else float("inf")  # a NaN never passes


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value`, a tensor or a nest of dictionaries, tuples and lists, with `change` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_tensors(change, item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def all_tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nest of dictionaries, tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in all_tensors(item)]


def named_outputs(result: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """A call's result by name: `out`, or `out0`, `out1`, … where it is a tuple."""
    return {"out": result} if isinstance(result, Tensor) else {f"out{i}": each for i, each in enumerate(result)}


def present(arguments: Arguments, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` for which `arguments` holds a tensor."""
    return tuple(name for name in names if isinstance(arguments.get(name), Tensor))


def run(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiable: tuple[str, ...] = (),
    mutates: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Outputs of `function`, named by `named_outputs`, then the gradients of its differentiable arguments and the
    contents of those that it changes, both under the arguments' names.

    Arguments that the function changes are passed as copies. The gradients that flow into the outputs are drawn
    from a fixed seed, rounded to the outputs' dtypes.
    """
    differentiable = present(arguments, differentiable)
    arguments = {
        name: value.detach().requires_grad_()
        if name in differentiable
        else map_tensors(torch.clone, value)
        if name in mutates
        else value
        for name, value in arguments.items()
    }
    outputs = named_outputs(function(**arguments))
    results = {name: out.detach() for name, out in outputs.items()}
    if differentiable:
        dependent = [out for out in outputs.values() if out.requires_grad]
        leaves = [arguments[name] for name in differentiable]
        gradients = torch.autograd.grad(dependent, leaves, [upstream_gradient(out) for out in dependent])
        results.update(zip(differentiable, gradients, strict=True))
    results.update((name, arguments[name]) for name in mutates if arguments.get(name) is not None)
    return results


def upstream_gradient(out: Tensor) -> Tensor:
    """A fixed random gradient for `out`: the same values for every dtype, up to rounding.

    Mostly positive: with mixed signs a parameter's gradient, a sum over all rows, would cancel, and its relative error
    would be that of the cancellation.
    """
    # Small ones are drawn on the CPU, so that every device sees the same numbers.
    device = torch.device("cpu") if out.numel() <= _MAX_DRAWN_ON_CPU else out.device
    generator = torch.Generator(device).manual_seed(0)
    # Drawn in bfloat16, which the other dtypes represent exactly, so that all see the same numbers.
    values = torch.empty(out.shape, dtype=torch.bfloat16, device=device).normal_(1.0, 0.75, generator=generator)
    return values.to(out.device, out.dtype)


def in_float64(arguments: Arguments) -> Arguments:
    """The same arguments with every floating-point tensor widened to float64, exactly."""
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)


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
    expected = run(record.reference, in_float64(arguments), differentiable, record.mutates)
    found = []
    for name, actual in run(function, arguments, differentiable, record.mutates).items():
        bound = 0.0  # integers must be equal
        if actual.is_floating_point():
            first = next(iter(arguments.values())) if name in record.after_rounding else actual
            tolerance = record.tolerances[first.dtype]
            bound = tolerance.gradient if name in differentiable else tolerance.forward
        found.append(Deviation(name, relative_error(actual, expected[name]), bound))
    return found
