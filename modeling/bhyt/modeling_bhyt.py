"""BHyT: both norms of a layer are bounded hyperbolic tangents, ``gamma * tanh(lambda / kappa * x / rms(x))``.

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
    # The branch variance is computed from the weights.
    _keys_to_ignore_on_load_missing = [r"norm\.branch$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module that has no weights in the checkpoint."""
        if isinstance(module, BhytNorm):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def post_init(self) -> None:
        """As in transformers; some tensors of BHyT norms are kept in float32."""
        norms = [module for module in self.modules() if isinstance(module, BhytNorm)]
        self._keep_in_fp32_modules_strict = {leaf for norm in norms for leaf in norm.float32_tensors()}
        super().post_init()

    def init_weights(self) -> None:
        super().init_weights()
        self.base_model._refresh_if_changed(strict=False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; lambdas that are constants are frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, BhytNorm):
                module.freeze_constants()
        return loaded

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        """Raise `HFEError` if the checkpoint does not have the BHyT tensors that the configuration describes."""
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
                f"checkpoint and configuration disagree on {len(foreign)} constants of BHyT norms, {foreign[0]} first",
                "leave bhyt_output_scale, bhyt_second_site and bhyt_learnable_estimate as the checkpoint's config.json "
                "has them",
            )
        for name, module in self.named_modules():
            if isinstance(module, BhytNorm) and not module.lam.is_meta:
                _check_values(name, module)

    def _foreign_constants(self, missing_keys: set[str], unexpected_keys: set[str]) -> list[str]:
        """Constants that the model has and the checkpoint lacks, or the reverse, and that change the result."""
        prefix = f"{self.base_model_prefix}."
        absent, surplus = ({key.removeprefix(prefix) for key in keys} for keys in (missing_keys, unexpected_keys))
        foreign = []
        for name, norm in self.named_modules():
            if isinstance(norm, BhytNorm):
                found = surplus if norm.out_scale is None else absent
                foreign += [key for key in [f"{name.removeprefix(prefix)}.out_scale"] if key in found]
                # A trainable `approx` estimate may start from its initial values; an exact norm has no such constants.
                found = {"affine": absent, "approx": surplus, "exact": set()}[norm.estimate]
                foreign += [key for key in [f"{name.removeprefix(prefix)}.affine"] if key in found]
        return foreign

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the saved branch variances are computed from the saved weights."""
        if state_dict is None:
            self.refresh_branch_variance()
        else:
            prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
            state_dict = self.base_model._with_branch_variance(state_dict, prefix)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def refresh_branch_variance(self) -> list[int]:
        """Recompute the branch variances of the `approx` norms from the present weights, adapters included.

        This is done automatically when a model is created, loaded, saved or switched to evaluation, and before a call
        in evaluation mode if weights or adapters changed (not in a compiled call, nor with sharded weights). In
        training, `BranchVarianceCallback` or `keep_branch_variance` calls it at intervals. With sharded weights all
        processes must call this method and everything that calls it.

        Returns:
            The layers whose weights cannot be read in this process; they keep the stored values.

        Raises:
            HFEError: such a layer has no stored value.
        """
        return self.base_model._refresh(strict=True)


class BhytModel(BhytPreTrainedModel, DecoderModel):
    """Decoder whose layers `config.bhyt_layers` have BHyT in place of their norms."""

    # Fingerprint of the weights that the branch variances were last computed from.
    _refreshed_fingerprint: Hashable = None

    def __init__(self, config: BhytConfig) -> None:
        # Not checked by the configuration, because transformers also creates one from its defaults alone.
        estimated = [i for i in config.bhyt_layers if config.bhyt_estimate(i) == "approx"]
        if estimated and config.bhyt_seq_len is None:
            raise HFEError(
                f"bhyt_second_site='approx' in layers {estimated} needs the length of the training sequences",
                "set bhyt_seq_len, or bhyt_second_site='exact'",
            )
        super().__init__(config)

    def build_norm(self, position: str, layer_idx: int | None = None) -> nn.Module:
        bounded = self.config.bhyt_final == "bhyt" if layer_idx is None else layer_idx in self.config.bhyt_layers
        return BhytNorm(self.config, position, layer_idx) if bounded else super().build_norm(position, layer_idx)

    def train(self, mode: bool = True) -> Any:
        """As in PyTorch; switching to evaluation recomputes the branch variances."""
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
        """As in `DecoderModel`; in evaluation, recomputes branch variances if weights changed since the last call."""
        if not self.training and not torch.compiler.is_compiling():
            self._refresh_if_changed(strict=True)
        return super().prepare_token_inputs(token_ids, attention_mask, position_ids, past_key_values, kwargs)

    def _approximate_layers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and submodules of each layer of this pipeline stage whose post-attention norm is `approx`."""
        for index, layer in self.layers_here().items():
            parts = layer._modules
            if norm_attribute(parts["post_attention_layernorm"], "estimate") == "approx":
                yield index, parts

    def _fingerprint(self) -> Hashable:
        """A value that changes with the weights that branch variances depend on; None without such, or if sharded."""
        found = []
        for _, parts in self._approximate_layers():
            attention = parts["self_attn"]._modules
            found += [fingerprint(attention["v_proj"]), fingerprint(attention["o_proj"])]
        return None if None in found else tuple(found) or None

    def _refresh_if_changed(self, strict: bool) -> None:
        """Refresh if `_fingerprint` differs from that of the last refresh; `strict` as for `_refresh`."""
        if self._fingerprint() not in (None, self._refreshed_fingerprint):
            self._refresh(strict)

    @torch.no_grad()
    def _refresh(self, strict: bool) -> list[int]:
        """As `refresh_branch_variance`; without `strict`, a layer without a stored value is no error."""
        unread = []
        for index, parts in self._approximate_layers():
            norms = [m for m in parts["post_attention_layernorm"].modules() if isinstance(m, BhytNorm)]
            stored = [norm.branch for norm in norms if norm.branch is not None]
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
                # Skip unchanged writes: they would invalidate a pending backward.
                if not torch.equal(branch, found.to(branch.device)):
                    with torch.inference_mode(branch.is_inference()):
                        branch.copy_(found)
        self._refreshed_fingerprint = self._fingerprint()
        return unread

    def _branch_variance(self, value_weight: Tensor, output_weight: Tensor, value_bias: Tensor | None) -> Tensor:
        head_dim, seq_len = self.config.head_dim, self.config.bhyt_seq_len
        return branch_variance(value_weight, output_weight, value_bias, head_dim=head_dim, seq_len=seq_len)

    def _with_branch_variance(self, state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """`state_dict` with branch variances computed from its own weights, for the layers whose weights it has whole.

        Args:
            state_dict: tensors by name; v_proj.weight is [num_key_value_heads * head_dim, hidden_size].
            prefix: of the base model's names in it.
        """
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
    """Raise `HFEError` if a loaded norm has NaN or infinite parameters; warn if its lambda, so its output, is zero."""
    for leaf in ("lam", "affine", "out_scale"):
        tensor = whole(getattr(norm, leaf))
        if tensor is not None and not tensor.isfinite().all():
            raise HFEError(
                f"{name}.{leaf} of the checkpoint holds NaN or infinity",
                "take a checkpoint from before training failed",
            )
    if not whole(norm.lam).any():
        get_logger().warning("%s.lam is 0, so the output of this norm is zero", name)


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
