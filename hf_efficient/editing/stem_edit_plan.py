"""Plans of knowledge edits: which positions of a prompt use the table rows of which other tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger

MODES = ("auto", "one_to_one", "left_pad", "right_pad", "copy", "subset", "average")


@dataclass(frozen=True)
class StemEditPlan:
    """Positions of a prompt, and the tokens whose rows the STEM layers use there.

    Attributes:
        positions: of the source entity's tokens in the tokenised prompt, counted without padding.
        source_ids: the token at each position; a call with another token there is an error.
        replacements: for each position the tokens whose rows are used: one, or several whose mean is taken.
        mode: how lengths were matched; never `auto`.
        layers: STEM layers that the edit applies to; None for all.
        source, target: the entities.
        target_ids: the target's tokens.
    """

    positions: tuple[int, ...]
    source_ids: tuple[int, ...]
    replacements: tuple[tuple[int, ...], ...]
    mode: str
    layers: tuple[int, ...] | None
    source: str
    target: str
    target_ids: tuple[int, ...]


def stem_edit_plan(
    tokenizer: Any,
    prompt: str,
    source: str,
    target: str,
    mode: str = "auto",
    layers: Sequence[int] | None = None,
    keep: Sequence[int] | None = None,
    counts: Mapping[int, float] | Sequence[float] | None = None,
) -> StemEditPlan:
    """A plan that gives the tokens of `source` in `prompt` the rows of `target`; for `stem_override`.

    The entity is the last literal occurrence of `source` in `prompt`. Its tokens are found by their character offsets
    in the whole prompt, and those of `target` by offsets in the prompt with `target` in place of `source`, so that a
    space before a word is part of its token if the tokenizer treats it so. With n source and m target tokens:

    | mode | row at source position k |
    |---|---|
    | `one_to_one` | target token k; n = m |
    | `left_pad` | n > m: the pad token at the first n - m, then the target; n < m: the last n target tokens |
    | `right_pad` | the target, then the pad token at the last n - m; n < m: the first n target tokens |
    | `copy` | target token k mod m |
    | `subset` | the n target tokens of `keep`, or those with the lowest `counts`, in their order; n <= m |
    | `average` | the mean of the rows of all target tokens |
    | `auto` | `one_to_one` where n = m, else `average` |

    Args:
        tokenizer: a fast tokenizer, which gives character offsets; called as ``tokenizer(prompt)``.
        prompt: the text that the model will be called with.
        source, target: the entity in the prompt, and the one whose rows replace its rows.
        mode: one of the table.
        layers: STEM layers to edit; None for all.
        keep: for `subset`: indices of the target's tokens to keep, n of them.
        counts: for `subset`: how often each token id occurs in some text, by id; an absent id counts 0.

    The pad token is the tokenizer's, or its EOS, or, with a warning, its BOS.

    Raises:
        HFEError: the source is not in the prompt, shares a token with other words, or does not fit the mode; an
            argument is given that the mode does not take; the target has unknown tokens.

    Source: STEM, arXiv:2601.10639, section 3.5; `subset` by counts is our own.

    Example:
        >>> plan = stem_edit_plan(tokenizer, "The capital of Spain is", "Spain", "Germany")
        >>> with stem_override(model, plan):
        ...     model.generate(**tokenizer("The capital of Spain is", return_tensors="pt"))
    """
    if mode not in MODES:
        raise HFEError(f"mode={mode!r} is unknown", f"choose one of {', '.join(MODES)}")
    if mode != "subset" and (keep is not None or counts is not None):
        raise HFEError(f"mode={mode!r} takes neither keep nor counts", "leave them out, or choose mode='subset'")
    if not source or not target:
        raise HFEError(f"source={source!r} and target={target!r}: neither may be empty", "name both entities")
    start = prompt.rfind(source)
    if start < 0:
        raise HFEError(f"the source {source!r} is not in the prompt {prompt!r}", "write it as the prompt does")
    positions, source_ids = _tokens_of_span(tokenizer, prompt, start, start + len(source))
    with_target = prompt[:start] + target + prompt[start + len(source) :]
    _, target_ids = _tokens_of_span(tokenizer, with_target, start, start + len(target))
    _check_known(tokenizer, target, target_ids)

    if mode == "auto":
        mode = "one_to_one" if len(source_ids) == len(target_ids) else "average"
    return StemEditPlan(
        positions=positions,
        source_ids=source_ids,
        replacements=_match_lengths(tokenizer, mode, source_ids, target_ids, keep, counts),
        mode=mode,
        layers=None if layers is None else tuple(layers),
        source=source,
        target=target,
        target_ids=target_ids,
    )


def _tokens_of_span(tokenizer: Any, text: str, start: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions and ids of the tokens of the characters [start, end) of `text`."""
    if not getattr(tokenizer, "is_fast", False):
        raise HFEError(
            f"{type(tokenizer).__name__} gives no character offsets", "load the fast tokenizer of this checkpoint"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    entity = text[start:end]
    positions = []
    for position, (first, last) in enumerate(encoded["offset_mapping"]):
        if first < last and first < end and last > start:
            if text[first:start].strip() or text[end:last].strip():
                raise HFEError(
                    f"the token {text[first:last]!r} contains more than the entity {entity!r}", "name the whole word"
                )
            positions.append(position)
    if not positions:
        raise HFEError(f"the tokenizer gives no token for {entity!r} in {text!r}", "name an entity that it keeps")
    return tuple(positions), tuple(encoded["input_ids"][position] for position in positions)


def _check_known(tokenizer: Any, target: str, ids: tuple[int, ...]) -> None:
    """Raise `HFEError` if a token of the target is the unknown token."""
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise HFEError(
            f"the target {target!r} has tokens {list(ids)}, where {tokenizer.unk_token_id} stands for unknown ones",
            "name a target that the vocabulary holds",
        )


def _match_lengths(
    tokenizer: Any,
    mode: str,
    source: tuple[int, ...],
    target: tuple[int, ...],
    keep: Sequence[int] | None,
    counts: Mapping[int, float] | Sequence[float] | None,
) -> tuple[tuple[int, ...], ...]:
    """The target tokens whose mean row each source token looks up."""
    n, m = len(source), len(target)
    if mode == "average":
        return (target,) * n
    if mode == "one_to_one" and n != m:
        raise HFEError(
            f"mode='one_to_one' needs equal lengths: the source has {n} tokens {list(source)}, the target {m} "
            f"{list(target)}",
            "choose another mode, for example 'average'",
        )
    if mode == "one_to_one":
        ids = target
    elif mode == "copy":
        ids = tuple(target[k % m] for k in range(n))
    elif mode == "subset":
        ids = tuple(target[k] for k in _subset(n, target, keep, counts))
    else:
        pads = (_pad_id(tokenizer),) * (n - m) if n > m else ()
        ids = pads + target[-n:] if mode == "left_pad" else target[:n] + pads
    return tuple((token,) for token in ids)


def _subset(
    n: int,
    target: tuple[int, ...],
    keep: Sequence[int] | None,
    counts: Mapping[int, float] | Sequence[float] | None,
) -> list[int]:
    """Indices of the `n` target tokens to keep, in order."""
    m = len(target)
    if m < n:
        raise HFEError(
            f"mode='subset' needs a target at least as long as the source: it has {m} tokens, the source {n}",
            "choose 'left_pad', 'right_pad', 'copy' or 'average'",
        )
    if (keep is None) == (counts is None):
        raise HFEError(
            "mode='subset' needs either keep or counts, not both",
            f"pass keep, {n} of the indices 0..{m - 1}, or counts, how often each token id occurs",
        )
    if keep is not None:
        if len(keep) != n or len(set(keep)) != n or not all(0 <= k < m for k in keep):
            raise HFEError(f"keep={list(keep)} must be {n} different indices of 0..{m - 1}", "correct keep")
        return sorted(keep)
    return sorted(sorted(range(m), key=lambda k: _count(counts, target[k]))[:n])


def _count(counts: Any, token: int) -> float:
    """The count of a token; 0 if a mapping lacks it."""
    if isinstance(counts, Mapping):
        return counts.get(token, 0)
    if token >= len(counts):
        raise HFEError(f"counts has {len(counts)} entries, the target has token {token}", "count every token id")
    return float(counts[token])


def _pad_id(tokenizer: Any) -> int:
    """The id of the pad token, else EOS, else BOS with a warning; `HFEError` without any of them."""
    for name in ("pad", "eos", "bos"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            if name == "bos":
                get_logger().warning("the tokenizer has neither a pad nor an EOS token; BOS rows fill the edit")
            return token
    raise HFEError("the tokenizer has no pad, EOS or BOS token to fill with", "choose the mode 'copy' or 'average'")
