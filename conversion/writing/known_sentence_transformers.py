"""Keys and types of the files that the package sentence-transformers reads beside a text encoder.

`modules.json` lists what makes an embedding of the encoder's hidden states. The package imports the classes that it
names, so only these three, which have no weights, are known: the encoder, pooling and normalisation.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

MODULES_NAME = "modules.json"
# Each module but the encoder has a folder of its own, named by its number and class.
MODULE_FILES = ("[0-9]_Pooling/config.json", "[0-9]_Normalize/config.json")
SENTENCE_TRANSFORMERS_FILES = (
    *(MODULES_NAME, "sentence_bert_config.json", "config_sentence_transformers.json"),
    *MODULE_FILES,
)


class SentenceModule(TypedDict, total=False):
    """One entry of `modules.json`: the class as releases before and since 6 name it, and its folder."""

    idx: int
    name: str
    path: Literal["", "1_Pooling", "1_Normalize", "2_Normalize"]
    type: Literal[
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
        "sentence_transformers.models.Normalize",
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "sentence_transformers.base.modules.normalize.Normalize",
    ]


class Modality(TypedDict, total=False):
    """Which method of the encoder is called, and which of its results is used."""

    method: Literal["forward"]
    method_output_name: Literal["last_hidden_state"]


class Modalities(TypedDict, total=False):
    """The kinds of input."""

    text: Modality


class TransformerSettings(TypedDict, total=False):
    """`sentence_bert_config.json`: settings of the encoder."""

    max_seq_length: int | None
    do_lower_case: bool
    transformer_task: Literal["feature-extraction"]
    modality_config: Modalities
    module_output_name: Literal["token_embeddings"]
    unpad_inputs: bool


PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


class PoolingSettings(TypedDict, total=False):
    """`1_Pooling/config.json`: how the hidden states of a text become one vector."""

    word_embedding_dimension: int
    embedding_dimension: int
    pooling_mode: PoolingMode | list[PoolingMode]
    pooling_mode_cls_token: bool
    pooling_mode_mean_tokens: bool
    pooling_mode_max_tokens: bool
    pooling_mode_mean_sqrt_len_tokens: bool
    pooling_mode_weightedmean_tokens: bool
    pooling_mode_lasttoken: bool
    include_prompt: bool


class NormalizeSettings(TypedDict, total=False):
    """`2_Normalize/config.json`: which vector is divided by its length."""

    module_input_name: Literal["sentence_embedding"]
    module_output_name: Literal["sentence_embedding"]


class Versions(TypedDict, total=False):
    """Releases of the packages that wrote the files."""

    sentence_transformers: str
    transformers: str
    pytorch: str


class EmbeddingSettings(TypedDict, total=False):
    """`config_sentence_transformers.json`: settings of the whole model."""

    model_type: Literal["SentenceTransformer"]
    __version__: Versions
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None
    truncate_dim: int | None


# Name or glob pattern of each file -> type of its content.
SENTENCE_TRANSFORMERS_JSON: dict[str, Any] = {
    MODULES_NAME: list[SentenceModule],
    "sentence_bert_config.json": TransformerSettings,
    "config_sentence_transformers.json": EmbeddingSettings,
    MODULE_FILES[0]: PoolingSettings,
    MODULE_FILES[1]: NormalizeSettings,
}
