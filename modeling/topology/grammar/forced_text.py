"""Forced tokens: the control tokens, headers and separators that parallel generation appends without sampling.

Control tokens are tags such as `<Path>`, each one token. A branch is a path or step that is decoded in parallel with
its siblings. It begins after a fork with a forced header, `<Path>` and a label or `<Step>` and a title. When all
branches have ended, their parent is continued with the forced tokens of the join. A separator is the white space
between two control tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS

Encode = Callable[[str], Sequence[int]]


def encode_function(tokenizer: Any) -> Encode:
    """Return a function from a text, which may contain control tokens, to its ids, without special tokens added.

    Args:
        tokenizer: a tokenizer of transformers.
    """
    return functools.partial(tokenizer.encode, add_special_tokens=False)


class ForcedText:
    """The forced tokens of a grammar, as ids.

    Each text is encoded together with the control token before it, so that its tokens are those of the training data.

    Args:
        grammar: `multiverse` or `medverse`.
        token_ids: control token -> id, for every control token of the grammar.
        encode: function from a text to its token ids; see `encode_function`.
        separator: white space between two control tokens; may be empty.

    Attributes:
        fork_id: the token after which branches begin: `</Goal>` or `</Plan>`.
        close_id: the closing tag of a branch: `</Path>` or `</Step>`.
        open_id: the token that opens a block inside a branch: `<Parallel>`; None for MedVerse.
        invalid_in_branch: id -> control token, for the control tokens that are invalid directly inside a branch: when
            one is sampled there, the scheduler closes the branch instead.
        control_ids: ids of all control tokens.
        separator_ids: ids of the separator, appended after `fork_id` and `close_id`.
        execution_ids: `<Execution>` and a separator, appended after the separator that follows MedVerse's plan; empty
            for Multiverse.
        join_ids: first tokens of a join: `<Conclusion>` and a separator, for MedVerse after `</Execution>` and a
            separator.

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
        """Return the ids of a Multiverse path's header: ``<Path>``, separator, ``label:``.

        Raises:
            TopologyError: the tokenizer encodes `<Path>` as another id in this text.
        """
        return self._header("<Path>", f"{self._separator}{label}:")

    def step_header(self, number: int, title: str) -> tuple[int, ...]:
        """Return the ids of a MedVerse step's header: ``<Step> Transient Step number: title`` and a line break.

        White space in the title is reduced to single spaces.

        Raises:
            TopologyError: the tokenizer encodes `<Step>` as another id in this text.
        """
        title = " ".join(title.split())
        return self._header("<Step>", f" Transient Step {number}: {title}".rstrip() + "\n")

    def close_block_ids(self, in_path: bool) -> tuple[int, ...]:
        """Return the ids that close a block nested in a Multiverse path: `</Path>` if `in_path`, then `</Parallel>`."""
        close_block = self._token_ids["</Parallel>"]
        return (self.close_id, close_block) if in_path else (close_block,)

    def disallowed_ids(self, eos_ids: Collection[int]) -> dict[str, tuple[int, ...]]:
        """Return for each place in the text the token ids that a model may be kept from choosing there.

        In a branch or path these are EOS and all control tokens, except the one that closes it and the one that opens a
        block in it. Between the paths of a block they are EOS and the closing tag of a path.

        Args:
            eos_ids: ids of the tokens that end the text.

        Returns:
            Place (a value of `Branch.context`) -> ids. `branch`: directly in a branch; `path`: in a path of a block
            that is decoded sequentially inside a branch; `block`: in such a block, between its paths. There is no entry
            for `outside`, where no id is disallowed.
        """
        in_path = tuple(sorted((self.control_ids - {self.close_id, self.open_id}) | set(eos_ids)))
        return {"branch": in_path, "path": in_path, "block": (self.close_id, *eos_ids)}

    def _header(self, tag: str, text: str) -> tuple[int, ...]:
        """Return the ids of a control token and the text after it, without other control tokens; cached.

        Raises:
            TopologyError: as for `_encode_tag`.
        """
        key = tag + text
        if key not in self._headers:
            first, *rest = self._encode_tag(tag, text)
            # The model has generated the label or title, which may contain the text of a control token.
            self._headers[key] = (first, *(token for token in rest if token not in self.control_ids))
        return self._headers[key]

    def _encode_tag(self, tag: str, text: str) -> tuple[int, ...]:
        """Return the ids of a control token and the text after it.

        Raises:
            TopologyError: the first id is not that of the control token.
        """
        ids = tuple(int(token) for token in self._encode(tag + text))
        if not ids or ids[0] != self._token_ids[tag]:
            raise TopologyError(
                f"the tokenizer encodes {tag + text!r} as {list(ids[:4])}…, but the model's id of {tag} is "
                f"{self._token_ids[tag]}",
                "use the tokenizer that belongs to this checkpoint",
            )
        return ids
