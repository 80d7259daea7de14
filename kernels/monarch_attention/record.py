"""The record of monarch_attention for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.decode_attention.configs import padded_head_dim
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.configs import average_config, left_config, right_config
from hf_efficient.kernels.monarch_attention.geometry import geometry
from hf_efficient.kernels.monarch_attention.gradient_configs import (
    left_gradient_config,
    query_gradient_config,
    right_gradient_config,
)
from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout
from hf_efficient.kernels.monarch_attention.op import monarch_attention_backward, monarch_attention_forward
from hf_efficient.kernels.monarch_attention.reference import monarch_attention as reference_monarch_attention
from hf_efficient.kernels.monarch_attention.reference import tiles_per_chunk, visible_tiles
from hf_efficient.kernels.validate import rows_contiguous

Layout = SequenceLayout | GridLayout


def _draw(
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout,
    queries: int,
    keys: int | None = None,
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 16,
) -> Arguments:
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)

    def normal(tokens: int) -> Tensor:
        # The layout of a model's projections.
        return torch.randn((batch, tokens, heads, head_dim), generator=generator).to(device, dtype).transpose(1, 2)

    keys = queries if keys is None else keys
    return {"q": 1.5 * normal(queries), "k": normal(keys), "v": normal(keys), "layout": layout}


def _mask(*rows: str, device: torch.device) -> Tensor:
    """bool [B, N] from texts in which 1 is a valid token."""
    return torch.tensor([[place == "1" for place in row] for row in rows], device=device)


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernels for one iteration."""

    def draw(layout: Layout, queries: int, keys: int | None = None, **sizes: int) -> Arguments:
        return _draw(device, dtype, layout, queries, keys, **sizes)

    def masked(layout: Layout, *rows: str, **sizes: int) -> Arguments:
        return draw(layout, len(rows[0]), batch=len(rows), **sizes) | {"key_mask": _mask(*rows, device=device)}

    grid, sequence = GridLayout(3, 5), SequenceLayout(3)
    # A block without a valid token, one with a single one, and a padded block.
    holes = masked(sequence, "1111100011100", "1001110001101", heads=2)
    cases = {
        "prime sizes": draw(grid, 30, batch=2, heads=3, head_dim=17),
        "a sequence": draw(sequence, 12, heads=2),
        "a sequence with masked blocks": holes,
        "frames tied": draw(GridLayout(3, 5, f_tied=3), 90),
        "the height cut": draw(GridLayout(4, 5, h_reduce=2), 40),
        "the width cut": draw(GridLayout(3, 10, w_reduce=2), 60),
        "a cache of earlier frames": draw(grid, 15, 60),
        "fewer keys than queries": draw(grid, 45, 15),
        "causal chunks": draw(grid, 60) | {"causal_frames": 2},
        "causal chunks of several tiles": draw(GridLayout(4, 3, 2, 2), 48) | {"causal_frames": 2},
        "one row": draw(GridLayout(1, 7), 21),
        "one column": draw(GridLayout(7, 1), 14),
        "one token a tile": draw(GridLayout(1, 1), 5),
        "more rows than a block": draw(GridLayout(66, 2), 132),
        "more columns than a block": draw(GridLayout(2, 37), 74),
        "more columns than are held at once": draw(GridLayout(2, 97), 194),
        "padding in front": draw(SequenceLayout(4, pad="pre"), 17),
        "padding behind": draw(SequenceLayout(4), 14, batch=2),
        "the mean of a column's queries": masked(SequenceLayout(3, "post", "mean"), "1111100011100", "1001110001101"),
        "the mean and padding in front": masked(SequenceLayout(3, "pre", "mean"), "0001111011", "1111111111"),
        "one valid token": masked(sequence, "0000100000", "1111111111"),
        "no valid token": masked(sequence, "0000000000", "1101111111"),
        "head_dim 24": draw(grid, 15, head_dim=24),
        "head_dim 32": draw(grid, 15, head_dim=32),
        "head_dim 64": draw(grid, 15, head_dim=64),
        "head_dim 80": draw(grid, 15, head_dim=80),
        "head_dim 128": draw(grid, 30, head_dim=128),
        "head_dim 256": draw(grid, 15, head_dim=256),
        "a scale of its own": draw(grid, 15) | {"scale": 0.6},
        "no token": draw(sequence, 0),
        "no row": draw(sequence, 12, batch=0),
        "no row, masked": draw(sequence, 12, batch=0)
        | {"key_mask": torch.ones(0, 12, dtype=torch.bool, device=device)},
    }
    for row_axes in ("f", "h", "w", "fw", "hw"):
        cases[f"rows along {row_axes}"] = draw(GridLayout(4, 3, 2, 2, 1, row_axes), 48)
    plain = draw(grid, 30, heads=2)
    cases["heads first in memory"] = {n: x.contiguous() if n in "qkv" else x for n, x in plain.items()}
    wider = draw(grid, 30, head_dim=48)
    cases["strided rows"] = {n: x[..., 8:40] if n in "qkv" else x for n, x in wider.items()}
    cases["a strided head_dim"] = {n: x[..., ::3] if n in "qkv" else x for n, x in wider.items()}
    single = draw(grid, 30)
    cases["one key head, expanded"] = plain | {n: single[n].expand(-1, 2, -1, -1) for n in "kv"}
    hidden = ~holes["key_mask"][:, None, :, None]
    # Infinite, not NaN, so that arguments can be compared with themselves.
    cases["masked tokens that hold infinity"] = {
        n: x.masked_fill(hidden, float("inf")) if n in "qkv" else x for n, x in holes.items()
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    good = _draw(device, torch.float32, GridLayout(3, 4), 24, batch=2, heads=2)
    q, k, v = good["q"], good["k"], good["v"]
    sequence: dict[str, Any] = {"layout": SequenceLayout(4)}
    mask = torch.ones(2, 24, dtype=torch.bool, device=device)

    def bad(label: str, *words: str, error: type[Exception] = HFEError, **changes: object) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    return [
        bad("no keys", "`k`", "NoneType", k=None),
        bad("queries of integers", "`q`", "int64", "float32", q=q.long()),
        bad("values in another dtype", "`v`", "float16", "float32", v=v.half()),
        bad("queries without heads", "`q`", "(2, 24, 16)", "[B, H, Nq, D]", q=q[:, 0]),
        bad("keys of fewer heads", "`k`", "(2, 1, 24, 16)", "(2, 2, 24, 16)", k=k[:, :1]),
        bad("fewer values than keys", "`v`", "(2, 2, 12, 16)", "that of `k`", v=v[:, :, :12]),
        bad("no head_dim", "`q`", "(2, 2, 24, 0)", "last dimension", **{n: good[n][..., :0] for n in "qkv"}),
        bad("no layout", "`layout`", "NoneType", "SequenceLayout", layout=None),
        bad("no iteration", "`num_iters` is 0", "at least 1", num_iters=0),
        bad("half an iteration", "`num_iters` is 1.5", "integer", num_iters=1.5),
        bad("a negative scale", "`scale` is -1.0", "positive", scale=-1.0),
        bad("an infinite scale", "`scale` is inf", "positive", scale=float("inf")),
        bad("a part of a frame", "24 tokens", "3 x 5", layout=GridLayout(3, 5)),
        bad("keys of a part of a frame", "20 tokens", "3 x 4", k=k[:, :, :20], v=v[:, :, :20]),
        bad("frames that cannot be tied", "`f_tied` is 3", "2 frames", layout=GridLayout(3, 4, f_tied=3)),
        bad("a mask of a grid", "`key_mask`", "GridLayout", key_mask=mask),
        bad("half a frame a chunk", "`causal_frames` is 0.5", "integer", causal_frames=0.5),
        bad("no frame a chunk", "`causal_frames` is 0", "at least 1", causal_frames=0),
        bad("chunks that do not divide", "`causal_frames` is 3", "2 frames", causal_frames=3),
        bad("ties across chunks", "`f_tied` is 2", "chunk has 1", layout=GridLayout(3, 4, 2), causal_frames=1),
        bad("chunks of a cache", "1 frames of queries and 2", "None", q=q[:, :, :12], causal_frames=1),
        bad("a sequence with a cache", "12 queries and 24 keys", "as many", **sequence, q=q[:, :, :12]),
        bad("a block too large", "`block_size` is 25", "24 tokens", layout=SequenceLayout(25)),
        bad("a mask of numbers", "`key_mask`", "int64", "bool", **sequence, key_mask=mask.long()),
        bad("a mask for each query", "`key_mask`", "(2, 1, 24)", "[B, Nk]", **sequence, key_mask=mask[:, None]),
        bad("a mask of fewer tokens", "`key_mask`", "(2, 23)", "(2, 24)", **sequence, key_mask=mask[:, 1:]),
        bad("a mask of one row", "`key_mask`", "(1, 24)", "(2, 24)", **sequence, key_mask=mask[:1]),
        bad("chunks of a sequence", "`causal_frames` is 1", "no frames", **sequence, causal_frames=1),
        bad(
            "values on another device",
            "on cpu" if device.type == "cpu" else "on cuda",
            "on meta",
            "one device",
            v=v.to("meta"),
        ),
        bad("an unknown backend", "'cutlass'", "reference, triton", error=BackendError, backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[object, ...]]]:
    """The operators, with the arguments that the public function passes."""
    q, k, v = (rows_contiguous(arguments[name]) for name in ("q", "k", "v"))
    layout, key_mask = arguments["layout"], arguments.get("key_mask")
    at = list(geometry(layout, q.shape[2], k.shape[2], arguments.get("causal_frames")))
    scale = arguments.get("scale", q.shape[3] ** -0.5)
    is_sequence = isinstance(layout, SequenceLayout)
    kind = is_sequence, is_sequence and layout.pad_queries == "mean"
    forward = (q, k, v, key_mask, at, 1, scale, *kind, True)
    out, lse = monarch_attention_forward(*forward)
    twice = (q, k, v, key_mask, at, 2, scale, *kind, False)
    backward = (torch.ones_like(out), q, k, v, out, lse, key_mask, at, scale, *kind)
    return [
        (monarch_attention_forward, forward),
        (monarch_attention_forward, twice),
        (monarch_attention_backward, backward),
    ]


_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# dtypes of arguments; those of q for the others named here.
_FLOAT32 = ("lse_r", "c_l", "lse", "averaged_lse", "dc", "e", "delta", "dq_part")
_ELEMENTS = (
    *("out", "q", "k", "v", "k_tail", "v_tail", "a_l", "y", "averaged", "pad_query"),
    *("dout", "dq", "dk", "dv", "dz", "da", "dy"),
)


def _compilation(label: str, kernel: Any, element: str, constants: dict[str, Any], config: Any) -> Compilation:
    """One kernel with its `constants`, whose other arguments have types by name."""
    absent = {} if constants.get("HAS_MASK") else {"key_mask": None}
    if "pad_query" in kernel.arg_names and not constants.get("PAD_MEAN"):
        absent["pad_query"] = None
    if constants.get("WITH_LSE") is False:
        absent["lse_r"] = None
    constants = {name: value for name, value in (constants | absent).items() if name in kernel.arg_names}
    types = {name: "i32" for name in kernel.arg_names if name not in constants}
    types |= {name: f"*{element}" for name in types if name in _ELEMENTS}
    types |= {name: "*fp32" for name in types if name in _FLOAT32}
    types |= {name: "fp32" for name in types if name in ("scale", "qk_scale")}
    types |= {name: "*u8" for name in types if name == "key_mask"}
    if constants.get("USE_TMA"):
        block_d = constants["BLOCK_D"]
        blocks = {"k": "BLOCK_L", "v": "BLOCK_L", "k_tail": "TAIL_L", "v_tail": "TAIL_L"}
        blocks |= {"q": "BLOCK_M"} if constants["LOOP_ROWS"] else {}
        for name, rows in blocks.items():
            if constants[rows]:
                types[name] = f"tensordesc<{element}[1, 1, {constants[rows]}, {block_d}]>"
    return Compilation(
        label=f"{kernel.__name__} {label}",
        kernel=kernel,
        types=types,
        constants=constants,
        num_warps=config.num_warps,
        aligned=tuple(n for n, kind in types.items() if kind[0] == "*" or n.endswith(("stride_n", "stride_h"))),
    )


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel for video grids and for sequences.

    With large tiles for 8.6, where a program has the least shared memory, and the tiles of 9.0, which has its own.
    """
    from hf_efficient.kernels.monarch_attention.triton_forward import average_kernel, left_kernel, right_kernel
    from hf_efficient.kernels.monarch_attention.triton_gradients import (
        left_gradient_kernel,
        query_gradient_kernel,
        right_gradient_kernel,
        summary_gradient_kernel,
    )

    # (element, head_dim, rows, columns, kind of layout); grids have 21 tiles.
    cases = {
        86: [
            ("bf16", 128, 30, 52, "grid"),
            ("bf16", 64, 128, 128, "masked"),
            ("bf16", 256, 90, 150, "grid"),
            ("fp32", 128, 15, 14, "masked"),
            ("fp32", 256, 90, 80, "grid"),
        ],
        90: [("bf16", 128, 30, 52, "grid"), ("bf16", 64, 128, 128, "sequence"), ("bf16", 128, 135, 80, "grid")],
    }
    device = divmod(capability, 10)
    for element, head_dim, rows, columns, kind in cases.get(capability, [("fp16", 64, 15, 14, "masked")]):
        label = f"{element} head_dim {head_dim}, {kind} of {rows} x {columns}"
        size = _SIZES[element]
        common = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "IS_SEQUENCE": kind != "grid"}
        common |= {"HAS_MASK": kind == "masked", "PAD_MEAN": kind == "masked"}
        right = right_config(columns, columns if kind != "grid" else 21 * columns, head_dim, size, device)
        for averaged in (False, True):
            use_tma = right.use_tma and kind != "masked"
            constants = {**common, "BLOCK_M": right.block_m, "BLOCK_L": right.block_l, "TAIL_L": right.tail_l}
            constants |= {"STREAM": right.stream, "AVERAGED": averaged, "WITH_Y": not averaged, "USE_TMA": use_tma}
            constants |= {"NUM_STAGES": right.num_stages, "PAD_MEAN": kind == "masked" and not averaged}
            constants |= {"WITH_LSE": not averaged, "LOOP_ROWS": use_tma and kind == "sequence" and not averaged}
            yield _compilation(f"{label}, averaged {averaged}", right_kernel, element, constants, right)
        left = left_config(rows, head_dim, size, device)
        tiles = {"BLOCK_M": left.block_m, "BLOCK_N": left.block_n, "NUM_STAGES": left.num_stages}
        for with_out in (True, False):
            constants = {**common, **tiles, "WITH_OUT": with_out, "WITH_LSE": True}
            yield _compilation(f"{label}, output {with_out}", left_kernel, element, constants, left)
        average = average_config(head_dim, size, device)
        tiles = {"BLOCK_M": average.block_m, "BLOCK_N": average.block_n, "NUM_STAGES": average.num_stages}
        yield _compilation(label, average_kernel, element, {**common, **tiles}, average)
        gradient, all_rows = left_gradient_config(rows, head_dim, size, device)
        tiles = {"BLOCK_M": gradient.block_m, "BLOCK_N": gradient.block_n, "NUM_STAGES": gradient.num_stages}
        constants = {**common, **tiles, "SUMMARIES": all_rows}
        yield _compilation(f"{label}, summaries {all_rows}", left_gradient_kernel, element, constants, gradient)
        if not all_rows:
            yield _compilation(label, summary_gradient_kernel, element, {**common, **tiles}, gradient)
        gradient = right_gradient_config(columns, head_dim, size, device)
        constants = {**common, "BLOCK_M": gradient.block_m, "BLOCK_L": gradient.block_n}
        constants |= {"NUM_STAGES": gradient.num_stages}
        yield _compilation(label, right_gradient_kernel, element, constants, gradient)
        gradient = query_gradient_config(columns, head_dim, size, device)
        constants = {**common, "BLOCK_M": gradient.block_m, "BLOCK_L": gradient.block_n}
        constants |= {"NUM_STAGES": gradient.num_stages}
        yield _compilation(label, query_gradient_kernel, element, constants, gradient)


def _products(arguments: Arguments) -> tuple[int, int]:
    """Multiplications of one product that has b1 b2² terms for each pair of tiles, and of one that has b2 b1²."""
    q, layout = arguments["q"], arguments["layout"]
    batch, heads, queries, head_dim = q.shape
    tiles, rows, columns = layout.tiling(queries)
    key_tiles = layout.tiling(arguments["k"].shape[2]).tiles
    chunk = tiles_per_chunk(layout, arguments.get("causal_frames"))
    pairs = sum(seen for _, seen in visible_tiles(tiles, key_tiles, chunk)) * batch * heads * head_dim
    return pairs * rows * columns**2, pairs * columns * rows**2


def forward_cost(arguments: Arguments) -> Cost:
    """q, k and v read, the output written. Three products of the R-step and two of the L-step; two each, earlier."""
    q, k = arguments["q"], arguments["k"]
    right, left = _products(arguments)
    earlier = arguments.get("num_iters", 1) - 1
    return Cost(bytes=2 * q.nbytes + 2 * k.nbytes, flops=2 * ((3 + 2 * earlier) * right + (2 + 2 * earlier) * left))


def backward_cost(arguments: Arguments) -> Cost:
    """q, k, v, the output and its gradient read, three gradients written.

    Nine products of the R-step and five of the L-step, with those of the forward pass that have to be computed again,
    since their results are too large to keep.
    """
    q, k = arguments["q"], arguments["k"]
    right, left = _products(arguments)
    return Cost(bytes=4 * q.nbytes + 4 * k.nbytes, flops=2 * (9 * right + 5 * left))


RECORD = KernelRecord(
    name="monarch_attention",
    api=monarch_attention,
    reference=reference_monarch_attention,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: what a row of keys holds for a query is rounded, both softmaxes, and the result; in the backward
    # pass also the gradients of all of these.
    tolerances={
        torch.float32: Tolerance(1e-5, 1e-5),
        torch.float16: Tolerance(2e-3, 5e-3),
        torch.bfloat16: Tolerance(1e-2, 2e-2),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    backward_cost=backward_cost,
    # Softmax attention is a peer in time, not with the same result: `benchmarks/` compares them.
    differentiable=("q", "k", "v"),
)
