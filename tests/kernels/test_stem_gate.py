"""stem_gate against the mathematics: oracles that share no code with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hf_efficient.kernels.stem_gate.api import stem_gate
from hf_efficient.kernels.stem_gate.record import RECORD


def _draw(tokens: int, rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    gate = torch.randn(tokens, width, dtype=dtype)
    return gate, torch.randn(rows, width, dtype=dtype), torch.randint(0, rows, (tokens,))


def test_it_is_the_formula_element_by_element() -> None:
    gate, table, ids = _draw(5, 4, 3)
    out = stem_gate(gate, table, ids)
    for t in range(5):
        for j in range(3):
            g = gate[t, j].item()
            assert out[t, j].item() == pytest.approx(g / (1 + math.exp(-g)) * table[ids[t], j].item(), rel=1e-14)


def test_its_gradients_are_the_formulas_element_by_element() -> None:
    gate, table, ids = _draw(7, 3, 2)
    gate.requires_grad_()
    table.requires_grad_()
    upstream = torch.randn(7, 2, dtype=torch.float64)
    dgate, dtable = torch.autograd.grad(stem_gate(gate, table, ids), (gate, table), upstream)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for t in range(7):
        for j in range(2):
            g, d = gate[t, j].item(), upstream[t, j].item()
            s = 1 / (1 + math.exp(-g))
            slope = s * (1 + g * (1 - s))
            assert dgate[t, j].item() == pytest.approx(d * table[ids[t], j].item() * slope, rel=1e-12)
            expected[ids[t], j] += d * g * s
    torch.testing.assert_close(dtable, expected, rtol=1e-12, atol=1e-14)


def test_a_stem_feed_forward_is_a_gated_one_whose_up_projection_reads_one_hot_ids() -> None:
    """Forward and every gradient, at the level of the whole feed-forward, in float64."""
    tokens, hidden, width, rows = 9, 6, 11, 5
    x = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    w_gate = torch.randn(width, hidden, dtype=torch.float64, requires_grad=True)
    w_down = torch.randn(hidden, width, dtype=torch.float64, requires_grad=True)
    table = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, rows, (tokens,))
    one_hot = F.one_hot(ids, rows).double()
    dense = (F.silu(x @ w_gate.T) * (one_hot @ table)) @ w_down.T
    stem = stem_gate(x @ w_gate.T, table, ids) @ w_down.T
    upstream = torch.randn_like(dense)
    torch.testing.assert_close(stem, dense, rtol=1e-12, atol=1e-12)
    leaves = (x, w_gate, w_down, table)
    expected = torch.autograd.grad(dense, leaves, upstream)
    for mine, theirs in zip(torch.autograd.grad(stem, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_in_float32_it_equals_the_unfused_modules_bit_for_bit() -> None:
    gate, table, ids = _draw(33, 7, 40, torch.float32)
    assert torch.equal(stem_gate(gate, table, ids), F.silu(gate) * F.embedding(ids, table))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    gate, table, ids = _draw(64, 9, 50, dtype)
    exact = stem_gate(gate.double(), table.double(), ids)
    error = (stem_gate(gate, table, ids).double() - exact).abs()
    # Half a unit in the last place of the result, and a little for the float32 in between.
    assert (error <= exact.abs() * torch.finfo(dtype).eps * 0.51 + torch.finfo(dtype).tiny).all()


def test_the_gradient_of_a_bfloat16_row_is_summed_in_float32() -> None:
    """4096 equal contributions: summed in bfloat16 they would stall at 256 of them."""
    table = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    gate = torch.full((4096, 4), 40.0, dtype=torch.bfloat16)
    ids = torch.ones(4096, dtype=torch.long)
    stem_gate(gate, table, ids).backward(torch.full_like(gate, 1 / 64))
    assert table.grad[1].tolist() == [40.0 * 4096 / 64] * 4
    assert table.grad[0].eq(0).all()


def test_rows_that_no_token_asks_for_have_a_gradient_of_exactly_zero() -> None:
    gate, table, _ = _draw(6, 10, 4, torch.float32)
    table.requires_grad_()
    stem_gate(gate, table, torch.tensor([1, 3, 3, 5, 7, 1])).sum().backward()
    assert table.grad[[0, 2, 4, 6, 8, 9]].eq(0).all()


def test_relabelling_the_ids_and_permuting_the_rows_changes_nothing() -> None:
    gate, table, ids = _draw(12, 8, 5, torch.float32)
    order = torch.randperm(8)
    assert torch.equal(stem_gate(gate, table[order], order.argsort()[ids]), stem_gate(gate, table, ids))


def test_a_table_in_another_dtype_leaves_the_result_in_the_dtype_of_the_gate() -> None:
    gate, table, ids = _draw(5, 4, 6, torch.float32)
    out = stem_gate(gate.bfloat16(), table.requires_grad_(), ids)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert table.grad.dtype is torch.float32


def test_the_byte_model_is_the_one_that_the_notes_state() -> None:
    arguments = {
        "gate": torch.empty(16, 32, dtype=torch.bfloat16),
        "table": torch.empty(100, 32, dtype=torch.bfloat16),
        "ids": torch.arange(16) // 4,
    }
    tokens, distinct, rows, row_bytes, id_bytes = 16, 4, 100, 32 * 2, 16 * 8
    assert RECORD.forward_cost(arguments).bytes == (2 * tokens + distinct) * row_bytes + id_bytes
    assert RECORD.backward_cost(arguments).bytes == (3 * tokens + distinct + rows) * row_bytes + id_bytes
