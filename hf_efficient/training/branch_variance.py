"""Recomputes BHyT's branch variances, which depend on v_proj and o_proj, regularly while these are trained.

A branch variance is what a layer's attention adds to the mean square of the residual stream; the layer's post-attention
norm uses this estimate in place of the exact mean square (`BhytNorm`, estimate `approx`).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytModel


def steps_between_refreshes(max_steps: int) -> int:
    """A fiftieth of the training steps, rounded down, at least 1 and at most 1,000; the rule of the released code."""
    return min(max(max_steps // 50, 1), 1000)


class BranchVarianceCallback(TrainerCallback):
    """Recomputes the branch variances of BHyT models in a `Trainer`, also at the beginning and end of training.

        trainer = Trainer(model, …, callbacks=[BranchVarianceCallback()])

    Args:
        every: steps between two updates; by default a fiftieth of the training steps, at most 1,000.

    Raises:
        UsageError: `every` is below 1.
        HFEError: from each update, if trained weights cannot be read on this process (FSDP1, ZeRO-3), which is found at
            the beginning of training; or a layer whose weights cannot be read has no value yet.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = _checked(every)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Recompute the branch variances; errors as for the class."""
        _refresh(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Recompute the branch variances where the number of finished steps is a multiple of `every`."""
        if state.global_step % (self.every or steps_between_refreshes(state.max_steps)) == 0:
            _refresh(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Recompute the branch variances."""
        _refresh(model)


def keep_branch_variance(
    model: nn.Module, optimizer: Optimizer, *, every: int | None = None, max_steps: int | None = None
) -> RemovableHandle:
    """Recompute the branch variances now and every few steps of `optimizer`: for a training loop without `Trainer`.

        keep_branch_variance(model, optimizer, max_steps=len(batches))

    Args:
        model: holds one or more BHyT models; it may be wrapped and sharded, then on all processes alike.
        optimizer: the optimizer, or Accelerate's wrapper of it.
        every: steps between two updates.
        max_steps: steps of the whole training; a fiftieth of them is the default of `every`, at most 1,000.

    Returns:
        The handle of the optimizer's hook; `remove()` ends the updates.

    Raises:
        UsageError: neither `every` nor `max_steps` is given, or `every` is below 1.
        HFEError: weights that are trained cannot be read on this process, or a layer whose weights cannot be read has
            no value yet; now or from a step of the optimizer.
    """
    if every is None and max_steps is None:
        raise UsageError("neither `every` nor `max_steps` is given", "pass one, so that the interval is known")
    interval = _checked(every) or steps_between_refreshes(max_steps or 0)
    steps = 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % interval == 0:
            _refresh(model)

    _refresh(model)
    # Accelerate's optimizer calls the one that it wraps, and only when gradients were finite.
    return getattr(optimizer, "optimizer", optimizer).register_step_post_hook(after_step)


def _checked(every: int | None) -> int | None:
    """`every` unchanged; `UsageError` if it is below 1."""
    if every is not None and every < 1:
        raise UsageError(f"every={every} must be at least 1", "pass the number of steps between two updates")
    return every


def _refresh(model: nn.Module) -> None:
    """Recompute the branch variances of all BHyT models in `model`; with sharded weights on all processes.

    Raises:
        HFEError: a layer's weights cannot be read, and they are trained or the layer has no value yet.
    """
    for module in model.modules():
        if not isinstance(module, BhytModel):
            continue
        for index in module.refresh_branch_variance():
            attention: Any = module.layers[index].self_attn
            if any(p.requires_grad for part in (attention.v_proj, attention.o_proj) for p in part.parameters()):
                raise HFEError(
                    f"v_proj and o_proj of layer {index} are trained, and their weights cannot be read on this process",
                    "shard with FSDP2 in place of FSDP1 or ZeRO-3, freeze the two, or set bhyt_second_site='exact'",
                )
