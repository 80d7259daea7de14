"""BHyT: in chosen layers both norms are a bounded hyperbolic tangent, ``gamma * tanh(lambda / kappa * x / rms(x))``.

arXiv:2601.09719.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.bhyt.bhyt_norm import BhytNorm
from hf_efficient.modeling.bhyt.branch_variance import branch_variance
from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.bhyt.effective_weight import effective_weight, fingerprint, whole
from hf_efficient.modeling.decoder.modeling_decoder import (
    DecoderForCausalLM,
    DecoderModel,
    DecoderPreTrainedModel,
)
from hf_efficient.modeling.decoder.rms_norm import norm_attribute
from hf_efficient.modeling.decoder.task_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)


class BhytPreTrainedModel(DecoderPreTrainedModel):
    config: BhytConfig
    config_class = BhytConfig  # transformers reads annotations unevaluated, so it is named here too
    # It is computed from the weights.
    _keys_to_ignore_on_load_missing = [r"norm\.branch$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BhytNorm):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def post_init(self) -> None:
        sites = [module for module in self.modules() if isinstance(module, BhytNorm)]
        self._keep_in_fp32_modules_strict = {leaf for site in sites for leaf in site.float32_tensors()}
        super().post_init()

    def init_weights(self) -> None:
        super().init_weights()
        self.base_model._follow_weights(strict=False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, BhytNorm):
                module.freeze_constants()
        return loaded

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        super().check_loaded(missing_keys, unexpected_keys)
        bounds = sorted(key for key in missing_keys if key.endswith(".lam"))
        if bounds:
            raise HFEError(
                f"the checkpoint lacks {len(bounds)} lambdas, {bounds[0]} first, so it is not a BHyT checkpoint",
                "convert the stock model with `hf-efficient convert SOURCE OUTPUT --patch bhyt` and load OUTPUT",
            )
        foreign = self._foreign_constants(missing_keys, unexpected_keys)
        if foreign:
            raise HFEError(
                f"checkpoint and configuration disagree whether there are {len(foreign)} constants of BHyT sites, "
                f"{foreign[0]} first",
                "leave bhyt_output_scale, bhyt_second_site and bhyt_learnable_estimate as the checkpoint's config.json "
                "has them",
            )
        for name, module in self.named_modules():
            if isinstance(module, BhytNorm) and not module.lam.is_meta:
                _check_values(name, module)

    def _foreign_constants(self, missing_keys: set[str], unexpected_keys: set[str]) -> list[str]:
        """Constants that one of checkpoint and model has and the other would have to have, to compute the same."""
        prefix = f"{self.base_model_prefix}."
        absent, surplus = ({key.removeprefix(prefix) for key in keys} for keys in (missing_keys, unexpected_keys))
        foreign = []
        for name, site in self.named_modules():
            if isinstance(site, BhytNorm):
                found = surplus if site.out_scale is None else absent
                foreign += [key for key in [f"{name.removeprefix(prefix)}.out_scale"] if key in found]
                # An estimate to be trained may begin at its initial values, and exact sites need none.
                found = {"affine": absent, "approx": surplus, "exact": set()}[site.estimate]
                foreign += [key for key in [f"{name.removeprefix(prefix)}.affine"] if key in found]
        return foreign

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the branch variances that are saved are those of the weights that are saved."""
        if state_dict is None:
            self.refresh_branch_variance()
        else:
            prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
            state_dict = self.base_model._with_branch_variance(state_dict, prefix)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def refresh_branch_variance(self) -> list[int]:
        """Compute what the approximate sites expect of the attention from its weights as they are, adapters included.

        This happens by itself where a model is made, loaded, saved or switched to evaluation, and before a call in
        evaluation mode when weights or adapters changed (a compiled call, or one with sharded weights, does not look).
        In training `BranchVarianceCallback` or `keep_branch_variance` calls it now and then. With sharded weights all
        processes must call it, and what calls it.

        Returns:
            The layers whose weights cannot be read here, so that they keep what is stored.

        Raises:
            HFEError: such a layer has nothing stored.
        """
        return self.base_model._refresh(strict=True)


class BhytModel(BhytPreTrainedModel, DecoderModel):
    """Decoder whose layers `config.bhyt_layers` have BHyT in place of their norms."""

    # Of the weights that the branch variances were last computed from.
    _seen: Hashable = None

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

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if not mode:
            self._refresh(strict=True)
        return self

    def prepare_token_inputs(
        self,
        token_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Any:
        if not self.training and not torch.compiler.is_compiling():
            self._follow_weights(strict=True)
        return super().prepare_token_inputs(token_ids, attention_mask, position_ids, past_key_values, kwargs)

    def _approximate_layers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and parts of each layer that is here and whose second site is approximate."""
        for index, layer in self.layers_here().items():
            parts = layer._modules
            if norm_attribute(parts["post_attention_layernorm"], "estimate") == "approx":
                yield index, parts

    def _fingerprint(self) -> Hashable:
        """Changes with the weights that branch variances depend on; None without such, and where they are sharded."""
        found = []
        for _, parts in self._approximate_layers():
            attention = parts["self_attn"]._modules
            found += [fingerprint(attention["v_proj"]), fingerprint(attention["o_proj"])]
        return None if None in found else tuple(found) or None

    def _follow_weights(self, strict: bool) -> None:
        """Refresh where the weights changed since the last time, as far as a quick look tells."""
        if self._fingerprint() not in (None, self._seen):
            self._refresh(strict)

    @torch.no_grad()
    def _refresh(self, strict: bool) -> list[int]:
        """See `refresh_branch_variance`; unless `strict`, a layer may have nothing stored."""
        unread = []
        for index, parts in self._approximate_layers():
            sites = [m for m in parts["post_attention_layernorm"].modules() if isinstance(m, BhytNorm)]
            stored = [site.branch for site in sites if site.branch is not None]
            if any(branch.is_meta for branch in stored):
                continue
            projections = parts["self_attn"].v_proj, parts["self_attn"].o_proj
            read = [effective_weight(module, stored[0].to(self.dtype)) for module in projections]
            if None in read:
                unread.append(index)
                if strict and any(bool(branch.isnan().any()) for branch in stored):
                    raise HFEError(
                        f"layer {index} has no branch variance, and the weights to compute it from cannot be read here",
                        "load the model once whole (no offloading, and FSDP2 in place of FSDP1 or ZeRO-3) and save it, "
                        "or set bhyt_second_site='exact'",
                    )
                continue
            (value_weight, value_bias), (output_weight, _) = read
            found = self._branch_variance(value_weight, output_weight, value_bias)
            for branch in stored:
                # Not written in vain, for a backward pass may be waiting that was promised what it saw.
                if not torch.equal(branch, found.to(branch.device)):
                    with torch.inference_mode(branch.is_inference()):
                        branch.copy_(found)
        self._seen = self._fingerprint()
        return unread

    def _branch_variance(self, value_weight: Tensor, output_weight: Tensor, value_bias: Tensor | None) -> Tensor:
        head_dim, seq_len = self.config.head_dim, self.config.bhyt_seq_len
        return branch_variance(value_weight, output_weight, value_bias, head_dim=head_dim, seq_len=seq_len)

    def _with_branch_variance(self, state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """`state_dict` with the branch variances of its own weights, where it has them whole."""
        config, found = self.config, {}
        kv_width, width = (n * config.head_dim for n in (config.num_key_value_heads, config.num_attention_heads))
        shapes = (kv_width, config.hidden_size), (config.hidden_size, width)
        for index, _ in self._approximate_layers():
            layer = f"{prefix}layers.{index}"
            names = ("v_proj.weight", "o_proj.weight", "v_proj.bias")
            values, outputs, bias = (state_dict.get(f"{layer}.self_attn.{name}") for name in names)
            if all(
                type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.shape == shape
                for tensor, shape in zip((values, outputs), shapes, strict=True)
            ):
                branch = self._branch_variance(values, outputs, bias)
                found[f"{layer}.post_attention_layernorm.branch"] = branch
        return state_dict | found


def _check_values(name: str, norm: BhytNorm) -> None:
    """Raise `HFEError` where a loaded site holds what is no number; tell of one that passes nothing on."""
    for leaf in ("lam", "affine", "out_scale"):
        tensor = whole(getattr(norm, leaf))
        if tensor is not None and not tensor.isfinite().all():
            raise HFEError(
                f"{name}.{leaf} of the checkpoint holds NaN or infinity",
                "take a checkpoint from before training failed",
            )
    if not whole(norm.lam).any():
        get_logger().warning("%s.lam is 0, so this site passes nothing on", name)


class BhytForCausalLM(BhytPreTrainedModel, DecoderForCausalLM, GenerationMixin):
    """`BhytModel` and a language-model head."""

    model_class = BhytModel


class BhytForSequenceClassification(BhytPreTrainedModel, DecoderForSequenceClassification):
    """`BhytModel` and a classifier of texts."""

    model_class = BhytModel


class BhytForTokenClassification(BhytPreTrainedModel, DecoderForTokenClassification):
    """`BhytModel` and a classifier of tokens."""

    model_class = BhytModel


class BhytForQuestionAnswering(BhytPreTrainedModel, DecoderForQuestionAnswering):
    """`BhytModel` and scores of where an answer begins and ends."""

    model_class = BhytModel


__all__ = [
    "BhytConfig",
    "BhytForCausalLM",
    "BhytForQuestionAnswering",
    "BhytForSequenceClassification",
    "BhytForTokenClassification",
    "BhytModel",
    "BhytPreTrainedModel",
]
