"""rotary_cache against the mathematics, and against the steps of a stock model that it replaces."""

from __future__ import annotations

import math

import pytest
import torch

from hf_efficient.kernels.rotary_cache.api import rotary_cache
from hf_efficient.kernels.rotary_cache.record import RECORD, draw

CPU = torch.device("cpu")


def test_a_pair_is_rotated_by_its_angle() -> None:
    """(x1, x2) as a point of the plane, element by element."""
    arguments = draw(CPU, torch.float32, width=6)
    q, cos, sin = arguments["q"], arguments["cos"], arguments["sin"]
    rotated = rotary_cache(**arguments)
    for b, t, h, i in ((0, 0, 0, 0), (1, 2, 4, 2), (0, 1, 3, 1)):
        x1, x2 = q[b, t, h, i].item(), q[b, t, h, i + 3].item()
        angle = math.atan2(sin[b, t, i], cos[b, t, i])
        turned = complex(x1, x2) * complex(math.cos(angle), math.sin(angle))
        assert rotated[b, h, t, i].item() == pytest.approx(turned.real, rel=1e-5, abs=1e-6)
        assert rotated[b, h, t, i + 3].item() == pytest.approx(turned.imag, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
def test_in_float32_it_is_what_a_stock_layer_does_with_a_static_cache(normalised: bool) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    arguments = draw(CPU, torch.float32, normalised=normalised)
    cache_position, length = torch.tensor([4, 5, 6]), torch.tensor(4)
    keys, values = arguments["key_cache"].clone(), arguments["value_cache"].clone()
    rotated = rotary_cache(**{**arguments, "cache_position": cache_position, "length": length})
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    if normalised:
        norm = Qwen3RMSNorm(14, arguments["eps"]).requires_grad_(False)
        norm.weight.copy_(arguments["q_weight"])
        q = norm(q)
        norm.weight.copy_(arguments["k_weight"])
        k = norm(k)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), arguments["cos"], arguments["sin"])
    keys[:, :, cache_position], values[:, :, cache_position] = k, v.transpose(1, 2)
    torch.testing.assert_close(rotated, q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(arguments["key_cache"], keys, rtol=1e-6, atol=1e-6)
    assert torch.equal(arguments["value_cache"], values)
    assert length.item() == 7


def test_a_token_outside_the_cache_is_written_nowhere() -> None:
    arguments = draw(CPU, torch.float32, cache_len=5)
    keys, values = arguments["key_cache"].clone(), arguments["value_cache"].clone()
    rotary_cache(**{**arguments, "cache_position": torch.tensor([-1, 2, 5])})
    untouched = [0, 1, 3, 4]
    assert torch.equal(arguments["key_cache"][:, :, untouched], keys[:, :, untouched])
    assert torch.equal(arguments["value_cache"][:, :, untouched], values[:, :, untouched])
    assert torch.equal(arguments["value_cache"][:, :, 2], arguments["v"][:, 1])


def test_each_sequence_may_have_its_own_cache_positions() -> None:
    arguments = draw(CPU, torch.float32)
    cache_position = torch.tensor([[0, 3, 1], [7, 2, 9]])
    rotary_cache(**{**arguments, "cache_position": cache_position})
    for b in range(2):
        assert torch.equal(arguments["value_cache"][b][:, cache_position[b]], arguments["v"][b].transpose(0, 1))


def test_a_growing_cache_gets_new_tensors() -> None:
    arguments = draw(CPU, torch.float32)
    fixed = {**arguments, "cache_position": torch.tensor([8, 9, 10])}
    rotary_cache(**fixed)
    new = [torch.empty(2, 3, 3, 14) for _ in range(2)]
    rotary_cache(**{**arguments, "key_cache": new[0], "value_cache": new[1], "cache_position": None, "length": None})
    assert torch.equal(new[0], arguments["key_cache"][:, :, 8:])
    assert torch.equal(new[1], arguments["value_cache"][:, :, 8:])


def test_half_precision_is_rounded_once() -> None:
    arguments = draw(CPU, torch.bfloat16, width=64)
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    exact = RECORD.reference(**wide)
    found = rotary_cache(**arguments)
    steps = (found.contiguous().view(torch.int16).int() - exact.bfloat16().contiguous().view(torch.int16).int()).abs()
    assert (steps > 0).float().mean() < 0.01 and steps[exact.abs() > 0.05].max() <= 1


def test_its_schema_declares_the_mutated_arguments() -> None:
    """A compiler that took the operator for a pure function could drop or reorder it."""
    from hf_efficient.kernels.rotary_cache.op import rotary_cache_write

    written = {argument.name for argument in rotary_cache_write._schema.arguments if argument.alias_info is not None}
    assert written == {"key_cache", "value_cache", "length"} == set(RECORD.mutates)


def test_the_byte_model_is_the_one_that_the_notes_state() -> None:
    arguments = draw(CPU, torch.bfloat16, batch=1, queries=1, heads=(4, 2), width=8)
    assert RECORD.forward_cost(arguments).bytes == 2 * (2 * (4 + 2 + 2) * 8 + 2 * 8)
    assert RECORD.forward_cost({**arguments, "value_cache": None}).bytes == 2 * (2 * (4 + 2) * 8 + 2 * 8)
