"""Fields of config.json that the mapping to our decoder does not read: which can be ignored, and which are refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from hf_efficient.errors import HFEError

# Fields that the stock families' configurations do not declare, and that do not change their logits.
_NO_EFFECT = frozenset(
    (
        # kind and origin of the file
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
_NO_EFFECT_PREFIXES = ("_", "unsloth_")
# Parts of the names of fields that change what a model computes in some architecture.
_COMPUTES = re.compile(
    r"scal|multipl|cap|clip|clamp|window|chunk|rope|rotary|posit|alibi|attn|attention|attribute|causal|norm|bias|layer"
    r"|head|expert|moe|router|mtp|nextn|block|parallel|sparse|kv|latent|lora|mup|fus|config|residual|conv|mamba|ssm|gate"
    r"|activation|act_|hidden|embed|proj|quant|cross|encoder|decoder|prefix|prune|skip|temperature|softmax|sink"
)
_TASKS = ("ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_EMPTY: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


def check_fields(fields: dict[str, Any], config: PreTrainedConfig, *, others: bool = True) -> list[str]:
    """Warnings about fields of a decoder's config.json that are ignored, as transformers ignores them.

    Args:
        fields: of config.json.
        config: transformers' configuration with these fields.
        others: also check fields that the stock model does not have; False if another reader checks them.

    Raises:
        HFEError: a field changes, or may change, what the model computes in a way that our decoder does not implement.
    """
    model_type = str(config.model_type)
    if not fields.get("is_causal", True):
        raise _refusal("is_causal", fields["is_causal"], "attends to later positions too", "use a causal model")
    if config.is_encoder_decoder:
        raise _refusal("is_encoder_decoder", True, "is an encoder-decoder", "use a causal language model")
    _check_windows(fields, config)
    _check_rope(config)
    declared = {field.name for field in dataclasses.fields(config)}
    if not others:
        return []
    warnings = unread_fields(fields, config)
    stock = type(config).__name__.removesuffix("Config")
    listed = config.architectures or []
    others_named = [name for name in listed if name not in {stock + task for task in _TASKS}]
    if others_named and "hfe_format" not in declared:
        warnings.append(
            f"config.json names the class {others_named[0]}; its weights were read as those of a stock {model_type}"
        )
    named = fields.get("auto_map")
    if isinstance(named, dict) and "AutoModelForCausalLM" in named and "hfe_format" not in declared:
        warnings.append(
            f"the source comes with its own modeling code, which is not run: it was read as the stock {model_type}, "
            "as transformers reads it without trust_remote_code"
        )
    return warnings


def unread_fields(fields: dict[str, Any], config: PreTrainedConfig, *, read: Sequence[str] = ()) -> list[str]:
    """A warning about the fields of config.json that the stock model does not have; none without such fields.

    Args:
        fields: of config.json.
        config: transformers' configuration with these fields.
        read: fields that the caller has checked.

    Raises:
        HFEError: the name of such a field suggests that it changes what the model computes.
    """
    model_type = str(config.model_type)
    known = (
        {field.name for field in dataclasses.fields(config)} | vars(GenerationConfig()).keys() | _NO_EFFECT | {*read}
    )
    unknown = [
        name
        for name, value in fields.items()
        if name not in known and not name.startswith(_NO_EFFECT_PREFIXES) and value not in _EMPTY
    ]
    for name in unknown:
        if _COMPUTES.search(name.lower()):
            raise HFEError(
                f"config.json sets {name}={str(fields[name])[:80]}, a field that the stock {model_type} does not have "
                "and whose name says that it changes what the model computes",
                "use the model type that the checkpoint was trained as, or remove the field if it has no effect",
            )
    if not unknown:
        return []
    return [f"config.json sets {', '.join(unknown)}, which the stock {model_type} does not read either"]


def _check_windows(fields: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise `HFEError` where sliding windows of config.json affect the stock model's cache but not its attention.

    In Llama and Mistral `layer_types` only selects the cache layers; so does `sliding_window` in Llama.
    """
    declared = {field.name for field in dataclasses.fields(config)}
    window = fields.get("sliding_window")
    if "sliding_window" not in declared and window is not None:
        raise _refusal(
            "sliding_window", window, "the stock model has for its cache, not for its attention", "remove the field"
        )
    kinds = getattr(config, "layer_types", None)
    if "layer_types" in declared or kinds is None:
        return
    expected = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    if list(kinds) != [expected] * config.num_hidden_layers:
        raise _refusal(
            "layer_types",
            kinds,
            f"differs from what every layer of {config.model_type} does ({expected})",
            "use a model type that has windows by layer (ministral, qwen2), or remove the field",
        )


def _check_rope(config: PreTrainedConfig) -> None:
    """Raise `HFEError` for a rotary embedding of a part of each head, which our decoder does not have."""
    rope = config.rope_parameters or {}
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _refusal(
            "partial_rotary_factor",
            rope["partial_rotary_factor"],
            "rotates a part of each head, while the stock model rotates all of it",
            "set it to 1, or use the model type that the checkpoint was trained as",
        )


def _refusal(name: str, value: Any, reason: str, remedy: str) -> HFEError:
    """The error for a field that our decoder does not implement."""
    return HFEError(f"config.json sets {name}={str(value)[:120]}, which {reason}", remedy)
