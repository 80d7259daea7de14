"""Stock checkpoint -> BHyT: a bounded hyperbolic tangent replaces RMSNorm.

With z the normalised row and a = lambda / kappa, a converted norm computes ``weight * out_scale * tanh(a z)``. The
weight is the source's, bit for bit, so removing `lam` and `out_scale` restores the source.

- Lossless: a is so small that tanh(u) equals u to below the rounding of bfloat16, and ``out_scale = 1 / a``. Since
  ``|z| <= sqrt(D)``, the relative error of an output is at most ``(a sqrt(D))^2 / 3`` for any input.
- Bounded: a is given, and `out_scale` has a gain for each channel, fitted to text.

`conversion/bhyt/fits.py` has the formulas of what is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from hf_efficient.conversion.bhyt.fits import (
    ChannelGains,
    MeanSquareLine,
    NormMeasurements,
    after_attention,
    mean_square,
    replaced,
)
from hf_efficient.conversion.measuring.calibration import Calibration, required_calibration
from hf_efficient.conversion.patch import ExpectedChoice, NewTensor, TensorChanges, bibtex, is_number, layer_indices
from hf_efficient.errors import UsageError
from hf_efficient.modeling.bhyt.bhyt_norm import BhytNorm
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm

_SECOND_SITES = ("exact", "affine")
_FINAL_NORMS = ("rms", "bhyt")
_LEAVES = ("input_layernorm", "post_attention_layernorm")
# The relative difference of tanh(u) and u is u^2 / 3: for this u, half a unit in the last place of bfloat16.
_LARGEST_ARGUMENT = 0.0765
_LARGEST_A = 2.0**-10
# In the first layers attention adds most to the residual stream, and a line does not fit the result. Of the other
# layers, those whose line misses the scale by more than this stay exact too.
_ALWAYS_EXACT = (0, 1)
_LARGEST_MISS = 0.03


class BhytMeasurements(TypedDict, total=False):
    """What `Bhyt.report` returns: `sites` by the norm's name, `line_misses` by layer."""

    sites: dict[str, NormMeasurements]
    line_misses: dict[int, float]
    summary: dict[str, str]


@dataclass
class Bhyt:
    """Options of the BHyT patch.

    Raises:
        UsageError: an option is malformed here, or does not suit the model in `check`.
    """

    name: ClassVar[str] = "bhyt"
    card_note: ClassVar[str] = (
        "BHyT (arXiv:2601.09719) bounds the output of RMSNorm: `gamma * tanh(lambda / kappa * x / rms(x))`. "
        "Converted without `--bhyt-bound`, lambda is so small that the model equals its source to within rounding, and "
        "nothing is bounded. **Converted with it, the model is bounded and the conversion lossy**: expect a clear loss "
        "of quality until the model has been recovered by training."
    )

    citation: ClassVar[str] = bibtex(
        "byun2026bhyt",
        "Bounded Hyperbolic Tangent: A Stable and Efficient Alternative to Pre-Layer Normalization in Large Language "
        "Models",
        "Byun, Hoyoon and Choi, Youngjun and Kim, Taero and Park, Sungrae and Song, Kyungwoo",
        "2601.09719",
    )

    second_site: str = field(
        default="exact",
        metadata={
            "help": "mean square in a layer's second norm (post_attention_layernorm): exact; affine: estimated by a "
            "fitted line from that of the first norm, which saves a sum over the row (needs text)"
        },
    )
    exact_layers: str | list[int] = field(
        default="auto",
        metadata={
            "help": "with affine: layers whose second norm stays exact, such as 0,1,5, or none; auto: 0, 1 and those "
            f"where a line misses the scale by more than {_LARGEST_MISS:.0%}"
        },
    )
    bound: float | None = field(
        default=None,
        metadata={
            "help": "lambda: bounds a norm at |x / rms| = kappa / lambda, with gains fitted to text; lossy (default: "
            "none, which is lossless)"
        },
    )
    kappa: float = field(default=10.0, metadata={"help": "divisor of lambda"})
    final: str = field(default="rms", metadata={"help": "the final norm: rms keeps it, bhyt converts it too"})

    def __post_init__(self) -> None:
        for name, words in (("second_site", _SECOND_SITES), ("final", _FINAL_NORMS)):
            if getattr(self, name) not in words:
                raise UsageError(f"bhyt {name}={getattr(self, name)!r} is unknown", f"choose one of {', '.join(words)}")
        for name in ("bound", "kappa"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0) and (name, value) != ("bound", None):
                raise UsageError(
                    f"bhyt {name}={value!r} must be a positive number", "the paper's lambda is 1, its kappa 10"
                )
        if self.exact_layers != "auto":
            self.exact_layers = _parse_layers(self.exact_layers)
            if self.second_site == "exact":
                raise UsageError(
                    f"bhyt exact_layers={self.exact_layers} goes with second_site=affine; every layer is exact already",
                    "leave it out",
                )
        self._misses: dict[int, float] = {}
        self._summary: dict[str, str] = {}
        self._measured: dict[str, NormMeasurements] = {}

    @property
    def needs_calibration(self) -> bool:
        """True unless the conversion is lossless and no second norm is estimated by a line."""
        return self.bound is not None or self.second_site == "affine"

    @property
    def measures_choice(self) -> bool:
        """True if the exact layers are chosen by running the source model."""
        return self.second_site == "affine" and self.exact_layers == "auto"

    def check(self, config: DecoderConfig) -> None:
        """Raise `UsageError` if the source already has BHyT norms or lacks a layer of `exact_layers`."""
        if "bhyt" in config.active_patches:
            raise UsageError(
                f"the source is a BHyT checkpoint already ({config.model_type}, source {config.source_model_type})",
                "convert its stock source again, with the options you want",
            )
        named = self.exact_layers if isinstance(self.exact_layers, list) else []
        outside = [index for index in named if index >= config.num_hidden_layers]
        if outside:
            raise UsageError(
                f"bhyt exact_layers {outside} do not exist", f"the model has layers 0 to {config.num_hidden_layers - 1}"
            )

    def choose(self, config: DecoderConfig, calibration: Calibration | None) -> dict[str, Any]:
        """The configuration fields of the BHyT model; with `exact_layers="auto"` the exact layers are measured.

        Raises:
            UsageError: the exact layers are to be measured and `calibration` is None.
            HFEError: a weight cannot be read or holds NaN or infinity.
        """
        exact = self.exact_layers if isinstance(self.exact_layers, list) else []
        if self.measures_choice:
            self._misses = _line_misses(required_calibration(calibration))
            exact = [i for i, miss in self._misses.items() if i in _ALWAYS_EXACT or miss > _LARGEST_MISS]
        if not self.needs_calibration:
            u = self._lambda(config) / self.kappa * math.sqrt(config.hidden_size)
            self._summary["bhyt"] = f"lossless: a norm's outputs are within {u * u / 3:.1e} of the source's"
        return self._fields(config, exact)

    def expected_choice(self, config: DecoderConfig) -> ExpectedChoice:
        """The fields that `choose` will return, with the fewest possible exact layers in place of measured ones.

        Called only if the exact layers are measured.
        """
        count = config.num_hidden_layers
        exact = [index for index in _ALWAYS_EXACT if index < count]
        known = f"{len(exact)} to {count} layers, {' and '.join(map(str, exact))} among them"
        # A line is stored for each layer that is not exact, so this is the largest size.
        return ExpectedChoice(
            self._fields(config, exact), {"bhyt_exact_layers": f"{known}; sizes are those of {len(exact)}"}
        )

    def _fields(self, config: DecoderConfig, exact: list[int]) -> dict[str, Any]:
        """The configuration fields of the BHyT model, with the layers `exact`."""
        bound = self._lambda(config)
        return {
            "bhyt_layers": list(range(config.num_hidden_layers)),
            "bhyt_second_site": self.second_site,
            "bhyt_exact_layers": exact,
            "bhyt_lambda_input": bound,
            "bhyt_lambda_post": bound,
            # A lossless lambda is too small for the steps of an optimizer, and the weight can learn all that it could.
            "bhyt_learnable_lambda": self.bound is not None,
            "bhyt_kappa": self.kappa,
            # That of RMSNorm: with another eps, the norm of small hidden states would differ.
            "bhyt_eps": config.rms_norm_eps,
            "bhyt_final": self.final,
            **({"bhyt_lambda_final": bound} if self.final == "bhyt" else {}),
            "bhyt_output_scale": True,
        }

    def changes(self, config: DecoderConfig, dtype: torch.dtype) -> TensorChanges:
        """The added tensors: `out_scale` and `lam` of every norm, `affine` where a line estimates the mean square."""
        width = (config.hidden_size,)
        origin = "1 / a" if self.bound is None else "gains fitted to text"
        added = {}
        for prefix, index in _norms(config):
            added[f"{prefix}.out_scale"] = NewTensor(width, torch.float32, origin)
            if prefix.endswith(_LEAVES[1]) and config.bhyt_estimate(index) == "affine":
                added[f"{prefix}.affine"] = NewTensor((2,), torch.float32, "line fitted to text")
        # Last, so that a narrower dtype does not misalign the float32 tensors in the file.
        added |= {f"{prefix}.lam": NewTensor((1,), dtype, "lambda") for prefix, _ in _norms(config)}
        return TensorChanges(added)

    def tensors(self, config: DecoderConfig, calibration: Calibration | None) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the added tensors, in the order of `changes`.

        Raises:
            UsageError: something is fitted and `calibration` is None.
            HFEError: a weight cannot be read or holds NaN or infinity.
        """
        # Rounded to the dtype of the checkpoint, because the gains are fitted to the stored value.
        lam = torch.tensor([self._lambda(config)], dtype=config.dtype or torch.float32)
        if self.needs_calibration:
            yield from self._fitted(config, required_calibration(calibration), lam)
        else:
            for prefix, _ in _norms(config):
                yield f"{prefix}.out_scale", self._plain_gain(config, lam)
        for prefix, _ in _norms(config):
            yield f"{prefix}.lam", lam

    def report(self) -> BhytMeasurements:
        """What was fitted at each norm, the misses by which exact layers were chosen, and lines for the table."""
        return {"sites": self._measured, "line_misses": self._misses, "summary": self._summary}

    def _lambda(self, config: DecoderConfig) -> float:
        """The lambda of every norm: the bound, or kappa times the largest a that is lossless and a power of two."""
        if self.bound is not None:
            return self.bound
        # A power of two, so that multiplying a weight by 1 / a is exact.
        largest = min(_LARGEST_A, _LARGEST_ARGUMENT / math.sqrt(config.hidden_size))
        return self.kappa * 2.0 ** math.floor(math.log2(largest))

    def _fitted(self, config: DecoderConfig, calibration: Calibration, lam: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of `out_scale`, and `affine` where a line is fitted, of every norm that is converted.

        The text runs through the layers with the norms converted so far and, if they are bounded, also with the
        source's norms. A gain fits the converted norm's output on the converted residual stream to the source norm's
        output on the source's residual stream, so each layer corrects part of the errors of the layers below it.

        What is fitted is also stored for `report`. Errors as for `tensors`.
        """
        run = calibration.start(calibration.fit)
        (converted,) = run.batches
        source = None if self.bound is None else converted.clone()
        for index, layer in run.layers():
            stock = {"input": layer.input_layernorm, "post": layer.post_attention_layernorm}
            first, second = (f"model.layers.{index}.{leaf}" for leaf in _LEAVES)
            gain = self._gain(first, config, lam, converted.hidden, None if source is None else source.hidden)
            yield f"{first}.out_scale", gain
            parts = {_LEAVES[0]: _norm(config, "input", index, stock["input"], lam, gain)}
            with replaced(layer, **parts):
                attended = after_attention(run, index, layer, converted)
            target = None if source is None else after_attention(run, index, layer, source)
            gain = self._gain(second, config, lam, attended, target)
            yield f"{second}.out_scale", gain
            line = None
            if config.bhyt_estimate(index) == "affine":
                line = MeanSquareLine.fit(mean_square(converted.hidden), mean_square(attended))
                self._measured[second] = {**self._measured.get(second, {}), **line.report}
                yield f"{second}.affine", line.tensor
            parts[_LEAVES[1]] = _norm(config, "post", index, stock["post"], lam, gain, line)
            with replaced(layer, **parts):
                run.run_layer(index, layer, converted)
            if source is not None:
                run.run_layer(index, layer, source)
            calibration.progress("calibrating", index + 1, config.num_hidden_layers)
        if config.bhyt_final == "bhyt":
            gain = self._gain("model.norm", config, lam, converted.hidden, None if source is None else source.hidden)
            yield "model.norm.out_scale", gain
        self._summarise()

    def _gain(self, name: str, config: DecoderConfig, lam: Tensor, converted: Tensor, source: Tensor | None) -> Tensor:
        """`out_scale` [D] of the norm `name`, fitted to the residual streams before it [B, S, D]; 1 / a if lossless.

        The measurements of a fit are stored for `report`.

        Args:
            converted, source: residual stream of the converted model, and of the source; None if lossless.
        """
        if source is None:
            return self._plain_gain(config, lam)
        fit = ChannelGains.fit(lam.item() / self.kappa, config.bhyt_eps, source, converted)
        self._measured[name] = fit.report
        return fit.gain

    def _plain_gain(self, config: DecoderConfig, lam: Tensor) -> Tensor:
        """The gain 1 / a = kappa / lambda of every channel [hidden_size], fp32, used if lambda is lossless."""
        return torch.full((config.hidden_size,), self.kappa / lam.item())

    def _summarise(self) -> None:
        """Add the numbers that the report's table shows to the summary."""
        norms = self._measured
        if self.bound is not None:
            errors = sorted((found["relative_error"], name) for name, found in norms.items())
            shares = [found["saturated"] for found in norms.values()]
            self._summary |= {
                "bhyt, error of a norm": f"median {errors[len(errors) // 2][0]:.1%}, most {errors[-1][0]:.1%} in "
                f"{errors[-1][1]}",
                "bhyt, |tanh| above 0.9": f"{sum(shares) / len(shares):.2%} of all, {max(shares):.2%} of one norm's",
                "bhyt, largest |x| / rms": f"{max(found['max_over_rms'] for found in norms.values()):.1f}",
            }
        lines = sorted((found["miss"], name) for name, found in norms.items() if "slope" in found)
        if lines:
            self._summary["bhyt, miss of a line"] = f"at most {lines[-1][0]:.1%} of the scale, in {lines[-1][1]}"
            through_origin = sum(norms[name]["through_origin"] for _, name in lines)
            if through_origin:
                self._summary["bhyt, lines through zero"] = (
                    f"{through_origin} of {len(lines)}: the best line has a negative slope or intercept"
                )


def _line_misses(calibration: Calibration) -> dict[int, float]:
    """Layer -> `miss` of a `MeanSquareLine` (relative error of the second norm's scale), fitted to the probe text."""
    run = calibration.start(calibration.probe)
    (batch,) = run.batches
    misses = {}
    for index, layer in run.layers():
        attended = after_attention(run, index, layer, batch)
        misses[index] = MeanSquareLine.fit(mean_square(batch.hidden), mean_square(attended)).miss
        run.run_layer(index, layer, batch)
        calibration.progress("choose layers", index + 1, calibration.config.num_hidden_layers)
    return misses


def _norm(
    config: DecoderConfig,
    position: str,
    index: int,
    stock: DecoderRMSNorm,
    lam: Tensor,
    gain: Tensor,
    line: MeanSquareLine | None = None,
) -> BhytNorm:
    """The converted norm at `position` (`input` or `post`) of layer `index`, in fp32, on the device of `stock`.

    `stock` is the source's norm, `lam` [1] lambda, `gain` [D] the output scale, `line` the estimate of the mean square.
    """
    tensors = {"weight": stock.weight, "lam": lam, "out_scale": gain, **({"affine": line.tensor} if line else {})}
    norm = BhytNorm(config, position, index).to(stock.weight.device).requires_grad_(False)
    norm.load_state_dict(tensors)
    return norm


def _norms(config: DecoderConfig) -> list[tuple[str, int]]:
    """(name, layer index) of each norm that is converted; the index of the final norm is the number of layers."""
    norms = [(f"model.layers.{index}.{leaf}", index) for index in config.bhyt_layers for leaf in _LEAVES]
    return [*norms, ("model.norm", config.num_hidden_layers)] if config.bhyt_final == "bhyt" else norms


def _parse_layers(layers: str | list[int]) -> list[int]:
    """`exact_layers` as a sorted list of indices, empty for `none`.

    Raises:
        UsageError: one is no integer, is negative or occurs twice.
    """
    if isinstance(layers, str) and layers.strip() == "none":
        return []
    parsed = layer_indices(layers)
    if parsed is None or any(index < 0 for index in parsed):
        raise UsageError(
            f"bhyt exact_layers={layers!r} must be none, or different whole numbers from 0 on, separated by commas",
            "for example 0,1",
        )
    return parsed
