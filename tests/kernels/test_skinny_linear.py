"""skinny_linear against the mathematics, and the table of its launch configurations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from hf_efficient.errors import HFEError
from hf_efficient.kernels.skinny_linear.api import skinny_linear
from hf_efficient.kernels.skinny_linear.configs import (
    MAX_ROWS,
    ROW_CLASSES,
    k_per_split,
    launch_config,
    row_class,
    shared_memory,
)
from hf_efficient.kernels.skinny_linear.record import RECORD


def test_every_element_is_a_sum_of_products() -> None:
    x, weights = torch.randn(2, 3), [torch.randn(2, 3), torch.randn(1, 3)]
    biases, residual = [None, torch.randn(1)], torch.randn(2, 3)
    out = skinny_linear(x, weights, biases, residual=residual)
    for r, (i, j) in itertools.product(range(2), enumerate([(0, 0), (0, 1), (1, 0)])):
        matrix, row = j
        expected = sum(x[r, k].item() * weights[matrix][row, k].item() for k in range(3)) + residual[r, i].item()
        expected += biases[matrix][row].item() if biases[matrix] is not None else 0.0
        assert out[r, i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_gated_pair_is_silu_of_the_first_times_the_second() -> None:
    x, gate, up = torch.randn(1, 4), torch.randn(2, 4), torch.randn(2, 4)
    out = skinny_linear(x, [gate, up], gated=True)
    for j in range(2):
        g, u = (x[0].double() @ gate[j].double()).item(), (x[0].double() @ up[j].double()).item()
        assert out[0, j].item() == pytest.approx(g / (1 + math.exp(-g)) * u, rel=1e-5)


def test_in_float32_it_is_the_modules_bit_for_bit() -> None:
    """The reference in float32 runs the same functions as the modules, so that a model may mix both."""
    x, linear = torch.randn(3, 5, 8), torch.nn.Linear(8, 6)
    with torch.no_grad():
        assert torch.equal(skinny_linear(x, [linear.weight], [linear.bias]), linear(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """The residual is added before the rounding, and the gate is not rounded before its product."""
    x, gate, up = (torch.randn(*shape).to(dtype) for shape in ((4, 40), (16, 40), (16, 40)))
    residual = 8 * torch.randn(4, 16).to(dtype)
    exact = F.linear(x.double(), gate.double()) + residual.double()
    exact_gated = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
    for found, wanted in (
        (skinny_linear(x, [gate], residual=residual), exact),
        (skinny_linear(x, [gate, up], gated=True), exact_gated),
    ):
        error = (found.double() - wanted).abs()
        # Half a unit in the last place of the result, and a little for the float32 in between.
        assert (error <= wanted.abs() * torch.finfo(dtype).eps * 0.51 + 1e-5).all()


def test_the_number_of_rows_is_that_of_all_leading_dimensions() -> None:
    weight = torch.randn(3, 4)
    assert skinny_linear(torch.randn(8, 8, 4), [weight]).shape == (8, 8, 3)
    with pytest.raises(HFEError, match="72 rows"):
        skinny_linear(torch.randn(8, 9, 4), [weight])


def test_a_weight_may_be_a_parameter_where_no_gradient_is_wanted() -> None:
    x, weight = torch.randn(2, 4), torch.nn.Parameter(torch.randn(3, 4))
    with pytest.raises(HFEError, match=r"`weights\[0\]` requires a gradient"):
        skinny_linear(x, [weight])
    with torch.inference_mode():
        assert not skinny_linear(x, [weight]).requires_grad


def test_every_number_of_rows_has_a_class_that_holds_it() -> None:
    for rows in range(1, MAX_ROWS + 1):
        assert rows <= row_class(rows) < max(2 * rows, 17)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
def test_every_shape_has_a_configuration_that_fits(capability: tuple[int, int]) -> None:
    limit = 99 * 1024 if capability < (9, 0) else 227 * 1024
    shapes = itertools.product(ROW_CLASSES, (1, 576, 8192, 128256), (1, 37, 576, 2048, 28672), (2, 4), (False, True))
    for rows, outputs, depth, size, gated in shapes:
        config = launch_config(rows, outputs, depth, size, gated, capability)
        for number in (config.block_n, config.block_k, config.num_warps):
            assert number & (number - 1) == 0 and number > 0
        if rows > 1:
            assert config.block_n >= 16 and config.block_k >= 16, "the tensor cores take no less"
            assert shared_memory(config, rows, 1 + gated, size) <= limit


def test_small_weights_still_occupy_the_device() -> None:
    """A weight of 2048 rows makes at least 128 programs; an H100 has 132 multiprocessors."""
    for rows, depth in itertools.product(ROW_CLASSES, (2048, 8192)):
        config = launch_config(rows, 2048, depth, 2, False, (9, 0))
        assert 2048 // config.block_n * config.splits >= 128


def test_only_deep_weights_are_cut_and_into_whole_tiles() -> None:
    """Split-K costs a launch: K = 2048 is too short for it, and one row or a gated pair is never split."""
    for rows, outputs, depth in itertools.product(ROW_CLASSES, (64, 2048, 5120, 49152), (576, 2048, 8192, 14336)):
        for gated in (False, True):
            config = launch_config(rows, outputs, depth, 2, gated, (9, 0))
            split_len = k_per_split(config, depth)
            assert split_len % config.block_k == 0 and split_len * config.splits >= depth
            if rows == 1 or gated or depth == 2048:
                assert config.splits == 1
            assert config.splits == 1 or split_len >= 2048
    assert launch_config(32, 2048, 8192, 2, False, (9, 0)).splits == 4


def test_the_byte_model_is_the_one_that_the_notes_state() -> None:
    x, gate, up = torch.empty(8, 32), torch.empty(16, 32), torch.empty(16, 32)
    arguments = {"x": x, "weights": [gate, up], "biases": [None, torch.empty(16)], "residual": None, "gated": True}
    assert RECORD.forward_cost(arguments).bytes == 4 * (2 * 16 * 32 + 8 * 32 + 16 + 8 * 16)
    assert RECORD.forward_cost(arguments).flops == 2 * 8 * 32 * 32
    side = {**arguments, "gated": False, "residual": torch.empty(8, 32)}
    assert RECORD.forward_cost(side).bytes == 4 * (2 * 16 * 32 + 8 * 32 + 16 + 8 * 32 + 8 * 32)
