"""The output of parallel generation.

Terms: a branch is a part of a sequence that is decoded in parallel with others, a Multiverse path or a MedVerse
step; the trunk is the root branch. Child branches start at a fork and end at a join. A segment is a run of consecutive
tokens between forks and joins; a token may attend to the tokens before it in its own segment and to those of the
segment's ancestors. Forced tokens are appended by generation without sampling (headers, separators, joins).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_efficient.modeling.topology.generation.branches import BranchPath, BranchState, all_branches
from hf_efficient.modeling.topology.generation.parallel_decoding import ParallelDecodeLoop
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler


@dataclass
class BranchInfo:
    """One branch of a generated sequence.

    Attributes:
        path: identifies the branch: for each fork from the trunk to it, the index of the fork in its branch (from 0)
            and the label of the child; () for the trunk.
        state: `done`, or `skipped` when it never started: the budget was too small, or the sequence was stopped before
            (by `max_time`).
        finish_reason: why it ended without its own closing tag (`eos`, `length`, `max_time`, `stopping_criteria`,
            `branch_max_new_tokens`, or the control token sampled instead); an empty string if it ended with the tag,
            or if it was skipped because the sequence was stopped. For the trunk, why the sequence ended.
        num_tokens: tokens generated in it, including forced ones and those of its joins, without those of its children.
        num_sampled_tokens: tokens chosen by the sampler.
        segments: segments of its tokens, ascending, numbered as in `TopologyGenerateOutput.segment_ids`.
        logprobs: log-probability of each sampled token, under the distribution that it was chosen from; empty without
            `output_scores`.
    """

    path: BranchPath
    state: str
    finish_reason: str
    num_tokens: int
    num_sampled_tokens: int
    segments: list[int]
    logprobs: list[float]

    @property
    def truncated(self) -> bool:
        """True for a path or step with a finish reason: it did not sample its own closing tag.

        Always False for the trunk, and for a branch that was skipped because the sequence was stopped.
        """
        return bool(self.path) and bool(self.finish_reason)


@dataclass
class TopologyGenerateOutput(ModelOutput):
    """Output of parallel generation with ``return_dict_in_generate=True``.

    Args:
        sequences: int64 [B, L]: prompts with their left padding, and generated tokens in the order of the text (trunk,
            branches one after another, join), padded on the right. `Topology.from_token_ids` recovers from them the
            topology that they were generated with.
        segment_ids: int32 [B, L], -1 at padding. Segments are numbered in the order of the text.
        position_ids: int64 [B, L], 0 at padding.
        parents: for each sequence and each of its segments that have tokens, the list of the segment's parents.
        branch_info: for each sequence, its branches in the order of the text, the trunk first.
        warnings: for each sequence, what was malformed in its text, which forks were rejected, and which branches were
            not started for lack of budget.
        num_forward_passes: forward passes of the model, including the prefill.
        generated_tokens: for each sequence, the number of tokens after the prompt, including forced ones.
        critical_path: for each sequence, the number of positions after the prompt: the length of the longest dependency
            path of tokens.
        parallelism: sum of `generated_tokens` divided by the sum of `critical_path`.
    """

    sequences: Tensor | None = None
    segment_ids: Tensor | None = None
    position_ids: Tensor | None = None
    parents: list[list[list[int]]] | None = None
    branch_info: list[list[BranchInfo]] | None = None
    warnings: list[list[str]] | None = None
    num_forward_passes: int | None = None
    generated_tokens: list[int] | None = None
    critical_path: list[int] | None = None
    parallelism: float | None = None


def collect_output(loop: ParallelDecodeLoop, pad_token_id: int, device: torch.device) -> TopologyGenerateOutput:
    """Return the output of a finished decoding loop.

    Args:
        loop: a loop whose `run` has returned.
        pad_token_id: id that fills `sequences` on the right.
        device: where the tensors of the output are placed.
    """
    schedulers = loop.sequences
    slots = [list(scheduler.slots_in_text_order()) for scheduler in schedulers]
    length = max(offset + len(listed) for offset, listed in zip(loop.offsets, slots, strict=True))
    sequences = torch.full((len(schedulers), length), pad_token_id, dtype=torch.long)
    segment_ids = torch.full((len(schedulers), length), -1, dtype=torch.int32)
    position_ids = torch.zeros((len(schedulers), length), dtype=torch.long)
    parents, info = [], []
    for row, (scheduler, offset, listed) in enumerate(zip(schedulers, loop.offsets, slots, strict=True)):
        renumbered: dict[int, int] = {}  # segment number in the scheduler -> number in the order of the text
        for slot in listed:
            renumbered.setdefault(scheduler.segments[slot], len(renumbered))
        end = offset + len(listed)
        sequences[row, :offset] = torch.from_numpy(loop.prompt[row, :offset])
        sequences[row, offset:end] = torch.tensor([scheduler.tokens[slot] for slot in listed])
        segment_ids[row, offset:end] = torch.tensor([renumbered[scheduler.segments[slot]] for slot in listed]).int()
        position_ids[row, offset:end] = torch.tensor([scheduler.positions[slot] for slot in listed])
        all_parents = scheduler.graph.parents
        parents.append([[renumbered[p] for p in all_parents[segment] if p in renumbered] for segment in renumbered])
        info.append(_branch_info(scheduler, renumbered))
    generated_tokens = [scheduler.num_generated_tokens for scheduler in schedulers]
    critical_path = [scheduler.critical_path for scheduler in schedulers]
    return TopologyGenerateOutput(
        sequences=sequences.to(device),
        segment_ids=segment_ids.to(device),
        position_ids=position_ids.to(device),
        parents=parents,
        branch_info=info,
        warnings=[scheduler.trunk.builder.warnings for scheduler in schedulers],
        num_forward_passes=loop.num_forward_passes,
        generated_tokens=generated_tokens,
        critical_path=critical_path,
        parallelism=sum(generated_tokens) / max(sum(critical_path), 1),
    )


def _branch_info(scheduler: SequenceScheduler, renumbered: dict[int, int]) -> list[BranchInfo]:
    """Return a `BranchInfo` for each branch of a sequence, in the order of the text, the trunk first.

    Args:
        scheduler: the finished sequence.
        renumbered: segment number in the scheduler -> segment number in the output.
    """
    infos = []
    for branch in all_branches(scheduler.trunk):
        slots = [item for item in branch.contents if isinstance(item, int)]
        infos.append(
            BranchInfo(
                path=branch.path,
                state="skipped" if branch.state is BranchState.SKIPPED else "done",
                finish_reason=branch.finish_reason,
                num_tokens=len(slots),
                num_sampled_tokens=branch.num_sampled_tokens,
                segments=sorted({renumbered[scheduler.segments[slot]] for slot in slots}),
                logprobs=list(branch.logprobs),
            )
        )
    return infos


__all__ = ["BranchInfo", "TopologyGenerateOutput"]
