"""The contract of the Triton kernels of every operation, driven by their records."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient.environment import triton_interpreted
from hf_efficient.errors import HFEError
from hf_efficient.kernels.contract import (
    KernelRecord,
    all_records,
    all_tensors,
    deviations,
    map_tensors,
    named_outputs,
    present,
    run,
    upstream_gradient,
)

RECORDS = all_records()
DIFFERENTIABLE = [record for record in RECORDS if record.differentiable]
INFERENCE_ONLY = [record for record in RECORDS if not record.differentiable]
CPU = torch.device("cpu")
# Numerical derivatives need float64; without it the kernels' gradients are compared with the reference's alone.
IN_FLOAT64 = [record for record in DIFFERENTIABLE if torch.float64 in record.tolerances]
# Integers want no gradient.
ON_NUMBERS = [
    record
    for record in INFERENCE_ONLY
    if any(t.is_floating_point() for t in all_tensors(record.samples(CPU, torch.float32)[0].arguments))
]


def _dtypes(record: KernelRecord, place: int) -> tuple[torch.dtype, ...]:
    """Dtypes of the sample at index `place`; in the slow interpreter, one dtype for most samples."""
    if not triton_interpreted():
        return tuple(record.tolerances)
    return record.interpreted if place % 3 == 0 else record.interpreted[:1]


def _labels(record: KernelRecord) -> list[str]:
    return [sample.label for sample in record.samples(CPU, torch.float32)]


def _arguments(record: KernelRecord, label: str, device: torch.device, dtype: torch.dtype) -> dict:
    return next(sample.arguments for sample in record.samples(device, dtype) if sample.label == label)


def _triton(record: KernelRecord):
    return functools.partial(record.api, backend="triton")


def _typical(record: KernelRecord, device: torch.device, dtype: torch.dtype) -> dict:
    return record.samples(device, dtype)[0].arguments


def _wanting_gradients(record: KernelRecord, arguments: dict) -> dict:
    names = present(arguments, record.differentiable)
    return {name: value.detach().requires_grad_() if name in names else value for name, value in arguments.items()}


def _first_output(record: KernelRecord, arguments: dict) -> Tensor:
    return next(iter(named_outputs(_triton(record)(**arguments)).values()))


by_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
by_differentiable = pytest.mark.parametrize("record", DIFFERENTIABLE, ids=lambda record: record.name)
by_sample = pytest.mark.parametrize(
    ("record", "label"),
    [
        pytest.param(r, label, id=f"{r.name}-{label}")
        for r in RECORDS
        # The interpreter is slow, and has neither scheduling nor streams: there one call shows what can be shown.
        for label in (_labels(r)[:1] if triton_interpreted() else _labels(r))
    ],
)
by_sample_and_dtype = pytest.mark.parametrize(
    ("record", "label", "dtype"),
    [
        pytest.param(r, label, dtype, id=f"{r.name}-{label}-{str(dtype).removeprefix('torch.')}")
        for r in RECORDS
        for place, label in enumerate(_labels(r))
        for dtype in _dtypes(r, place)
    ],
)


@by_sample_and_dtype
def test_results_and_gradients_match_the_reference(
    record: KernelRecord, label: str, dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    arguments = _arguments(record, label, device, dtype)
    before = map_tensors(torch.clone, arguments)
    wrong = [d for d in deviations(record, _triton(record), arguments) if not d.acceptable]
    assert not wrong, wrong
    # Arguments that the call may change were passed as copies.
    same = [torch.equal(a, b) for a, b in zip(all_tensors(before), all_tensors(arguments), strict=True)]
    assert all(same), "the call changed its inputs"


@by_sample
def test_two_runs_agree_bit_for_bit(record: KernelRecord, label: str, device: torch.device) -> None:
    arguments = _arguments(record, label, device, torch.float32)
    first, second = (run(_triton(record), arguments, record.differentiable, record.mutates) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@by_differentiable
def test_a_frozen_argument_leaves_the_other_gradients_alone(record: KernelRecord, device: torch.device) -> None:
    arguments = _typical(record, device, torch.float32)
    together = run(_triton(record), arguments, record.differentiable)
    for name in present(arguments, record.differentiable):
        alone = run(_triton(record), arguments, (name,))
        torch.testing.assert_close(alone[name], together[name], rtol=1e-6, atol=1e-7)


@by_differentiable
def test_any_layout_of_the_incoming_gradient_is_right(record: KernelRecord, device: torch.device) -> None:
    """The gradient of `out.sum()` is one expanded number, that of a transpose is strided."""
    arguments = _wanting_gradients(record, _typical(record, device, torch.float32))
    leaves = [arguments[name] for name in present(arguments, record.differentiable)]
    out = _first_output(record, arguments)
    for upstream in (out.new_ones(1).expand(out.shape), upstream_gradient(out).mT.contiguous().mT):
        strided = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        plain = torch.autograd.grad(out, leaves, upstream.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("record", IN_FLOAT64, ids=lambda record: record.name)
def test_numerical_derivatives(record: KernelRecord, device: torch.device) -> None:
    arguments = _wanting_gradients(record, _typical(record, device, torch.float64))
    names = present(arguments, record.differentiable)

    def function(*values: Tensor) -> Tensor | tuple[Tensor, ...]:
        return _triton(record)(**{**arguments, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(arguments[name] for name in names), fast_mode=True)


@by_sample
def test_operators_obey_pytorch(record: KernelRecord, label: str, device: torch.device) -> None:
    """Schema, fake tensors, autograd registration, tracing with dynamic shapes."""
    for operator, values in record.operators(_arguments(record, label, device, torch.float32)):
        torch.library.opcheck(operator, values)


@by_record
# What static shapes add, they add for the references too, which are compiled in both ways.
@pytest.mark.parametrize(
    "dynamic", [True] if triton_interpreted() else [True, False], ids=lambda dynamic: "dynamic" if dynamic else "static"
)
def test_compiles_into_one_graph(record: KernelRecord, dynamic: bool, device: torch.device) -> None:
    """Results and gradients are those of the uncompiled call, at several shapes.

    To rounding: where a result is an argument handed through, a compiler adds its gradient outside of the operator.
    """
    torch._dynamo.reset()
    compiled = torch.compile(
        _triton(record), fullgraph=True, dynamic=dynamic, backend="inductor" if device.type == "cuda" else "aot_eager"
    )
    for sample in record.samples(device, torch.float32)[: 2 if triton_interpreted() else 3]:
        arguments = sample.arguments
        expected = run(_triton(record), arguments, record.differentiable, record.mutates)
        actual = run(compiled, arguments, record.differentiable, record.mutates)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@by_record
def test_autocast_changes_nothing(record: KernelRecord, device: torch.device) -> None:
    """Modules pass tensors in the intended dtype; autocast does not change the operation itself."""
    arguments = _typical(record, device, torch.float32)
    for backend in ("triton", "reference"):
        function = functools.partial(record.api, backend=backend)
        expected = run(function, arguments, record.differentiable, record.mutates)

        def in_autocast(call: Callable[..., Any] = function, **values: Any) -> Any:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return call(**values)

        # The backward pass outside, as PyTorch has it.
        actual = run(in_autocast, arguments, record.differentiable, record.mutates)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@by_record
def test_bad_input_is_refused_before_a_launch(
    record: KernelRecord, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFE_CHECK", "1")
    for bad in record.bad_inputs(device):
        with pytest.raises(bad.error) as caught:
            record.api(**{"backend": "triton", **bad.arguments})
        assert isinstance(caught.value, HFEError)
        missing = [word for word in bad.words if word not in str(caught.value)]
        assert not missing, f"{bad.label}: {caught.value} lacks {missing}"


@by_differentiable
def test_a_second_derivative_is_refused_with_a_reason(record: KernelRecord, device: torch.device) -> None:
    name = record.differentiable[0]
    arguments = _typical(record, device, torch.float32)
    arguments = {**arguments, name: arguments[name].detach().requires_grad_()}
    out = _first_output(record, arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[name], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("record", ON_NUMBERS, ids=lambda record: record.name)
def test_a_tensor_that_wants_a_gradient_is_refused(record: KernelRecord, device: torch.device) -> None:
    arguments = _typical(record, device, torch.float32)
    wanting = map_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, arguments)
    with pytest.raises(HFEError, match=r"gradient.*torch\.no_grad\(\)"):
        _triton(record)(**wanting)
    with torch.no_grad():
        run(_triton(record), wanting, mutates=record.mutates)


@pytest.mark.gpu
@by_record
def test_a_cuda_graph_replays_forward_and_backward(record: KernelRecord, device: torch.device) -> None:
    """With other values in the same memory, as in the next step of a decoding loop."""
    arguments = _wanting_gradients(record, map_tensors(torch.clone, _typical(record, device, torch.bfloat16)))
    leaves = [arguments[name] for name in present(arguments, record.differentiable)]
    # What a call changes starts each time from the same contents, which `arguments` keeps.
    changed = {name: map_tensors(torch.clone, arguments.get(name)) for name in record.mutates}

    upstream: list[Tensor] = []

    def forward_and_backward() -> list[Tensor]:
        outputs = list(named_outputs(_triton(record)(**{**arguments, **changed})).values())
        dependent = [out for out in outputs if out.requires_grad]
        if not upstream:
            upstream.extend(upstream_gradient(out) for out in dependent)
        return [*outputs, *(torch.autograd.grad(dependent, leaves, upstream) if leaves else ())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward()  # what happens only once must not be captured, nor can random numbers be drawn there
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward()
    with torch.no_grad():  # a graph reads its inputs where they were: change them in place
        inputs = leaves or all_tensors({n: v for n, v in arguments.items() if n not in record.mutates})
        for tensor in inputs:
            if tensor.is_floating_point():
                tensor.normal_()
        for name, value in changed.items():  # the first call has changed these
            for tensor, start in zip(all_tensors(value), all_tensors(arguments.get(name)), strict=True):
                tensor.copy_(start)
    graph.replay()
    expected = run(_triton(record), arguments, record.differentiable, record.mutates)
    actual = captured + [changed[name] for name in record.mutates if changed[name] is not None]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected.values(), strict=True))
