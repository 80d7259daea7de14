"""Plans of STEM knowledge edits: which embedding rows replace those of which prompt positions.

A STEM layer has an embedding table with a row for each token id in place of its up-projection; an edit makes it use
the rows of a target entity at the positions of a source entity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger

MODES = ("auto", "one_to_one", "left_pad", "right_pad", "copy", "subset", "average")


@dataclass(frozen=True)
class StemEditPlan:
    """Positions of a prompt, and the token ids whose rows the STEM layers use there.

    Attributes:
        positions: indices of the source entity's tokens in the tokenised prompt, counted without padding.
        source_ids: token id at each position; `stem_override` raises for a call with another token there.
        replacements: for each position the token ids whose rows are used: one, or several whose mean is taken.
        mode: how the lengths were matched, a mode of `stem_edit_plan` other than `auto`.
        layers: indices of the STEM layers that the edit applies to; None for all.
        source, target: text of the two entities.
        target_ids: token ids of the target.
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
    """Plan an edit that replaces the embedding rows of `source` in `prompt` by those of `target`; for `stem_override`.

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
        layers: STEM layers to edit; None for all. `stem_override` checks that the model has them.
        keep: for `subset`: indices of the target's tokens to keep, n of them.
        counts: for `subset`: how often each token id occurs in some text, by id; an id that a mapping lacks has
            count 0. Of tokens with equal counts the earlier is kept.

    The pad token is the tokenizer's, or its EOS, or, with a warning, its BOS.

    Raises:
        HFEError: the mode is unknown; an entity is empty; the source is not in the prompt; an entity shares a token
            with other text or has none; the lengths do not suit the mode; `keep` or `counts` is given for another mode
            than `subset`, or is wrong; the target has unknown tokens; the tokenizer gives no offsets or has no token
            to pad with.

    Source: STEM, arXiv:2601.10639, section 3.5; `subset` by counts is not in the paper.

    Example:
        >>> plan = stem_edit_plan(tokenizer, "The capital of Spain is", "Spain", "Germany")
        >>> with stem_override(model, plan):
        ...     model.generate(**tokenizer("The capital of Spain is", return_tensors="pt"))
    """
    if mode not in MODES:
        raise HFEError(f"mode={mode!r} is unknown", f"choose one of {', '.join(MODES)}")
    if mode != "subset" and (keep is not None or counts is not None):
        raise HFEError(f"mode={mode!r} supports neither keep nor counts", "leave them out, or choose mode='subset'")
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
    """Positions and ids of the tokens that cover the characters [start, end) of `text`.

    Raises:
        HFEError: the tokenizer is not a fast one, a token also covers other text than white space, or there is none.
    """
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
        raise HFEError(f"the tokenizer gives no token for {entity!r} in {text!r}", "choose text that produces tokens")
    return tuple(positions), tuple(encoded["input_ids"][position] for position in positions)


def _check_known(tokenizer: Any, target: str, ids: tuple[int, ...]) -> None:
    """Raise `HFEError` if a token of the target is the unknown token."""
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise HFEError(
            f"the target {target!r} has tokens {list(ids)}, where {tokenizer.unk_token_id} is the unknown token",
            "choose a target without unknown tokens",
        )


def _match_lengths(
    tokenizer: Any,
    mode: str,
    source_ids: tuple[int, ...],
    target_ids: tuple[int, ...],
    keep: Sequence[int] | None,
    counts: Mapping[int, float] | Sequence[float] | None,
) -> tuple[tuple[int, ...], ...]:
    """For each source token, the target token ids whose embedding rows are averaged as its replacement.

    `mode` is one of `MODES` other than `auto`.

    Raises:
        HFEError: the lengths, `keep` or `counts` do not suit the mode, or there is no token to pad with.
    """
    num_source, num_target = len(source_ids), len(target_ids)
    if mode == "average":
        return (target_ids,) * num_source
    if mode == "one_to_one" and num_source != num_target:
        raise HFEError(
            f"mode='one_to_one' needs equal lengths: the source has {num_source} tokens {list(source_ids)}, the target "
            f"{num_target} {list(target_ids)}",
            "choose another mode, for example 'average'",
        )
    if mode == "one_to_one":
        ids = target_ids
    elif mode == "copy":
        ids = tuple(target_ids[k % num_target] for k in range(num_source))
    elif mode == "subset":
        ids = tuple(target_ids[k] for k in _subset(num_source, target_ids, keep, counts))
    else:
        missing = num_source - num_target
        pads = (_pad_id(tokenizer),) * missing if missing > 0 else ()
        ids = pads + target_ids[-num_source:] if mode == "left_pad" else target_ids[:num_source] + pads
    return tuple((token,) for token in ids)


def _subset(
    num_source: int,
    target_ids: tuple[int, ...],
    keep: Sequence[int] | None,
    counts: Mapping[int, float] | Sequence[float] | None,
) -> list[int]:
    """Indices into `target_ids` of the `num_source` tokens to keep, ascending: `keep`, or those with the lowest counts.

    Raises:
        HFEError: the target is shorter than the source, not exactly one of `keep` and `counts` is given, or `keep` is
            not `num_source` different indices of the target.
    """
    num_target = len(target_ids)
    if num_target < num_source:
        raise HFEError(
            f"mode='subset' needs a target at least as long as the source: it has {num_target} tokens, the "
            f"source {num_source}",
            "choose 'left_pad', 'right_pad', 'copy' or 'average'",
        )
    if (keep is None) == (counts is None):
        raise HFEError(
            "mode='subset' needs either keep or counts, not both",
            f"pass keep, {num_source} of the indices 0..{num_target - 1}, or counts, how often each token id occurs",
        )
    if keep is not None:
        if len(keep) != num_source or len({*keep}) != num_source or not all(0 <= k < num_target for k in keep):
            raise HFEError(
                f"keep={list(keep)} must be {num_source} different indices of 0..{num_target - 1}", "correct keep"
            )
        return sorted(keep)
    return sorted(sorted(range(num_target), key=lambda k: _count(counts, target_ids[k]))[:num_source])


def _count(counts: Any, token: int) -> float:
    """The count of a token id; 0 if a mapping lacks it, `HFEError` if a sequence is too short."""
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
