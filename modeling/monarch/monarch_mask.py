"""The attention mask of Monarch attention: which tokens of a batch are valid, and which rows are long enough for it.

It has one row of values per token instead of a [N, N] matrix. The function that makes it runs once in a forward pass of
the model, so the layers read nothing back from the device:

| mask | meaning |
|---|---|
| None | every token is valid |
| bool [B, N] | True at valid tokens; every row is long enough, and padded on the side of the layout's padding |
| int32 [B, 1, 1, N] | softmax attention in every row; plane 0 is 1 at valid tokens |
| int32 [B, 1, 2, N] | plane 1 is the number of valid tokens of the row; rows may be too short |
| int32 [B, 1, 4, N] | planes 2 and 3 too: the valid tokens have to be moved together, see `PackedMask` |

transformers passes a mask of rank 4 on as it is; its own masks are bool or floating point. B rows, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec


class PackedMask(NamedTuple):
    """The parts of a mask; None where the kind of mask has no such part.

    Attributes:
        keep: bool [B, N], True at valid tokens.
        length: int32 [B], number of valid tokens of a row.
        order: int32 [B, N], the token in each place once the valid ones are together on the side away from the padding.
        place: int32 [B, N], the place of each token, the inverse of `order`.
        softmax: True if every row uses softmax attention.
    """

    keep: Tensor
    length: Tensor | None = None
    order: Tensor | None = None
    place: Tensor | None = None
    softmax: bool = False


def is_packed(mask: Tensor | None) -> bool:
    """True if `pack_mask` or `pack_softmax_mask` made the mask."""
    return mask is not None and (mask.dtype == torch.int32 or mask.ndim == 2)


def pack_softmax_mask(keep: Tensor) -> Tensor:
    """Return the mask, int32 [B, 1, 1, N], of softmax attention to the tokens where bool [B, N] is True."""
    return keep.to(torch.int32)[:, None, None]


def pack_mask(keep: Tensor, spec: MonarchSpec) -> Tensor | None:
    """Return the mask of Monarch attention to the tokens where `keep`, bool [B, N], is True; see the table above.

    Reads one small tensor back from the device. While a graph is traced or captured it reads nothing, and the mask is
    of the most general kind.
    """
    tokens = keep.shape[1]
    if tokens < spec.least_tokens:
        return pack_softmax_mask(keep)
    length = keep.sum(1)
    together = valid_places(length, tokens, spec.pad)
    if not is_tracing(keep):
        long = length >= spec.least_tokens
        flags = torch.stack((keep.all(), long.all(), long.any(), (keep == together).all())).tolist()
        all_valid, all_long, any_long, in_place = flags
        if all_valid:
            return None
        if not any_long:
            return pack_softmax_mask(keep)
        if in_place:
            return keep if all_long else _stack(keep, length)
    # Place of each token: the valid ones in their order on one side, the others in their order on the other.
    valid, masked = keep.cumsum(1) - 1, (~keep).cumsum(1) - 1
    if spec.pad == "pre":
        valid = valid + (tokens - length)[:, None]
    else:
        masked = masked + length[:, None]
    place = torch.where(keep, valid, masked)
    order = torch.zeros_like(place).scatter(1, place, torch.arange(tokens, device=keep.device).expand_as(place))
    return _stack(keep, length, order, place)


def unpack_mask(mask: Tensor) -> PackedMask:
    """Return the parts of a mask that `pack_mask` or `pack_softmax_mask` made."""
    if mask.ndim == 2:
        return PackedMask(mask)
    planes = mask[:, 0].unbind(1)
    keep = planes[0] > 0
    if len(planes) == 1:
        return PackedMask(keep, softmax=True)
    length = planes[1][:, 0]
    return PackedMask(keep, length) if len(planes) == 2 else PackedMask(keep, length, planes[2], planes[3])


def valid_places(length: Tensor, tokens: int, pad: str) -> Tensor:
    """Return bool [B, tokens], True in the places of `length` [B] valid tokens, away from the side of the padding."""
    places = torch.arange(tokens, device=length.device)
    if pad == "pre":
        return places >= tokens - length[:, None]
    return places < length[:, None]


def keep_of_prepared_mask(mask: Tensor, owner: str) -> Tensor:
    """Return bool [B, N], True at valid tokens, of a mask of rank 4 that the caller of a model prepared.

    Args:
        mask: [B, 1, Q, N] with the same values for every query: bool, True at valid tokens; or floating point, 0 at
            valid tokens, and at most -10,000 at others.
        owner: name of the attention module, for the message.

    Raises:
        HFEError: the values depend on the head or query, or are a bias; or they cannot be read, in a traced graph.
    """
    remedy = "pass attention_mask of shape [batch, tokens], or use attn_implementation='sdpa'"
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise HFEError(f"{owner} got an attention mask {list(mask.shape)}; Monarch attention takes one per row", remedy)
    # A tensor that was expanded along the queries has one row in memory.
    same = mask.shape[2] == 1 or mask.stride(2) == 0
    if is_tracing(mask):
        if not same or mask.dtype != torch.bool:
            raise HFEError(
                f"{owner} got an attention mask {list(mask.shape)} of {mask.dtype}, whose values torch.compile cannot "
                "check; Monarch attention takes masks that are the same for every query",
                remedy,
            )
    elif not same and not bool((mask == mask[:, :, :1]).all()):
        raise HFEError(
            f"{owner} got an attention mask {list(mask.shape)} whose rows differ; Monarch attention takes masks that "
            "are the same for every query",
            remedy,
        )
    row = mask[:, 0, 0]
    if row.dtype == torch.bool:
        return row
    if not bool(((row == 0) | (row <= -1e4)).all()):
        raise HFEError(f"{owner} got an attention mask with a bias, which Monarch attention does not have", remedy)
    return row == 0


def _stack(keep: Tensor, *planes: Tensor) -> Tensor:
    """Return int32 [B, 1, planes, N] of `keep` and planes [B, N] or, the same for every token, [B]."""
    rows = [keep, *(plane[:, None].expand_as(keep) if plane.ndim == 1 else plane for plane in planes)]
    return torch.stack([row.to(torch.int32) for row in rows], 1)[:, None]
