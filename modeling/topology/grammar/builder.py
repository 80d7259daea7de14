"""The state machine that gives every token its segment and its position, in training and in decoding alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from hf_efficient.errors import TopologyError, UsageError
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
# Tokens in which a path's label, and a step's title, must end.
LABEL_TOKENS = 16
TITLE_TOKENS = 64
# Tags that generation writes itself, and tags after which it writes a separator.
_FORCED = frozenset({"<Path>", "<Step>", "<Execution>", "</Execution>", "<Conclusion>"})
_SEPARATED = frozenset({"</Goal>", "</Path>", "</Plan>", "</Step>"})


class TopologyBuilder(MultiverseRules, MedVerseRules):
    """A cursor that appends tokens to a graph of segments and follows the control tokens among them.

    A separator after a path's closing tag belongs to that path, and its siblings do not see it.

    Args:
        grammar: `multiverse` or `medverse`.
        token_ids: control token -> id.
        mode: what MedVerse's steps see: `dag`, `layers` or `flat`.
        strict: malformed input raises `TopologyError`; else the cursor makes the best of it and `warnings` tells.
        decode: text of token ids. MedVerse cannot do without; Multiverse reads labels with it.
        graph: graph to go on with, at its last segment; by default a new one with a root.
        row: row of the batch, for messages.
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
        self.cur = len(self.graph) - 1 if len(self.graph) else self.graph.new([], "root")
        self.frames = []
        self.plan_read = Plan()
        self.warnings = []
        self.fed = 0
        self._rules = RULES[grammar]
        self._tags = {token_ids[tag]: tag for tag in self._rules}
        self._control = np.array(sorted(self._tags), dtype=np.int64)
        self._texts: dict[int, str] = {}  # of single tokens

    @property
    def outline_labels(self) -> list[str]:
        """Labels of the open block's outlines, an empty text for each that has none."""
        return list(self.frames[-1].labels) if self.frames else []

    def feed(self, token_id: int, step: int | None = None) -> Placement:
        """Append one token.

        Args:
            token_id: the token.
            step: the number of the step that a `<Step>` opens. A step of unknown number, as in text that was not
                foreseen, sees all steps before it; `feed_many` reads the number from the header instead.
        """
        tag = self._tags.get(token_id)
        if tag is not None:
            self._follow(tag, _Header(step=step))
        elif self.outline_ids is not None:
            self.outline_ids.append(token_id)
        self.fed += 1
        return Placement(self.cur, self.graph.append(self.cur))

    def feed_many(self, ids: Sequence[int] | np.ndarray) -> Placements:
        """Append tokens; the time depends on the number of control tokens, hardly on that of the others."""
        given = np.asarray(ids)
        if given.size and (given.size != given.shape[-1] or given.dtype.kind not in "iu"):
            raise UsageError(
                f"the ids are {given.dtype} of shape {list(given.shape)}", "pass the whole numbers of one row: [S]"
            )
        ids = given.astype(np.int64).reshape(-1)
        forced = np.zeros(len(ids), dtype=bool)
        segments: list[int] = []
        starts: list[int] = []
        counts: list[int] = []

        def append(count: int) -> None:
            segments.append(self.cur)
            starts.append(self.graph.append(self.cur, count))
            counts.append(count)
            self.fed += count

        at = 0
        stops = np.flatnonzero(np.isin(ids, self._control)).tolist()
        for stop, following in zip(stops, [*stops[1:], len(ids)], strict=False):
            if stop > at:
                if self.outline_ids is not None:
                    self.outline_ids.extend(ids[at:stop].tolist())
                append(stop - at)
            tag = self._tags[int(ids[stop])]
            header = self._read_header(tag, ids[stop + 1 : min(following, stop + 1 + TITLE_TOKENS)])
            # A tag that is taken for ordinary text forces nothing.
            if self._follow(tag, header):
                forced[stop + (tag in _SEPARATED) : stop + 1 + header.length] = tag in _FORCED or tag in _SEPARATED
            append(1)
            at = stop + 1
        if len(ids) > at:
            if self.outline_ids is not None:
                self.outline_ids.extend(ids[at:].tolist())
            append(len(ids) - at)

        lengths = np.array(counts, dtype=np.int64)
        firsts = np.cumsum(lengths) - lengths
        position_ids = np.repeat(np.array(starts, dtype=np.int64) - firsts, lengths) + np.arange(len(ids))
        return Placements(np.repeat(np.array(segments, dtype=np.int32), lengths), position_ids, forced)

    def finish(self, allow_truncated: bool = False) -> None:
        """Complain about what is left open at the end of a text."""
        if allow_truncated:
            return
        if self.frames:
            frame = self.frames[-1]
            self.complain(
                f"the block that opened at token {frame.opened} is not closed",
                frame.tag,
                "close it, or read a text that was cut with allow_truncated=True (collator: strict=False)",
            )
        elif self.plan and not self.executed:
            self.complain(
                "the plan is never executed", "<Plan>", "write its steps between <Execution> and </Execution>"
            )

    # Cursors that run beside each other

    def fork(self, branches: int | Sequence[Any]) -> list[TopologyBuilder]:
        """A cursor for each path of the open block, or each step of the open execution, on the same graph.

        The first token that a cursor is fed must be its opener: `<Path>`, or `<Step>` with ``step=``, once the steps
        that it needs are done. This cursor waits until `join`.

        Args:
            branches: how many paths, labelled as the outlines are, or their labels; for steps their numbers, in the
                order of the text.
        """
        frame = self.frame
        if frame is None or frame.in_path or frame.joined:
            raise TopologyError("there is no open block to fork", "fork after </Goal> or <Execution>", row=self.row)
        if isinstance(branches, int):
            branches = [*frame.labels, *[""] * branches][:branches]
        labels = list(branches)
        if frame.steps is not None:
            frame.steps.foresee(labels)
        children = []
        for count, label in enumerate(labels, len(frame.tails) + 1):
            child = object.__new__(type(self))
            child.__dict__.update(self.__dict__)
            trunk = self.cur if frame.steps is None else frame.trunk
            named = [str(label) or f"{frame.prefix}{count}"]
            child.frames = [replace(frame, trunk=trunk, tails=[], labels=named, paths=[])]
            child.warnings = []
            child.base_depth = self.depth - 1
            children.append(child)
        return children

    def join(self, children: Iterable[TopologyBuilder]) -> None:
        """Take the cursors of a fork back, in the order of their labels; the next tag joins them.

        That is `<Conclusion>` or `</Parallel>`, for steps `</Execution>` or `<Conclusion>`.
        """
        frame = self.frames[-1]
        for child in children:
            frame.tails.append(child.cur)
            self.warnings.extend(child.warnings)

    # Tags

    def _follow(self, tag: str, header: _Header) -> bool:
        """Make the transition of `tag`; False when it is taken for ordinary text."""
        if tag == "<Step>":
            return self.open_step(header.step)
        if tag == "<Path>":
            return self.open_path(header.label)
        return self._rules[tag](self)

    def _read_header(self, tag: str, tail: np.ndarray) -> _Header:
        """What `tail`, the ids between a tag and the next, says of it."""
        if self.decode is None or not (tag in _FORCED or tag in _SEPARATED):
            return _Header()
        following = tail.tolist()
        if tag == "<Path>":
            return self._read_label(following)
        blank = next((i for i, token_id in enumerate(following) if self._text(token_id).strip()), len(following))
        if tag != "<Step>":
            return _Header(blank)
        # The title ends with its line, or where tokens run out.
        breaks = (i for i in range(blank, len(following)) if "\n" in self._text(following[i]))
        count = next(breaks, len(following) - 1) + 1
        title = self.decode(following[:count]).lstrip().split("\n", 1)[0]
        found = STEP_NUMBER.search(title)
        return _Header(count, step=int(found[1])) if found else _Header()

    def _read_label(self, following: list[int]) -> _Header:
        text = ""
        for count, token_id in enumerate(following[:LABEL_TOKENS], 1):
            text += self._text(token_id)
            found = PATH_LABEL.match(text)
            if found:
                return _Header(count, label=found[1])
        return _Header()

    def _text(self, token_id: int) -> str:
        """Text of one token; asked again and again for few of them."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id]) if self.decode is not None else ""
        return text


class _Header(NamedTuple):
    """What follows a tag: how many tokens belong to it, and what they say."""

    length: int = 0
    label: str = ""
    step: int | None = None
