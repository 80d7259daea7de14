"""bhyt_norm against the mathematics, element by element, and its bounds."""

from __future__ import annotations

import math

import pytest
import torch

from hf_efficient.kernels.bhyt_norm.api import bhyt_norm
from hf_efficient.kernels.bhyt_norm.configs import MAX_WIDTH, backward_config, forward_config
from hf_efficient.kernels.bhyt_norm.record import RECORD

KAPPA = 10.0


def _bound(value: float) -> torch.Tensor:
    return torch.tensor([value])


def test_it_is_the_formula_element_by_element() -> None:
    x, residual, weight = torch.randn(2, 5), torch.randn(2, 5), torch.randn(5)
    scale = torch.tensor([3.0])
    normed, summed, v = bhyt_norm(x, weight, _bound(7.0), 0.25, residual=residual, out_scale=scale)
    for r in range(2):
        row = [x[r, i].item() + residual[r, i].item() for i in range(5)]
        mean_square = sum(value * value for value in row) / 5
        assert v[r].item() == pytest.approx(mean_square, rel=1e-6)
        assert summed[r].tolist() == pytest.approx(row, rel=1e-6, abs=1e-7)
        wanted = [
            3.0 * w * math.tanh(0.7 * value / math.sqrt(mean_square + 0.25))
            for value, w in zip(row, weight.tolist(), strict=True)
        ]
        assert normed[r].tolist() == pytest.approx(wanted, rel=1e-5)


def test_an_estimated_site_takes_a_line_of_the_given_mean_square_and_never_too_little() -> None:
    x, v = torch.randn(3, 4), torch.tensor([0.5, 1.0, 2.0])
    for slope, offset, used in ((1.5, 0.25, [1.0, 1.75, 3.25]), (1.0, -1.5, [0.0005, 0.001, 0.5])):
        affine = torch.tensor([slope, offset])
        normed, _, returned = bhyt_norm(x, torch.ones(4), _bound(2.0), 1e-6, variance=v, affine=affine)
        assert returned is v
        wanted = torch.tanh(0.2 * x / (torch.tensor(used) + 1e-6).sqrt()[:, None])
        torch.testing.assert_close(normed, wanted)


def test_what_is_true_of_every_row() -> None:
    """Markov: at most D / kappa^2 channels pass the bound; the mean square of tanh is at most (bound / kappa)^2."""
    weight = torch.rand(400) + 0.5
    for x in (torch.randn(50, 400), torch.randn(50, 400) ** 5, torch.eye(50, 400) * 1e6):
        for bound in (1.0, 3.0):
            normed, _, v = bhyt_norm(x, weight, _bound(bound), 1e-6)
            u = bound / KAPPA * x / (v + 1e-6).sqrt()[:, None]
            assert ((u.abs() > bound).sum(1) <= 400 / KAPPA**2).all()
            assert ((normed / weight).square().mean(1) <= (bound / KAPPA) ** 2 * (1 + 1e-5)).all()
            assert (normed.abs() <= weight).all()


def test_powers_of_two_and_signs_pass_through_an_exact_site() -> None:
    x, weight = torch.randn(4, 32), torch.randn(32)
    once = bhyt_norm(x, weight, _bound(2.0), 1e-12)[0]
    torch.testing.assert_close(bhyt_norm(1024 * x, weight, _bound(2.0), 1e-12)[0], once, rtol=1e-5, atol=1e-7)
    assert torch.equal(bhyt_norm(-x, weight, _bound(2.0), 1e-12)[0], -once)


def test_half_precision_rows_do_not_overflow_to_zero() -> None:
    """One channel of 300 squares to more than float16 holds: the released code gives a row of zeros."""
    x = torch.ones(1, 2000, dtype=torch.float16)
    x[0, 0] = 300
    normed, _, v = bhyt_norm(x, torch.ones(2000, dtype=torch.float16), _bound(1.0).half(), 1e-6)
    assert v.item() == pytest.approx((300**2 + 1999) / 2000, rel=1e-4)
    assert normed[0, 1].item() == pytest.approx(math.tanh(0.1 / math.sqrt(v.item())), rel=1e-3)


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    broken = x.detach().clone()
    broken[1, 2] = float("nan")
    broken.requires_grad_()
    for rows in (x, broken):
        bhyt_norm(rows, torch.ones(8), _bound(2.0), 1e-6)[0].sum().backward()
    others = [0, 2]
    assert torch.equal(x.grad[others], broken.grad[others])
    assert bhyt_norm(broken, torch.ones(8), _bound(2.0), 1e-6)[0][1].isnan().all()


def test_the_mean_square_passes_its_gradient_on() -> None:
    """A site that used it as a constant would be wrong."""
    x = torch.randn(3, 8, requires_grad=True)
    _, summed, v = bhyt_norm(x, torch.ones(8), _bound(2.0), 1e-6)
    branch = torch.randn(3, 8)
    second = bhyt_norm(branch, torch.ones(8), _bound(2.0), 1e-6, residual=summed, variance=v)[0]
    through = torch.autograd.grad(second.sum(), x, retain_graph=True)[0]
    held = bhyt_norm(branch, torch.ones(8), _bound(2.0), 1e-6, residual=summed, variance=v.detach())[0]
    assert not torch.allclose(through, torch.autograd.grad(held.sum(), x)[0])


def test_every_width_has_configurations() -> None:
    for width in (1, 31, 64, 576, 4096, MAX_WIDTH):
        for rows in (1, 64, 100_000):
            for element in (2, 4, 8):
                row_bytes = 3 * element * width
                backward = backward_config(rows, width, row_bytes)
                for config in (forward_config(rows, width, True), backward):
                    assert config.block_width >= width
                    assert config.num_warps & (config.num_warps - 1) == 0
                # The rows on their way fit the shared memory of every device.
                tile = backward.block_rows * row_bytes * backward.block_width // width
                assert (backward.num_stages - 1) * tile <= 96 * 1024
            assert forward_config(rows, width, False).block_width <= 4096


def test_the_widths_of_common_models_read_ahead() -> None:
    for width, stages, programs in ((2048, 4, 2), (4096, 4, 1), (8192, 3, 1)):
        config = backward_config(16384, width, 6 * width)
        assert (config.num_stages, config.programs, config.num_warps) == (stages, programs, width // 512)


def test_the_byte_model_is_the_one_that_the_notes_state() -> None:
    x = torch.empty(4, 32, dtype=torch.bfloat16)
    call = {"x": x, "weight": x[0], "residual": x}
    assert RECORD.forward_cost(call).bytes == 8 * 4 * 32 + 4 * 4 + 2 * 32
    assert RECORD.forward_cost({**call, "residual": None}).bytes == 4 * 4 * 32 + 4 * 4 + 2 * 32
    assert RECORD.backward_cost(call).bytes == 8 * 4 * 32 + 4 * 4 + 4 * 32
