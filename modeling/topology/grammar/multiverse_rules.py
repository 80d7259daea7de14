"""Multiverse's control tokens: blocks of parallel paths, which may hold blocks themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_efficient.modeling.topology.grammar.control_tokens import PATH_LABEL
from hf_efficient.modeling.topology.grammar.cursor import Cursor, Frame


class MultiverseRules(Cursor):
    """What each tag does."""

    def open_parallel(self) -> bool:
        if self.frames and not self.in_path:
            self.complain("a block opens beside the paths of another", "<Parallel>", "open it in a path or outside")
        return self.open_frame("<Parallel>") is not None

    def close_outline(self) -> bool:
        if self.outline_ids is None:
            return False
        found, frame = PATH_LABEL.match(self.take_outline()), self.frame
        if frame is None or frame.in_path or frame.joined:
            return False
        frame.labels.append(found[1] if found else "")
        return True

    def close_goal(self) -> bool:
        frame = self.frame
        if frame is None or frame.in_path or frame.joined:
            return False
        repeated = first_repeated(frame.labels)
        if repeated:
            self.complain(f"two outlines are labelled {repeated}", "</Goal>", "give each path a label of its own")
        return True

    def open_path(self, label: str = "") -> bool:
        frame = self.frame
        if frame is None or frame.joined:
            return self.complain("a path opens outside a block", "<Path>", "open a block with <Parallel> first")
        if frame.in_path:
            self.complain("a path opens inside another", "<Path>", "close it with </Path>, or open a <Parallel> in it")
            self.close_path(frame)
        if not self.may_branch("<Path>"):
            return False
        count = len(frame.paths)
        frame.paths.append(label)
        if label and label in frame.paths[:count]:
            self.complain(f"two paths are labelled {label}", "<Path>", "give each path a label of its own")
        outlined = frame.labels[count] if count < len(frame.labels) else ""
        self.cur = self.graph.new([frame.trunk], outlined or label or f"{frame.prefix}{count + 1}")
        frame.in_path = True
        return True

    def close_open_path(self) -> bool:
        frame = self.frame
        if frame is None or not frame.in_path:
            return self.complain("no path is open", "</Path>", "open it with <Path>")
        self.close_path(frame)
        return True

    def conclude_block(self) -> bool:
        frame = self.frame
        if frame is None:
            return self.complain("no block is open", "<Conclusion>", "open it with <Parallel>")
        if frame.joined:
            return self.complain("the block has a conclusion already", "<Conclusion>", "write one for each block")
        self.end_paths(frame, "<Conclusion>")
        if frame.tails:
            self.join_segments(frame)
        return bool(frame.tails)

    def close_parallel(self) -> bool:
        frame = self.frame
        if frame is None:
            return self.complain("no block is open", "</Parallel>", "open it with <Parallel>")
        if not frame.joined:
            self.end_paths(frame, "</Parallel>")
            if frame.tails:
                self.complain("the block has no conclusion", "</Parallel>", "write <Conclusion> after its last path")
                self.join_segments(frame)
        self.frames.pop()
        # A block between two paths belongs to the path before it.
        outer = self.frame
        if outer is not None and outer.tails and not outer.in_path and not outer.joined:
            outer.tails[-1] = self.cur
        return True

    def end_paths(self, frame: Frame, tag: str) -> None:
        """Close what is open before a join, and check the number of paths."""
        if frame.in_path:
            self.complain("a path is still open", tag, "close it with </Path>")
            self.close_path(frame)
        outlines, paths = len(frame.labels), len(frame.tails)
        if not paths:
            self.complain("the block has no path", tag, "write at least one <Path>")
        elif outlines != paths:
            self.complain(
                f"the block has {outlines} outlines and {paths} paths", tag, "write one outline for each path"
            )


def first_repeated(labels: Sequence[str]) -> str:
    """The first label that is there for the second time; unread ones do not count."""
    return next((label for i, label in enumerate(labels) if label and label in labels[:i]), "")


MULTIVERSE_RULES: dict[str, Callable[..., Any]] = {
    "<Parallel>": MultiverseRules.open_parallel,
    "</Parallel>": MultiverseRules.close_parallel,
    "</Goal>": MultiverseRules.close_goal,
    "<Outline>": MultiverseRules.open_outline,
    "</Outline>": MultiverseRules.close_outline,
    "<Path>": MultiverseRules.open_path,
    "</Path>": MultiverseRules.close_open_path,
    "<Conclusion>": MultiverseRules.conclude_block,
}
