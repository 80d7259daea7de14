"""Multiverse's control tokens: blocks of parallel paths, which may be nested.

    <Parallel> <Goal> (<Outline> 1: text </Outline>)+ </Goal>
    (<Path> 1: text </Path>)+ <Conclusion> text </Conclusion> </Parallel>

A segment is a run of consecutive tokens; a token may attend to the tokens before it in its own segment and to all
tokens of the segment's ancestors. Each path begins a segment that follows the block's trunk, the segment in which the
block opened. The join is the segment after the paths, which begins at `<Conclusion>` and follows the ends of all paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_efficient.modeling.topology.grammar.control_tokens import PATH_LABEL
from hf_efficient.modeling.topology.grammar.cursor import Cursor, Frame


class MultiverseRules(Cursor):
    """The rule of each control token, to be called before the token is appended to `segment`.

    A rule returns True if it applied its token, and False if the token has no meaning at this place and is an ordinary
    token. At a malformed token it raises `TopologyError` if `strict`; otherwise it adds to `warnings` (see
    `Cursor.report_malformed`) and goes on, or returns False.
    """

    def open_parallel(self) -> bool:
        """`<Parallel>`: open a block; False if blocks would be nested deeper than `MAX_DEPTH`."""
        if self.frames and not self.in_path:
            self.report_malformed(
                "a block opens beside the paths of another", "<Parallel>", "open it in a path or outside"
            )
        return self.open_frame("<Parallel>") is not None

    def close_outline(self) -> bool:
        """`</Outline>`: add the label of the collected outline to the block, an empty string if it has none.

        An ordinary token if no outline is open, or if the block's paths have begun.
        """
        if self.outline_ids is None:
            return False
        label, frame = PATH_LABEL.match(self.pop_outline()), self.frame
        if frame is None or frame.in_path or frame.joined:
            return False
        frame.outline_labels.append(label[1] if label else "")
        return True

    def close_goal(self) -> bool:
        """`</Goal>`: check that the outlines have different labels; an ordinary token outside a block or in a path."""
        frame = self.frame
        if frame is None or frame.in_path or frame.joined:
            return False
        repeated = first_repeated(frame.outline_labels)
        if repeated:
            self.report_malformed(f"two outlines are labelled {repeated}", "</Goal>", "give each path its own label")
        return True

    def open_path(self, label: str = "") -> bool:
        """`<Path>`: make `segment` a new segment that follows the trunk of the block.

        If not `strict`, a path inside another closes that one. False, after `report_malformed`, outside an open block,
        after its join, or if the graph has no room.

        Args:
            label: label in the path's header, or an empty string. It names the segment if the path's outline has no
                label; without either, the segment is named by the path's number in the block.
        """
        frame = self.frame
        if frame is None or frame.joined:
            return self.report_malformed("a path opens outside a block", "<Path>", "open a block with <Parallel> first")
        if frame.in_path:
            self.report_malformed(
                "a path opens inside another", "<Path>", "close it with </Path>, or open a <Parallel> in it"
            )
            self.close_path(frame)
        if not self.can_add_path("<Path>"):
            return False
        count = len(frame.path_labels)
        frame.path_labels.append(label)
        if label and label in frame.path_labels[:count]:
            self.report_malformed(f"two paths are labelled {label}", "<Path>", "give each path its own label")
        outlined = frame.outline_labels[count] if count < len(frame.outline_labels) else ""
        self.segment = self.graph.new([frame.trunk], outlined or label or f"{frame.prefix}{count + 1}")
        frame.in_path = True
        return True

    def close_open_path(self) -> bool:
        """`</Path>`: close the open path, whose segment a separator may still extend."""
        frame = self.frame
        if frame is None or not frame.in_path:
            return self.report_malformed("no path is open", "</Path>", "open it with <Path>")
        self.close_path(frame)
        return True

    def conclude_block(self) -> bool:
        """`<Conclusion>`: join the paths of the block in a new segment; False if the block has no path."""
        frame = self.frame
        if frame is None:
            return self.report_malformed("no block is open", "<Conclusion>", "open it with <Parallel>")
        if frame.joined:
            return self.report_malformed(
                "the block has a conclusion already", "<Conclusion>", "write one for each block"
            )
        self.end_paths(frame, "<Conclusion>")
        if frame.path_ends:
            self.join_paths(frame)
        return bool(frame.path_ends)

    def close_parallel(self) -> bool:
        """`</Parallel>`: close the block, and join its paths if no conclusion has; that is malformed."""
        frame = self.frame
        if frame is None:
            return self.report_malformed("no block is open", "</Parallel>", "open it with <Parallel>")
        if not frame.joined:
            self.end_paths(frame, "</Parallel>")
            if frame.path_ends:
                self.report_malformed(
                    "the block has no conclusion", "</Parallel>", "write <Conclusion> after its last path"
                )
                self.join_paths(frame)
        self.frames.pop()
        # A block between two paths belongs to the path before it.
        outer = self.frame
        if outer is not None and outer.path_ends and not outer.in_path and not outer.joined:
            outer.path_ends[-1] = self.segment
        return True

    def end_paths(self, frame: Frame, tag: str) -> None:
        """Close the open path before a join, and check that there is one path for each outline.

        Args:
            frame: the innermost open block.
            tag: control token that joins the paths, for messages.
        """
        if frame.in_path:
            self.report_malformed("a path is still open", tag, "close it with </Path>")
            self.close_path(frame)
        outlines, paths = len(frame.outline_labels), len(frame.path_ends)
        if not paths:
            self.report_malformed("the block has no path", tag, "write at least one <Path>")
        elif outlines != paths:
            self.report_malformed(
                f"the block has {outlines} outlines and {paths} paths", tag, "write one outline for each path"
            )


def first_repeated(labels: Sequence[str]) -> str:
    """Return the first label that repeats an earlier one, or an empty string; empty labels do not count."""
    return next((label for i, label in enumerate(labels) if label and label in labels[:i]), "")


# Control token -> its rule. The rule of `<Path>` takes the label; `<Think>` and others have none.
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
