"""Configuration of the decoder that every language-model patch shares.

Annotations are evaluated in this file and in those of the patches: `strict` does not check a type that is a string.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_efficient.modeling.base.registered_config import RegisteredConfig

_LAYER_TYPES = ("full_attention", "sliding_attention")


def length_dependent_rope(rope_parameters: dict[str, Any] | None) -> str | None:
    """Return the first `rope_type` whose frequencies depend on the largest position (`dynamic`, `longrope`), or None.

    Args:
        rope_parameters: transformers' dictionary, or a dictionary of layer type to such a dictionary; None for default.
    """
    parameters = rope_parameters or {}
    candidates = (parameters, *parameters.values())
    types = [str(each.get("rope_type", "")) for each in candidates if isinstance(each, dict)]
    return next((rope_type for rope_type in types if "dynamic" in rope_type or rope_type == "longrope"), None)


@strict
class DecoderConfig(RegisteredConfig, PreTrainedConfig):
    """Llama, Mistral, Qwen2 and Qwen3 as one set of fields; the defaults are a Llama.

    | field | meaning |
    |---|---|
    | `attention_bias` | biases on q, k, v (Qwen2: True) |
    | `attention_output_bias` | bias on the attention's output projection |
    | `mlp_bias` | biases on gate, up and down |
    | `qk_norm` | RMSNorm over each head of q and k, before the rotary embedding (Qwen3) |
    | `head_dim` | channels of a head; by default `hidden_size // num_attention_heads` |
    | `layer_types` | `full_attention` or `sliding_attention` for each layer; by default sliding where a window is set |
    | `sliding_window` | number of tokens a query of a sliding layer may attend to, its own included |
    | `rope_parameters` | transformers' rotary dictionary (`rope_type`, `rope_theta`, …) |
    | `carry_residual` | a layer leaves its last residual addition to the next norm's kernel; the same results, faster |
    | `source_model_type` | stock model type that the weights were converted from; None if trained from scratch |
    | `hfe_format` | version of the checkpoint layout |

    The remaining fields mean what they mean in `LlamaConfig`.
    """

    model_type = "hfe_decoder_base"
    # False: the patch that defines an architecture cannot be absent. `hfe_decoder`, with any combination, sets True.
    patch_is_optional = False
    peft_targets = "llama"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    carry_residual: bool = False
    source_model_type: str | None = None
    hfe_format: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Replace the defaults None by the values that the table describes."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.base_model_tp_plan = self.tensor_parallel_plan()
        super().__post_init__(**kwargs)

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Return transformers' tensor-parallel plan: pattern of module names -> style. A patch adds its own entries."""
        plan = dict(type(self).base_model_tp_plan)
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                plan[f"layers.*.self_attn.{name}"] = "replicated_with_grad_allreduce"
        return plan

    def fields_of_absent_patches(self) -> set[str]:
        """Return the names of the fields that have no effect because their patch is absent. A patch adds its own."""
        return set()

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the fields of absent patches, which get their defaults on loading."""
        absent = self.fields_of_absent_patches()
        return {name: value for name, value in super().to_dict().items() if name not in absent}

    def validate_architecture(self) -> None:
        """Check rules across fields; transformers calls it when a configuration is created.

        Raises:
            ValueError: a rule is broken; the message has the value and the rule.
        """
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: the rotary embedding rotates pairs of channels")
        unknown = sorted(set(self.layer_types) - set(_LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types contains {unknown}; this decoder supports {list(_LAYER_TYPES)}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types names sliding_attention, so sliding_window must be set")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1, or None for no window")


__all__ = ["DecoderConfig"]
