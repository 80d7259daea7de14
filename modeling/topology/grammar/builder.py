"""The state machine that assigns a segment and a position to every token, in training and in generation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import (
    CONTROL_TOKENS,
    PATH_LABEL,
    STEP_NUMBER,
    Decode,
    check_grammar,
)
from hf_efficient.modeling.topology.grammar.medverse_rules import MEDVERSE_RULES, MedVerseRules
from hf_efficient.modeling.topology.grammar.multiverse_rules import MULTIVERSE_RULES, MultiverseRules
from hf_efficient.modeling.topology.grammar.plan import Plan
from hf_efficient.modeling.topology.grammar.segment_graph import Placement, Placements, SegmentGraph

RULES = {"multiverse": MULTIVERSE_RULES, "medverse": MEDVERSE_RULES}
# Tokens after the control token within which a path's label, and a step's title, must end.
LABEL_TOKENS = 16
TITLE_TOKENS = 64
# Control tokens that generation forces, and control tokens after which it forces a separator.
_FORCED = frozenset({"<Path>", "<Step>", "<Execution>", "</Execution>", "<Conclusion>"})
_SEPARATED = frozenset({"</Goal>", "</Path>", "</Plan>", "</Step>"})


class TopologyBuilder(MultiverseRules, MedVerseRules):
    """A cursor that appends tokens to a graph of segments and applies the rules of the control tokens among them.

    A separator after a path's closing tag belongs to that path, and its siblings do not see it.

    Args:
        grammar: `multiverse` or `medverse`.
        token_ids: control token -> id.
        mode: what MedVerse's steps see: `dag`, `layers` or `flat`; see `StepOrder`.
        strict: malformed input raises `TopologyError`; otherwise it is read leniently and listed in `warnings`.
        decode: text of token ids. Required for MedVerse; without it Multiverse's labels are not read.
        graph: graph to continue at its last segment; by default a new one with a root segment.
        row: batch row, for messages.

    Raises:
        UsageError: `grammar` or `mode` is unknown.
        TopologyError: `token_ids` lacks a control token, or `decode` is missing.
    """

    def __init__(
        self,
        grammar: str,
        token_ids: dict[str, int],
        *,
        mode: str = "dag",
        strict: bool = True,
        decode: Decode | None = None,
        graph: SegmentGraph | None = None,
        row: int | None = None,
    ) -> None:
        check_grammar(grammar, mode)
        lacking = [tag for tag in CONTROL_TOKENS[grammar] if tag not in token_ids]
        if lacking:
            raise TopologyError(
                f"no token id is known for {' '.join(lacking)}",
                f"convert the model with `hf-efficient convert --patch {grammar}`, which adds the control tokens",
            )
        if decode is None and grammar == "medverse":
            raise TopologyError("MedVerse's plan and steps are read from their text", "pass decode=")
        self.grammar = grammar
        self.token_ids = token_ids
        self.mode = mode
        self.strict = strict
        self.decode = decode
        self.graph = SegmentGraph() if graph is None else graph
        self.row = row
        self.segment = len(self.graph) - 1 if len(self.graph) else self.graph.new([], "root")
        self.frames = []
        self.parsed_plan = Plan()
        self.warnings = []
        self.num_tokens = 0
        self._rules = RULES[grammar]
        self._tags = {token_ids[tag]: tag for tag in self._rules}
        self._control_ids = np.array(sorted(self._tags), dtype=np.int64)
        self._token_texts: dict[int, str] = {}

    @property
    def outline_labels(self) -> list[str]:
        """Labels of the open block's outlines, an empty text for each without a label."""
        return list(self.frames[-1].outline_labels) if self.frames else []

    def feed(self, token_id: int, step: int | None = None) -> Placement:
        """Append one token.

        Args:
            token_id: the token.
            step: number of the step that a `<Step>` opens. A step without a number sees all steps before it.
                `feed_many` reads the number from the header instead.

        Raises:
            TopologyError: the token is malformed here, and the cursor is `strict`.
        """
        tag = self._tags.get(token_id)
        if tag is not None:
            self._apply_rule(tag, _Header(step=step))
        elif self.outline_ids is not None:
            self.outline_ids.append(token_id)
        self.num_tokens += 1
        return Placement(self.segment, self.graph.append(self.segment))

    def feed_many(self, ids: Sequence[int] | np.ndarray) -> Placements:
        """Append tokens [S]; faster than `feed`, because the tokens between two control tokens are appended together.

        Raises:
            UsageError: `ids` is not one-dimensional, or not of integers.
            TopologyError: the text is malformed, and the cursor is `strict`.
        """
        array = np.asarray(ids)
        if array.size and (array.size != array.shape[-1] or array.dtype.kind not in "iu"):
            raise UsageError(
                f"the ids are {array.dtype} of shape {list(array.shape)}", "pass the integers of one row: [S]"
            )
        ids = array.astype(np.int64).reshape(-1)
        forced = np.zeros(len(ids), dtype=bool)
        # Runs of consecutive tokens of one segment: the segment, the first position, the number of tokens.
        segments: list[int] = []
        starts: list[int] = []
        counts: list[int] = []

        def append_run(count: int) -> None:
            segments.append(self.segment)
            starts.append(self.graph.append(self.segment, count))
            counts.append(count)
            self.num_tokens += count

        def append_text(start: int, stop: int) -> None:
            if stop > start:
                if self.outline_ids is not None:
                    self.outline_ids.extend(ids[start:stop].tolist())
                append_run(stop - start)

        start = 0
        control = np.flatnonzero(np.isin(ids, self._control_ids)).tolist()  # indices of the control tokens
        for index, following in zip(control, [*control[1:], len(ids)], strict=False):
            append_text(start, index)
            tag = self._tags[int(ids[index])]
            header = self._read_header(tag, ids[index + 1 : min(following, index + 1 + TITLE_TOKENS)])
            # No token is forced after a control token that counts as ordinary text.
            if self._apply_rule(tag, header):
                first = index + (tag in _SEPARATED)  # a tag before a separator is the model's own
                forced[first : index + 1 + header.length] = tag in _FORCED or tag in _SEPARATED
            append_run(1)
            start = index + 1
        append_text(start, len(ids))

        lengths = np.array(counts, dtype=np.int64)
        firsts = np.cumsum(lengths) - lengths
        position_ids = np.repeat(np.array(starts, dtype=np.int64) - firsts, lengths) + np.arange(len(ids))
        return Placements(np.repeat(np.array(segments, dtype=np.int32), lengths), position_ids, forced)

    def finish(self, allow_truncated: bool = False) -> None:
        """Check at the end of a text that every block is closed and every plan executed.

        Args:
            allow_truncated: check nothing, for a text that may be cut.

        Raises:
            TopologyError: a block is open or a plan not executed, and the cursor is `strict`.
        """
        if allow_truncated:
            return
        if self.frames:
            frame = self.frames[-1]
            self.report_malformed(
                f"the block that opened at token {frame.token_index} is not closed",
                frame.tag,
                "close it, or read a text that was cut with allow_truncated=True (collator: strict=False)",
            )
        elif self.plan and not self.executed:
            self.report_malformed(
                "the plan is never executed", "<Plan>", "write its steps between <Execution> and </Execution>"
            )

    # Parallel cursors

    def fork(self, branches: int | Sequence[Any]) -> list[TopologyBuilder]:
        """One cursor for each path of the open block, or each step of the open execution, on the same graph.

        The first token fed to such a cursor must be its `<Path>`, or its `<Step>` with ``step=``, fed after the steps
        that it depends on are done. Feed nothing to this cursor until `join`.

        Args:
            branches: number of paths, which take the labels of the outlines; or the paths' labels; or, for an
                execution, the steps' numbers in the order of the text.

        Raises:
            TopologyError: no block is open whose paths could begin here.
        """
        frame = self.frame
        if frame is None or frame.in_path or frame.joined:
            raise TopologyError("there is no open block to fork", "fork after </Goal> or <Execution>", row=self.row)
        if isinstance(branches, int):
            branches = [*frame.outline_labels, *[""] * branches][:branches]
        labels = list(branches)
        if frame.steps is not None:
            frame.steps.register(labels)
        children = []
        for count, label in enumerate(labels, len(frame.path_ends) + 1):
            child = self.copy()
            child.base_depth = self.depth - 1
            child_frame = frame.copy()
            child_frame.trunk = self.segment if frame.steps is None else frame.trunk
            child_frame.outline_labels = [str(label) or f"{frame.prefix}{count}"]
            child_frame.path_ends, child_frame.path_labels = [], []
            child.frames = [child_frame]
            children.append(child)
        return children

    def join(self, children: Iterable[TopologyBuilder]) -> None:
        """End the cursors of a fork, given in the order of their labels, so that this cursor can be fed again.

        Its next control token joins their segments: `<Conclusion>` or `</Parallel>`, for steps `</Execution>` or
        `<Conclusion>`.
        """
        frame = self.frames[-1]
        for child in children:
            frame.path_ends.append(child.segment)
            self.warnings.extend(child.warnings)

    # Control tokens

    def _apply_rule(self, tag: str, header: _Header) -> bool:
        """Apply the rule of `tag`; False when it counts as ordinary text."""
        if tag == "<Step>":
            return self.open_step(header.step)
        if tag == "<Path>":
            return self.open_path(header.label)
        return self._rules[tag](self)

    def _read_header(self, tag: str, tail: np.ndarray) -> _Header:
        """The header of `tag` at the beginning of `tail`, the ids between it and the next control token."""
        if self.decode is None or not (tag in _FORCED or tag in _SEPARATED):
            return _Header()
        following = tail.tolist()
        if tag == "<Path>":
            return self._read_label(following)
        blank = next((i for i, token_id in enumerate(following) if self._token_text(token_id).strip()), len(following))
        if tag != "<Step>":
            return _Header(blank)
        # The title ends with its line, or where tokens run out.
        breaks = (i for i in range(blank, len(following)) if "\n" in self._token_text(following[i]))
        count = next(breaks, len(following) - 1) + 1
        title = self.decode(following[:count]).lstrip().split("\n", 1)[0]
        found = STEP_NUMBER.search(title)
        return _Header(count, step=int(found[1])) if found else _Header()

    def _read_label(self, following: list[int]) -> _Header:
        text = ""
        for count, token_id in enumerate(following[:LABEL_TOKENS], 1):
            text += self._token_text(token_id)
            found = PATH_LABEL.match(text)
            if found:
                return _Header(count, label=found[1])
        return _Header()

    def _token_text(self, token_id: int) -> str:
        """Text of one token, cached: decoding is slow, and headers consist of few different tokens."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id]) if self.decode is not None else ""
        return text


class _Header(NamedTuple):
    """The tokens that belong to the control token before them.

    Attributes:
        length: number of these tokens: white space, a path's label, or a step's title with its line break.
        label: label of a path, or an empty text.
        step: number of a step.
    """

    length: int = 0
    label: str = ""
    step: int | None = None
