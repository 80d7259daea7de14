"""The topology of one row of tokens: the segment and position of each token, and the graph of segments.

A segment is a run of consecutive tokens between two points where the text forks into parallel branches or joins them. A
token may attend to the tokens before it in its own segment and to all tokens of the segment's ancestors. Forced tokens
are those that parallel generation appends without sampling: headers of paths and steps, separators and joins. B is the
batch size, S the number of tokens, N that of segments, and W that of 64-bit words in a bitmap, at least ⌈N / 64⌉.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_efficient.errors import UsageError
from hf_efficient.kernels.topology_attention.reference import visible_pairs
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.control_tokens import Decode
from hf_efficient.modeling.topology.grammar.segment_graph import SegmentGraph, bitmap_bytes, with_ancestors


class TopologyBatch(NamedTuple):
    """Topologies of a batch, as arguments of the same names for a model's `forward`.

    Attributes:
        segment_ids: int32 [B, S], segment of each token, -1 at padding.
        position_ids: int64 [B, S], rotary positions, 0 at padding.
        segment_visibility: int64 [B, N, W]: bit t of row s is set where tokens of segment s may attend to tokens of
            segment t.
    """

    segment_ids: Tensor
    position_ids: Tensor
    segment_visibility: Tensor

    def to_mask(self) -> TopologyMask:
        """Return the same as a `TopologyMask`, the argument `topology` of a model or an attention function."""
        return TopologyMask(self.segment_ids, self.segment_visibility)


@dataclass
class Topology:
    """Segments and positions of S tokens, on the host.

    Token i may attend to token j iff both have a segment, that of j is that of i or an ancestor of it, and ``j <= i``.

    Attributes:
        segment_ids: numpy int32 [S], -1 for tokens without a segment.
        position_ids: numpy int64 [S], rotary positions.
        parents: for each of N segments, the segments that it follows; they have smaller numbers.
        labels: name of each segment; by default its number.
        forced: numpy bool [S], true for tokens that generation appends without sampling; all false if it is left out
            or has another length.
        warnings: a message for each malformed token, if the text was read with `strict=False`.
    """

    segment_ids: np.ndarray
    position_ids: np.ndarray
    parents: list[list[int]]
    labels: list[str] = field(default_factory=list)
    forced: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.forced) != len(self.segment_ids):
            self.forced = np.zeros(len(self.segment_ids), dtype=bool)
        if not self.labels:
            self.labels = [str(segment) for segment in range(len(self.parents))]

    @classmethod
    def from_token_ids(
        cls,
        ids: Sequence[int] | np.ndarray | Tensor,
        grammar: str,
        token_ids: dict[str, int],
        *,
        mode: str = "dag",
        strict: bool = True,
        decode: Decode | None = None,
        allow_truncated: bool = False,
        row: int | None = None,
    ) -> Topology:
        """Return the topology that the control tokens of a text describe; other arguments as for `TopologyBuilder`.

        Args:
            ids: token ids [S], of any integer type.
            grammar: `multiverse` or `medverse`.
            token_ids: control token -> id.
            decode: function from token ids to text; required for MedVerse.
            allow_truncated: blocks may be open at the end.

        Raises:
            UsageError: `grammar` or `mode` is unknown, or `ids` are not integers [S].
            TopologyError: the text is malformed and `strict`, `token_ids` lacks a control token, or `decode` is
                missing.
        """
        builder = TopologyBuilder(grammar, token_ids, mode=mode, strict=strict, decode=decode, row=row)
        placed = builder.feed_many(ids.cpu().numpy() if isinstance(ids, Tensor) else ids)
        builder.finish(allow_truncated)
        graph = builder.graph
        return cls(*placed[:2], graph.parents, graph.labels, placed.forced, builder.warnings)

    @classmethod
    def from_spec(cls, segments: Sequence[tuple[int, Sequence[int]]]) -> Topology:
        """Return the topology of consecutive segments.

        Args:
            segments: (number of tokens, numbers of the parents) of each segment; parents come before it.

        Raises:
            UsageError: a number of tokens is negative.
            TopologyError: a parent does not come before its segment, or there are too many segments.
        """
        graph = SegmentGraph()
        for count, parents in segments:
            if count < 0:
                raise UsageError(f"segment {len(graph)} has {count} tokens", "give each 0 tokens or more")
            graph.append(graph.new(parents, str(len(graph))), count)
        counts = [count for count, _ in segments]
        segment_ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        positions = [np.arange(end + 1 - count, end + 1) for end, count in zip(graph.end, counts, strict=True)]
        position_ids = np.concatenate(positions).astype(np.int64) if positions else np.zeros(0, dtype=np.int64)
        return cls(segment_ids, position_ids, graph.parents, graph.labels)

    @property
    def n_segments(self) -> int:
        """N, the number of segments."""
        return len(self.parents)

    def __len__(self) -> int:
        return len(self.segment_ids)

    @property
    def first_tokens(self) -> np.ndarray:
        """Indices [n] of the first token of each segment except segment 0, ascending.

        The next-token loss predicts a token from the one before it in the row. The first token of a segment continues
        another token than that, so it must have no label.
        """
        segments, first = np.unique(self.segment_ids, return_index=True)
        return np.sort(first[segments > 0])

    @property
    def critical_path(self) -> int:
        """Number of tokens on the longest path through the segment graph: the least number of decoding steps."""
        return int(self.position_ids[self.segment_ids >= 0].max(initial=-1)) + 1

    def closure(self) -> list[int]:
        """Return for each segment the bitmap of its ancestors and itself, as a Python integer.

        Raises:
            TopologyError: a parent does not come before its segment.
        """
        closure: list[int] = []
        for parents in self.parents:
            closure.append(with_ancestors(parents, closure))
        return closure

    def reachable(self, segment: int, other: int) -> bool:
        """True if tokens of segment `segment` may attend to segment `other`: it is that segment or an ancestor.

        Raises:
            TopologyError: as for `closure`.
            IndexError: there is no segment `segment`.
        """
        return bool(self.closure()[segment] >> other & 1)

    def bitmaps(self) -> Tensor:
        """Return `closure` as a tensor, int64 [N, W]: bit t of row s is bit ``t % 64`` of word ``t // 64``.

        Raises:
            TopologyError: as for `closure`; also in `dense_mask`, `to_mask` and `stack`, which call this.
        """
        words = max(1, -(-self.n_segments // 64))
        data = bitmap_bytes(self.closure(), words)
        return torch.from_numpy(np.frombuffer(data, dtype="<i8").astype(np.int64).reshape(-1, words))

    def dense_mask(self) -> Tensor:
        """Return a bool tensor [S, S], true where token i (row) may attend to token j (column)."""
        return visible_pairs(torch.from_numpy(self.segment_ids)[None], self.bitmaps()[None])[0]

    def to_mask(self) -> TopologyMask:
        """Return the `TopologyMask` of a batch of this row alone, the argument `topology` of a model."""
        return Topology.stack([self]).to_mask()

    @staticmethod
    def pack(topologies: Sequence[Topology]) -> Topology:
        """Return the topology of several texts in one row, whose tokens may not attend to those of other texts.

        Segments are renumbered; positions are kept, so they restart at each text.

        Args:
            topologies: one for each text, at least one.
        """
        offsets = np.cumsum([0, *(each.n_segments for each in topologies)]).tolist()
        shifted = [
            np.where(each.segment_ids >= 0, each.segment_ids + offset, -1)
            for each, offset in zip(topologies, offsets, strict=False)
        ]
        return Topology(
            np.concatenate(shifted).astype(np.int32),
            np.concatenate([each.position_ids for each in topologies]),
            [
                [p + o for p in parents]
                for each, o in zip(topologies, offsets, strict=False)
                for parents in each.parents
            ],
            [label for each in topologies for label in each.labels],
            np.concatenate([each.forced for each in topologies]),
            [warning for each in topologies for warning in each.warnings],
        )

    @staticmethod
    def stack(topologies: Sequence[Topology], pad_to: int | None = None, side: str = "right") -> TopologyBatch:
        """Return topologies as a padded batch of tensors.

        Args:
            topologies: one for each row.
            pad_to: S, the length of the rows; by default that of the longest topology.
            side: `left` or `right`, where the padding is.

        Raises:
            UsageError: `pad_to` is too small, or `side` is unknown.
            TopologyError: in a topology, a parent does not come before its segment.
        """
        longest = max((len(each) for each in topologies), default=0)
        width = longest if pad_to is None else pad_to
        if width < longest or side not in ("left", "right"):
            raise UsageError(
                f"pad_to={pad_to}, side={side!r}", f"pad to {longest} tokens or more, on the side 'left' or 'right'"
            )
        rows = len(topologies)
        segment_ids = torch.full((rows, width), -1, dtype=torch.int32)
        position_ids = torch.zeros(rows, width, dtype=torch.int64)
        bitmaps = [each.bitmaps() for each in topologies]
        most = max((len(words) for words in bitmaps), default=0)
        segment_visibility = torch.zeros(
            rows, most, max((words.shape[1] for words in bitmaps), default=1), dtype=torch.int64
        )
        for row, (each, words) in enumerate(zip(topologies, bitmaps, strict=True)):
            filled = slice(width - len(each), width) if side == "left" else slice(0, len(each))
            segment_ids[row, filled] = torch.from_numpy(each.segment_ids)
            position_ids[row, filled] = torch.from_numpy(each.position_ids)
            segment_visibility[row, : len(words), : words.shape[1]] = words
        return TopologyBatch(segment_ids, position_ids, segment_visibility)
