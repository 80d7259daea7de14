"""How close does decoding attention come to the memory's speed, by batch, length and capacity of the cache?

    python -m benchmarks.decode_attention [--cases TEXT] [--output FOLDER]
    python -m benchmarks.decode_attention --sweep [--cases TEXT]

One query for each of 32 heads, 8 key-value heads, bfloat16; and branches that share a cache, a query each, their
slots as generation leaves them, one of each branch in turn. With `--sweep` other tiles and numbers of splits than
those of the table are timed, and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Provider, parser, rotation_of, run, time_calls
from benchmarks.plot import plot
from hf_efficient.kernels.contract import Arguments, relative_error
from hf_efficient.kernels.decode_attention.configs import LaunchConfig, launch_config, multiprocessor_count, split_count
from hf_efficient.kernels.decode_attention.record import RECORD
from hf_efficient.kernels.decode_attention.reference import visible_slots

HEADS, KV_HEADS = 32, 8
WIDTHS = (64, 128)
BATCHES = (1, 8, 32)
LENGTHS = (2048, 8192, 32768)
# Batch rows, branches of each, slots that all see, slots of each branch.
BRANCHES = ((1, 8, 4096, 512), (1, 32, 4096, 128), (16, 4, 1024, 256), (16, 16, 1024, 64))
# block_n, stages and warps.
TILES = (
    (32, 4, 2),
    (32, 6, 4),
    (64, 2, 4),
    (64, 3, 4),
    (64, 4, 4),
    (64, 5, 4),
    (64, 3, 2),
    (64, 4, 8),
    (128, 2, 4),
    (128, 3, 4),
    (128, 3, 8),
)
# More shared memory than this leaves a multiprocessor of an H100 no second program.
TILE_BYTES = 114 * 1024
PROGRAMS = (1, 2, 3, 4, 6)


def draw(batch: int, length: int, capacity: int, width: int, device: torch.device, seed: int) -> Arguments:
    """Arguments of one call, at the last of `length` filled slots in a cache of `capacity`."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)

    return {
        "q": normal(batch, HEADS, 1, width),
        "k": normal(batch, KV_HEADS, capacity, width),
        "v": normal(batch, KV_HEADS, capacity, width),
        "kv_len": torch.full((batch,), length, dtype=torch.int32, device=device),
        "q_pos": torch.full((batch, 1), length - 1, dtype=torch.int32, device=device),
    }


def draw_branches(
    batch: int, branches: int, shared: int, own: int, width: int, device: torch.device, seed: int
) -> Arguments:
    """Arguments of one call, at the last slot of each of `branches` that share a prefix."""
    length = shared + branches * own
    arguments = draw(batch, length, length, width, device, seed)
    generator = torch.Generator(device).manual_seed(seed)
    query = torch.empty((batch, HEADS, branches, width), dtype=torch.bfloat16, device=device)
    numbers = torch.arange(branches, dtype=torch.int32, device=device)
    segments = torch.cat((numbers.new_zeros(shared), 1 + numbers.repeat(own)))
    return arguments | {
        "q": query.normal_(generator=generator),
        "q_pos": (length - branches + numbers).expand(batch, -1).contiguous(),
        "kv_segment_ids": segments.expand(batch, -1).contiguous(),
        "segment_visibility": (1 | torch.ones(branches, dtype=torch.int64, device=device) << 1 + numbers.long())
        .expand(batch, -1)[..., None]
        .contiguous(),
    }


def cases(device: torch.device) -> list[Case]:
    sizes = [(batch, length, length) for batch in BATCHES for length in LENGTHS]
    sizes.insert(5, (8, 8192, 4 * 8192))
    found = []
    for width in WIDTHS:
        for batch, length, capacity in sizes:
            shape = {"batch": batch, "length": length, "capacity": capacity, "width": width}
            label = f"D={width} B={batch} L={length}" + (f" of {capacity}" if capacity > length else "")
            drawn = functools.partial(draw, **shape, device=device)
            found.append(Case(label, "decode", shape, torch.bfloat16, lambda s, d=drawn: d(seed=s)))
        for branched in BRANCHES:
            shape = dict(zip(("batch", "branches", "shared", "own"), branched, strict=True), width=width)
            drawn = functools.partial(draw_branches, **shape, device=device)
            label = "D={4} B={0} {1} branches of {3} after {2}".format(*branched, width)
            found.append(Case(label, "decode", shape, torch.bfloat16, lambda s, d=drawn: d(seed=s)))
    return found


def masked() -> Callable[..., torch.Tensor]:
    """PyTorch's attention under a boolean mask, made once for all layers, as in a stock model, and not timed."""
    masks: dict[int, torch.Tensor] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **seen: torch.Tensor) -> torch.Tensor:
        if id(k) not in masks:
            masks[id(k)] = visible_slots(k.shape[2], **seen)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[id(k)], enable_gqa=True)

    return attend


def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention to the whole cache: right only where it is full."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# Other configurations than the table's


def _seconds(rotation: list[Arguments], config: LaunchConfig, splits: int, device: torch.device) -> float | None:
    """Seconds of a call in this configuration; None where it does not fit the device."""
    from triton import OutOfResources

    from hf_efficient.kernels.decode_attention.triton_kernels import launch

    def call(arguments: Arguments) -> torch.Tensor:
        q, k, v, kv_len, q_pos = (arguments[name] for name in ("q", "k", "v", "kv_len", "q_pos"))
        return launch(q, k, v, kv_len, q_pos, None, None, k.shape[2], None, q.shape[3] ** -0.5, config, splits)

    try:
        found = call(rotation[0])
    except OutOfResources:
        return None
    usual = RECORD.api(**rotation[0]).transpose(1, 2)
    if relative_error(found, usual) > 2 * RECORD.tolerances[found.dtype].forward:
        raise SystemExit(f"{config}, {splits} splits: the result is wrong")
    timing = time_calls([functools.partial(call, arguments) for arguments in rotation], device, graph=True)
    return 1e-3 * timing.median


def _sweep_case(case: Case, device: torch.device) -> None:
    rotation = rotation_of(RECORD, case)
    q, k = rotation[0]["q"], rotation[0]["k"]
    width, programs = q.shape[3], q.shape[0] * KV_HEADS
    usual = launch_config(HEADS // KV_HEADS, width, q.element_size())
    processors = multiprocessor_count(device)
    floor = RECORD.forward_cost(rotation[0]).bytes

    def splits_of(config: LaunchConfig) -> int:
        return split_count(programs, k.shape[2], config.block_n, processors)

    tried: dict[tuple[Any, ...], float] = {}

    def time(config: LaunchConfig, splits: int) -> None:
        key = (config.block_n, config.num_stages, config.num_warps, splits)
        seconds = tried.get(key) or _seconds(rotation, config, splits, device)
        if seconds is not None:
            tried[key] = seconds

    time(usual, splits_of(usual))
    for block_n, stages, warps in TILES:
        if 2 * (stages - 1) * block_n * width * q.element_size() <= TILE_BYTES:
            config = replace(usual, block_n=block_n, num_stages=stages, num_warps=warps)
            time(config, splits_of(config))
    block_n, stages, warps, _ = min(tried, key=tried.__getitem__)
    best = replace(usual, block_n=block_n, num_stages=stages, num_warps=warps)
    for number in PROGRAMS:
        blocks = -(-case.shape["length"] // block_n)
        time(best, max(1, min(number * processors // programs, blocks)))
    table = (usual.block_n, usual.num_stages, usual.num_warps, splits_of(usual))
    print(f"{case.label}: block_n, stages, warps, splits")
    for key, seconds in sorted(tried.items(), key=lambda item: item[1])[:6] + [(table, tried[table])]:
        note = "  <- the table's" if key == table else ""
        print(f"    {key!s:<20}{1e6 * seconds:>9.2f} us {floor / seconds / 1e9:>6.0f} GB/s{note}", flush=True)


def sweep(arguments: argparse.Namespace) -> None:
    """Time every tile on a short and a long cache, for one row and for 32, then numbers of splits for the best tile."""
    device = torch.device(arguments.device)
    corners = [
        case
        for case in cases(device)
        if case.shape["batch"] in (1, 32)
        and "length" in case.shape
        and case.shape["length"] in (2048, 32768)
        # A large batch of long caches behaves as one of short ones, and takes memory.
        and case.shape["batch"] * case.shape["length"] <= 65536
        and arguments.cases in case.label
    ]
    stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
    with stream, torch.no_grad():
        for case in corners:
            _sweep_case(case, device)
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--sweep", action="store_true", help="time other configurations than the table's")
    arguments = options.parse_args(argv)
    if arguments.sweep:
        sweep(arguments)
        return
    providers = [
        Provider("sdpa", masked),
        Provider("unmasked", lambda: unmasked),
        Provider("triton", lambda: functools.partial(RECORD.api, backend="triton")),
    ]
    lines = run("decode_attention", RECORD, cases(torch.device(arguments.device)), providers, arguments)
    title = "decode_attention: one query, 32 heads, 8 key-value heads, bfloat16"
    plot(lines, title, arguments.output / "decode_attention.png")


if __name__ == "__main__":
    main()
