"""Layouts of topologies, and inputs of attention under them with the expected results in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import ROTATION_BYTES
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.modeling.topology.grammar.control_tokens import MULTIVERSE
from hf_efficient.modeling.topology.grammar.topology import Topology

WIDTH = 128
CHECKED_ROWS = 2048  # of the scores of one head in float64, at a time

Segments = list[tuple[int, list[int]]]


@dataclass(frozen=True)
class Layout:
    """A case: its segments as (length, parents), and the heads of queries and of keys."""

    label: str
    segments: Segments
    heads: tuple[int, int] = (32, 32)

    @cached_property
    def topology(self) -> Topology:
        return Topology.from_spec(self.segments)

    @property
    def length(self) -> int:
        return sum(length for length, _ in self.segments)

    @property
    def causal_pairs(self) -> int:
        return self.length * (self.length + 1) // 2

    @cached_property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees: all tokens of a segment's ancestors come before its own."""
        seen: list[set[int]] = []
        pairs = 0
        for length, parents in self.segments:
            ancestors = set(parents).union(*(seen[parent] for parent in parents))
            seen.append(ancestors)
            pairs += length * sum(self.segments[i][0] for i in ancestors) + length * (length + 1) // 2
        return pairs


def parallel(trunk: int, paths: int, length: int, conclusion: int) -> Segments:
    """A trunk, paths that do not see each other, and a conclusion that sees all."""
    return [(trunk, []), *[(length, [0])] * paths, (conclusion, list(range(1, paths + 1)))]


def layouts(unit: int = 1) -> list[Layout]:
    """The cases, every length divided by `unit`, so that tiny ones run anywhere."""
    qwen = (28, 4)
    steps = [[0], [0], [0], [1, 2], [2, 3], [1, 3]]
    blocks: Segments = [(1024, [])]
    for _ in range(8):  # 8 blocks one after another: more segments than a word has bits
        join = len(blocks) - 1
        blocks += [*[(192, [join])] * 8, (384, list(range(join + 1, join + 9)))]
    found = [
        Layout("16k, 8 paths", parallel(2048, 8, 1536, 2048)),
        Layout("32k, 8 paths", parallel(4096, 8, 3072, 4096)),
        Layout("8k, 4 paths", parallel(1024, 4, 1536, 1024), qwen),
        Layout("8k, 8 paths", parallel(1024, 8, 768, 1024), qwen),
        Layout("8k, 2 paths", parallel(2048, 2, 2048, 2048), qwen),
        Layout("32k, 16 paths", parallel(2048, 16, 1792, 2048), qwen),
        Layout("16k, 8 blocks of 8 paths", blocks, qwen),
        Layout("16k, 8 samples packed", [(2048, [])] * 8, qwen),
        Layout("1476, MedVerse-like", [(700, []), *((96, parents) for parents in steps), (200, [4, 5, 6])], qwen),
        Layout("16k, plain text", [(16384, [])]),
    ]
    return [
        Layout(x.label, [(max(2, length // unit), parents) for length, parents in x.segments], x.heads) for x in found
    ]


class Problem:
    """A layout on the device, and enough inputs that none is still in the cache when it is used again."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        batch = Topology.stack([layout.topology])
        self.segment_ids, self.segment_visibility = batch.segment_ids.to(device), batch.segment_visibility.to(device)
        self.length = layout.length
        self.blocks = topology_blocks(self.segment_ids, self.segment_visibility)
        # Of a visible pair of segments: bool [N, N].
        bits = self.segment_visibility[0].cpu().numpy().astype(np.uint64)[..., None] >> np.arange(64, dtype=np.uint64)
        table = torch.from_numpy((bits & 1).astype(bool).reshape(len(bits), -1)[:, : len(bits)])
        self.table = table.to(device)

    @cached_property
    def inputs(self) -> list[tuple[Tensor, ...]]:
        """q, k, v and the gradient of the output, [1, H, S, D] each."""
        heads, kv_heads = self.layout.heads
        size = 2 * self.length * WIDTH * (2 * heads + 2 * kv_heads)
        count = 1 + (ROTATION_BYTES // size if self.device.type == "cuda" else 0)
        generator = torch.Generator(self.device).manual_seed(0)

        def drawn(number: int) -> Tensor:
            shape = (1, self.length, number, WIDTH)  # the layout of a model's projections
            flat = torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(generator=generator)
            return flat.transpose(1, 2)

        return [(drawn(heads), drawn(kv_heads), drawn(kv_heads), drawn(heads)) for _ in range(count)]

    def rows_seen(self, rows: slice, causal: bool) -> Tensor:
        """What the queries `rows` see of all keys: bool [rows, S]."""
        places = torch.arange(self.length, device=self.device)
        seen = places[None] <= places[rows, None]
        if not causal:
            seen &= self.table[self.segment_ids[0, rows].long()][:, self.segment_ids[0].long()]
        return seen

    def expected(self, kv_head: int, causal: bool) -> dict[str, Tensor]:
        """Output and gradients of one key head and its query heads, from the formula in float64, rows by rows."""
        group = self.layout.heads[0] // self.layout.heads[1]
        mine = slice(kv_head * group, (kv_head + 1) * group)
        heads = (mine, kv_head, kv_head, mine)
        q, k, v, upstream = (x[0, which].double() for x, which in zip(self.inputs[0], heads, strict=True))
        found = {
            "out": torch.empty_like(q),
            "q": torch.empty_like(q),
            "k": torch.zeros_like(k),
            "v": torch.zeros_like(v),
        }
        for first in range(0, self.length, CHECKED_ROWS):
            rows = slice(first, min(first + CHECKED_ROWS, self.length))
            seen = self.rows_seen(rows, causal)
            for head in range(group):
                scores = (q[head, rows] @ k.T * WIDTH**-0.5).masked_fill_(~seen, float("-inf"))
                p = scores.softmax(-1)
                out = p @ v
                do = upstream[head, rows]
                ds = p * (do @ v.T - (do * out).sum(-1, keepdim=True)) * WIDTH**-0.5
                found["out"][head, rows], found["q"][head, rows] = out, ds @ k
                found["k"] += ds.T @ q[head, rows]
                found["v"] += p.T @ do
        return found


def sample_ids(paths: int, length: int, ends: int) -> tuple[list[int], dict[str, int]]:
    """Ids of a Multiverse sample with one block, and the ids of the control tokens."""
    ids = {token: 1000 + number for number, token in enumerate(MULTIVERSE)}

    def text(count: int) -> list[int]:
        return [number % 997 for number in range(count)]

    found = text(ends - 4 - 5 * paths) + [ids["<Parallel>"], ids["<Goal>"]]
    for _ in range(paths):
        found += [ids["<Outline>"], *text(3), ids["</Outline>"]]
    found += [ids["</Goal>"], 0]
    for _ in range(paths):
        found += [ids["<Path>"], *text(length - 2), ids["</Path>"]]
    return [*found, ids["<Conclusion>"], *text(ends - 3), ids["</Conclusion>"], ids["</Parallel>"]], ids
