"""The record of rotary_cache for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.rotary_cache.api import rotary_cache
from hf_efficient.kernels.rotary_cache.configs import DECODE_TOKENS, launch_config
from hf_efficient.kernels.rotary_cache.op import rotary_cache_write
from hf_efficient.kernels.rotary_cache.reference import rotary_cache as reference_rotary_cache


def draw(
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 2,
    queries: int = 3,
    heads: tuple[int, int] = (5, 3),
    width: int = 14,
    cache_len: int = 11,
    normalised: bool = False,
) -> Arguments:
    """One call on a packed projection and filled caches."""
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q_heads, kv_heads = heads
    packed = drawn(batch, queries, (q_heads + 2 * kv_heads) * width).unflatten(-1, (-1, width))
    angles = torch.rand(batch, queries, width // 2, generator=generator).repeat(1, 1, 2) * 6.28
    return {
        "q": packed[:, :, :q_heads],
        "k": packed[:, :, q_heads : q_heads + kv_heads],
        "v": packed[:, :, q_heads + kv_heads :],
        "cos": angles.cos().to(device, dtype),
        "sin": angles.sin().to(device, dtype),
        "key_cache": drawn(batch, kv_heads, cache_len, width),
        "value_cache": drawn(batch, kv_heads, cache_len, width),
        "cache_position": torch.randperm(cache_len, generator=generator)[:queries].to(device),
        "q_weight": drawn(width) if normalised else None,
        "k_weight": drawn(width) if normalised else None,
        "eps": 1e-5,
        "length": torch.tensor(4, device=device),
    }


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernel."""

    def drawn(**sizes: Any) -> Arguments:
        return draw(device, dtype, **sizes)

    base = drawn()
    some, rows = torch.tensor([9, -1, 11], device=device), torch.tensor([[3, 1, 2], [-5, 10, 0]], device=device)
    wide = drawn(width=28)
    cases = {
        "prime sizes": drawn(heads=(7, 3), queries=5, normalised=True),
        "no normalisation": base,
        "one token, heads of 64": drawn(batch=1, queries=1, heads=(8, 4), width=64),
        "heads of 80": drawn(batch=3, queries=1, heads=(2, 1), width=80, normalised=True),
        "heads of 2": drawn(width=2),
        "positions outside the cache": {**base, "cache_position": some},
        "positions of each sequence": {**base, "cache_position": rows},
        "positions in one row": {**base, "cache_position": some[None]},
        "int32 positions": {**base, "cache_position": rows.int(), "length": base["length"].int()},
        "strided positions": {**base, "cache_position": rows.t().contiguous().t()},
        "no positions": {**base, "cache_position": None},
        "no length": {**base, "length": None},
        "no cache": {**base, "key_cache": None, "value_cache": None},
        "keys only": {**base, "value_cache": None},
        "values only": {**base, "key_cache": None},
        "only q normalised": {**base, "q_weight": base["cos"][0, 0]},
        "only k normalised": {**base, "k_weight": base["cos"][0, 0]},
        "no token": drawn(queries=0),
        "one cos for all": {**base, "cos": base["cos"][:1], "sin": base["sin"][:1]},
        "cos and sin laid out apart": {**base, "cos": wide["cos"][..., ::2], "sin": base["sin"]},
        "more tokens than a decoding step": drawn(
            batch=1, queries=DECODE_TOKENS + 1, heads=(2, 1), width=8, cache_len=DECODE_TOKENS + 3
        ),
        "caches apart in memory": {
            **base,
            "key_cache": wide["key_cache"][..., 14:],
            "value_cache": wide["value_cache"].transpose(1, 2).contiguous().transpose(1, 2)[..., :14],
        },
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    good = draw(device, torch.float32, width=8)

    def bad(label: str, *words: str, error: type[Exception] = HFEError, **changes: Any) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    q, k, cos, cache, cache_position = (good[name] for name in ("q", "k", "cos", "key_cache", "cache_position"))
    return [
        bad("no k", "`k`", "NoneType", k=None),
        bad("q of integers", "`q`", "int64", "bfloat16", q=q.long()),
        bad("q in double precision", "`q`", "float64", "bfloat16", q=q.double()),
        bad("a cache in another dtype", "`key_cache`", "float16", "float32", key_cache=cache.half()),
        bad("positions as floats", "`cache_position`", "float32", "int64", cache_position=cache_position.float()),
        bad("q without a head dimension", "`q`", "[B, Q, Hq, D]", q=q.flatten(2)),
        bad("an odd head", "7 elements", "even", **{n: good[n][..., :7] for n in ("q", "k", "v", "cos", "sin")}),
        bad("no element in a head", "`q`", "(2, 3, 5, 0)", q=q[..., :0]),
        bad("k for other tokens", "`k`", "(2, 2, 3, 8)", "(2, 3, 3, 8)", k=k[:, :2]),
        bad("v of other heads", "`v`", "(2, 3, 2, 8)", "(2, 3, 3, 8)", v=k[:, :, :2]),
        bad("cos for other tokens", "`cos`", "(2, 2, 8)", "(2, 3, 8)", cos=cos[:, :2]),
        bad("sin of another batch", "`sin`", "(1, 3, 8)", "(2, 3, 8)", sin=good["sin"][:1]),
        bad("a cache of another batch", "`key_cache`", "(1, 3, 11, 8)", "(2, 3, 11, 8)", key_cache=cache[:1]),
        bad("a value cache of another length", "`value_cache`", "10", "one C", value_cache=cache[:, :, 1:]),
        bad("a transposed cache", "`key_cache`", "stride", key_cache=cache.mT.contiguous().mT),
        bad("transposed heads", "`q`", "stride", q=q.mT.contiguous().mT),
        bad("positions for other tokens", "`cache_position`", "(2,)", "(3,)", cache_position=cache_position[:2]),
        bad(
            "positions of another batch",
            "`cache_position`",
            "(3, 3)",
            "(2, 3)",
            cache_position=cache_position.expand(3, 3),
        ),
        bad("a weight too short", "`q_weight`", "(7,)", "(8,)", q_weight=cos[0, 0, :7]),
        bad("a length with a dimension", "`length`", "(1,)", "()", length=good["length"][None]),
        bad("positions on another device", "on meta", "one device", cache_position=cache_position.to("meta")),
        bad("an unknown backend", "'cutlass'", "reference, triton", error=BackendError, backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Any, ...]]]:
    """The operator, which takes what the public function takes, by position."""
    return [(rotary_cache_write, tuple(arguments.values()))]


def compilations(capability: int) -> Iterator[Compilation]:
    """Decoding and bulk, heads of 64 and 128, with and without the normalisations."""
    from hf_efficient.kernels.rotary_cache.triton_kernels import rotary_cache_kernel as kernel

    sizes = ("queries", "cache_slots", "q_heads", "kv_heads", "half")
    for dtype in ("bf16", "fp16", "fp32"):
        for tokens, width, normalised in ((1, 64, False), (1, 128, True), (DECODE_TOKENS + 1, 128, False)):
            # The other dtypes differ in nothing but conversions, which the normalised case has all of.
            if dtype != "bf16" and (not normalised or capability in (80, 100)):
                continue
            config = launch_config(tokens)
            absent = () if normalised else ("q_weight", "k_weight")
            types = {
                name: "i32" if name in sizes or name.endswith("_stride") else f"*{dtype}"
                for name in kernel.arg_names
                if name.islower() and name not in absent
            }
            types.update(cache_position="*i64", length="*i64", eps="fp32")
            yield Compilation(
                label=f"{dtype} {tokens} tokens heads of {width}{' normalised' * normalised}",
                kernel=kernel,
                types=types,
                constants={
                    **dict.fromkeys(absent),
                    "BLOCK_HEADS": config.block_heads,
                    "BLOCK_HALF": width // 2,
                    "OVERLAP": capability >= 90,
                },
                num_warps=config.num_warps,
                aligned=tuple(
                    name for name in types if name not in (*sizes[:-1], "eps") and not name.startswith("position_")
                ),
            )


def forward_cost(arguments: Arguments) -> Cost:
    """q, k, v in and out, cos and sin once a token; cache positions and weights are left out, being next to nothing."""
    q, cos, kept = arguments["q"], arguments["cos"], 0
    for source, cache in (("k", "key_cache"), ("v", "value_cache")):
        kept += arguments[source].numel() if arguments[cache] is not None else 0
    moved = 2 * (q.numel() + kept) + 2 * cos.numel()
    return Cost(bytes=moved * q.element_size(), flops=4 * (q.numel() + kept))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-x2, x1), dim=-1) * sin[:, None]


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_position: Tensor,
    *,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    length: Tensor | None,
) -> Tensor:
    """What one writes without this package, for `cache_position` [Q] within the cache."""
    if q_weight is not None:
        q = torch.nn.functional.rms_norm(q, q.shape[-1:], q_weight, eps)
    if k_weight is not None:
        k = torch.nn.functional.rms_norm(k, k.shape[-1:], k_weight, eps)
    key_cache.index_copy_(2, cache_position, _rotate(k.transpose(1, 2), cos, sin))
    value_cache.index_copy_(2, cache_position, v.transpose(1, 2))
    if length is not None:
        length.copy_(cache_position[-1] + 1)
    return _rotate(q.transpose(1, 2), cos, sin)


RECORD = KernelRecord(
    name="rotary_cache",
    api=rotary_cache,
    reference=reference_rotary_cache,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: one rounding, and two of the normalisation before it.
    tolerances={
        torch.float32: Tolerance(1e-6, 0.0),
        torch.float16: Tolerance(1e-3, 0.0),
        torch.bfloat16: Tolerance(6e-3, 0.0),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    peers={"eager": eager},
    mutates=("key_cache", "value_cache", "length"),
)
