"""Keys and types of a checkpoint's JSON settings: a conversion writes only these, and `verify` accepts only these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

# JSON has no infinity and no NaN: transformers writes them as objects.
_FLOAT_TAGS = ({"__float__": "Infinity"}, {"__float__": "-Infinity"}, {"__float__": "NaN"})
# Tokenizer classes that belong to no single model.
_TOKENIZER_CLASSES = {
    *("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "SentencePieceBackend", "PythonBackend"),
    *("MistralCommonBackend", "MistralCommonTokenizer"),
}
_SHOWN = 80
_UNKNOWN_KEY = "is not a known key"

IdList = list[int]


class GenerationSettings(TypedDict, total=False):
    """`generation_config.json`: the fields of `GenerationConfig` in any supported release whose values are JSON."""

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    early_stopping: bool | Literal["never"] | None
    max_time: float | None
    stop_strings: str | list[str] | None
    do_sample: bool | None
    num_beams: int | None
    use_cache: bool | None
    use_mtp: bool | None
    cache_implementation: str | None
    max_cache_len: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    length_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: list[IdList] | None
    renormalize_logits: bool | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | IdList | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: list[float] | None
    suppress_tokens: IdList | None
    begin_suppress_tokens: IdList | None
    sequence_bias: list[list[IdList | float]] | None
    token_healing: bool | None
    guidance_scale: float | None
    num_return_sequences: int | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    output_scores: bool | None
    output_logits: bool | None
    return_dict_in_generate: bool | None
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | IdList | None
    encoder_no_repeat_ngram_size: int | None
    decoder_start_token_id: int | IdList | None
    is_assistant: bool | None
    num_assistant_tokens: int | None
    num_assistant_tokens_schedule: Literal["heuristic", "heuristic_transient", "constant"] | None
    assistant_confidence_threshold: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    assistant_early_exit: int | None
    assistant_lookbehind: int | None
    target_lookbehind: int | None
    assistant_ensemble_weight: float | None
    speculation_type: str | None
    disable_compile: bool | None
    low_memory: bool | None
    penalty_alpha: float | None
    dola_layers: str | IdList | None
    diversity_penalty: float | None
    num_beam_groups: int | None
    prefill_chunk_size: int | None
    _from_model_config: bool | None
    transformers_version: str | None


# A token outside the vocabulary's model, as `tokenizer_config.json` and `special_tokens_map.json` hold it.
AddedToken = TypedDict(
    "AddedToken",
    {
        "content": str,
        "lstrip": bool,
        "rstrip": bool,
        "normalized": bool,
        "single_word": bool,
        "special": bool,
        "id": int,
        "__type": str,
    },
    total=False,
)
Token = str | AddedToken | None
TokenList = list[str | AddedToken]


class SpecialTokens(TypedDict, total=False):
    """`special_tokens_map.json`, and the same keys in `tokenizer_config.json`."""

    bos_token: Token
    eos_token: Token
    unk_token: Token
    sep_token: Token
    pad_token: Token
    cls_token: Token
    mask_token: Token
    additional_special_tokens: TokenList | None
    extra_special_tokens: TokenList | dict[str, str | AddedToken] | None


class ChatTemplate(TypedDict, total=False):
    """One of several chat templates."""

    name: str
    template: str


class SentencePieceSettings(TypedDict, total=False):
    """Options of a SentencePiece model."""

    enable_sampling: bool
    nbest_size: int
    alpha: float


class TokenizerSettings(SpecialTokens, total=False):
    """`tokenizer_config.json`: keys that transformers' own tokenizers write. None of them names a file or code."""

    tokenizer_class: str | None
    added_tokens_decoder: dict[str, AddedToken]
    chat_template: str | list[ChatTemplate] | None
    backend: Literal["tokenizers", "sentencepiece", "python", "custom", "mistral-common"] | None
    is_local: bool
    local_files_only: bool
    model_max_length: float | None
    model_input_names: list[str]
    model_specific_special_tokens: dict[str, str | AddedToken]
    max_length: int | None
    max_len: int | None
    stride: int
    padding: bool | str | None
    padding_side: Literal["left", "right"]
    pad_to_multiple_of: int | None
    pad_token_id: int | None
    pad_token_type_id: int | None
    truncation: bool | str | None
    truncation_side: Literal["left", "right"]
    truncation_strategy: str
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    add_dummy_prefix_space: bool
    byte_fallback: bool
    clean_up_tokenization_spaces: bool
    continuing_subword_prefix: str | None
    do_basic_tokenize: bool
    do_lower_case: bool
    dropout: float | None
    end_of_word_suffix: str | None
    errors: str
    fuse_unk: bool
    keep_accents: bool | None
    legacy: bool | None
    never_split: list[str] | None
    remove_space: bool
    sp_model_kwargs: SentencePieceSettings | None
    spaces_between_special_tokens: bool
    split_special_tokens: bool
    strip_accents: bool | None
    tokenize_chinese_chars: bool
    trim_offsets: bool
    use_default_system_prompt: bool


def is_tokenizer_class(name: str) -> bool:
    """True for the name of a tokenizer class of transformers."""
    known = _TOKENIZER_CLASSES | {str(known) for known in TOKENIZER_MAPPING_NAMES.values()}
    return name in known or name.removesuffix("Fast") in known


def type_mismatches(value: Any, kind: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, description of the mismatch) for each part of a JSON value whose type differs from `kind`.

    Args:
        value: a result of `json.loads`.
        kind: the expected type: str, int, float, bool, None, Any, unions, `Literal`, `list`, `dict` or a `TypedDict`,
            which allows no other keys than its own, and none of which is required. A float may also be an int, or an
            object by which transformers writes infinity and NaN. Keys of a `dict` are str, `Literal`, or
            int for decimal digits.
        name: path of the value, the prefix of the yielded paths.
    """
    if _fits(value, kind):
        return
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for inner in kinds:
        if isinstance(value, dict) and is_typeddict(inner):
            hints = get_type_hints(inner)
            for key, item in value.items():
                path = f"{name}.{key}" if name else key
                if key in hints:
                    yield from type_mismatches(item, hints[key], path)
                else:
                    yield path, _UNKNOWN_KEY
            return
        if isinstance(value, dict) and get_origin(inner) is dict:
            key_kind, item_kind = get_args(inner)
            for key, item in value.items():
                path = f"{name}.{key}" if name else key
                if _key_fits(key, key_kind):
                    yield from type_mismatches(item, item_kind, path)
                else:
                    yield path, _UNKNOWN_KEY
            return
        if isinstance(value, list) and get_origin(inner) is list:
            for i, item in enumerate(value):
                yield from type_mismatches(item, get_args(inner)[0], f"{name}[{i}]")
            return
    yield name, f"is {_shown(value)}, which is not {' or '.join(_described(inner) for inner in kinds)}"


def object_type(name: str, types_by_key: dict[str, Any]) -> Any:
    """A `TypedDict` with these keys, all optional, for `type_mismatches`."""
    return TypedDict(name, types_by_key, total=False)  # type: ignore[operator]


def _fits(value: Any, kind: Any) -> bool:
    """True if a JSON value is of the type `kind`, see `type_mismatches`; a bool is no int, an int is a float."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_key_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        return isinstance(value, dict) and all(key in hints and _fits(value[key], hints[key]) for key in value)
    if kind is Any:
        return True
    if kind in (None, NoneType):
        return value is None
    if kind is float:
        return type(value) in (int, float) or (isinstance(value, dict) and value in _FLOAT_TAGS)
    return type(value) is kind  # a bool is no int


def _key_fits(key: str, kind: Any) -> bool:
    """True if a key of a JSON object is of the type `kind`; JSON stores integer keys as strings of digits."""
    return key.isascii() and key.isdecimal() if kind is int else _fits(key, kind)


def _described(kind: Any) -> str:
    """Description of a type for a message, such as `a list of a whole number`."""
    if get_origin(kind) is Literal:
        return " or ".join(repr(each) for each in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_described(get_args(kind)[0])}"
    if is_typeddict(kind) or kind is dict or get_origin(kind) is dict:
        return "an object"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_described(each) for each in get_args(kind))
    names = {NoneType: "null", None: "null", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "a text" if kind is str else str(kind))


def _shown(value: Any) -> str:
    """The value as ASCII text of at most `_SHOWN` characters."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def without_unknown(values: dict[str, Any], kind: Any) -> tuple[dict[str, Any], list[str]]:
    """(entries of `values` that are of the TypedDict `kind`, names of the other top-level entries)."""
    dropped = list(dict.fromkeys(re.split(r"[.\[]", name)[0] for name, _ in type_mismatches(values, kind)))
    return {key: value for key, value in values.items() if key not in dropped}, dropped
