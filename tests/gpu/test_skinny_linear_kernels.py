"""The kernels of skinny_linear: several matrices in one launch, shapes of models, large weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from hf_efficient.kernels.contract import relative_error
from hf_efficient.kernels.skinny_linear.api import skinny_linear
from hf_efficient.kernels.skinny_linear.configs import MAX_ROWS, LaunchConfig
from hf_efficient.kernels.skinny_linear.reference import skinny_linear as reference_skinny_linear


@pytest.mark.parametrize("rows", [1, 5])
def test_skinny_linear_reads_nothing_around_its_tensors(rows: int, device: torch.device, poisoned: None) -> None:
    """All tensors are surrounded by NaNs, so that reading one would show in the result."""

    def amid(tensor: torch.Tensor) -> torch.Tensor:
        around = torch.full([size + 4 for size in tensor.shape], float("nan"), device=device)
        inner = around[tuple(slice(2, 2 + size) for size in tensor.shape)]
        return inner.copy_(tensor)

    x, residual = torch.randn(rows, 35, device=device), torch.randn(rows, 24, device=device)
    weights = [torch.randn(size, 35, device=device) for size in (17, 3, 4)]
    biases = [torch.randn(17, device=device), None, torch.randn(4, device=device)]
    surrounded = skinny_linear(
        amid(x),
        [amid(weight) for weight in weights],
        [None if bias is None else amid(bias) for bias in biases],
        residual=amid(residual),
        backend="triton",
    )
    assert torch.equal(surrounded, skinny_linear(x, weights, biases, residual=residual, backend="triton"))
    assert surrounded.isfinite().all()


def test_skinny_linear_gives_every_row_the_same_bits_wherever_it_stands(device: torch.device) -> None:
    """A sequence's logits do not depend on its place in the batch, nor on its neighbours."""
    x, weight = torch.randn(7, 40, device=device), torch.randn(21, 40, device=device)
    out = skinny_linear(x, [weight], backend="triton")
    order = torch.randperm(7, device=device)
    assert torch.equal(skinny_linear(x[order], [weight], backend="triton"), out[order])
    assert torch.equal(skinny_linear(x[:3], [weight], backend="triton"), out[:3])


@pytest.mark.parametrize("rows", [1, 2])
def test_skinny_linear_side_by_side_is_bitwise_each_alone(rows: int, device: torch.device) -> None:
    x, weights = torch.randn(rows, 33, device=device), [torch.randn(n, 33, device=device) for n in (19, 2, 18)]
    together = skinny_linear(x, weights, backend="triton")
    alone = [skinny_linear(x, [weight], backend="triton") for weight in weights]
    assert torch.equal(together, torch.cat(alone, dim=-1))


@pytest.mark.parametrize(("rows", "depth", "splits"), [(3, 129, 4), (17, 64, 2), (2, 96, 4)])
def test_skinny_linear_adds_the_splits_of_split_k(
    rows: int, depth: int, splits: int, device: torch.device, poisoned: None
) -> None:
    """Biases and residual are added once, not per split; K = 129 leaves a split of 1, K = 96 makes 3 splits of 4."""
    from hf_efficient.kernels.skinny_linear.triton_kernels import launch

    x, residual = torch.randn(rows, depth, device=device), torch.randn(rows, 24, device=device)
    weights = [torch.randn(size, depth, device=device) for size in (19, 2, 3)]
    biases = [torch.randn(19, device=device), None, torch.randn(3, device=device)]
    config = LaunchConfig(16, 32, 4, 2, splits)
    out = launch(x, weights, biases, residual, False, config)
    assert relative_error(out, reference_skinny_linear(x, weights, biases, residual=residual)) < 2e-6
    assert torch.equal(out, launch(x, weights, biases, residual, False, config)), "added in a fixed order"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "depth", "gated"),
    [
        ((2048, 512, 512), 2048, False),
        ((8192, 8192), 2048, True),
        ((2048,), 8192, False),
        ((32768,), 2048, False),
        ((576, 192, 192), 576, False),
        ((1536, 1536), 576, True),
        ((49152,), 576, False),
    ],
)
def test_skinny_linear_is_right_at_the_shapes_of_models(
    sizes: tuple[int, ...], depth: int, gated: bool, dtype: torch.dtype, device: torch.device
) -> None:
    weights = [torch.randn(size, depth, device=device, dtype=dtype) * depth**-0.5 for size in sizes]
    bound = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]
    for rows in (1, 2, 8, 16, 17, 32, 33, MAX_ROWS):
        x = torch.randn(rows, depth, device=device, dtype=dtype)
        parts = [F.linear(x.double(), weight.double()) for weight in weights]
        exact = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, dim=-1)
        assert relative_error(skinny_linear(x, weights, gated=gated), exact) < bound, rows


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 9])
def test_skinny_linear_addresses_more_than_2_to_the_31_elements(rows: int, device: torch.device) -> None:
    weight = torch.empty(2**20 + 7, 2048 + 16, device=device, dtype=torch.bfloat16).normal_()
    assert weight.numel() > 2**31
    x = torch.randn(rows, weight.shape[1], device=device, dtype=torch.bfloat16)
    out = skinny_linear(x, [weight])
    for part in (slice(0, 64), slice(-64, None)):
        assert relative_error(out[:, part], F.linear(x.double(), weight[part].double())) < 4e-3


@pytest.mark.gpu
def test_skinny_linear_runs_in_several_streams_at_once(device: torch.device) -> None:
    """No state is shared between calls: graphs replayed concurrently do not affect each other."""
    weight = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    xs = [torch.randn(rows, 2048, device=device, dtype=torch.bfloat16) for rows in (1, 8, 32, 64)]
    expected = [skinny_linear(x, [weight]) for x in xs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in xs], [[] for _ in xs]
    for _, (place, stream) in itertools.product(range(20), enumerate(streams)):
        with torch.cuda.stream(stream):
            found[place].append(skinny_linear(xs[place], [weight]))
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for outs, wanted in zip(found, expected, strict=True) for out in outs)


@pytest.mark.gpu
def test_skinny_linear_reads_weights_that_the_kernel_before_has_written(device: torch.device) -> None:
    """An overlapped launch starts early, but weights that it has prefetched may still change."""
    x = torch.randn(1, 2048, device=device, dtype=torch.bfloat16)
    versions = [torch.randn(8192, 2048, device=device, dtype=torch.bfloat16) for _ in range(2)]
    expected = [skinny_linear(x, [version]) for version in versions]
    torch.cuda.synchronize()
    weight, found = torch.empty_like(versions[0]), []
    for step in range(40):
        weight.copy_(versions[step % 2])
        found.append(skinny_linear(x, [weight]))
    assert all(torch.equal(out, expected[step % 2]) for step, out in enumerate(found))
