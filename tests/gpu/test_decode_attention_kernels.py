"""The kernels of decode_attention: what they must not read, splitting, growing caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_efficient.kernels.contract import relative_error
from hf_efficient.kernels.decode_attention.api import decode_attention

NAN = float("nan")


def _draw(device: torch.device, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for the sizes batch, heads, kv_heads, queries, slots, head_dim."""
    batch, heads, kv_heads, queries, slots, head_dim = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)

    cache = (batch, kv_heads, slots, head_dim)
    return normal(batch, heads, queries, head_dim), normal(*cache), normal(*cache)


def _launch(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, q_pos: Tensor, splits: int) -> Tensor:
    """[B, Q, Hq, D], computed in `splits` splits."""
    from hf_efficient.kernels.decode_attention.triton_kernels import launch

    return launch(q, k, v, kv_len, q_pos, None, None, k.shape[2], None, q.shape[3] ** -0.5, splits=splits)


def test_decode_attention_reads_only_visible_slots(device: torch.device, poisoned: None) -> None:
    """Slots past the length, before the window and after the last query hold NaN, and so does the memory around."""
    q, k, v = _draw(device, torch.float32, 2, 4, 2, 2, 80, 24)
    kv_len = torch.tensor([70, 9], device=device)
    q_pos = torch.tensor([[65, 60], [30, -1]], device=device)
    expected = decode_attention(q, k, v, kv_len, q_pos, 20, backend="reference")
    around = [torch.full((4, 4, 100, 24), NAN, device=device) for _ in range(2)]
    views = [whole[1:3, 1:3, 10:90] for whole in around]
    for view, clean in zip(views, (k, v), strict=True):
        view[0, :, 41:66] = clean[0, :, 41:66]
        view[1, :, :9] = clean[1, :, :9]
        view[1, :, 9:] = NAN
    # The second row's first query lies past the end of its cache, and its window covers no filled slot.
    views[0][1, :, :9] = views[1][1, :, :9] = NAN
    out = decode_attention(q, *views, kv_len, q_pos, 20, backend="triton")
    assert out[1].eq(0).all()
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_in_holes_does_not_reach_the_output_of_decode_attention(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = _draw(device, dtype, 1, 4, 2, 1, 150, 16)
    kv_segment_ids = torch.zeros(1, 150, dtype=torch.int32, device=device)
    kv_segment_ids[:, :70] = kv_segment_ids[:, 100:103] = -1
    q_pos = torch.tensor([[149]], device=device)
    clean = decode_attention(q, k, v, 150, q_pos, kv_segment_ids=kv_segment_ids, backend="triton")
    holes = (kv_segment_ids < 0)[0]
    k[:, :, holes] = v[:, :, holes] = NAN
    assert torch.equal(decode_attention(q, k, v, 150, q_pos, kv_segment_ids=kv_segment_ids, backend="triton"), clean)


def test_decode_attention_is_the_same_in_any_number_of_splits(device: torch.device, poisoned: None) -> None:
    """Also in more splits than there are blocks, of which some are empty."""
    q, k, v = _draw(device, torch.float32, 2, 2, 1, 2, 200, 16)
    kv_len = torch.tensor([193, 3], device=device)
    q_pos = torch.tensor([[192, 100], [2, -1]], device=device)
    expected = decode_attention(q, k, v, kv_len, q_pos, backend="reference").transpose(1, 2)
    for splits in (1, 2, 3, 7, 70):
        assert relative_error(_launch(q, k, v, kv_len, q_pos, splits), expected) < 1e-5, splits


def test_decode_attention_does_not_depend_on_the_capacity(device: torch.device) -> None:
    """Bit for bit, for one number of splits: they divide the filled slots, not the capacity."""
    q, k, v = _draw(device, torch.float32, 1, 2, 1, 1, 100, 16)
    larger = [torch.cat([x, torch.full_like(x, NAN)], dim=2) for x in (k, v)]
    kv_len = torch.tensor([100], device=device)
    q_pos = torch.tensor([[99]], device=device)
    assert torch.equal(_launch(q, k, v, kv_len, q_pos, 3), _launch(q, *larger, kv_len, q_pos, 3))


def test_decode_attention_keeps_large_scores_apart(device: torch.device) -> None:
    """Scores of ±1000 in different splits: no exponential overflows, and the small ones vanish."""
    q = torch.full((1, 1, 1, 16), 10.0, device=device)
    k = torch.full((1, 1, 200, 16), -25.0, device=device)
    k[:, :, 77] = 25.0
    v = torch.randn(1, 1, 200, 16, device=device)
    out = decode_attention(q, k, v, 200, torch.tensor([[199]], device=device), backend="triton")
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 77], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "group", "queries"), [(64, 4, 1), (128, 7, 1), (80, 3, 5), (256, 8, 16), (64, 4, 64)]
)
def test_decode_attention_at_the_sizes_of_models(
    dtype: torch.dtype, head_dim: int, group: int, queries: int, device: torch.device
) -> None:
    q, k, v = _draw(device, dtype, 3, 2 * group, 2, queries, 2500, head_dim)
    kv_len = torch.tensor([2500, 1, 1313], device=device)
    q_pos = kv_len[:, None] - torch.arange(queries, device=device)[None, :] - 1
    expected = decode_attention(q.double(), k.double(), v.double(), kv_len, q_pos, backend="reference")
    found = decode_attention(q, k, v, kv_len, q_pos)
    bound = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 3e-6}[dtype]
    assert relative_error(found, expected) < bound


@pytest.mark.gpu
def test_decode_attention_follows_a_growing_cache_through_a_captured_graph(device: torch.device) -> None:
    """One capture serves every length: each replay equals the same call made directly, bit for bit."""
    q, k, v = _draw(device, torch.bfloat16, 2, 8, 2, 1, 4096, 64)
    kv_len = torch.tensor([5, 1], device=device)
    q_pos = torch.tensor([[4], [0]], device=device)
    decode_attention(q, k, v, kv_len, q_pos)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, kv_len, q_pos)
    for lengths in ((5, 1), (6, 64), (63, 65), (4096, 0), (1000, 4095)):
        kv_len.copy_(torch.tensor(lengths))
        q_pos.copy_(kv_len[:, None] - 1)
        q.normal_()
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, kv_len, q_pos))
        expected = decode_attention(q.double(), k.double(), v.double(), kv_len, q_pos, backend="reference")
        assert relative_error(out, expected) < 4e-3


@pytest.mark.gpu
def test_decode_attention_on_two_streams_concurrently(device: torch.device) -> None:
    """Calls share no state, so concurrent ones do not change each other."""
    calls = []
    for length in (4000, 8192):
        q, k, v = _draw(device, torch.bfloat16, 1, 8, 2, 1, length, 64)
        q_pos = torch.tensor([[length - 1]], device=device)
        calls.append((q, k, v, torch.tensor([length], device=device), q_pos))
    expected = [decode_attention(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, call, found in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(decode_attention(*call))
    torch.cuda.synchronize()
    for wanted, found in zip(expected, results, strict=True):
        assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["heads first", "slots first"])
def test_decode_attention_addresses_more_than_2_to_the_31_elements(layout: str, device: torch.device) -> None:
    """The last slots of a cache of 2^31 + 2^17 elements, under a window that leaves few to compare."""
    slots, kv_heads, head_dim, window = 2**21 + 2**7, 8, 128, 300
    shape = (1, kv_heads, slots, head_dim) if layout == "heads first" else (1, slots, kv_heads, head_dim)
    k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    if layout == "slots first":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    assert k.numel() > 2**31
    q = torch.randn(1, 16, 1, head_dim, dtype=torch.bfloat16, device=device)
    out = decode_attention(q, k, v, slots, torch.tensor([[slots - 1]], device=device), window)
    last = [x[:, :, -window:].double() for x in (k, v)]
    q_pos = torch.tensor([[window - 1]], device=device)
    assert relative_error(out, decode_attention(q.double(), *last, window, q_pos, backend="reference")) < 4e-3


@pytest.mark.gpu
def test_decode_attention_does_not_recompile_as_a_cache_grows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    compiled: list[str] = []

    def note(*, repr: str, **_: object) -> bool:
        compiled.append(repr)
        return False

    q, k, v = _draw(device, torch.bfloat16, 1, 8, 2, 1, 1100, 64)
    kv_segment_ids = torch.zeros(1, 1100, dtype=torch.int32, device=device)

    def attend(length: int) -> None:
        grown = [x[:, :, :length].contiguous() for x in (k, v)]
        q_pos = torch.tensor([[length - 1]], device=device)
        decode_attention(q, *grown, length, q_pos, kv_segment_ids=kv_segment_ids[:, :length].contiguous())

    attend(10)  # one split
    attend(200)  # several splits
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    for length in (11, 64, 65, 129, 333, 512, 1024, 1025, 1100):
        attend(length)
    assert not compiled, compiled
