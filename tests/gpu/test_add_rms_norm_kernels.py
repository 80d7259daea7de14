"""The kernel of add_rms_norm: the modules' rounding, shapes of models, very many rows."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.kernels.add_rms_norm.api import add_rms_norm


def _steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance of a and b in units in the last place of half precision, for equal signs."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


@pytest.mark.parametrize("width", [64, 20_000])
def test_add_rms_norm_rounds_where_the_reference_rounds(width: int, device: torch.device) -> None:
    """Equal except in the last place, where the order of a sum can change the rounding."""
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    x, residual = torch.randn(2, 5, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    normed, summed = add_rms_norm(x, weight, 1e-5, residual, backend="triton")
    expected, expected_sum = add_rms_norm(x, weight, 1e-5, residual, backend="reference")
    assert torch.equal(summed, expected_sum)
    steps = _steps(normed, expected)
    assert steps.max() <= 2 and (steps > 0).float().mean() < 0.01


def test_add_rms_norm_leaves_a_row_to_itself(device: torch.device) -> None:
    """NaN in one row does not reach another: rows share tiles, not sums."""
    x, weight = torch.randn(1030, 24, device=device), torch.randn(24, device=device)
    expected, _ = add_rms_norm(x, weight, 1e-5, backend="triton")
    x[17] = float("nan")
    normed, _ = add_rms_norm(x, weight, 1e-5, backend="triton")
    others = torch.arange(1030, device=device) != 17
    assert torch.equal(normed[others], expected[others])
    assert normed[17].isnan().all()


@pytest.mark.gpu
def test_add_rms_norm_addresses_more_than_2_to_the_31_elements(device: torch.device) -> None:
    x = torch.empty(2**19 + 3, 4096, device=device, dtype=torch.bfloat16).normal_()
    assert x.numel() > 2**31
    weight = torch.randn(4096, device=device, dtype=torch.bfloat16)
    normed, summed = add_rms_norm(x, weight, 1e-5, x)
    for rows in (slice(0, 8), slice(-8, None)):
        expected, expected_sum = add_rms_norm(x[rows], weight, 1e-5, x[rows], backend="reference")
        assert torch.equal(summed[rows], expected_sum)
        assert _steps(normed[rows], expected).max() <= 2
