"""Token ids of given embeddings, found by exact comparison with the rows of the embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_efficient.errors import HFEError
from hf_efficient.logging import warn_once

# Elements of the embedding that are hashed at a time; bounds the memory to 8 bytes for each.
_BLOCK_ELEMENTS = 1 << 22
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _hash_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Return a 64-bit hash of each row, int64 [N]: bits of the elements times `factors`, summed modulo 2^64.

    Args:
        rows: [N, d], floating-point of 2, 4 or 8 bytes.
        factors: int64 [d], odd, on the device of `rows`.
    """
    bits = (rows + 0.0).contiguous().view(_INTEGERS[rows.dtype.itemsize])  # + 0.0 turns -0.0 into 0.0
    return (bits.long() * factors).sum(-1)


@torch.no_grad()
def match_token_ids(inputs_embeds: Tensor, embed_tokens: nn.Module, vocab_size: int) -> Tensor:
    """Return the ids, int64 [B, S], of the embedding rows that equal `inputs_embeds` [B, S, d] in every element.

    Rows are found by hash and then compared, so that no [B, S, vocab_size, d] comparison is made. The embedding is
    called as a module, so that adapters and offloading hooks run. If several rows are equal, the lowest id is returned,
    with a warning, once in the process. Reads the whole embedding and synchronises with the device in every call.

    Args:
        inputs_embeds: [B, S, d]; compared in the dtype that it and the embedding promote to. The result is on its
            device.
        embed_tokens: the embedding, called with ids [N] on that device; returns rows [N, d].
        vocab_size: number of its rows.

    Raises:
        HFEError: an embedding that equals no row.
    """
    device, width = inputs_embeds.device, inputs_embeds.shape[-1]
    given = inputs_embeds.reshape(-1, width)
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randint(-(1 << 62), 1 << 62, (width,), generator=generator) * 2 + 1).to(device)

    def rows(ids: Tensor) -> Tensor:
        """Return the embedding rows [N, d] of `ids` [N], in the promoted dtype."""
        found = embed_tokens(ids).to(device)
        return found.to(torch.promote_types(found.dtype, given.dtype))

    blocks = torch.arange(vocab_size, device=device).split(max(1, _BLOCK_ELEMENTS // width))
    hashes, order = torch.cat([_hash_rows(rows(block), factors) for block in blocks]).sort(stable=True)
    given = given.to(rows(order[:1]).dtype)
    wanted = _hash_rows(given, factors)
    position = torch.searchsorted(hashes, wanted).clamp_(max=vocab_size - 1)
    ids = order[position]

    different = (rows(ids) != given).any(-1)
    if different.any():
        first = int(different.nonzero()[0])
        index = list(divmod(first, inputs_embeds.shape[1]))
        raise HFEError(
            f"inputs_embeds at position {index} equals no row of the embedding, so its token id is unknown",
            "pass stem_input_ids beside inputs_embeds",
        )
    following = (position + 1).clamp(max=vocab_size - 1)
    if ((hashes[following] == wanted) & (following != position)).any():
        warn_once("some embeddings in inputs_embeds are rows of several token ids; the lowest id is taken")
    return ids.view(inputs_embeds.shape[:-1])
