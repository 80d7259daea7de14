"""The elements of a structured text as a tree, with their offsets in the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS

ROOT = ""


@dataclass(frozen=True)
class Issue:
    """One problem of a structured text.

    Attributes:
        line: line of the problem, from 1.
        offset: character of the problem, from 0.
        tag: the tag there, or that of the element it belongs to.
        problem: what is wrong.
    """

    line: int
    offset: int
    tag: str
    problem: str

    def __str__(self) -> str:
        return f"line {self.line} (character {self.offset}), {self.tag}: {self.problem}"


@dataclass
class Element:
    """An element such as `<Goal> … </Goal>`.

    Attributes:
        name: name of its tag; an empty name for the whole text, which is the root of the tree.
        start: offset of its opening tag.
        inner: offsets of its content: the first character, and the one after the last.
        stop: offset after its closing tag.
        children: the elements directly inside it, in order.
    """

    name: str
    start: int
    inner: tuple[int, int]
    stop: int = -1
    children: list[Element] = field(default_factory=list)

    def named(self, name: str) -> list[Element]:
        """The children with this name."""
        return [child for child in self.children if child.name == name]

    def walk(self) -> Iterator[Element]:
        """All elements below this one, in pre-order."""
        pending = self.children[::-1]
        while pending:
            element = pending.pop()
            yield element
            pending += element.children[::-1]

    def own_text(self, text: str) -> Iterator[tuple[int, str]]:
        """The pieces of its content outside its children, with their offsets."""
        start = self.inner[0]
        for child in self.children:
            yield start, text[start : child.start]
            start = child.stop
        yield start, text[start : self.inner[1]]


def tag_pattern(grammar: str) -> re.Pattern[str]:
    """A pattern of the grammar's control tokens; group 1 is `/` for a closing tag, group 2 the name."""
    names = {tag.strip("</>") for tag in CONTROL_TOKENS[grammar]}
    return re.compile(f"<(/?)({'|'.join(sorted(names))})>")


def read_tree(text: str, grammar: str, report: Callable[[int, str, str], None]) -> Element:
    """The tree of a text's elements. An element that is not closed ends where its parent ends.

    Args:
        report: called as ``report(offset, tag, problem)`` for each tag without a counterpart.
    """
    whole = Element(ROOT, 0, (0, len(text)), len(text))
    stack = [whole]

    def close(stop: int, after: int) -> None:
        element = stack.pop()
        element.inner, element.stop = (element.inner[0], stop), after

    for match in tag_pattern(grammar).finditer(text):
        closing, name = match[1], match[2]
        if not closing:
            element = Element(name, match.start(), (match.end(), len(text)))
            stack[-1].children.append(element)
            stack.append(element)
        elif name not in [element.name for element in stack[1:]]:
            report(match.start(), match[0], "closes nothing")
        else:
            while stack[-1].name != name:
                report(stack[-1].start, f"<{stack[-1].name}>", f"is not closed before {match[0]}")
                close(match.start(), match.start())
            close(match.start(), match.end())
    while len(stack) > 1:
        report(stack[-1].start, f"<{stack[-1].name}>", "is never closed")
        close(len(text), len(text))
    return whole
