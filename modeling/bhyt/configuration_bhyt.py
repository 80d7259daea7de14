"""Configuration of BHyT: a bounded hyperbolic tangent in place of the two norms of a layer."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig

_SECOND_SITES = ("exact", "approx", "affine")
_FINAL_NORMS = ("rms", "bhyt")


@strict
class BhytConfig(DecoderConfig):
    """`DecoderConfig` plus the BHyT fields.

    | field | meaning |
    |---|---|
    | `bhyt_layers` | layers whose two norms are BHyT, sorted and unique; by default all, or none where the patch is |
    | | optional (`hfe_decoder`). The others keep RMSNorm |
    | `bhyt_second_site` | mean square in `post_attention_layernorm`: `exact`; `approx`, that of `input_layernorm` |
    | | plus what attention is expected to add (the paper's choice); `affine`, slope times that of |
    | | `input_layernorm` plus intercept, both fitted |
    | `bhyt_exact_layers` | layers with an exact `post_attention_layernorm`, whatever `bhyt_second_site` says |
    | `bhyt_lambda_input` | initial lambda of `input_layernorm`: one number, or one for each layer of the model |
    | `bhyt_lambda_post` | the same for `post_attention_layernorm` |
    | `bhyt_lambda_final` | the same for a BHyT final norm, one number |
    | `bhyt_learnable_lambda` | train the lambdas |
    | `bhyt_kappa` | coverage constant of Chebyshev's inequality: tanh gets lambda / kappa * x / rms(x) |
    | `bhyt_eps` | added to every mean square; by default `rms_norm_eps` |
    | `bhyt_final` | the final norm: `rms`, or `bhyt` (exact) |
    | `bhyt_seq_len` | length of the training sequences, T of the paper; `approx` needs it |
    | `bhyt_learnable_estimate` | train slope and intercept of the `approx` estimate, from (1, 1) |
    | `bhyt_output_scale` | every BHyT norm has a fixed factor for each channel, as converted checkpoints need |
    """

    model_type = "hfe_bhyt"

    bhyt_layers: list[int] | None = None
    bhyt_second_site: str = "approx"
    bhyt_exact_layers: list[int] | None = None
    bhyt_lambda_input: int | float | list[int | float] = 2.0
    bhyt_lambda_post: int | float | list[int | float] = 1.0
    bhyt_lambda_final: int | float = 1.0
    bhyt_learnable_lambda: bool = True
    bhyt_kappa: int | float = 10.0
    bhyt_eps: int | float | None = None
    bhyt_final: str = "rms"
    bhyt_seq_len: int | None = None
    bhyt_learnable_estimate: bool = False
    bhyt_output_scale: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Replace the defaults None by the values that the table describes."""
        if self.bhyt_layers is None:
            self.bhyt_layers = [] if self.patch_is_optional else list(range(self.num_hidden_layers))
        if self.bhyt_exact_layers is None:
            self.bhyt_exact_layers = []
        if self.bhyt_eps is None:
            self.bhyt_eps = self.rms_norm_eps
        super().__post_init__(**kwargs)

    @property
    def active_patches(self) -> list[str]:
        """Names of the patches that this configuration has, `bhyt` if any norm is BHyT."""
        active = bool(self.bhyt_layers) or self.bhyt_final == "bhyt"
        return [*super().active_patches, *(["bhyt"] if active else [])]

    def bhyt_estimate(self, layer_idx: int) -> str:
        """Return how this layer's post-attention norm gets its mean square: `exact`, `approx` or `affine`."""
        return "exact" if layer_idx in self.bhyt_exact_layers else self.bhyt_second_site

    def bhyt_lambda(self, position: str, layer_idx: int | None = None) -> float:
        """Return the initial lambda of a norm, as a float.

        Args:
            position: `input` (before attention), `post` (after attention) or `final`.
            layer_idx: index of the layer; None for `final`.
        """
        initial = getattr(self, f"bhyt_lambda_{position}")
        return float(initial[layer_idx] if isinstance(initial, list) else initial)

    def fields_of_absent_patches(self) -> set[str]:
        """As in `DecoderConfig`; all BHyT fields if no norm is BHyT."""
        absent = super().fields_of_absent_patches()
        return absent if "bhyt" in self.active_patches else absent | set(BhytConfig.__annotations__)

    def validate_bhyt(self) -> None:
        """Check the BHyT fields; transformers calls it when a configuration is created.

        Raises:
            ValueError: a rule is broken; the message has the value and the rule.
        """
        count = self.num_hidden_layers
        if not self.patch_is_optional and not self.bhyt_layers and self.bhyt_final == "rms":
            raise ValueError("bhyt_layers is empty; name at least one layer, or use the unpatched decoder")
        for name in ("bhyt_layers", "bhyt_exact_layers"):
            layers = getattr(self, name)
            outside = [i for i in layers if not 0 <= i < count]
            if outside:
                raise ValueError(f"{name} holds {outside}; the model has layers 0..{count - 1}")
            if layers != sorted(set(layers)):
                raise ValueError(f"{name}={layers} must be sorted and free of duplicates")
        stock = [i for i in self.bhyt_exact_layers if i not in self.bhyt_layers]
        if stock:
            raise ValueError(f"bhyt_exact_layers holds {stock}, which are not among bhyt_layers={self.bhyt_layers}")
        for name, words in (("bhyt_second_site", _SECOND_SITES), ("bhyt_final", _FINAL_NORMS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {list(words)}")
        for name in ("bhyt_lambda_input", "bhyt_lambda_post", "bhyt_lambda_final", "bhyt_kappa", "bhyt_eps"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != count:
                raise ValueError(f"{name} has {len(values)} numbers; the model has {count} layers")
            for value in values if isinstance(values, list) else [values]:
                if not (value > 0 and math.isfinite(value)):  # also true for NaN
                    raise ValueError(f"{name}={values} must be positive and finite")
        if self.bhyt_seq_len is not None and self.bhyt_seq_len < 1:
            raise ValueError(f"bhyt_seq_len={self.bhyt_seq_len} must be at least 1")
        if self.bhyt_learnable_estimate and self.bhyt_second_site != "approx":
            raise ValueError(
                f"bhyt_learnable_estimate=True goes with bhyt_second_site='approx', not with {self.bhyt_second_site!r}"
            )


__all__ = ["BhytConfig"]
