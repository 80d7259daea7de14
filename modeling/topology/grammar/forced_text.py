"""What parallel generation writes by itself: openers, headers, separators and joins, as token ids."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hf_efficient.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS

Encode = Callable[[str], Sequence[int]]


def encoder_of(tokenizer: Any) -> Encode:
    """Token ids of a text, its control tokens included, and nothing added."""
    return functools.partial(tokenizer.encode, add_special_tokens=False)


class ForcedText:
    """The tokens that a grammar forces. A text is encoded with the tag before it, as in the training data.

    Args:
        grammar: `multiverse` or `medverse`.
        token_ids: control token -> id.
        encode: token ids of a text.
        separator: text that follows nearly every tag.

    Attributes:
        fork: the token after which branches begin.
        closer: the token that ends a branch.
        opener: the token that opens a block inside a branch; None where there is none.
        enders: tokens that cannot stand in a branch, so that they end it as well.
        control: ids of all control tokens.
        separator: what follows `fork` and `closer`.
        execution: what follows the separator of MedVerse's plan; empty for Multiverse.
        join: what a join begins with.
    """

    def __init__(self, grammar: str, token_ids: Mapping[str, int], encode: Encode, separator: str = "\n") -> None:
        self.grammar = grammar
        self._token_ids = token_ids
        self._encode = encode
        self._separator = separator
        self.control = frozenset(token_ids[tag] for tag in CONTROL_TOKENS[grammar])
        if grammar == "multiverse":
            fork, closer, enders = "</Goal>", "</Path>", ("<Path>", "<Conclusion>", "</Parallel>")
            self.opener: int | None = token_ids["<Parallel>"]
            self.execution: tuple[int, ...] = ()
            self.join = self._after("<Conclusion>", separator)
        else:
            fork, closer, enders = "</Plan>", "</Step>", ("<Step>", "<Conclusion>", "</Execution>")
            self.opener = None
            self.execution = self._after("<Execution>", separator)
            self.join = (*self._after("</Execution>", separator), *self._after("<Conclusion>", separator))
        self.fork, self.closer = token_ids[fork], token_ids[closer]
        self.enders = {token_ids[tag]: tag for tag in enders}
        self.separator = self._after(closer, separator)[1:]
        self._headers: dict[str, tuple[int, ...]] = {}

    def path_header(self, label: str) -> tuple[int, ...]:
        """What a Multiverse path begins with: ``<Path>``, separator, ``label:``."""
        return self._header("<Path>", f"{self._separator}{label}:")

    def step_header(self, number: int, title: str) -> tuple[int, ...]:
        """What a MedVerse step begins with: ``<Step> Transient Step number: title`` and a separator."""
        title = " ".join(title.split())
        return self._header("<Step>", f" Transient Step {number}: {title}".rstrip() + "\n")

    def closing(self, in_path: bool) -> tuple[int, ...]:
        """What closes a block inside a Multiverse path: its open path, where there is one, and the block."""
        close_block = self._token_ids["</Parallel>"]
        return (self.closer, close_block) if in_path else (close_block,)

    def misplaced(self, eos_ids: Collection[int]) -> dict[str, tuple[int, ...]]:
        """For each value of `Branch.banned`, the tokens that break the text there."""
        in_path = tuple(sorted((self.control - {self.closer, self.opener}) | set(eos_ids)))
        return {"branch": in_path, "path": in_path, "block": (self.closer, *eos_ids)}

    def _header(self, tag: str, text: str) -> tuple[int, ...]:
        key = tag + text
        if key not in self._headers:
            first, *rest = self._after(tag, text)
            # A label or title that the model wrote may hold what reads as a tag.
            self._headers[key] = (first, *(token for token in rest if token not in self.control))
        return self._headers[key]

    def _after(self, tag: str, text: str) -> tuple[int, ...]:
        ids = tuple(int(token) for token in self._encode(tag + text))
        if not ids or ids[0] != self._token_ids[tag]:
            raise TopologyError(
                f"the tokenizer encodes {tag + text!r} as {list(ids[:4])}…, but the model's id of {tag} is "
                f"{self._token_ids[tag]}",
                "use the tokenizer that belongs to this checkpoint",
            )
        return ids
