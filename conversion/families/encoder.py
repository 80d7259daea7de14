"""The model family of bidirectional text encoders: BERT, RoBERTa and XLM-RoBERTa, which has RoBERTa's modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import BertConfig, PreTrainedConfig, RobertaConfig, XLMRobertaConfig

from hf_efficient.conversion.architecture import load
from hf_efficient.conversion.families.derived import DerivedFamily
from hf_efficient.conversion.families.family import FINE_TUNING, LORA, TOKENIZER_FILES
from hf_efficient.conversion.reading.config_fields import unread_fields
from hf_efficient.conversion.writing.known_sentence_transformers import SENTENCE_TRANSFORMERS_FILES
from hf_efficient.errors import HFEError

if TYPE_CHECKING:
    from hf_efficient.conversion.measuring.evaluation import Evaluator

# Names of the first releases for the weight and bias of a layer norm.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

# Auto class -> evaluator of its models.
_EVALUATORS = {
    "AutoModelForMaskedLM": "hf_efficient.conversion.measuring.masked:MaskedEvaluator",
    "AutoModel": "hf_efficient.conversion.measuring.embedding:EmbeddingEvaluator",
}


class EncoderFamily(DerivedFamily):
    """Text encoders with bidirectional self-attention; see `ModelFamily` for the methods."""

    name = "bidirectional encoders"
    config_classes = {"bert": BertConfig, "roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}
    prefixes = ("bert.", "roberta.")
    buffers = ("embeddings.position_ids", "embeddings.token_type_ids")
    other_heads = ("cls.", "lm_head.", "bert.pooler.", "roberta.pooler.", "pooler.")
    tensor_groups = {
        "attention": (".attention.",),
        "feed-forward": (".intermediate.", ".output."),
        "embeddings and head": ("",),
    }
    inspected_fields = (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"),
        *("max_position_embeddings", "tie_word_embeddings"),
    )
    pipeline_tags = {
        "AutoModel": "feature-extraction",
        "AutoModelForMaskedLM": "fill-mask",
        "AutoModelForSequenceClassification": "text-classification",
        "AutoModelForTokenClassification": "token-classification",
        "AutoModelForQuestionAnswering": "question-answering",
    }
    companion_files = (*TOKENIZER_FILES, *SENTENCE_TRANSFORMERS_FILES)
    not_evaluated = "the model has no head that predicts tokens"

    def check_fields(self, fields: dict[str, Any], stock: PreTrainedConfig) -> list[str]:
        """As `ModelFamily.check_fields`; decoders, cross-attention and relative positions raise `HFEError`.

        So do fields that `unread_fields` rejects: unknown ones that by their name change what the model computes.
        """
        for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
            if fields.get(name):
                raise HFEError(
                    f"config.json sets {name}={fields[name]!r}; an encoder attends to all positions of its input only",
                    "use a checkpoint that was trained as an encoder",
                )
        positions = fields.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise HFEError(
                f"config.json sets position_embedding_type={str(positions)[:80]!r}; transformers reads only absolute",
                "use a checkpoint with absolute positions",
            )
        return unread_fields(fields, stock, read=("position_embedding_type",))

    def own_config(self, stock: PreTrainedConfig) -> PreTrainedConfig:
        """As `DerivedFamily.own_config`; `HFEError` also for a padding token with which no model can be built."""
        config = super().own_config(stock)
        pad, numbered = config.pad_token_id, _numbers_from_padding(config)
        if (pad is None and numbered) or (pad is not None and not (0 if numbered else -1) <= pad < config.vocab_size):
            rule = ", and RoBERTa numbers positions from pad_token_id + 1 on" if numbered else ""
            raise HFEError(
                f"config.json has pad_token_id={pad}; the vocabulary is 0..{config.vocab_size - 1}{rule}",
                "set pad_token_id in config.json to that of the tokenizer",
            )
        if longest_input(config) < 1:
            raise HFEError(
                f"config.json has max_position_embeddings={config.max_position_embeddings} and pad_token_id={pad}; "
                "RoBERTa numbers positions from pad_token_id + 1 on, so no input has room",
                "correct config.json",
            )
        return config

    def older_names(self, name: str) -> list[str]:
        """The name of a layer norm's weight or bias in the first releases."""
        ending = ".".join(name.split(".")[-2:])
        return [name.removesuffix(ending) + _OLD_NAMES[ending]] if ending in _OLD_NAMES else []

    def evaluator(self, config: PreTrainedConfig) -> Evaluator | None:
        """The `MaskedEvaluator` (loss of masked tokens), without a head the `EmbeddingEvaluator`; else None.

        Errors as for `auto_class`.
        """
        found = _EVALUATORS.get(self.auto_class(config))
        return None if found is None else load(found)()

    def description(self, config: PreTrainedConfig) -> dict[str, str]:
        """Label -> text about layers, attention heads, vocabulary and class, for `inspect`."""
        heads, tied = config.num_attention_heads, "tied" if config.tie_word_embeddings else "untied"
        return {
            "shape": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, feed-forward "
            f"{config.intermediate_size}",
            "attention": f"{heads} heads of {config.hidden_size // heads}, bidirectional",
            "vocabulary": f"{config.vocab_size:,}, embeddings {tied}",
            "class": config.architectures[0],
        }

    def snippets(self, auto_class: str, *, chat: bool) -> dict[str, str]:
        """Sentence -> code for the model's head and for LoRA."""
        found = {"AutoModelForMaskedLM": ("Masked tokens:", _FILL_MASK), "AutoModel": ("Embeddings:", _EMBEDDINGS)}
        label, code = found.get(auto_class, ("Class of a text:", _CLASSIFY))
        return {label: code, FINE_TUNING: LORA.format("")}


def longest_input(config: PreTrainedConfig) -> int:
    """Largest number of tokens that an encoder has positions for; `config` is a stock one or one of ours."""
    return int(config.max_position_embeddings) - (config.pad_token_id + 1 if _numbers_from_padding(config) else 0)


def _numbers_from_padding(config: PreTrainedConfig) -> bool:
    """True for RoBERTa, whose positions begin at pad_token_id + 1, that of a padding token being pad_token_id."""
    return isinstance(config, RobertaConfig | XLMRobertaConfig)


ENCODERS = EncoderFamily()

_FILL_MASK = """inputs = tokenizer(f"Paris is the {tokenizer.mask_token} of France.", return_tensors="pt")
inputs = inputs.to(model.device)
logits = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]
print(tokenizer.decode(logits.argmax(-1)))"""
_EMBEDDINGS = """inputs = tokenizer(["A first text.", "A second one."], padding=True, return_tensors="pt")
inputs = inputs.to(model.device)
mask = inputs.attention_mask[..., None]
print((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))"""
_CLASSIFY = """inputs = tokenizer("A text.", return_tensors="pt").to(model.device)
print(model(**inputs))"""
