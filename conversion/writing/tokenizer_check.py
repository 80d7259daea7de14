"""Checks that a tokenizer behaves the same when it is loaded from a converted folder as from its source.

AutoTokenizer chooses the class by the model type as well as by the name in tokenizer_config.json, and a conversion
changes the model type.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from hf_efficient.conversion.writing.durable_files import write_text
from hf_efficient.errors import HFEError
from hf_efficient.json_file import read_json
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig

# Where tokenizers differ: composed and decomposed accents, digits, white space, cases, scripts, symbols, code.
_TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 12345.67 or 1,000,000; isn't it? HELLO World",
    "\u00e9t\u00e9 e\u0301te\u0301 na\u00efve \ufb01ne \u2126 \uff21\uff22 \u1e9b\u0323",
    "  two  spaces\ttab\n\n new\r\nlines   \n   end  ",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \u0645\u0631\u062d\u0628\u0627",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    'def f(x):\n    return x**2 + 1  # <b>&amp;</b> {"a": [1, 2]}\n',
    "",
)
_CHAT = [{"role": "user", "content": "Hi there, 2 + 2?"}, {"role": "assistant", "content": "4"}]


def keep_tokenizer(name: str, tokenizer: Any, folder: Path) -> list[str]:
    """Make `AutoTokenizer.from_pretrained(folder)` behave like `tokenizer`; returns warnings for the report.

    If it behaves differently, `tokenizer_class` is written to tokenizer_config.json; if that is not enough, the
    tokenizer is saved again.

    Args:
        name: name of the source, for messages.
        tokenizer: the tokenizer of the source.
        folder: folder of the result, with copies of the tokenizer's files; config.json may be missing.

    Raises:
        HFEError: the tokenizer that is loaded from `folder` still behaves differently, or tokenizer_config.json cannot
            be read.
        DiskFullError: tokenizer_config.json cannot be written, because the disk is full.
    """
    expected = _behaviour(tokenizer)

    def same() -> bool:
        """Whether the tokenizer loaded from `folder` behaves as expected."""
        try:
            # None of our model types has a tokenizer class of its own, so any of our configurations gives the same.
            loaded = AutoTokenizer.from_pretrained(folder, config=EfficientDecoderConfig(), trust_remote_code=False)
        # transformers raises many kinds of errors for a tokenizer that it cannot load.
        except Exception:
            return False
        return _behaviour(loaded) == expected

    if same():
        return []
    _write_tokenizer_class(tokenizer, folder)
    if same():
        return []
    tokenizer.save_pretrained(folder)
    if same():
        return ["the source's tokenizer was saved anew: from copies of its files it would have given other ids"]
    raise HFEError(
        f"the tokenizer of {name}, a {type(tokenizer).__name__}, gives other ids when it is loaded without the model "
        "type of its source",
        "name a tokenizer that AutoTokenizer loads from a folder without config.json (--tokenizer)",
    )


def _write_tokenizer_class(tokenizer: Any, folder: Path) -> None:
    """Set `tokenizer_class` in tokenizer_config.json, which is created if it is missing; errors: `keep_tokenizer`."""
    path = folder / TOKENIZER_CONFIG_FILE
    settings = read_json(path) if path.is_file() else {}
    settings["tokenizer_class"] = type(tokenizer).__name__
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _behaviour(tokenizer: Any) -> list[Any]:
    """What two tokenizers must have in common, to compare by ==.

    Vocabulary, added and special tokens, chat template and its result, padding side, and the ids and decoded texts of
    `_TEXTS` and of texts with added tokens.
    """
    special = sorted(str(token) for token in tokenizer.get_added_vocab())
    texts = [*_TEXTS, *special, " x ".join(special), *(f"a{token}b" for token in special[:50])]
    results: list[Any] = [
        tokenizer.get_vocab(),
        tokenizer.get_added_vocab(),
        {role: str(token) for role, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        tokenizer.padding_side,
    ]
    for text in texts:
        ids = _or_error(tokenizer.encode, text, add_special_tokens=False)
        results += [ids, _or_error(tokenizer.encode, text)]
        results += [_or_error(tokenizer.decode, ids, skip_special_tokens=skip) for skip in (False, True)]
    if tokenizer.chat_template:
        for prompt in (False, True):
            render = tokenizer.apply_chat_template
            results.append(_or_error(render, _CHAT, tokenize=False, add_generation_prompt=prompt))
    return results


def _or_error(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call; if it raises, the name of the error's class, which both tokenizers must raise."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error).__name__
