"""The state machine that assigns a segment and a position to every token, in training and in generation.

A segment is a run of consecutive tokens: a token may attend to the tokens before it in its own segment and to all
tokens of the segment's ancestors in the graph of segments. Control tokens (tags such as `<Path>` that are one token
each) start segments: a path or step begins one that follows the segment before its block, or the steps that it depends
on (a fork), and the conclusion begins one that follows all paths (a join). Forced tokens are those that parallel
generation appends without sampling: the headers of paths and steps, separators (white space after a closing tag), and
the control tokens of a join.
"""

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
# Number of tokens after `<Path>` and `<Step>` that are searched for the path's label and the step's title.
LABEL_TOKENS = 16
TITLE_TOKENS = 64
# Control tokens that generation appends without sampling, and control tokens after which it appends a separator.
_FORCED = frozenset({"<Path>", "<Step>", "<Execution>", "</Execution>", "<Conclusion>"})
_SEPARATED = frozenset({"</Goal>", "</Path>", "</Plan>", "</Step>"})


class TopologyBuilder(MultiverseRules, MedVerseRules):
    """Appends tokens to a graph of segments and applies the rules of the control tokens among them.

    Feed it the tokens of one row in order: `feed` or `feed_many`, then `finish`. For parallel generation, `fork` makes
    a builder for each path of a block, all on one graph, and `join` ends them. A separator after a path's closing tag
    belongs to that path, so the sibling paths may not attend to it.

    Args:
        grammar: `multiverse` or `medverse`.
        token_ids: control token -> id.
        mode: what a MedVerse step may attend to: `dag`, `layers` or `flat`; see `StepOrder`.
        strict: raise `TopologyError` at malformed input; otherwise the control token is ignored or the text repaired
            (an open path is closed, for example), and a message is added to `warnings`.
        decode: function from token ids to text. Required for MedVerse; without it Multiverse's labels are not read.
        graph: graph to continue at its last segment; by default a new one with a root segment.
        row: batch row that messages name; None for no row.

    Attributes:
        graph: the segments, with their parents, positions and labels.
        segment: segment of the next token, unless that token starts a new one.
        frames: open blocks, the innermost last.
        warnings: a message for each malformed token.
        num_tokens: number of tokens fed so far.

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
        """Labels of the innermost open block's outlines, an empty string for one without; empty outside blocks."""
        return list(self.frames[-1].outline_labels) if self.frames else []

    def feed(self, token_id: int, step: int | None = None) -> Placement:
        """Append one token; return its segment and position.

        No headers are read: a path that `<Path>` opens gets the label of its outline, or its number without one.

        Args:
            token_id: the token.
            step: number of the step that a `<Step>` opens; None for other tokens. A step without a number may
                attend to all steps before it, except in mode `flat`. `feed_many` reads the number from the header
                instead.

        Raises:
            TopologyError: the control token is malformed here and the builder is `strict`; or, in a forked builder, the
                step opens before one that it depends on.
        """
        tag = self._tags.get(token_id)
        if tag is not None:
            self._apply_rule(tag, _Header(step=step))
        elif self.outline_ids is not None:
            self.outline_ids.append(token_id)
        self.num_tokens += 1
        return Placement(self.segment, self.graph.append(self.segment))

    def feed_many(self, ids: Sequence[int] | np.ndarray) -> Placements:
        """Append tokens; return their segments, positions and which of them are forced, arrays [S].

        Faster than `feed`, because the tokens between two control tokens are appended together. Labels of paths and
        numbers of steps are read from the tokens after `<Path>` and `<Step>`.

        Args:
            ids: token ids [S], of any integer type.

        Raises:
            UsageError: `ids` are not integers, or those of several rows; [1, S] is accepted.
            TopologyError: the text is malformed, and the builder is `strict`, or as for `feed` in a forked builder. The
                tokens before the error have been appended to the graph.
        """
        array = np.asarray(ids)
        if array.size and (array.size != array.shape[-1] or array.dtype.kind not in "iu"):
            raise UsageError(
                f"the ids are {array.dtype} of shape {list(array.shape)}", "pass the integers of one row: [S]"
            )
        ids = array.astype(np.int64).reshape(-1)
        forced = np.zeros(len(ids), dtype=bool)
        # For each run of consecutive tokens of one segment: the segment, its first position, its number of tokens.
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
            # A control token without meaning at its place is an ordinary token, and no forced tokens follow it.
            if self._apply_rule(tag, header):
                first = index + (tag in _SEPARATED)  # the tag before a separator is sampled, so not forced
                forced[first : index + 1 + header.length] = tag in _FORCED or tag in _SEPARATED
            append_run(1)
            start = index + 1
        append_text(start, len(ids))

        lengths = np.array(counts, dtype=np.int64)
        firsts = np.cumsum(lengths) - lengths
        position_ids = np.repeat(np.array(starts, dtype=np.int64) - firsts, lengths) + np.arange(len(ids))
        return Placements(np.repeat(np.array(segments, dtype=np.int32), lengths), position_ids, forced)

    def finish(self, allow_truncated: bool = False) -> None:
        """Check at the end of a text that every block is closed and the last plan is executed.

        A violation is added to `warnings` unless the builder is `strict`.

        Args:
            allow_truncated: check nothing, for a text that may be truncated.

        Raises:
            TopologyError: a block is open or a plan not executed, and the builder is `strict`.
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
        """Return a builder for each path of the open block, or each step of the open execution, on the same graph.

        The first token fed to such a builder must be its `<Path>`, or its `<Step>` with ``step=``, and a step must be
        fed after the steps that it depends on are done. Feed nothing to this builder until `join`. The steps are added
        to the execution in the given order, so fork an execution once.

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
        """End the builders of a fork so that this builder can be fed again; adds their warnings to its own.

        The next control token fed must be the one that joins their segments: `<Conclusion>` or `</Parallel>`, for steps
        `</Execution>` or `<Conclusion>`.

        Args:
            children: builders returned by the last `fork` of this builder, whose block is still open, in the order of
                their labels; some may be left out.
        """
        frame = self.frames[-1]
        for child in children:
            frame.path_ends.append(child.segment)
            self.warnings.extend(child.warnings)

    # Control tokens

    def _apply_rule(self, tag: str, header: _Header) -> bool:
        """Apply the rule of control token `tag`; False if it has no meaning here and is an ordinary token.

        Args:
            tag: the control token.
            header: label or step number that follows it, for `<Path>` and `<Step>`.

        Raises:
            TopologyError: the token is malformed here and the builder is `strict`, or as for `feed`.
        """
        if tag == "<Step>":
            return self.open_step(header.step)
        if tag == "<Path>":
            return self.open_path(header.label)
        return self._rules[tag](self)

    def _read_header(self, tag: str, tail: np.ndarray) -> _Header:
        """Return the header that follows a control token: its label or number and its length in tokens.

        The header is empty without `decode`, and for control tokens that no forced tokens follow.

        Args:
            tag: the control token.
            tail: int64 [n], ids between it and the next control token, at most `TITLE_TOKENS`.
        """
        if self.decode is None or not (tag in _FORCED or tag in _SEPARATED):
            return _Header()
        following = tail.tolist()
        if tag == "<Path>":
            return self._read_label(following)
        blank = next((i for i, token_id in enumerate(following) if self._token_text(token_id).strip()), len(following))
        if tag != "<Step>":
            return _Header(blank)
        # The title ends at the end of its line, or with the last token.
        breaks = (i for i in range(blank, len(following)) if "\n" in self._token_text(following[i]))
        count = next(breaks, len(following) - 1) + 1
        title = self.decode(following[:count]).lstrip().split("\n", 1)[0]
        number = STEP_NUMBER.search(title)
        return _Header(count, step=int(number[1])) if number else _Header()

    def _read_label(self, following: list[int]) -> _Header:
        """Return the header of a path whose label ends within the first `LABEL_TOKENS` ids; otherwise an empty one."""
        text = ""
        for count, token_id in enumerate(following[:LABEL_TOKENS], 1):
            text += self._token_text(token_id)
            match = PATH_LABEL.match(text)
            if match:
                return _Header(count, label=match[1])
        return _Header()

    def _token_text(self, token_id: int) -> str:
        """Return the text of one token, or an empty string without `decode`.

        Texts are cached, because decoding is slow and headers consist of few different tokens.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id]) if self.decode is not None else ""
        return text


class _Header(NamedTuple):
    """The tokens that follow a control token and belong to it; forced in generation.

    Attributes:
        length: number of these tokens: white space, a path's label, or a step's title with its line break.
        label: label of a path such as `2.1`; otherwise an empty string.
        step: number of a step; otherwise None.
    """

    length: int = 0
    label: str = ""
    step: int | None = None
