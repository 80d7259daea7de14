"""The kernels of monarch_attention: several iterations, and groups of heads that share a workspace in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_efficient.kernels.contract import relative_error
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.geometry import geometry
from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout

ITERATED = {
    "frames": (GridLayout(3, 5), 30, 30),
    "a cache": (GridLayout(3, 5), 15, 45),
    "tiles": (GridLayout(4, 3, 2, 2, 1, "w"), 48, 48),
    "a sequence": (SequenceLayout(5), 25, 25),
    "a masked sequence": (SequenceLayout(4), 23, 23),
    "padding in front": (SequenceLayout(4, "pre", "mean"), 23, 23),
}


def _draw(
    device: torch.device, dtype: torch.dtype, queries: int, keys: int, batch: int = 2, heads: int = 1
) -> list[Tensor]:
    """q, k, v and a gradient of the output, as a model's projections leave them."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, tokens, heads, 16, generator=generator).to(device, dtype).transpose(1, 2)
        for tokens in (queries, keys, keys, queries)
    ]


@pytest.mark.parametrize("case", ITERATED)
@pytest.mark.parametrize("num_iters", [2, 3])
def test_monarch_attention_of_several_iterations_is_the_reference(
    case: str, num_iters: int, device: torch.device, poisoned: None
) -> None:
    layout, queries, keys = ITERATED[case]
    q, k, v, _ = _draw(device, torch.float32, queries, keys)
    options: dict = {"num_iters": num_iters}
    if queries == 23:
        mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.6
        # A block and a column without a valid token.
        mask[0, 4:8] = mask[1, ::4] = False
        options["key_mask"] = mask.to(device)
    found = monarch_attention(q, k, v, layout, **options, backend="triton")
    expected = monarch_attention(q.double(), k.double(), v.double(), layout, **options, backend="reference")
    assert relative_error(found, expected) < 1e-5


def test_monarch_attention_is_the_same_where_heads_take_turns_in_a_small_workspace(device: torch.device) -> None:
    """Outputs and gradients bit for bit, for a grid and for padding that is filled with means."""
    from hf_efficient.kernels.monarch_attention.triton_backward import launch_backward
    from hf_efficient.kernels.monarch_attention.triton_kernels import launch_forward

    for layout, tokens in ((GridLayout(2, 3), 12), (SequenceLayout(3, "post", "mean"), 8)):
        q, k, v, dout = _draw(device, torch.float32, tokens, tokens, heads=3)
        dout = dout.transpose(1, 2).contiguous()
        is_sequence = isinstance(layout, SequenceLayout)
        kind = (list(geometry(layout, tokens, tokens, None)), 0.25, is_sequence, is_sequence)
        results = []
        for workspace_bytes in (1, 2**30):
            at, scale, *rest = kind
            out, lse = launch_forward(q, k, v, None, at, 1, scale, *rest, True, workspace_bytes=workspace_bytes)
            gradients = launch_backward(dout, q, k, v, out, lse, None, *kind, workspace_bytes=workspace_bytes)
            results.append((out, lse, *gradients))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
