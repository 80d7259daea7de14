"""BHyT: in chosen layers both norms are a bounded hyperbolic tangent, ``gamma * tanh(lambda / kappa * x / rms(x))``.

arXiv:2601.09719.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationMixin

from hf_efficient.errors import HFEError
from hf_efficient.modeling.bhyt.bhyt_norm import BhytNorm
from hf_efficient.modeling.bhyt.branch_variance import branch_variance
from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.decoder.modeling_decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel


class BhytPreTrainedModel(DecoderPreTrainedModel):
    config: BhytConfig
    config_class = BhytConfig  # transformers reads annotations unevaluated, so it is named here too
    _keep_in_fp32_modules_strict = {r"norm\.affine$", r"norm\.branch$", r"norm\.out_scale$"}
    # Computed anew from the weights.
    _keys_to_ignore_on_load_missing = [r"norm\.branch$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BhytNorm):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def post_init(self) -> None:
        super().post_init()
        self.refresh_branch_variance()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.refresh_branch_variance()
        return loaded

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        super().check_loaded(missing_keys, unexpected_keys)
        bounds = sorted(key for key in missing_keys if key.endswith(".lam"))
        if bounds:
            raise HFEError(
                f"the checkpoint lacks {len(bounds)} lambdas, {bounds[0]} first, so it is not a BHyT checkpoint",
                "convert the stock model with `hf-efficient convert SOURCE OUTPUT --patch bhyt` and load OUTPUT",
            )

    @torch.no_grad()
    def refresh_branch_variance(self) -> None:
        """Compute the `branch` of every approximate site from the weights as they are."""
        model = self.base_model
        for layer in getattr(model, "layers", ()):
            norm = layer.post_attention_layernorm
            if isinstance(norm, BhytNorm) and norm.branch is not None and not norm.branch.is_meta:
                attention = layer.self_attn
                norm.branch.copy_(
                    branch_variance(
                        attention.v_proj.weight,
                        attention.o_proj.weight,
                        attention.v_proj.bias,
                        head_dim=self.config.head_dim,
                        seq_len=self.config.bhyt_seq_len,
                    )
                )


class BhytModel(BhytPreTrainedModel, DecoderModel):
    """Decoder whose layers `config.bhyt_layers` have BHyT in place of their norms."""

    def __init__(self, config: BhytConfig) -> None:
        # Not a rule of the configuration, which transformers also makes from defaults alone.
        estimated = [i for i in config.bhyt_layers if config.bhyt_estimate(i) == "approx"]
        if estimated and config.bhyt_seq_len is None:
            raise HFEError(
                f"bhyt_second_site='approx' in layers {estimated} needs the length of the training sequences",
                "set bhyt_seq_len, or bhyt_second_site='exact'",
            )
        super().__init__(config)

    def build_norm(self, site: str, layer_idx: int | None = None) -> nn.Module:
        bounded = self.config.bhyt_final == "bhyt" if layer_idx is None else layer_idx in self.config.bhyt_layers
        return BhytNorm(self.config, site, layer_idx) if bounded else super().build_norm(site, layer_idx)


class BhytForCausalLM(BhytPreTrainedModel, DecoderForCausalLM, GenerationMixin):
    """`BhytModel` and a language-model head."""

    model_class = BhytModel


__all__ = ["BhytConfig", "BhytForCausalLM", "BhytModel", "BhytPreTrainedModel"]
