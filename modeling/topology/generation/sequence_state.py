"""State of one sequence in parallel generation: its tokens, branches and segments, and how much budget is left.

The terms (trunk, fork, join, forced token, segment, block, budget) are defined in `scheduler.py`, whose
`SequenceScheduler` changes this state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hf_efficient.modeling.topology.generation.branches import Branch, BranchState, Fork, slots_in_text_order
from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.cursor import MAX_DEPTH
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText
from hf_efficient.modeling.topology.grammar.segment_graph import MAX_SEGMENTS, bitmap_bytes


class SequenceState:
    """Tokens of one sequence in the order in which they were generated, its branches, and its budget.

    Args:
        row: batch row.
        prompt: ids without padding.
        builder: a new builder with `strict=False`, which assigns a segment and a position to each token.
        forced: the grammar's forced tokens.
        limits: limits of the sequence.
        padding: ids of the left padding, which transformers' logits processors receive before the prompt.

    Attributes:
        tokens, segments, positions: id, segment and position of the token in each cache slot.
        token_branches: the branch of each token after the prompt.
        num_computed_tokens: tokens whose keys and values a forward pass has computed, or computes now.
        active_branches: branches that sample a token after the next forward pass.
        trunk: the root branch, which contains all others.
        graph: the segments, with their parents and positions.
        prompt_length: number of prompt tokens.
        prompt_end: position after the last one of the prompt.
        finish_reason: why the sequence ended (`eos`, `length`, or the reason passed to `stop`), or an empty string
            while it runs.

    Raises:
        UsageError: `prompt` does not consist of integers.
    """

    def __init__(
        self,
        row: int,
        prompt: Sequence[int],
        builder: TopologyBuilder,
        forced: ForcedText,
        limits: Limits,
        padding: Sequence[int] = (),
    ) -> None:
        self.row = row
        self.forced = forced
        self.limits = limits
        self.graph = builder.graph
        self.prompt_length = len(prompt)
        placed = builder.feed_many(prompt)
        self.tokens: list[int] = [int(token) for token in prompt]
        self.segments: list[int] = placed.segment_ids.tolist()
        self.positions: list[int] = placed.position_ids.tolist()
        self.token_branches: list[Branch] = []
        self.num_computed_tokens = 0
        self.finish_reason = ""
        self.prompt_end = max(self.graph.end) + 1
        self.trunk = Branch(row, (), builder, None, self._visible_ids)
        self.trunk.state = BranchState.ACTIVE
        self.trunk.last_slot = self.prompt_length - 1
        self.active_branches = [self.trunk]
        self._padding = list(padding)
        self._segment_tokens: dict[int, list[int]] = {}  # ids of each segment's tokens
        self._num_grouped_tokens = 0  # tokens that `_segment_tokens` contains
        self._segments_in_text_order: list[int] = []
        self._forks: list[Fork] = []  # unfinished forks, the innermost last

    # Tokens

    def slots_in_text_order(self) -> Iterator[int]:
        """Iterate over all cache slots in the order of the text: prompt, then each branch before its later siblings."""
        yield from range(self.prompt_length)
        yield from slots_in_text_order(self.trunk)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt, including forced ones."""
        return len(self.tokens) - self.prompt_length

    @property
    def critical_path(self) -> int:
        """Number of positions after the prompt: the length of the longest dependency path of tokens."""
        return max(self.graph.end) + 1 - self.prompt_end

    def bitmaps(self, segments: Sequence[int], words: int) -> bytes:
        """Return, for each of `segments`, the bitmap of the segments whose tokens its tokens may attend to.

        Bitmaps follow one another as bytes, each `words` little-endian 64-bit integers; bit t stands for segment t.

        Raises:
            OverflowError: a bitmap does not fit in `words` integers.
        """
        closure = self.graph.closure
        return bitmap_bytes([closure[segment] for segment in segments], words)

    def _visible_ids(self, branch: Branch) -> list[int]:
        """Return the ids that the next token of a branch may attend to, in the order of the text, after the padding.

        Tokens are grouped by segment, and only those appended since the last call are added to the groups.
        """
        for slot in range(self._num_grouped_tokens, len(self.tokens)):
            self._segment_tokens.setdefault(self.segments[slot], []).append(self.tokens[slot])
        self._num_grouped_tokens = len(self.tokens)
        if len(self._segments_in_text_order) != len(self._segment_tokens):
            # There are new segments. Their numbers depend on when each branch was started, not on the text.
            self._segments_in_text_order = list(
                dict.fromkeys(self.segments[slot] for slot in self.slots_in_text_order())
            )
        visible, ids = self.graph.closure[branch.builder.segment], list(self._padding)
        for segment in self._segments_in_text_order:
            if visible >> segment & 1:
                ids += self._segment_tokens[segment]
        return ids

    def _append(self, branch: Branch, token: int, step: int | None = None) -> None:
        """Append one token to a branch: assign its segment and position, and the next cache slot.

        Args:
            branch: the branch that the token belongs to.
            token: token id.
            step: number of the MedVerse step, for the token `<Step>` that opens it.
        """
        placement = branch.builder.feed(token, step)
        branch.last_slot = len(self.tokens)
        branch.contents.append(branch.last_slot)
        self.tokens.append(token)
        self.segments.append(placement.segment)
        self.positions.append(placement.position)
        self.token_branches.append(branch)

    def _append_all(self, branch: Branch, tokens: Sequence[int]) -> None:
        """Append tokens to a branch, one after another."""
        for token in tokens:
            self._append(branch, token)

    # Budget

    def _remaining_budget(self, branch: Branch) -> int:
        """Return how many positions a branch may still fill; with a token budget, the tokens left to the sequence.

        Forced tokens that close branches are not subtracted. Zero or less if the budget is exhausted.
        """
        if self.limits.budget == "tokens":
            return self.limits.max_new_tokens - self.num_generated_tokens
        return self.prompt_end + self.limits.max_new_tokens - branch.position

    def _reserved_positions(self, branch: Branch) -> int:
        """Return the positions that a branch must leave free for forced tokens; 0 for the trunk.

        `Branch.reserve` counts the branch's own closing tag and separator, and the joins and closing tags of the
        branches above it. Each open block adds two: `</Path>` and `</Parallel>`.
        """
        return 0 if branch.is_trunk else branch.reserve + 2 * branch.open_blocks

    def _closing_tokens(self, branch: Branch) -> int:
        """Return the number of tokens reserved for closing a branch; 0 for the trunk.

        Two for each open block (`</Path>` and `</Parallel>`), its closing tag and the separator. Tokens of the branches
        above it are not counted.
        """
        return 0 if branch.is_trunk else 2 * branch.open_blocks + 1 + len(self.forced.separator_ids)

    def _unreserved_tokens(self) -> int:
        """Return how many tokens of a token budget remain after all active branches are closed and all forks joined.

        It is negative if the budget does not suffice for these forced tokens.
        """
        joins = sum(len(self.forced.join_ids) + self._closing_tokens(fork.parent) for fork in self._forks)
        closing = sum(self._closing_tokens(branch) for branch in self.active_branches)
        return self.limits.max_new_tokens - self.num_generated_tokens - joins - closing

    def _can_open_block(self, branch: Branch) -> bool:
        """True if the budget suffices for `<Parallel>` in a branch other than the trunk, and for closing that block."""
        # Two tokens to close the block: `</Path>` and `</Parallel>`.
        if self.limits.budget == "tokens":
            return self._unreserved_tokens() >= len(self.active_branches) + 2
        return self._remaining_budget(branch) > 2 + self._reserved_positions(branch)

    def _reserve_of_children(self, branch: Branch) -> int:
        """Return the positions that each child of `branch` keeps free for forced tokens, as `Branch.reserve`.

        These are its closing tag and separator, the join, and the closing tags and joins of the branches above.
        """
        above = 0
        if not branch.is_trunk:
            # After the join: `</Parallel>` of the forked block (1), two tags for each block around it inside `branch`,
            # and what `branch` itself reserves.
            above = 1 + 2 * (branch.open_blocks - 1) + branch.reserve
        return 1 + len(self.forced.separator_ids) + len(self.forced.join_ids) + above

    def _required_budget(self, branch: Branch, headers: list[tuple[int, ...]]) -> int:
        """Return a remaining budget that suffices for children with these headers, as positions or tokens.

        Each child then has room for one sampled token, and all can be closed and joined.

        Args:
            branch: the branch that is to fork.
            headers: forced tokens that each child begins with.
        """
        reserve = self._reserve_of_children(branch)
        if self.limits.budget == "positions":
            # The separator before the headers, the longest header, one sampled token, and the reserved positions.
            return len(self.forced.separator_ids) + max(map(len, headers)) + 1 + reserve
        reserved = self._remaining_budget(branch) - self._unreserved_tokens()
        per_child = 2 + len(self.forced.separator_ids)  # a sampled token, the closing tag and the separator
        # The last 2 are for the separator before the headers, of at most two tokens.
        return reserved + len(self.forced.join_ids) + sum(len(header) + per_child for header in headers) + 2

    def _has_segments_for(self, branches: int) -> bool:
        """True if a fork into this many branches leaves enough of `MAX_SEGMENTS` for the joins of nested blocks."""
        return len(self.graph) + branches + 4 * MAX_DEPTH <= MAX_SEGMENTS
