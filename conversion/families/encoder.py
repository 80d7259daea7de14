"""The model family of bidirectional encoders: BERT models become classes of ours that derive from the stock ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_efficient.conversion.architecture import ArchitectureSpec, architecture_of, architectures, load, runtime_fields
from hf_efficient.conversion.families.family import FINE_TUNING, LORA, ModelFamily
from hf_efficient.conversion.reading.config_fields import unread_fields
from hf_efficient.errors import HFEError, error_text

if TYPE_CHECKING:
    from hf_efficient.conversion.measuring.evaluation import Evaluator

# Fields of a configuration that describe the file or the class, not the model.
_FILE_FIELDS = ("model_type", "auto_map", "transformers_version", "_name_or_path")
_PREFIX = "bert."
# Names of the first releases for the weight and bias of a layer norm.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# Prefixes of tensors of the pretraining heads, which the class that the checkpoint names may not have.
_OTHER_HEADS = ("cls.", "bert.pooler.", "pooler.")


class EncoderFamily(ModelFamily):
    """Encoders with bidirectional self-attention; see `ModelFamily` for the methods."""

    name = "bidirectional encoders"
    config_classes = {"bert": BertConfig}
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
        """As `ModelFamily.own_config`; `architectures` names our class with the source's head. Errors: `auto_class`."""
        spec = _spec(stock)
        fields = {name: value for name, value in stock.to_dict().items() if name not in _FILE_FIELDS}
        if architecture_of(stock.model_type) is None:
            fields["source_model_type"] = stock.model_type
        for name in runtime_fields():
            fields.pop(name, None)
        fields["architectures"] = [spec.auto_classes[self.auto_class(stock)].__name__]
        try:
            config = spec.config_class(**fields)
        # For a field of a wrong type or value huggingface_hub raises its own error classes.
        except Exception as error:
            cause = error_text(error, most=None)
            raise HFEError(
                f"config.json does not describe an encoder of ours: {cause}", "correct config.json"
            ) from error
        if config.hidden_act not in ACT2FN:
            raise HFEError(
                f"config.json names the activation hidden_act={config.hidden_act!r}, which transformers does not know",
                f"use one of {', '.join(sorted(ACT2FN)[:6])}, …, or a checkpoint of another family",
            )
        return config

    def auto_class(self, stock: PreTrainedConfig) -> str:
        """Name of the Auto class of the first of `architectures`; `BertForPreTraining` counts as masked language model.

        Raises:
            HFEError: `architectures` is missing, or names a class that our architecture does not have.
        """
        named = (stock.architectures or [None])[0]
        spec = _spec(stock)
        prefix = type(stock).__name__.removesuffix("Config")
        task = str(named).removeprefix(prefix).removeprefix("For").replace("PreTraining", "MaskedLM")
        auto = "AutoModel" if task == "Model" else f"AutoModelFor{task}"
        if named is None or auto not in spec.auto_classes:
            heads = [each.removeprefix("AutoModel") or "Model" for each in spec.auto_classes if each != "AutoConfig"]
            known = ", ".join(prefix + head for head in heads)
            raise HFEError(
                f"config.json names the class {named} in architectures; conversions support {known}",
                "correct architectures in config.json, or choose a checkpoint of one of these classes",
            )
        return auto

    def skeleton(self, config: PreTrainedConfig) -> nn.Module:
        """The model of the class in `architectures`, on the meta device."""
        with torch.device("meta"):
            return model_class(config)(config)

    def stored_names(self, names: set[str], expected: set[str]) -> dict[str, str]:
        """As `ModelFamily.stored_names`: a missing or surplus prefix `bert.`, and the old names of layer norms."""
        stored = {}
        for name in expected - names:
            # A checkpoint of the base model has no prefix before its names, one of a model with a head has.
            for other in (name, name.removeprefix(_PREFIX), _PREFIX + name):
                ending = ".".join(other.split(".")[-2:])
                old = other.removesuffix(ending) + _OLD_NAMES.get(ending, ending)
                found = next((each for each in (other, old) if each in names and each not in expected), None)
                if found is not None:
                    stored[name] = found
        return stored

    def reason_to_leave_out(self, name: str) -> str:
        """A reason for stored buffers and parts of other heads; an empty text for any other tensor."""
        if name.endswith(_BUFFERS):
            return "a buffer that the model computes itself"
        return "part of a head that the model's class does not have" if name.startswith(_OTHER_HEADS) else ""

    def evaluator(self, config: PreTrainedConfig) -> Evaluator | None:
        """The `MaskedEvaluator`: loss of masked tokens; None for another head than masked language modelling.

        Errors as for `auto_class`.
        """
        if self.auto_class(config) != "AutoModelForMaskedLM":
            return None
        return load("hf_efficient.conversion.measuring.masked:MaskedEvaluator")()

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


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class that a configuration of one of our encoders names first in `architectures`.

    Raises:
        KeyError: the name is not that of a class of ours. A configuration from `own_config` names one.
    """
    spec = _spec(config)
    by_name: dict[str, Any] = {cls.__name__: cls for cls in spec.auto_classes.values()}
    return by_name[config.architectures[0]]


def _spec(config: PreTrainedConfig) -> ArchitectureSpec:
    """The architecture of a configuration of ours; for a stock one, the one that combines patches.

    Raises:
        StopIteration: no architecture that combines patches is made from the stock model type.
    """
    ours = architecture_of(config.model_type)
    if ours is not None:
        return ours
    return next(spec for spec in architectures() if config.model_type in (spec.source_types or ()) and spec.combines)


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
