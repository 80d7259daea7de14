"""Forced tokens: the openers, headers, separators and joins that parallel generation writes in place of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS

Encode = Callable[[str], Sequence[int]]


def encode_function(tokenizer: Any) -> Encode:
    """A function from a text with control tokens to its ids, without special tokens added."""
    return functools.partial(tokenizer.encode, add_special_tokens=False)


class ForcedText:
    """The forced tokens of a grammar, as ids.

    A text is encoded together with the control token before it, as in the training data.

    Args:
        grammar: `multiverse` or `medverse`.
        token_ids: control token -> id.
        encode: token ids of a text.
        separator: text between two control tokens.

    Attributes:
        fork_id: the token after which branches begin: `</Goal>` or `</Plan>`.
        close_id: the token that ends a branch: `</Path>` or `</Step>`.
        open_id: the token that opens a block inside a branch: `<Parallel>`; None for MedVerse.
        invalid_in_branch: id -> control token, for the control tokens that are invalid directly inside a branch and
            therefore end it.
        control_ids: ids of all control tokens.
        separator_ids: follow `fork_id` and `close_id`.
        execution_ids: follow the separator after MedVerse's plan; empty for Multiverse.
        join_ids: the first tokens of a join.

    Raises:
        TopologyError: the tokenizer encodes a control token as another id.
    """

    def __init__(self, grammar: str, token_ids: Mapping[str, int], encode: Encode, separator: str = "\n") -> None:
        self.grammar = grammar
        self._token_ids = token_ids
        self._encode = encode
        self._separator = separator
        self.control_ids = frozenset(token_ids[tag] for tag in CONTROL_TOKENS[grammar])
        if grammar == "multiverse":
            fork, close, invalid = "</Goal>", "</Path>", ("<Path>", "<Conclusion>", "</Parallel>")
            self.open_id: int | None = token_ids["<Parallel>"]
            self.execution_ids: tuple[int, ...] = ()
            self.join_ids = self._encode_tag("<Conclusion>", separator)
        else:
            fork, close, invalid = "</Plan>", "</Step>", ("<Step>", "<Conclusion>", "</Execution>")
            self.open_id = None
            self.execution_ids = self._encode_tag("<Execution>", separator)
            self.join_ids = (
                *self._encode_tag("</Execution>", separator),
                *self._encode_tag("<Conclusion>", separator),
            )
        self.fork_id, self.close_id = token_ids[fork], token_ids[close]
        self.invalid_in_branch = {token_ids[tag]: tag for tag in invalid}
        self.separator_ids = self._encode_tag(close, separator)[1:]
        self._headers: dict[str, tuple[int, ...]] = {}

    def path_header(self, label: str) -> tuple[int, ...]:
        """Ids of a Multiverse path's header: ``<Path>``, separator, ``label:``."""
        return self._header("<Path>", f"{self._separator}{label}:")

    def step_header(self, number: int, title: str) -> tuple[int, ...]:
        """Ids of a MedVerse step's header: ``<Step> Transient Step number: title`` and a line break."""
        title = " ".join(title.split())
        return self._header("<Step>", f" Transient Step {number}: {title}".rstrip() + "\n")

    def close_block_ids(self, in_path: bool) -> tuple[int, ...]:
        """Ids that close a block inside a Multiverse path: first the block's open path where `in_path`."""
        close_block = self._token_ids["</Parallel>"]
        return (self.close_id, close_block) if in_path else (close_block,)

    def disallowed_ids(self, eos_ids: Collection[int]) -> dict[str, tuple[int, ...]]:
        """Value of `Branch.context` -> ids that would make the text malformed there; no entry where none would.

        Args:
            eos_ids: tokens that end the text.
        """
        in_path = tuple(sorted((self.control_ids - {self.close_id, self.open_id}) | set(eos_ids)))
        return {"branch": in_path, "path": in_path, "block": (self.close_id, *eos_ids)}

    def _header(self, tag: str, text: str) -> tuple[int, ...]:
        key = tag + text
        if key not in self._headers:
            first, *rest = self._encode_tag(tag, text)
            # The model wrote the label or title, which may contain the text of a control token.
            self._headers[key] = (first, *(token for token in rest if token not in self.control_ids))
        return self._headers[key]

    def _encode_tag(self, tag: str, text: str) -> tuple[int, ...]:
        """Ids of a control token and the text after it."""
        ids = tuple(int(token) for token in self._encode(tag + text))
        if not ids or ids[0] != self._token_ids[tag]:
            raise TopologyError(
                f"the tokenizer encodes {tag + text!r} as {list(ids[:4])}…, but the model's id of {tag} is "
                f"{self._token_ids[tag]}",
                "use the tokenizer that belongs to this checkpoint",
            )
        return ids
