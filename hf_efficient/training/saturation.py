"""Measures the fraction of a BHyT model's activations at which tanh is saturated, for the logs of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from hf_efficient.errors import UsageError
from hf_efficient.modeling.bhyt.bhyt_norm import BhytNorm
from hf_efficient.modeling.bhyt.effective_weight import full_tensor
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytModel

_PREFIX = "bhyt/saturation"


class SaturationMonitor:
    """Counts the activations whose ``|tanh|`` is above a threshold, at each BHyT norm (a site) of a model.

    A BHyT norm, `BhytNorm`, applies tanh to the scaled hidden states in place of an RMSNorm.

        with SaturationMonitor(model) as monitor:
            loss = model(**batch).loss
            loss.backward()
        log(monitor.read())

    No activation is kept: each site adds to one counter on its device, which `read` copies to the CPU. With gradient
    checkpointing a layer is counted twice, which changes no share. Calls under `torch.compile` are not counted.

    Args:
        model: holds BHyT sites, also under adapters and wrappers.
        threshold: between 0 and 1.

    Raises:
        UsageError: a threshold outside (0, 1), or a model without BHyT sites.
    """

    def __init__(self, model: nn.Module, threshold: float = 0.9) -> None:
        if not 0 < threshold < 1:
            raise UsageError(f"threshold={threshold} must lie between 0 and 1", "0.9 is usual")
        self.model = model
        # tanh is above the threshold where its argument is above this.
        self._limit = math.atanh(threshold)
        self._handles: list[RemovableHandle] = []
        self._hits: dict[str, Tensor] = {}
        self._elements: dict[str, int] = {}
        if not any(isinstance(module, BhytNorm) for module in model.modules()):
            raise UsageError(f"{type(model).__name__} has no BHyT site", "monitor a model of architecture hfe_bhyt")

    def attach(self) -> SaturationMonitor:
        """Register the hooks; call it again after `detach`, or after adding adapters. Counters keep their values."""
        self.detach()
        sites = [module for module in self.model.modules() if isinstance(module, BhytNorm)]
        self._handles = [site.register_forward_hook(self._count) for site in sites]
        return self

    def detach(self) -> None:
        """Remove the hooks; the counters can still be read."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> SaturationMonitor:
        return self.attach()

    def __exit__(self, *_: Any) -> None:
        self.detach()

    @torch.no_grad()
    def _count(self, site: BhytNorm, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Forward hook: add the saturated elements of this call to the site's counter."""
        _, stream, statistic = output
        if torch.compiler.is_compiling() or statistic is None:  # a stock norm saturates nothing
            return
        scale = site.tanh_scale(arguments[2] if len(arguments) > 2 else None, statistic)
        # One bound for each row instead of the argument of tanh for each element.
        hits = (stream.abs() > (self._limit / scale.abs())[..., None]).sum()
        label = site_label(site)
        self._hits[label] = self._hits[label].add_(hits) if label in self._hits else hits
        self._elements[label] = self._elements.get(label, 0) + stream.numel()

    def read(self) -> dict[str, float]:
        """Fraction of saturated elements of each norm since the last call, their mean and maximum; resets the counters.

        Names are ``bhyt/saturation/layer_3/post``, ``bhyt/saturation/final``, ``…/mean`` and ``…/max``; empty when no
        site was called. In distributed training the metrics are those of this process's part of the batch.
        """
        shares = {label: int(hits) / max(self._elements[label], 1) for label, hits in self._hits.items()}
        self._hits, self._elements = {}, {}
        if not shares:
            return {}
        summary = {"mean": sum(shares.values()) / len(shares), "max": max(shares.values())}
        return {f"{_PREFIX}/{label}": share for label, share in (shares | summary).items()}


class SaturationCallback(TrainerCallback):
    """Logs `SaturationMonitor.read` and `bhyt_depth_bound` of a `Trainer`'s model every few steps; no cost in others.

        trainer.add_callback(SaturationCallback(trainer.log, every=50))

    Args:
        log: gets the metrics as a dictionary.
        every: steps between two measurements.
        threshold: as for `SaturationMonitor`.

    Raises:
        UsageError: `every` is below 1; or, from the first measured step, as `SaturationMonitor`.
    """

    def __init__(self, log: Callable[[dict[str, float]], None], every: int = 100, threshold: float = 0.9) -> None:
        if every < 1:
            raise UsageError(f"every={every} must be at least 1", "pass the number of steps between two measurements")
        self.log = log
        self.every = every
        self.threshold = threshold
        self._monitor: SaturationMonitor | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach a monitor if this step is measured; `UsageError` as `SaturationMonitor`."""
        if (state.global_step + 1) % self.every == 0:
            self._monitor = SaturationMonitor(model, self.threshold).attach()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Log the metrics of the step, where it was measured."""
        if self._monitor is None:
            return
        self._monitor.detach()
        metrics = self._monitor.read() | {"bhyt/depth_bound": bhyt_depth_bound(model)}
        self._monitor = None
        should_log = control.should_log  # logging here resets it, and the Trainer's own log would be skipped
        self.log(metrics)
        control.should_log = should_log


def site_label(site: BhytNorm) -> str:
    """Name of a norm in the metrics: ``layer_3/input``, ``layer_3/post`` or ``final``."""
    return site.position if site.layer_idx is None else f"layer_{site.layer_idx}/{site.position}"


@torch.no_grad()
def bhyt_depth_bound(model: nn.Module) -> float:
    """Largest ``|lambda| / kappa * sqrt(L)`` of the layers' sites, L layers: below 1 the paper's depth theorem holds.

    lambda is a norm's parameter `lam`, kappa its constant. The largest over several BHyT models, if `model` holds more
    than one; 0 without BHyT layers. The final norm does not count. With sharded weights all processes call it.

    Source: arXiv:2601.09719, the condition lambda / kappa < 1 / sqrt(L).
    """
    bounds = [0.0]
    for part in model.modules():
        if isinstance(part, BhytModel):
            for site in part.layers.modules():
                if isinstance(site, BhytNorm):
                    bounds.append(abs(float(full_tensor(site.lam))) / site.kappa * math.sqrt(len(part.layers)))
    return max(bounds)
