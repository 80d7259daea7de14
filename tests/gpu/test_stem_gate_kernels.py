"""The kernels of stem_gate: ids outside the table, rows that no token uses, very large tensors."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.errors import TokenIdError
from hf_efficient.kernels.stem_gate.api import stem_gate
from hf_efficient.kernels.stem_gate.configs import CHUNK
from hf_efficient.kernels.stem_gate.op import stem_gate_backward, stem_gate_backward_gate, stem_gate_forward


def test_stem_gate_reads_nothing_for_ids_outside_the_table(device: torch.device, poisoned: None) -> None:
    """The rows before and after the table hold NaN: reading one would show in the results."""
    width = 20
    around = torch.full((12, width), float("nan"), device=device)
    around[4:8] = torch.randn(4, width, device=device)
    table = around[4:8]
    ids = torch.tensor([0, -1, 3, 4, 2, -4, 7, 1], device=device)
    outside = (ids < 0) | (ids >= 4)
    gate = torch.randn(8, width, device=device)
    out = stem_gate_forward(gate, table, ids)
    dgate, dtable = stem_gate_backward(torch.ones_like(gate), gate, table, ids)
    dgate_alone = stem_gate_backward_gate(torch.ones_like(gate), gate, table, ids)
    for result in (out, dgate, dgate_alone):
        assert result[outside].eq(0).all()
        assert result[~outside].isfinite().all()
    torch.testing.assert_close(out[~outside], stem_gate(gate[~outside], table, ids[~outside], backend="reference"))
    torch.testing.assert_close(dtable, torch.nn.functional.silu(gate)[~outside][ids[~outside].argsort()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stem_gate_rows_of_absent_ids_have_a_gradient_of_exactly_zero(dtype: torch.dtype, device: torch.device) -> None:
    table = torch.randn(50, 33, device=device, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 25, (CHUNK + 9,), device=device) * 2
    gate = torch.randn(*ids.shape, 33, device=device, dtype=dtype)
    stem_gate(gate, table, ids, backend="triton").sum().backward()
    assert table.grad[1::2].eq(0).all()
    assert table.grad[ids.unique()].ne(0).any(dim=1).all()


def test_stem_gate_sums_many_small_gradients_of_one_row_in_float32(device: torch.device) -> None:
    """A sum of 3 x 64 + 1 ones and of as many 2^-10: in float16 the small ones would be rounded away."""
    count = 3 * CHUNK + 1
    table = torch.ones(2, 8, device=device, dtype=torch.float16, requires_grad=True)
    gate = torch.full((2 * count, 8), 30.0, device=device, dtype=torch.float16)  # sigmoid(30) is 1 in float32
    ids = torch.ones(2 * count, dtype=torch.long, device=device)
    upstream = torch.full_like(gate, 2.0**-5)
    upstream[1::2] = 2.0**-15
    (grad,) = torch.autograd.grad(stem_gate(gate, table, ids, backend="triton"), table, upstream)
    expected = torch.tensor(30.0 * count * (2.0**-5 + 2.0**-15), dtype=torch.float64).to(torch.float16)
    assert grad[1].eq(expected.to(device)).all()


def test_stem_gate_gives_one_result_for_any_grouping_of_the_leading_dimensions(device: torch.device) -> None:
    gate, table = torch.randn(4, 6, 16, device=device), torch.randn(9, 16, device=device)
    ids = torch.randint(0, 9, (4, 6), device=device)
    together = stem_gate(gate, table, ids, backend="triton")
    apart = torch.stack([stem_gate(g, table, i, backend="triton") for g, i in zip(gate, ids, strict=True)])
    assert torch.equal(together, apart)


@pytest.mark.gpu
def test_stem_gate_bfloat16_is_rounded_once(device: torch.device) -> None:
    """Within one unit in the last place of the exact result: computed in float32, rounded at the end."""
    gate = 4 * torch.randn(999, 512, device=device, dtype=torch.bfloat16)
    table = torch.randn(77, 512, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, 77, (999,), device=device)
    exact = stem_gate(gate.double(), table.double(), ids, backend="reference")
    found = stem_gate(gate, table, ids, backend="triton")
    steps = (found.view(torch.int16).int() - exact.to(torch.bfloat16).view(torch.int16).int()).abs()
    assert steps.max() <= 1
    assert steps.float().mean() < 0.01


@pytest.mark.gpu
def test_stem_gate_looks_for_wrong_ids_on_the_device_when_asked(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, table = torch.randn(3, 8, device=device), torch.randn(5, 8, device=device)
    ids = torch.tensor([0, 5, 1], device=device)
    assert stem_gate(gate, table, ids)[1].eq(0).all()
    monkeypatch.setenv("HFE_CHECK", "1")
    with pytest.raises(TokenIdError, match=r"5 at position \[1\]"):
        stem_gate(gate, table, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("large", ["table", "tokens"])
def test_stem_gate_addresses_more_than_2_to_the_31_elements(large: str, device: torch.device) -> None:
    width = 8192
    rows, tokens = (2**18 + 3, 64) if large == "table" else (5, 2**18 + 3)
    generator = torch.Generator(device).manual_seed(0)
    table = torch.empty(rows, width, device=device, dtype=torch.bfloat16).normal_(generator=generator).requires_grad_()
    gate = torch.empty(tokens, width, device=device, dtype=torch.bfloat16).normal_(generator=generator).requires_grad_()
    assert max(table.numel(), gate.numel()) > 2**31
    ids = torch.randint(0, rows, (tokens,), device=device, generator=generator)
    ids[-2:] = torch.tensor([rows - 1, 0], device=device)
    out = stem_gate(gate, table, ids, backend="triton")
    dgate, dtable = torch.autograd.grad(out, (gate, table), gate)

    last = slice(tokens - 64, tokens)
    part = gate.detach()[last].float().requires_grad_()
    expected = stem_gate(part, table.detach(), ids[last], backend="reference")
    torch.testing.assert_close(out[last].float(), expected, rtol=1e-2, atol=1e-3)
    (expected_dgate,) = torch.autograd.grad(expected, part, part.detach())
    torch.testing.assert_close(dgate[last].float(), expected_dgate, rtol=1e-2, atol=1e-3)
    mine = ids == rows - 1
    silu = torch.nn.functional.silu(gate.detach()[mine].float())
    expected_row = (silu * gate.detach()[mine].float()).sum(0, dtype=torch.float64)
    torch.testing.assert_close(dtable[-1].double(), expected_row, rtol=1e-2, atol=1e-3)
