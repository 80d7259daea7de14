"""What a conversion to BHyT fits to text: the gains of a bounded site, and the line of an estimated mean square."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from hf_efficient.conversion.measuring.layerwise import BatchState, LayerwisePass
from hf_efficient.modeling.decoder.modeling_decoder import DecoderLayer

# A gain stays within this factor of 1 / a: tanh never exceeds its argument, and more would amplify noise.
_MOST_GAIN = 4.0
# Mean square of tanh below which a channel says nothing about its gain.
_SILENT = 1e-12
# Where |tanh| exceeds this, a channel counts as saturated.
_SATURATED = 0.9


def mean_square(hidden: Tensor) -> Tensor:
    """``mean(x^2)`` over the last dimension, in float64."""
    return torch.stack([row.double().square().mean(-1) for row in hidden])


class SiteMeasurements(TypedDict, total=False):
    """What was fitted at one norm: the figures of `ChannelGains` and `MeanSquareLine`."""

    relative_error: float
    max_over_rms: float
    saturated: float
    gain_times_a: tuple[float, float, float]
    slope: float
    intercept: float
    through_origin: bool
    miss: float


@dataclass(frozen=True)
class ChannelGains:
    """Gain of each channel of one site.

    Attributes:
        gain: [D], float32.
        relative_error: of the normalised rows, with these gains.
        max_over_rms: the largest |x| / rms(x).
        saturated: share of channels with |tanh| above 0.9.
        gain_times_a: the least, the median and the largest gain as multiples of 1/a.
    """

    gain: Tensor
    relative_error: float
    max_over_rms: float
    saturated: float
    gain_times_a: tuple[float, float, float]

    @classmethod
    def fit(cls, a: float, eps: float, source: Tensor, converted: Tensor) -> ChannelGains:
        """Least squares over the tokens of a text.

        With z the normalised row of the source and t = tanh(a z') that of the converted model at the same token,
        channel j has the gain ``<z_j, t_j> / <t_j, t_j>``, between 1/a and 4/a. The first position of a sequence does
        not count: a decoder parks its attention there, on a row that is like no other and would outweigh hundreds.

        Args:
            a: lambda / kappa.
            eps: of the norm.
            source, converted: the residual stream before the norm [B, S, D], S at least 2.
        """
        width = source.shape[-1]
        sums = torch.zeros(3, width, dtype=torch.float64, device=source.device)
        largest, saturated = source.new_zeros(()), source.new_zeros((), dtype=torch.int64)
        for original, own in zip(source[:, 1:], converted[:, 1:], strict=True):  # a sequence at a time
            z, own_z = _normalised(original, eps), _normalised(own, eps)
            t = torch.tanh(a * own_z)
            sums += torch.stack([x.sum(0, dtype=sums.dtype) for x in (z * t, t.square(), z.square())])
            largest = torch.maximum(largest, own_z.abs().max())
            saturated += (t.abs() > _SATURATED).sum()
        product, energy, target = sums
        tokens = source[:, 1:].numel() // width
        gain = (product / energy.clamp_min(torch.finfo(energy.dtype).tiny)).clamp(1 / a, _MOST_GAIN / a)
        gain = torch.where(energy < _SILENT * tokens, 1 / a, gain)
        left = (gain.square() * energy - 2 * gain * product + target).sum() / target.sum()
        return cls(
            gain=gain.float(),
            relative_error=float(left.clamp_min(0).sqrt()),
            max_over_rms=float(largest),
            saturated=float(saturated) / (tokens * width),
            gain_times_a=(float(a * gain.min()), float(a * gain.median()), float(a * gain.max())),
        )

    @property
    def report(self) -> SiteMeasurements:
        return {
            "relative_error": self.relative_error,
            "max_over_rms": self.max_over_rms,
            "saturated": self.saturated,
            "gain_times_a": self.gain_times_a,
        }


def _normalised(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class MeanSquareLine:
    """``slope * v + intercept`` for the mean square v' of a layer's second site, v that of its first.

    Attributes:
        through_origin: the best line falls, or begins below zero, which leaves a row that is smaller than those of the
            text nothing to be divided by. So this one is the best of those that begin at zero.
        miss: root mean square over tokens of ``sqrt(estimate / v') - 1``, the relative error of the norm's scale.
    """

    slope: float
    intercept: float
    through_origin: bool
    miss: float

    @classmethod
    def fit(cls, first: Tensor, second: Tensor) -> MeanSquareLine:
        """The line that minimises ``sum ((slope v + intercept - v') / v')^2`` over tokens.

        Relative, since mean squares differ by a factor of a million from token to token, and the norm divides by them.

        Args:
            first, second: v and v' of each token [B, S], S at least 2; the first position does not count.
        """
        v, target = first[:, 1:].flatten().double(), second[:, 1:].flatten().double()
        design = torch.stack((v / target, 1 / target))
        slope, intercept = torch.linalg.lstsq(design.T, torch.ones_like(v)[:, None]).solution.flatten().tolist()
        through_origin = not (slope > 0 and intercept >= 0)
        if through_origin:
            slope, intercept = float(design[0].sum() / design[0].square().sum()), 0.0
        scale = ((slope * v + intercept).clamp_min(0) / target).sqrt()
        return cls(slope, intercept, through_origin, float((scale - 1).square().mean().sqrt()))

    @property
    def tensor(self) -> Tensor:
        """Slope and intercept [2], float32."""
        return torch.tensor([self.slope, self.intercept], dtype=torch.float32)

    @property
    def report(self) -> SiteMeasurements:
        return {
            "slope": self.slope,
            "intercept": self.intercept,
            "through_origin": self.through_origin,
            "miss": self.miss,
        }


@contextmanager
def replaced(layer: DecoderLayer, **parts: nn.Module) -> Iterator[None]:
    """While open, the layer has other parts."""
    own = {name: getattr(layer, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(layer, name, part)
        yield
    finally:
        for name, part in own.items():
            setattr(layer, name, part)


class _NoFeedForward(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, residual: Tensor | None = None) -> Tensor:
        return torch.zeros_like(hidden_states) if residual is None else residual


def after_attention(run: LayerwisePass, index: int, layer: DecoderLayer, stream: BatchState) -> Tensor:
    """The residual stream between the layer's attention and its feed-forward [B, S, D]; `stream` stays before both."""
    ahead = stream.clone()
    with replaced(layer, mlp=_NoFeedForward()):
        run.run_layer(index, layer, ahead)
    return ahead.hidden
