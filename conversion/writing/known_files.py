"""Types of a checkpoint's JSON files of settings, by file name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME

from hf_efficient.conversion.writing.known_processor import ImageProcessorSettings
from hf_efficient.conversion.writing.known_sentence_transformers import SENTENCE_TRANSFORMERS_JSON
from hf_efficient.conversion.writing.known_settings import GenerationSettings, TokenizerSettings
from hf_efficient.conversion.writing.known_tokenizer import TOKENIZER_JSON

# Name of the file, or a glob pattern -> type of its content, for `type_mismatches`.
_TYPES: dict[str, Any] = {
    GENERATION_CONFIG_NAME: GenerationSettings,
    TOKENIZER_CONFIG_FILE: TokenizerSettings,
    **TOKENIZER_JSON,
    IMAGE_PROCESSOR_NAME: ImageProcessorSettings,
    **SENTENCE_TRANSFORMERS_JSON,
}


def settings_type(name: str) -> Any:
    """The type of a file's content.

    Raises:
        StopIteration: no file of settings has this name; configuration, report and index of weights are none.
    """
    return next(kind for pattern, kind in _TYPES.items() if fnmatchcase(name, pattern))
