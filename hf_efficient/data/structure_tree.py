"""The elements of a structured text as a tree, with their offsets in the text.

A structured text contains control tokens, tags such as `<Goal>`, of one of two grammars: Multiverse or MedVerse. An
element is the text from an opening tag to its closing tag. Offsets are character indices, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS

# Name of the root element, the whole text, which has no tag.
ROOT = ""


@dataclass(frozen=True)
class Issue:
    """One problem of a structured text.

    Attributes:
        line: line of the problem, counted from 1.
        offset: character index of the problem, counted from 0.
        tag: the tag there, such as `<Goal>`, or the opening tag of the element that the problem is in.
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
        name: name of its tag, such as `Goal`; an empty string for the root of the tree, the whole text.
        start: offset of its opening tag.
        inner: offsets of its content: of the first character, and of the one after the last.
        stop: offset of the character after its closing tag.
        children: the elements directly inside it, in order.
    """

    name: str
    start: int
    inner: tuple[int, int]
    stop: int = -1
    children: list[Element] = field(default_factory=list)

    def named(self, name: str) -> list[Element]:
        """Return the direct children with this name, in order."""
        return [child for child in self.children if child.name == name]

    def walk(self) -> Iterator[Element]:
        """Iterate over all elements inside this one, in pre-order (the order of their opening tags)."""
        pending = self.children[::-1]
        while pending:
            element = pending.pop()
            yield element
            pending += element.children[::-1]

    def own_text(self, text: str) -> Iterator[tuple[int, str]]:
        """Iterate over the parts of its content outside its children, as (offset, part); parts may be empty.

        Args:
            text: the whole text.
        """
        start = self.inner[0]
        for child in self.children:
            yield start, text[start : child.start]
            start = child.stop
        yield start, text[start : self.inner[1]]


def tag_pattern(grammar: str) -> re.Pattern[str]:
    """Return a pattern that matches the grammar's control tokens; group 1 is `/` or empty, group 2 the tag's name.

    Args:
        grammar: `multiverse` or `medverse`; `KeyError` for another one.
    """
    names = {tag.strip("</>") for tag in CONTROL_TOKENS[grammar]}
    return re.compile(f"<(/?)({'|'.join(sorted(names))})>")


def read_tree(text: str, grammar: str, report: Callable[[int, str, str], None]) -> Element:
    """Return the root of the tree of a text's elements.

    It raises no error: a closing tag without an opening one is ignored, and an element that is not closed ends where
    its parent ends.

    Args:
        text: the text.
        grammar: `multiverse` or `medverse`.
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
