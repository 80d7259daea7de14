"""What a conversion to BHyT fits to text: gains of the tanh norms, and lines that estimate mean squares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from hf_efficient.conversion.measuring.layerwise import BatchState, LayerwisePass
from hf_efficient.modeling.decoder.decoder_layer import DecoderLayer

# A gain is between 1 / a, because |tanh(u)| <= |u|, and this factor times 1 / a: a larger one would amplify noise.
_MAX_GAIN = 4.0
# Below this mean square of tanh, a channel has too little signal to fit its gain.
_MIN_ENERGY = 1e-12
# A channel counts as saturated if |tanh| is above this.
_SATURATION_THRESHOLD = 0.9


def mean_square(hidden: Tensor) -> Tensor:
    """``mean(x^2)`` over the last dimension: [B, S, D] -> [B, S], in float64."""
    return torch.stack([row.double().square().mean(-1) for row in hidden])


class NormMeasurements(TypedDict, total=False):
    """What was fitted at one norm: the numbers of `ChannelGains` and `MeanSquareLine`."""

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
    """The fitted gain of each channel of one norm.

    Attributes:
        gain: [D], float32.
        relative_error: error of ``gain * tanh(a z')`` as an approximation of the source's normalised rows z, relative
            to the norm of z over all tokens; z' are the normalised rows of the converted model.
        max_over_rms: the largest |x| / rms(x) in the converted model.
        saturated: fraction of the elements with |tanh| above 0.9.
        gain_times_a: the smallest, the median and the largest gain, times a.
    """

    gain: Tensor
    relative_error: float
    max_over_rms: float
    saturated: float
    gain_times_a: tuple[float, float, float]

    @classmethod
    def fit(cls, a: float, eps: float, source: Tensor, converted: Tensor) -> ChannelGains:
        """Fit the gains by least squares over the tokens of a text.

        With z the normalised row of the source and t = tanh(a z') that of the converted model at the same token,
        channel j has the gain ``<z_j, t_j> / <t_j, t_j>``, clamped to between 1/a and 4/a; it is 1/a if the mean of
        t_j^2 is below `_MIN_ENERGY`. The first position of each sequence is left out: it is the attention sink of
        decoders, and its huge activations would outweigh hundreds of tokens.

        Args:
            a: lambda / kappa, the factor of the argument of tanh.
            eps: epsilon of the norm.
            source, converted: residual stream before the norm, of the source and of the converted model [B, S, D], with
                S at least 2.
        """
        width = source.shape[-1]
        sums = torch.zeros(3, width, dtype=torch.float64, device=source.device)
        largest, saturated = source.new_zeros(()), source.new_zeros((), dtype=torch.int64)
        for original, own in zip(source[:, 1:], converted[:, 1:], strict=True):  # a sequence at a time saves memory
            z, own_z = _normalised(original, eps), _normalised(own, eps)
            t = torch.tanh(a * own_z)
            sums += torch.stack([x.sum(0, dtype=sums.dtype) for x in (z * t, t.square(), z.square())])
            largest = torch.maximum(largest, own_z.abs().max())
            saturated += (t.abs() > _SATURATION_THRESHOLD).sum()
        product, energy, target = sums
        tokens = source[:, 1:].numel() // width
        tiny = torch.finfo(energy.dtype).tiny
        gain = (product / energy.clamp_min(tiny)).clamp(1 / a, _MAX_GAIN / a)
        gain = torch.where(energy < _MIN_ENERGY * tokens, 1 / a, gain)
        # If all rows are zero, so are their approximations, and the error is 0.
        squared_error = (gain.square() * energy - 2 * gain * product + target).sum() / target.sum().clamp_min(tiny)
        return cls(
            gain=gain.float(),
            relative_error=float(squared_error.clamp_min(0).sqrt()),
            max_over_rms=float(largest),
            saturated=float(saturated) / (tokens * width),
            gain_times_a=(float(a * gain.min()), float(a * gain.median()), float(a * gain.max())),
        )

    @property
    def report(self) -> NormMeasurements:
        """The fields without `gain`, for the report."""
        return {
            "relative_error": self.relative_error,
            "max_over_rms": self.max_over_rms,
            "saturated": self.saturated,
            "gain_times_a": self.gain_times_a,
        }


def _normalised(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class MeanSquareLine:
    """``slope * v + intercept``, an estimate of the mean square v' in a layer's post-attention norm.

    v is the mean square in the layer's input norm.

    Attributes:
        through_origin: the best line has no positive slope, or a negative intercept, so its estimate could be negative
            for rows smaller than those of the text; this is therefore the best line with intercept 0.
        miss: root mean square over tokens of ``sqrt(estimate / v') - 1``, the relative error of the norm's scale.
    """

    slope: float
    intercept: float
    through_origin: bool
    miss: float

    @classmethod
    def fit(cls, first: Tensor, second: Tensor) -> MeanSquareLine:
        """The line that minimises ``sum ((slope v + intercept - v') / v')^2`` over tokens.

        If its slope is not positive or its intercept is negative, the line with intercept 0 that minimises the sum.
        The error is relative, because mean squares differ by a factor of a million between tokens, and the norm divides
        by their square root.

        Args:
            first, second: v and v' > 0 of each token [B, S], S at least 2; the first position is left out.
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
    def report(self) -> NormMeasurements:
        """The fields by name, for the report."""
        return {
            "slope": self.slope,
            "intercept": self.intercept,
            "through_origin": self.through_origin,
            "miss": self.miss,
        }


@contextmanager
def replaced(layer: DecoderLayer, **parts: nn.Module) -> Iterator[None]:
    """Context: `layer` has the given submodules, name -> module, in place of its own, which it gets back at the end."""
    own = {name: getattr(layer, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(layer, name, part)
        yield
    finally:
        for name, part in own.items():
            setattr(layer, name, part)


class _NoFeedForward(nn.Module):
    """A feed-forward whose output is zero."""

    def forward(self, hidden_states: Tensor, *_: Any, residual: Tensor | None = None) -> Tensor:
        """Zeros of the shape of `hidden_states` [B, S, D], or `residual` if given, whose sum it is then."""
        return torch.zeros_like(hidden_states) if residual is None else residual


def after_attention(run: LayerwisePass, index: int, layer: DecoderLayer, batch: BatchState) -> Tensor:
    """The residual stream [B, S, D] after the attention of layer `index`; `batch`, its input, is not changed."""
    copied = batch.clone()
    with replaced(layer, mlp=_NoFeedForward()):
        run.run_layer(index, layer, copied)
    return copied.hidden
