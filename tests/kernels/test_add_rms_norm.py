"""add_rms_norm against the mathematics, and against the decoder modules that it replaces."""

from __future__ import annotations

import math

import pytest
import torch

from hf_efficient.kernels.add_rms_norm.api import add_rms_norm
from hf_efficient.kernels.add_rms_norm.configs import MAX_WIDTH, launch_config
from hf_efficient.kernels.add_rms_norm.record import RECORD


def test_it_is_the_formula_element_by_element() -> None:
    x, residual, weight = torch.randn(2, 5), torch.randn(2, 5), torch.randn(5)
    normed, summed = add_rms_norm(x, weight, 0.25, residual)
    for r in range(2):
        row = [x[r, i].item() + residual[r, i].item() for i in range(5)]
        scale = 1 / math.sqrt(sum(v * v for v in row) / 5 + 0.25)
        assert summed[r].tolist() == pytest.approx(row, rel=1e-6, abs=1e-7)
        wanted = [v * scale * w for v, w in zip(row, weight.tolist(), strict=True)]
        assert normed[r].tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_rounds_where_the_stock_module_rounds(dtype: torch.dtype) -> None:
    """Bit for bit the addition and the norm of a stock Llama layer."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(48, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        x, residual = torch.randn(7, 48).to(dtype), torch.randn(7, 48).to(dtype)
        normed, summed = add_rms_norm(x, norm.weight, norm.variance_epsilon, residual)
        assert torch.equal(summed, x + residual)
        assert torch.equal(normed, norm(x + residual))


def test_without_a_residual_the_sum_is_the_input_itself() -> None:
    x = torch.randn(3, 8)
    normed, summed = add_rms_norm(x, torch.ones(8), 1e-6)
    assert summed is x
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3), rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_stays_zero() -> None:
    normed, _ = add_rms_norm(torch.zeros(2, 16), torch.ones(16), 1e-6)
    assert normed.eq(0).all()


def test_scaling_the_input_changes_nothing_but_the_sum() -> None:
    x, weight = torch.randn(4, 32), torch.randn(32)
    torch.testing.assert_close(add_rms_norm(8 * x, weight, 0.0)[0], add_rms_norm(x, weight, 0.0)[0])


def test_every_width_has_a_configuration() -> None:
    for width in (1, 31, 64, 576, 4096, 16384, 16385, MAX_WIDTH):
        for rows in (1, 64, 100_000):
            config = launch_config(rows, width)
            assert config.block_rows * config.block_width <= 16384, "a tile stays in registers"
            assert 1 <= config.num_warps <= 16 and config.num_warps & (config.num_warps - 1) == 0


def test_the_byte_model_is_the_one_that_the_notes_state() -> None:
    x, weight = torch.empty(4, 32, dtype=torch.bfloat16), torch.empty(32, dtype=torch.bfloat16)
    alone = {"x": x, "weight": weight, "eps": 0.0, "residual": None}
    assert RECORD.forward_cost(alone).bytes == 2 * (2 * 4 * 32 + 32)
    assert RECORD.forward_cost({**alone, "residual": x}).bytes == 2 * (4 * 4 * 32 + 32)
