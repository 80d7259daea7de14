"""Every architecture of the package, one entry each.

A new architecture is a folder in ``modeling/``, one in ``conversion/``, its kernels, and one entry here.
`ArchitectureSpec` says what each field means.
"""

from __future__ import annotations

from functools import partial

import transformers

from hf_efficient.conversion.architecture import ArchitectureSpec, architecture_of, patch_classes, register_architecture

_decoder = partial(
    ArchitectureSpec,
    tasks=("SequenceClassification", "TokenClassification", "QuestionAnswering", "CausalLM"),
    family="hf_efficient.conversion.families.decoder:CAUSAL_DECODERS",
)
_parallel_decoder = partial(
    _decoder,
    generation="hf_efficient.modeling.topology.generation.generation_topology",
    adds_tokens=True,
    writes_special_tokens="hf_efficient.modeling.topology.grammar.control_tokens:is_trained",
    generation_figures=("parallelism",),
)
# The same patch in models of several families, each an architecture of its own, with and without the patch.
_monarch = partial(
    ArchitectureSpec,
    patch="monarch",
    patch_options="hf_efficient.conversion.monarch.patch:Monarch",
    inspected_fields={"monarch": "Monarch attention"},
)
_text_encoder = partial(
    _monarch,
    tasks=("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"),
    family="hf_efficient.conversion.families.encoder:ENCODERS",
    combines=True,
)

ARCHITECTURES: tuple[ArchitectureSpec, ...] = (
    _decoder(
        patch=None,
        modeling="hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder",
        prefix="EfficientDecoder",
        combines=True,
    ),
    _decoder(
        patch="stem",
        modeling="hf_efficient.modeling.stem.modeling_stem",
        prefix="Stem",
        patch_options="hf_efficient.conversion.stem.patch:Stem",
        tensor_groups={"STEM tables": ("stem_embed",)},
        inspected_fields={"stem_layers": "STEM layers"},
        token_tables=("stem_embed",),
        runtime_fields=("stem_offload",),
        release_readers=("hf_efficient.conversion.stem.lingua_reader:LinguaReader",),
    ),
    _decoder(
        patch="bhyt",
        modeling="hf_efficient.modeling.bhyt.modeling_bhyt",
        prefix="Bhyt",
        patch_options="hf_efficient.conversion.bhyt.patch:Bhyt",
        release_readers=("hf_efficient.conversion.bhyt.release_reader:BhytReleaseReader",),
    ),
    _parallel_decoder(
        patch="multiverse",
        modeling="hf_efficient.modeling.multiverse.modeling_multiverse",
        prefix="Multiverse",
        patch_options="hf_efficient.conversion.topology.patch:Multiverse",
    ),
    _parallel_decoder(
        patch="medverse",
        modeling="hf_efficient.modeling.medverse.modeling_medverse",
        prefix="MedVerse",
        patch_options="hf_efficient.conversion.topology.patch:MedVerse",
    ),
    _text_encoder(
        modeling="hf_efficient.modeling.monarch_bert.modeling_monarch_bert",
        prefix="MonarchBert",
        source_types=("bert",),
    ),
    # XLM-RoBERTa is RoBERTa with another vocabulary.
    _text_encoder(
        modeling="hf_efficient.modeling.monarch_roberta.modeling_monarch_roberta",
        prefix="MonarchRoberta",
        source_types=("roberta", "xlm-roberta"),
    ),
    _monarch(
        modeling="hf_efficient.modeling.monarch_vit.modeling_monarch_vit",
        prefix="MonarchViT",
        tasks=("ImageClassification",),
        family="hf_efficient.conversion.families.vision:VISION",
        source_types=("vit",),
        combines=True,
    ),
    _monarch(
        modeling="hf_efficient.modeling.monarch_wan.modeling_monarch_wan",
        prefix="MonarchWan",
        tasks=(),
        family="hf_efficient.conversion.families.video:VIDEO",
        combines=True,
        release_readers=("hf_efficient.conversion.wan.training_file:TrainingFileReader",),
    ),
)


def register_architectures() -> None:
    """Register every architecture with transformers' Auto classes. A second call has no effect."""
    for spec in ARCHITECTURES:
        register_architecture(spec)
        transformers.AutoConfig.register(spec.model_type, spec.config_class, exist_ok=True)
        for auto_name, model_class in spec.auto_classes.items():
            if auto_name != "AutoConfig":
                getattr(transformers, auto_name).register(spec.config_class, model_class, exist_ok=True)


__all__ = ["ARCHITECTURES", "ArchitectureSpec", "architecture_of", "patch_classes", "register_architectures"]
