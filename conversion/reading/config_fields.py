"""Checks the fields of config.json that our models do not read: some are ignored, others raise an error.

"Stock" means the unpatched transformers model of the same model type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from hf_efficient.errors import HFEError

# Fields that the stock configuration classes do not declare, and that do not change the logits.
_IGNORED_FIELDS = frozenset(
    (
        # metadata
        *("model_type", "auto_map", "name_or_path", "torch_dtype", "configuration_files", "transformers_weights"),
        *("is_llama_config", "transformers.js_config", "license", "language", "datasets", "base_model"),
        # tokenizer and lengths
        *("tokenizer_class", "model_max_length", "max_sequence_length", "max_seq_length", "max_seq_len", "seq_length"),
        *(
            "seq_len",
            "n_ctx",
            "sep_token_id",
            "cls_token_id",
            "mask_token_id",
            "unk_token_id",
            "decoder_start_token_id",
        ),
        # other heads, losses and training
        *("num_labels", "finetuning_task", "task_specific_params", "classifier_dropout", "ignore_index", "is_decoder"),
        *("num_beam_groups", "diversity_penalty", "penalty_alpha"),
        *("gradient_checkpointing", "neftune_noise_alpha", "hidden_dropout", "hidden_dropout_prob", "embd_pdrop"),
        *("attn_pdrop", "resid_pdrop", "attention_probs_dropout_prob", "residual_dropout", "embedding_dropout"),
        *("initializer_factor", "init_std", "z_loss", "use_reentrant", "pretraining_tp"),
        # implementation of attention, and further outputs
        *("attn_implementation", "experts_implementation", "use_flash_attention", "use_flash_attention_2"),
        *("use_flash_attn", "flash_attention", "use_sdpa", "output_attentions", "use_return_dict", "torchscript"),
        *("use_bfloat16", "tf_legacy_loss"),
        # converted to other fields by the configuration class
        *("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"),
        *("use_sliding_window", "max_window_layers", "layer_types", "sliding_window", "head_dim"),
    )
)
_IGNORED_PREFIXES = ("_", "unsloth_")
# An undeclared field whose name matches is assumed to change what the model computes.
_CHANGES_COMPUTATION = re.compile(
    r"scal|multipl|cap|clip|clamp|window|chunk|rope|rotary|posit|alibi|attn|attention|attribute|causal|norm|bias|layer"
    r"|head|expert|moe|router|mtp|nextn|block|parallel|sparse|kv|latent|lora|mup|fus|config|residual|conv|mamba|ssm|gate"
    r"|activation|act_|hidden|embed|proj|quant|cross|encoder|decoder|prefix|prune|skip|temperature|softmax|sink"
)
_TASKS = ("ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_UNSET: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


def check_fields(fields: dict[str, Any], config: PreTrainedConfig, *, others: bool = True) -> list[str]:
    """Check the fields of a decoder's config.json; returns warnings for the user.

    There is one for all ignored fields (see `unread_fields`), one for a class in `architectures` that is not stock,
    and one for modeling code of the checkpoint's own, which is not run. The last two do not concern checkpoints of our
    own decoders.

    Args:
        fields: the fields of config.json.
        config: transformers' configuration with these fields.
        others: also check fields that `config` does not declare, and the class names; False if another reader does,
            which gives no warnings.

    Raises:
        HFEError: a field changes, or by its name may change, what the model computes, and our decoder does not
            implement it: bidirectional attention, an encoder-decoder, sliding windows that the stock model applies to
            its cache only, partial rotary embeddings.
    """
    model_type = str(config.model_type)
    if not fields.get("is_causal", True):
        raise _unsupported_field_error(
            "is_causal", fields["is_causal"], "means bidirectional attention", "use a causal model"
        )
    if config.is_encoder_decoder:
        raise _unsupported_field_error(
            "is_encoder_decoder", True, "is an encoder-decoder", "use a causal language model"
        )
    _check_windows(fields, config)
    _check_rope(config)
    declared = {field.name for field in dataclasses.fields(config)}
    if not others:
        return []
    warnings = unread_fields(fields, config)
    stock = type(config).__name__.removesuffix("Config")
    listed = config.architectures or []
    custom_classes = [name for name in listed if name not in {stock + task for task in _TASKS}]
    if custom_classes and "hfe_format" not in declared:
        warnings.append(
            f"config.json names the class {custom_classes[0]}; its weights were read as those of a stock {model_type}"
        )
    named = fields.get("auto_map")
    if isinstance(named, dict) and "AutoModelForCausalLM" in named and "hfe_format" not in declared:
        warnings.append(
            f"the source comes with its own modeling code, which is not run: it was read as the stock {model_type}, "
            "as transformers reads it without trust_remote_code"
        )
    return warnings


def unread_fields(fields: dict[str, Any], config: PreTrainedConfig, *, read: Sequence[str] = ()) -> list[str]:
    """A list with one warning that names the fields of config.json that are ignored; empty if there are none.

    Ignored are fields that neither `config` nor `GenerationConfig` declares. Those known to have no effect on the
    logits, and those that are null, false, zero or empty, are not named.

    Args:
        fields: the fields of config.json.
        config: transformers' configuration with these fields.
        read: names of fields that the caller has checked.

    Raises:
        HFEError: the name of an ignored field suggests that it changes what the model computes, e.g. `attn_scale`.
    """
    model_type = str(config.model_type)
    known = (
        {field.name for field in dataclasses.fields(config)}
        | vars(GenerationConfig()).keys()
        | _IGNORED_FIELDS
        | {*read}
    )
    unknown = [
        name
        for name, value in fields.items()
        if name not in known and not name.startswith(_IGNORED_PREFIXES) and value not in _UNSET
    ]
    for name in unknown:
        if _CHANGES_COMPUTATION.search(name.lower()):
            raise HFEError(
                f"config.json sets {name}={str(fields[name])[:80]}, a field that the stock {model_type} does not have "
                "and whose name says that it changes what the model computes",
                "use the model type that the checkpoint was trained as, or remove the field if it has no effect",
            )
    if not unknown:
        return []
    return [f"config.json sets {', '.join(unknown)}, which are ignored, as by the stock {model_type}"]


def _check_windows(fields: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise `HFEError` if the sliding windows of config.json affect the stock model's cache but not its attention.

    That is a `sliding_window` that `config` does not declare, or undeclared `layer_types` that differ from what every
    layer does.
    In transformers' Llama and Mistral `layer_types` only selects the cache layers; so does `sliding_window` in Llama.
    """
    declared = {field.name for field in dataclasses.fields(config)}
    window = fields.get("sliding_window")
    if "sliding_window" not in declared and window is not None:
        raise _unsupported_field_error(
            "sliding_window", window, f"only affects the cache in {config.model_type}", "remove the field"
        )
    kinds = getattr(config, "layer_types", None)
    if "layer_types" in declared or kinds is None:
        return
    expected = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    if list(kinds) != [expected] * config.num_hidden_layers:
        raise _unsupported_field_error(
            "layer_types",
            kinds,
            f"differs from what every layer of {config.model_type} does ({expected})",
            "use a model type that supports per-layer sliding windows (ministral, qwen2), or remove the field",
        )


def _check_rope(config: PreTrainedConfig) -> None:
    """Raise `HFEError` for a partial rotary embedding (partial_rotary_factor is not 1), which our decoder lacks."""
    rope = config.rope_parameters or {}
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported_field_error(
            "partial_rotary_factor",
            rope["partial_rotary_factor"],
            f"applies RoPE to part of each head; {config.model_type} applies it to the full head_dim",
            "set it to 1, or use the model type that the checkpoint was trained as",
        )


def _unsupported_field_error(name: str, value: Any, reason: str, remedy: str) -> HFEError:
    """The error for a field that our decoder does not support; `reason` is a clause after "which"."""
    return HFEError(f"config.json sets {name}={str(value)[:120]}, which {reason}", remedy)
