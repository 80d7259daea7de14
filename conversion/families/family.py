"""`ModelFamily`, what a kind of stock model must define to be converted, and functions that find a model's family.

A "stock" model is an unpatched model of transformers; "our" models are those of the architectures registered in
`conversion/architecture.py`. Causal decoders are one family, bidirectional encoders another. Plan, report, inspect,
evaluate, model card and command line call the family's methods and never test the model type themselves.

To add a family, write one file beside this one with a subclass of `ModelFamily`, an instance of it, and the classes in
`modeling/` that the stock models become. Then name the instance in `family=` of their entries in
`hf_efficient/registry.py`. A family that tests should cover has tiny models in `tests/modeling/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from hf_efficient.conversion.architecture import (
    ArchitectureSpec,
    architecture_of,
    architectures,
    architectures_beside,
    load,
    patch_classes,
)
from hf_efficient.conversion.reading.checkpoint_files import weight_files
from hf_efficient.conversion.reading.config_file import checked_fields
from hf_efficient.errors import HFEError, UsageError, error_text
from hf_efficient.modeling.decoder.weight_files import weight_file_names

if TYPE_CHECKING:
    from hf_efficient.conversion.measuring.evaluation import Evaluator

TOKENIZER_FILES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja"),
    *("chat_template.json", "additional_chat_templates/*.jinja"),
)
# Heading and code for the model card of every kind of model; `format` fills in the arguments of LoraConfig.
FINE_TUNING = "Fine-tuning with LoRA, and a merged checkpoint that loads in the same way:"
LORA = """from peft import LoraConfig, get_peft_model

model = get_peft_model(model, LoraConfig({}))
# ... train it, with transformers' Trainer or any other loop, then:
model.merge_and_unload().save_pretrained("merged")
tokenizer.save_pretrained("merged")"""


class ModelFamily(Protocol):
    """One kind of stock model. Subclasses set the attributes and write the methods without a body.

    Attributes:
        name: what messages call the models, in the plural.
        config_classes: stock model type -> transformers' configuration class, or one that stands for another library's.
        tensor_groups: label in `inspect` -> parts of the names of its tensors; the first that matches counts.
        inspected_fields: configuration fields that `inspect` reports as numbers.
        pipeline_tags: name of an Auto class -> the Hub's name of its task.
        generates: whether the models have `generate`, generation settings and `hf-efficient generate`.
        companion_files: glob patterns of the files of tokenizer or processor, which are copied from source to result;
            empty for models without one.
        image_processor: transformers' class of image processor for a model of images; None for any other.
        subfolders: folders of a repository in which config.json and weights may be, if it has no config.json itself.
        layouts: names of the layouts of other libraries that `layout` describes.
        patch_notes: name of a patch -> paragraph of the model card about it, in place of the patch's own `card_note`.
        patch_citations: name of a patch -> BibTeX for the model card, besides the patch's own `citation`.
        not_evaluated: why a model without an `evaluator` is not evaluated, for the report.
    """

    name: ClassVar[str]
    config_classes: ClassVar[Mapping[str, type[PreTrainedConfig]]]
    tensor_groups: ClassVar[Mapping[str, tuple[str, ...]]]
    inspected_fields: ClassVar[tuple[str, ...]]
    pipeline_tags: ClassVar[Mapping[str, str]]
    generates: ClassVar[bool] = False
    companion_files: ClassVar[tuple[str, ...]] = TOKENIZER_FILES
    image_processor: ClassVar[str | None] = None
    subfolders: ClassVar[tuple[str, ...]] = ()
    layouts: ClassVar[tuple[str, ...]] = ()
    patch_notes: ClassVar[Mapping[str, str]] = {}
    patch_citations: ClassVar[Mapping[str, str]] = {}
    not_evaluated: ClassVar[str] = ""

    @property
    def reads_text(self) -> bool:
        """True if the models have a tokenizer."""
        return set(TOKENIZER_FILES) <= set(self.companion_files)

    def supports(self, fields: Mapping[str, Any]) -> bool:
        """True if the fields of a config.json describe a stock model of this family."""
        return isinstance(fields.get("model_type"), str) and fields["model_type"] in self.config_classes

    def check_source(self, fields: Mapping[str, Any]) -> None:
        """Raise `HFEError` if the fields of config.json describe a variant that cannot be converted."""
        return

    def stock_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a config.json that `supports` accepts as fields of a class in `config_classes`.

        By default they are returned as they are. A family whose sources are not of transformers translates them, and
        sets `model_type`.

        Raises:
            HFEError: a field has a wrong type, or a value that our model does not implement.
        """
        return fields

    def check_fields(self, fields: dict[str, Any], stock: PreTrainedConfig) -> list[str]:
        """Warnings about fields of config.json that are ignored; `stock` is the configuration made of them.

        Raises:
            HFEError: a field changes what the model computes in a way that our model does not implement.
        """

    def own_config(self, stock: PreTrainedConfig) -> PreTrainedConfig:
        """The same model as a configuration of the architecture of this family that combines patches.

        Its model computes the same output from the same tensors. `stock` may already be a configuration of ours.

        Raises:
            HFEError: the configuration does not describe a model that can be built.
        """

    def auto_class(self, stock: PreTrainedConfig) -> str:
        """Name of the Auto class of the model with its head, e.g. `AutoModelForCausalLM`.

        Raises:
            HFEError: `architectures` names a head that our models do not have, in a family that reads it.
        """

    def skeleton(self, config: PreTrainedConfig) -> nn.Module:
        """The model of a configuration of ours, on the meta device (names and shapes, no data)."""

    def stored_names(self, names: set[str], expected: set[str]) -> dict[str, str]:
        """Name of a tensor in our model -> its name in the checkpoint, for those whose names differ.

        Args:
            names: names in the checkpoint.
            expected: names in our model.
        """

    def reason_to_leave_out(self, name: str) -> str:
        """Why a source tensor that our model does not have may be left out; an empty text if it may not."""

    def evaluator(self, config: PreTrainedConfig) -> Evaluator | None:
        """The evaluator of the model's loss on text; None if the model has no head that predicts tokens."""

    def weight_file_names(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the weight file and of the index of shards in a source; the first that exists is read.

        Args:
            fields: the fields of its config.json; `transformers_weights` among them is the only name.

        Raises:
            HFEError: `transformers_weights` is not the name of a safetensors file or index inside the folder.
        """
        return weight_file_names(fields)

    def weight_files(self, folder: Path, fields: dict[str, Any], name: str) -> list[Path]:
        """The safetensors files of a checkpoint folder.

        Args:
            folder: the checkpoint folder.
            fields: the fields of its config.json; `transformers_weights` among them names other weight files.
            name: what error messages call the folder.

        Raises:
            HFEError: no weight file is found, one is missing or outside the folder, or the weights are pickles; see
                `weight_files` of `reading/checkpoint_files.py`.
        """
        return weight_files(folder, fields, name)

    def layout(self, name: str, config: PreTrainedConfig) -> Layout:
        """How another library stores the model of a configuration of ours; `name` is one of `layouts`.

        Raises:
            HFEError: the layout is not one of the family's, or does not have the model.
        """
        raise HFEError(
            f"the {self.name} have no layout {name}", "a converted folder loads in transformers, with its code"
        )

    def description(self, config: PreTrainedConfig) -> dict[str, str]:
        """Label -> text, lines of `inspect` about the shape of a model of ours."""

    def snippets(self, auto_class: str, *, chat: bool) -> dict[str, str]:
        """Sentence -> code below it, for the model card; the code uses a loaded `model`, and `tokenizer` if it has one.

        `chat` is True if the tokenizer has a chat template.
        """


@dataclass(frozen=True)
class Layout:
    """How another library stores a model of ours.

    Attributes:
        fields: content of its config.json.
        names: name of each tensor in our model -> its name in the layout.
        weights: name of the weight file, such as `diffusion_pytorch_model.safetensors`.
        left_out: texts about settings of the model that the layout does not have, for the user.
    """

    fields: dict[str, Any]
    names: dict[str, str]
    weights: str
    left_out: list[str]


def families() -> list[ModelFamily]:
    """Every family of the registered architectures, in the order of the registry."""
    return [load(path) for path in dict.fromkeys(spec.family for spec in architectures())]


def companion_files() -> list[str]:
    """Glob patterns of tokenizer and processor files, of all families, without duplicates."""
    return list(dict.fromkeys(pattern for family in families() for pattern in family.companion_files))


def family_of(model_type: Any) -> ModelFamily | None:
    """The family of a stock model type or of one of ours; None for any other."""
    spec = architecture_of(model_type) if isinstance(model_type, str) else None
    if spec is not None:
        return load(spec.family)
    return next((family for family in families() if family.supports({"model_type": model_type})), None)


def family_of_fields(fields: Mapping[str, Any]) -> ModelFamily | None:
    """The family of the stock model, or of the one of ours, that the fields of a config.json describe; None if none."""
    spec = architecture_of(str(fields.get("model_type")))
    return load(spec.family) if spec else next((family for family in families() if family.supports(fields)), None)


def model_folder(folder: Path) -> Path:
    """The folder of config.json and weights: `folder`, or the first of a family's `subfolders` of it that has one."""
    places = [folder, *(folder / name for family in families() for name in family.subfolders)]
    return next((place for place in places if (place / CONFIG_NAME).is_file()), folder)


def family_of_config(config: PreTrainedConfig) -> ModelFamily:
    """The family of a configuration; `HFEError` if no family has its model type."""
    family = family_of(config.model_type)
    if family is None:
        raise _unsupported(config.model_type)
    return family


def source_config(fields: dict[str, Any], origin: str = "config.json") -> PreTrainedConfig:
    """The configuration with the fields of a config.json, of a transformers class or of one of ours.

    Code that the checkpoint may contain is never run. `origin` is the name of the file for error messages.

    Raises:
        HFEError: the model type is not supported, the weights are quantised, or a field has a wrong type or value.
    """
    try:
        return _source_config(fields)
    except HFEError as error:
        raise HFEError(*(part.replace("config.json", origin) for part in (error.problem, error.remedy))) from error


def _source_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """See `source_config`; the messages of its errors name config.json."""
    quantisation = fields.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise HFEError(
            f"the checkpoint is quantised (quant_method {method}); a conversion needs plain weights",
            "use the unquantised checkpoint, or a GGUF file, which is dequantised",
        )
    for family in families():
        family.check_source(fields)
    config_class, fields = _config_class(fields)
    checked = checked_fields(fields, config_class)
    try:
        config = config_class.from_dict(checked)
        # As every stock model does when it is built: completes the rotary parameters from the other fields.
        if hasattr(config, "rope_parameters"):
            config.standardize_rope_params()
        return config
    # transformers and huggingface_hub raise errors of their own for a field of a wrong type.
    except Exception as error:
        cause = error_text(error, most=None)
        raise HFEError(f"config.json is not a valid {config_class.__name__}: {cause}", "correct config.json") from error


def _config_class(fields: dict[str, Any]) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """(our or the stock configuration class of the fields of a config.json, the fields by this class's names).

    Raises:
        HFEError: no family supports the model, or as for `ModelFamily.stock_fields`.
    """
    spec = architecture_of(str(fields.get("model_type")))
    if spec is not None:
        return spec.config_class, fields
    family = family_of_fields(fields)
    if family is None:
        raise _unsupported(fields.get("model_type"))
    fields = family.stock_fields(fields)
    return family.config_classes[fields["model_type"]], fields


def _unsupported(model_type: Any) -> HFEError:
    """The error for a model type that no family has."""
    known = [name for family in families() for name in family.config_classes]
    return HFEError(
        f"model_type {model_type!r} is not a supported family; conversions support {', '.join(known)} and our own hfe_ "
        "models",
        "choose a checkpoint of one of these families",
    )


def target_architecture(
    stock: PreTrainedConfig, patches: Sequence[str], *, trained_patches: Sequence[str] = ()
) -> ArchitectureSpec:
    """The architecture of the result of a conversion.

    A single patch on a stock model gives that patch's own architecture, if it has one; every other combination gives
    the architecture of the family that combines patches.

    Args:
        stock: configuration of the source, of a transformers class or of ours.
        patches: names of the patches that the conversion applies.
        trained_patches: names of the patches that a source with a transformers configuration was trained with, e.g. in
            the code of a patch's authors.

    Raises:
        UsageError: a patch does not support this model type.
    """
    ours = architecture_of(stock.model_type)
    beside = check_patches(stock.model_type, patches)
    active = [*trained_patches, *patches]
    single = active[0] if len(active) == 1 and ours is None else None
    own = [spec for spec in beside if single is not None and spec.patch == single]
    return (own or [spec for spec in beside if spec.combines])[0]


def check_patches(model_type: str, patches: Sequence[str]) -> list[ArchitectureSpec]:
    """The architectures that models of `model_type` can be converted to, which has every patch of these names.

    Args:
        model_type: of a stock model of a family, or of one of our models.
        patches: names of the patches.

    Raises:
        UsageError: a patch does not support this model type.
    """
    ours = architecture_of(model_type)
    beside = architectures_beside(ours) if ours is not None else _architectures_for(model_type)
    for name in patches:
        if all(spec.patch != name for spec in beside):
            options: Any = patch_classes().get(name)
            reason = f": {options.scope}" if options is not None and hasattr(options, "scope") else ""
            known = ", ".join(spec.patch for spec in beside if spec.patch_options and spec.patch)
            supported = [kind for spec in architectures() if spec.patch == name for kind in _stock_types(spec)]
            raise UsageError(
                f"patch {name} does not support a {model_type} model{reason}",
                f"it supports the model types {', '.join(dict.fromkeys(supported))}; for {model_type} there "
                + (f"are the patches {known}" if known else "is no patch, only --patch none"),
            )
    return beside


def _stock_types(spec: ArchitectureSpec) -> Sequence[str]:
    """The stock model types that can be converted to an architecture."""
    return spec.source_types or tuple(load(spec.family).config_classes)


def _architectures_for(model_type: str) -> list[ArchitectureSpec]:
    """The architectures that models of a stock model type can be converted to."""
    return [spec for spec in architectures() if model_type in _stock_types(spec)]


def skeleton(config: PreTrainedConfig) -> nn.Module:
    """The model of a configuration of ours, on the meta device: names, shapes and module types, no data."""
    return family_of_config(config).skeleton(config)


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model, by name.

    Attributes:
        shapes: name -> shape of each tensor that a checkpoint stores, in the order of the model.
        tied: name of each tensor that a checkpoint does not store -> the one that it is tied to.
        float32: names of the tensors that a model in half precision has in float32.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    float32: set[str]


def model_tensors(config: PreTrainedConfig) -> ModelTensors:
    """The tensors of the model of a configuration of ours; creates it on the meta device, which reads no weights."""
    return tensors_of(skeleton(config))


def tensors_of(model: Any) -> ModelTensors:
    """The tensors of a model of transformers' kind (`PreTrainedModel`), such as one on the meta device."""
    tied = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    parts = set(model._keep_in_fp32_modules_strict or ())
    return ModelTensors(shapes, tied, {name for name in shapes if parts.intersection(name.split("."))})


def expected_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """`ModelTensors.shapes` of the model of a configuration of ours: name -> shape, without tied tensors."""
    return model_tensors(config).shapes
