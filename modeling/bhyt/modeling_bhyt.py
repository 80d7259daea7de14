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
from hf_efficient.modeling.bhyt.effective_weight import effective_weight, fingerprint, full_tensor
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
    """Initialisation, checks and saving that `BhytModel` and the models with a head share."""

    config: BhytConfig
    config_class = BhytConfig  # set too: transformers does not resolve the string annotation above
    # `branch` of `BhytNorm` (the branch variance) is computed from the weights.
    _keys_to_ignore_on_load_missing = [r"norm\.branch$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module in place; transformers calls it for those that have no weights in the checkpoint."""
        if isinstance(module, BhytNorm):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def post_init(self) -> None:
        """As in transformers; the tensors `float32_tensors` of each `BhytNorm` are kept in float32 when loading."""
        norms = [module for module in self.modules() if isinstance(module, BhytNorm)]
        self._keep_in_fp32_modules_strict = {leaf for norm in norms for leaf in norm.float32_tensors()}
        super().post_init()

    def init_weights(self) -> None:
        """As in transformers; then computes the branch variances from the initial weights, where available."""
        super().init_weights()
        self.base_model._refresh_if_changed(strict=False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; then freezes the parameters `lam` and `affine` of `BhytNorm` that are not to be trained.

        Raises:
            HFEError: see `check_loaded`; or a layer's estimate is `approx` and `bhyt_seq_len` is not set.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, BhytNorm):
                module.freeze_constants()
        return loaded

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        """Check that the loaded checkpoint has the BHyT tensors that the configuration describes, with finite values.

        Warns if a lambda is 0. If tensors are sharded, all processes must call this.

        Args:
            missing_keys: parameters and buffers of the model that the checkpoint does not have.
            unexpected_keys: tensors of the checkpoint that the model does not have.

        Raises:
            HFEError: a lambda is missing, `affine` or `out_scale` are missing or unexpected, or one of the three is
                NaN or infinite; and the errors of `DecoderPreTrainedModel.check_loaded`.
        """
        super().check_loaded(missing_keys, unexpected_keys)
        lambdas = sorted(key for key in missing_keys if key.endswith(".lam"))
        if lambdas:
            raise HFEError(
                f"the checkpoint is missing {len(lambdas)} lam tensors, e.g. {lambdas[0]}, so it is not a BHyT "
                "checkpoint",
                "convert the stock model with `hf-efficient convert SOURCE OUTPUT --patch bhyt` and load OUTPUT",
            )
        mismatched = self._mismatched_constants(missing_keys, unexpected_keys)
        if mismatched:
            raise HFEError(
                f"checkpoint and configuration disagree on {len(mismatched)} tensors of BHyT norms, e.g. "
                f"{mismatched[0]}",
                "leave bhyt_output_scale, bhyt_second_site and bhyt_learnable_estimate as the checkpoint's config.json "
                "has them",
            )
        for name, module in self.named_modules():
            if isinstance(module, BhytNorm) and not module.lam.is_meta:
                _check_values(name, module)

    def _mismatched_constants(self, missing_keys: set[str], unexpected_keys: set[str]) -> list[str]:
        """Names of the `out_scale` and `affine` that only the model or only the checkpoint has and that change outputs.

        The names are without the prefix of the base model. Arguments as for `check_loaded`.
        """
        prefix = f"{self.base_model_prefix}."
        missing, unexpected = ({key.removeprefix(prefix) for key in keys} for keys in (missing_keys, unexpected_keys))
        mismatched = []
        for name, norm in self.named_modules():
            if isinstance(norm, BhytNorm):
                name = name.removeprefix(prefix)
                # A tensor that the norm has must not be missing; one that it does not have must not be unexpected.
                errors = unexpected if norm.out_scale is None else missing
                mismatched += [key for key in [f"{name}.out_scale"] if key in errors]
                # `affine` missing for `approx` is no error: its initial values are those of an estimate without it. An
                # exact norm ignores it.
                errors = {"affine": missing, "approx": unexpected, "exact": set()}[norm.estimate]
                mismatched += [key for key in [f"{name}.affine"] if key in errors]
        return mismatched

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the saved branch variances are computed from the saved weights.

        Without `state_dict` those of the model are recomputed first, in place, so this raises `HFEError` as
        `refresh_branch_variance` does. A given `state_dict` is not changed.
        """
        if state_dict is None:
            self.refresh_branch_variance()
        else:
            prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
            state_dict = self.base_model._with_branch_variance(state_dict, prefix)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def refresh_branch_variance(self) -> list[int]:
        """Recompute `branch`, the branch variance [2], of the `approx` norms from the present weights and adapters.

        This is done automatically when a model is created, loaded, saved or switched to evaluation, and before a call
        in evaluation mode if weights or adapters changed (not in a compiled call, nor with sharded weights). In
        training, `BranchVarianceCallback` or `keep_branch_variance` calls it at intervals. With sharded weights all
        processes must call this method and everything that calls it.

        Returns:
            Indices of the layers whose weights are not available in this process (offloaded, or sharded in an unknown
            layout); these keep their values. A layer whose `branch` itself is on the meta device is skipped and not
            in the result.

        Raises:
            HFEError: a layer without available weights has no value yet (NaN); layers before it have been updated.
        """
        return self.base_model._refresh(strict=True)


class BhytModel(BhytPreTrainedModel, DecoderModel):
    """Decoder whose layers in `config.bhyt_layers` have a `BhytNorm` in place of each of their two norms.

    The final norm is a `BhytNorm` with `bhyt_final="bhyt"`. `__init__` raises `HFEError` if a layer's estimate is
    `approx` and `bhyt_seq_len` is not set.
    """

    # `_fingerprint()` at the last refresh of the branch variances; None before.
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
        """As in `DecoderModel`; a `BhytNorm` where the configuration has one."""
        bounded = self.config.bhyt_final == "bhyt" if layer_idx is None else layer_idx in self.config.bhyt_layers
        return BhytNorm(self.config, position, layer_idx) if bounded else super().build_norm(position, layer_idx)

    def train(self, mode: bool = True) -> Any:
        """As in PyTorch; switching to evaluation recomputes the branch variances, see `refresh_branch_variance`.

        Raises:
            HFEError: in evaluation mode, as `refresh_branch_variance`.
        """
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
        """As in `DecoderModel`; in evaluation mode, first recomputes the branch variances if weights have changed.

        Not in a compiled call.

        Raises:
            HFEError: as `refresh_branch_variance`.
        """
        if not self.training and not torch.compiler.is_compiling():
            self._refresh_if_changed(strict=True)
        return super().prepare_token_inputs(token_ids, attention_mask, position_ids, past_key_values, kwargs)

    def _approximate_layers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield index and child modules by name of each layer whose post-attention norm is `approx`.

        Only of the layers of this pipeline stage.
        """
        for index, layer in self.layers_here().items():
            modules = layer._modules
            if norm_attribute(modules["post_attention_layernorm"], "estimate") == "approx":
                yield index, modules

    def _fingerprint(self) -> Hashable:
        """A value that changes when v_proj or o_proj of an `approx` layer change, made of addresses and versions.

        None if there is no such layer, or if one of these weights is sharded.
        """
        fingerprints = []
        for _, modules in self._approximate_layers():
            attention = modules["self_attn"]._modules
            fingerprints += [fingerprint(attention["v_proj"]), fingerprint(attention["o_proj"])]
        return None if None in fingerprints else tuple(fingerprints) or None

    def _refresh_if_changed(self, strict: bool) -> None:
        """Call `_refresh` if `_fingerprint` is not None and not that of the last refresh; it raises for `strict`."""
        if self._fingerprint() not in (None, self._refreshed_fingerprint):
            self._refresh(strict)

    @torch.no_grad()
    def _refresh(self, strict: bool) -> list[int]:
        """Recompute `branch`, float32 [2], of each `approx` norm in place, and store the new fingerprint.

        Layers with `branch` on the meta device (not loaded yet, or offloaded) are skipped and not in the result.

        Args:
            strict: raise if a layer's weights are not available and its `branch` is still NaN (not computed yet).

        Returns:
            Indices of the layers whose weights are not available in this process; their `branch` is unchanged.

        Raises:
            HFEError: see `strict`.
        """
        unavailable_layers = []
        for index, modules in self._approximate_layers():
            # An adapter of PEFT (LN tuning, `modules_to_save`) holds the original norm and its copies.
            norms = [m for m in modules["post_attention_layernorm"].modules() if isinstance(m, BhytNorm)]
            branches = [norm.branch for norm in norms if norm.branch is not None]
            if any(branch.is_meta for branch in branches):
                continue
            projections = modules["self_attn"].v_proj, modules["self_attn"].o_proj
            weights = [effective_weight(module, branches[0].to(self.dtype)) for module in projections]
            if None in weights:
                unavailable_layers.append(index)
                if strict and any(bool(branch.isnan().any()) for branch in branches):
                    raise HFEError(
                        f"layer {index} has no branch variance, and the weights to compute it from are not available "
                        "in this process (offloaded or sharded)",
                        "load the model once whole (no offloading, and FSDP2 in place of FSDP1 or ZeRO-3) and save it, "
                        "or set bhyt_second_site='exact'",
                    )
                continue
            (value_weight, value_bias), (output_weight, _) = weights
            new_value = self._branch_variance(value_weight, output_weight, value_bias)
            for branch in branches:
                # An equal value is not written: an in-place write bumps the version counter, and a pending backward
                # pass that saved the tensor would fail.
                if not torch.equal(branch, new_value.to(branch.device)):
                    with torch.inference_mode(branch.is_inference()):
                        branch.copy_(new_value)
        self._refreshed_fingerprint = self._fingerprint()
        return unavailable_layers

    def _branch_variance(self, value_weight: Tensor, output_weight: Tensor, value_bias: Tensor | None) -> Tensor:
        """`branch_variance` with the configured `head_dim` and `seq_len`: float32 [2]."""
        head_dim, seq_len = self.config.head_dim, self.config.bhyt_seq_len
        return branch_variance(value_weight, output_weight, value_bias, head_dim=head_dim, seq_len=seq_len)

    def _with_branch_variance(self, state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return a copy of `state_dict` with `branch` of the `approx` norms computed from its own weights.

        Of a layer whose v_proj.weight or o_proj.weight is absent, on the meta device, or not an ordinary tensor of the
        full shape, the copy has what `state_dict` has.

        Args:
            state_dict: tensors by name; v_proj.weight is [num_key_value_heads * head_dim, hidden_size].
            prefix: what the names of the base model's tensors begin with: "" or "model.".
        """
        config, branches = self.config, {}
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
                branches[f"{layer}.post_attention_layernorm.branch"] = branch
        return state_dict | branches


def _check_values(name: str, norm: BhytNorm) -> None:
    """Check the loaded values of a norm: warn if lambda, and so the norm's output, is zero.

    Args:
        name: the norm's name in the model, for messages.
        norm: the norm; its tensors may be sharded, then all processes must call this.

    Raises:
        HFEError: `lam`, `affine` or `out_scale` has NaN or infinity.
    """
    for leaf in ("lam", "affine", "out_scale"):
        tensor = full_tensor(getattr(norm, leaf))
        if tensor is not None and not tensor.isfinite().all():
            raise HFEError(
                f"{name}.{leaf} of the checkpoint holds NaN or infinity",
                "take a checkpoint from before training failed",
            )
    if not full_tensor(norm.lam).any():
        get_logger().warning("%s.lam is 0, so the output of this norm is zero", name)


class BhytForCausalLM(BhytPreTrainedModel, DecoderForCausalLM, GenerationMixin):
    """`BhytModel` and a language-model head."""

    model_class = BhytModel


class BhytForSequenceClassification(BhytPreTrainedModel, DecoderForSequenceClassification):
    """`BhytModel` and a sequence classification head."""

    model_class = BhytModel


class BhytForTokenClassification(BhytPreTrainedModel, DecoderForTokenClassification):
    """`BhytModel` and a token classification head."""

    model_class = BhytModel


class BhytForQuestionAnswering(BhytPreTrainedModel, DecoderForQuestionAnswering):
    """`BhytModel` and a question answering head."""

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
