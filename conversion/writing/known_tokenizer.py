"""Keys and types of a tokenizer's JSON files other than tokenizer_config.json, for `type_mismatches`."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from hf_efficient.conversion.writing.known_settings import AddedToken, ChatTemplate, SpecialTokens


class Pattern(TypedDict, total=False):
    """The text or regular expression that a step of a tokenizer matches."""

    String: str
    Regex: str


class TemplatePart(TypedDict, total=False):
    """A place in the template of a post-processor."""

    id: str
    type_id: int


class TemplatePiece(TypedDict, total=False):
    """A special token or a sequence in the template of a post-processor."""

    SpecialToken: TemplatePart
    Sequence: TemplatePart


class TemplateToken(TypedDict, total=False):
    """A special token that a post-processor inserts."""

    id: str
    ids: list[int]
    tokens: list[str]


class Step(TypedDict, total=False):
    """One step of a tokenizer: a normalizer, pre-tokenizer, post-processor or decoder of the library `tokenizers`."""

    type: str
    normalizers: list[Step]
    pretokenizers: list[Step]
    processors: list[Step]
    decoders: list[Step]
    pattern: Pattern | str
    content: str
    prepend: str
    prepend_scheme: Literal["always", "first", "never"]
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool
    replacement: str
    str_rep: str
    split: bool
    behavior: str
    invert: bool
    individual_digits: bool
    delimiter: str
    length: int
    strip_left: bool
    strip_right: bool
    clean_text: bool
    handle_chinese_chars: bool
    strip_accents: bool | None
    lowercase: bool
    precompiled_charsmap: str | None
    single: list[TemplatePiece]
    pair: list[TemplatePiece]
    special_tokens: dict[str, TemplateToken]
    cls: list[str | int]
    sep: list[str | int]
    prefix: str
    suffix: str
    cleanup: bool
    start: int
    stop: int
    pad_token: str
    word_delimiter_token: str


class TokenizerModel(TypedDict, total=False):
    """The vocabulary and the model that splits words into its tokens."""

    type: str
    vocab: dict[str, int] | list[list[str | float]]
    merges: list[str | list[str]]
    dropout: float | None
    unk_token: str | None
    unk_id: int | None
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    max_input_chars_per_word: int
    fuse_unk: bool
    byte_fallback: bool
    ignore_merges: bool


class Truncation(TypedDict, total=False):
    """Truncation of an input."""

    direction: str
    max_length: int
    strategy: str
    stride: int


class FixedPadding(TypedDict, total=False):
    """Padding to a fixed length."""

    Fixed: int


class Padding(TypedDict, total=False):
    """Padding of a batch."""

    strategy: str | FixedPadding
    direction: str
    pad_to_multiple_of: int | None
    pad_id: int
    pad_type_id: int
    pad_token: str


class TokenizerFile(TypedDict, total=False):
    """`tokenizer.json`."""

    version: str
    truncation: Truncation | None
    padding: Padding | None
    added_tokens: list[AddedToken]
    normalizer: Step | None
    pre_tokenizer: Step | None
    post_processor: Step | None
    decoder: Step | None
    model: TokenizerModel


class TekkenFile(TypedDict, total=False):
    """`tekken.json`, Mistral's own format."""

    type: str
    version: int | str
    config: dict[str, str | int | float | bool | None]
    vocab: list[dict[str, str | int | None]]
    special_tokens: list[dict[str, str | int | bool]]
    model_settings_builder: None


class TemplateFile(TypedDict, total=False):
    """`chat_template.json`."""

    chat_template: str | list[ChatTemplate]


# Type of the content of each JSON file of a tokenizer, except tokenizer_config.json.
TOKENIZER_JSON: dict[str, Any] = {
    "tokenizer.json": TokenizerFile,
    "special_tokens_map.json": SpecialTokens,
    "added_tokens.json": dict[str, int],
    "vocab.json": dict[str, int],
    "tekken.json": TekkenFile,
    "chat_template.json": TemplateFile,
}
