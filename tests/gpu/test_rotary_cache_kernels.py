"""The kernel of rotary_cache: cache slots that it must not write, and very large caches."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.kernels.rotary_cache.api import rotary_cache
from hf_efficient.kernels.rotary_cache.record import draw


def test_rotary_cache_writes_its_slots_and_no_others(device: torch.device) -> None:
    """The caches are the middle of larger tensors, and some positions lie outside: the surroundings are unchanged."""
    arguments = draw(device, torch.float32, queries=4, cache_len=6)
    around = torch.full((2, 4, 5, 10, 18), 7.0, device=device)
    keys, values = (each[1:3, 1:4, 2:8, 2:16] for each in around)
    cache_position = torch.tensor([-1, 0, 5, 6], device=device)
    rotary_cache(
        **{**arguments, "key_cache": keys, "value_cache": values, "cache_position": cache_position}, backend="triton"
    )
    for cache in (keys, values):
        assert cache[:, :, [0, 5]].ne(7.0).all()
        cache[:, :, [0, 5]] = 7.0
    assert around.eq(7.0).all()


def test_rotary_cache_sets_the_length_from_the_last_token(device: torch.device) -> None:
    arguments = draw(device, torch.float32, queries=2)
    for cache_position, expected in (([[3, 4]], 5), ([[9, 2], [1, 7]], 8), ([0, 30], 31)):
        given = {**arguments, "cache_position": torch.tensor(cache_position, device=device)}
        rotary_cache(**given, backend="triton")
        assert arguments["length"].item() == expected
    rotary_cache(**{**arguments, "cache_position": None}, backend="triton")
    assert arguments["length"].item() == 2


def test_rotary_cache_normalises_each_head_by_itself(device: torch.device) -> None:
    arguments = draw(device, torch.float32, normalised=True)
    expected = rotary_cache(**arguments, backend="triton")
    arguments["q"][:, :, 3] *= 64.0
    scaled = rotary_cache(**{**arguments, "eps": 1e-9}, backend="triton")
    torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_rotary_cache_addresses_caches_of_more_than_2_to_the_31_elements(device: torch.device) -> None:
    small = draw(device, torch.bfloat16, batch=2, queries=1, heads=(8, 8), width=128, cache_len=3)
    capacity = 2**20 + 5
    keys, values = torch.zeros(2, 2, 8, capacity, 128, device=device, dtype=torch.bfloat16)
    assert keys.numel() > 2**31
    last = torch.tensor([capacity - 1], device=device)
    rotary_cache(**{**small, "key_cache": keys, "value_cache": values, "cache_position": last})
    rotary_cache(**{**small, "cache_position": torch.tensor([2], device=device)}, backend="reference")
    torch.testing.assert_close(keys[:, :, -1], small["key_cache"][:, :, 2])
    assert torch.equal(values[:, :, -1], small["value_cache"][:, :, 2])
    assert keys[:, :, :-1].eq(0).all()
