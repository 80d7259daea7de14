"""The providers of `benchmarks.topology_attention`: each prepares the attention function of a problem that is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.topology_cases import Problem
from hf_efficient.kernels.topology_attention.api import topology_attention
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, FULL_KEYS, PARTIAL_KEYS, BlockLists

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def mask_function(segment_ids: Tensor, segment_visibility: Tensor, table: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's mask function: one shift per pair where the visible segments fit in 32 bits, else a look-up."""
    segments = segment_ids[0]
    if segment_visibility.shape[1] > 31:

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return table[segments[q], segments[k]] & (k <= q)
    else:
        words = segment_visibility[0, :, 0].to(torch.int32)[segments]

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (((words[q] >> segments[k]) & 1) == 1) & (k <= q)

    return seen


def block_mask_of_lists(problem: Problem, blocks: BlockLists, seen: Callable[..., Tensor]) -> BlockMask:
    """FlexAttention's mask of our block lists."""
    return BlockMask.from_kv_blocks(
        blocks.counts[:, None, PARTIAL_KEYS],
        blocks.lists[:, None, PARTIAL_KEYS],
        blocks.counts[:, None, FULL_KEYS],
        blocks.lists[:, None, FULL_KEYS],
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(problem.length, problem.length),
    )


class Flex:
    """FlexAttention and its block masks. Compiled on CUDA; called uncompiled on the CPU, where it is only tested."""

    def __init__(self, problem: Problem) -> None:
        on_cuda = problem.device.type == "cuda"
        self.problem = problem
        self.attention: Any = torch.compile(flex_attention, dynamic=False) if on_cuda else flex_attention
        # Triton 3.6 takes minutes to compile persistent reductions here.
        options = {"triton.persistent_reductions": False}
        compiled = torch.compile(create_block_mask, dynamic=False, options=options)
        self.create: Any = compiled if on_cuda else create_block_mask
        self.grouped = problem.layout.heads[0] != problem.layout.heads[1]

    def seen(self) -> Callable[..., Tensor]:
        problem = self.problem
        return mask_function(problem.segment_ids, problem.segment_visibility, problem.table)

    def created(self, create: Any) -> BlockMask:
        problem = self.problem
        return create(self.seen(), None, None, problem.length, problem.length, device=problem.device, BLOCK_SIZE=BLOCK)

    def of_lists(self, blocks: BlockLists) -> BlockMask:
        return block_mask_of_lists(self.problem, blocks, self.seen())

    def new_lists(self) -> BlockMask:
        return self.of_lists(topology_blocks(self.problem.segment_ids, self.problem.segment_visibility))

    def with_mask(self, mask: Callable[[], BlockMask]) -> Attention:
        return lambda q, k, v: self.attention(q, k, v, block_mask=mask(), enable_gqa=self.grouped)


def _ours(problem: Problem, flex: Flex) -> Attention:
    return lambda q, k, v: topology_attention(
        q, k, v, problem.segment_ids, problem.segment_visibility, blocks=problem.blocks
    )


def _ours_new(problem: Problem, flex: Flex) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = topology_blocks(problem.segment_ids, problem.segment_visibility)
        return topology_attention(q, k, v, problem.segment_ids, problem.segment_visibility, blocks=blocks)

    return attend


def _flex(problem: Problem, flex: Flex) -> Attention:
    mask = flex.created(create_block_mask)
    return flex.with_mask(lambda: mask)


def _flex_lists(problem: Problem, flex: Flex) -> Attention:
    mask = flex.of_lists(problem.blocks)
    return flex.with_mask(lambda: mask)


def _dense(problem: Problem, flex: Flex) -> Attention:
    mask = problem.rows_seen(slice(None), causal=False)[None, None]
    group = problem.layout.heads[0] // problem.layout.heads[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:  # as transformers does where there is a mask
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def _causal(backend: SDPBackend, problem: Problem, flex: Flex) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=flex.grouped)

    return attend


@dataclass(frozen=True)
class Provider:
    """`topology`: whether masks and lists are given, made at each call, or none are needed."""

    prepare: Callable[[Problem, Flex], Attention]
    topology: str = "given"
    captured: bool = True


OURS, OURS_NEW, FLEX, FLEX_NEW = "hf_efficient", "hf_efficient, new topology", "flex", "flex, new topology"
FLEX_EAGER_MASK = "flex, new topology, mask not compiled"
PROVIDERS = {
    OURS: Provider(_ours),
    FLEX: Provider(_flex),
    "flex, our lists": Provider(_flex_lists),
    "sdpa, dense mask": Provider(_dense),
    OURS_NEW: Provider(_ours_new, "new"),
    FLEX_NEW: Provider(lambda problem, flex: flex.with_mask(partial(flex.created, flex.create)), "new", False),
    # As FlexAttention's documentation calls it; its intermediate results are several times the size of a dense mask.
    FLEX_EAGER_MASK: Provider(
        lambda problem, flex: flex.with_mask(partial(flex.created, create_block_mask)), "new", False
    ),
    "flex, our lists, new topology": Provider(
        lambda problem, flex: flex.with_mask(flex.new_lists), "new", captured=False
    ),
    "causal, cuDNN": Provider(partial(_causal, SDPBackend.CUDNN_ATTENTION), "none"),
    "causal, flash": Provider(partial(_causal, SDPBackend.FLASH_ATTENTION), "none"),
}
