"""The files of a converted folder beside its weights behave like the source's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_efficient.conversion.reading.source import open_source
from hf_efficient.conversion.writing.companion_files import write_companions
from hf_efficient.conversion.writing.tokenizer_check import keep_tokenizer
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError

TEXT = "the fox \u00e9t\u00e9 e\u0301te\u0301  1234\n <s> x </s>"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A byte-level BPE that merges digits and composed accents, as neither Llama's nor Qwen2's classes do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["the quick brown fox 1234 1234 \u00e9t\u00e9 e\u0301te\u0301 " * 20]
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def _settings(**changes: Any) -> Callable[[Path], None]:
    """Set fields of tokenizer_config.json; None removes one."""

    def edit(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))

    return edit


def _slow_files(folder: Path) -> None:
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    _settings(tokenizer_class=None)(folder)


EDITS: dict[str, Callable[[Path], Any]] = {
    "as saved": lambda folder: None,
    "vocab.json and merges.txt": _slow_files,
    "generic class": _settings(tokenizer_class="PreTrainedTokenizerFast"),
    "no class": _settings(tokenizer_class=None),
    "class of Llama": _settings(tokenizer_class="LlamaTokenizer"),
    "class of Qwen2": _settings(tokenizer_class="Qwen2TokenizerFast"),
    "class of GPT-2": _settings(tokenizer_class="GPT2Tokenizer"),
    "unknown class": _settings(tokenizer_class="OwnTokenizer"),
    "no settings": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    ),
}


# The classes of Llama and Mistral cannot be made from vocab.json and merges.txt.
CASES = [
    (family, edit)
    for family in ("llama", "mistral", "qwen2", "qwen3")
    for edit in EDITS
    if "qwen" in family or edit != "vocab.json and merges.txt"
]


@pytest.mark.parametrize(("family", "edit"), CASES)
def test_ids_are_those_of_the_source(
    family: str, edit: str, byte_level: Tokenizer, stock_folder: Callable[..., Path], tmp_path: Path
) -> None:
    stock, out = tmp_path / "stock", tmp_path / "out"
    shutil.copytree(stock_folder(family), stock)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=byte_level, **special).save_pretrained(stock)
    EDITS[edit](stock)
    out.mkdir()
    expected = AutoTokenizer.from_pretrained(stock)
    write_companions(open_source(str(stock)), out)
    # Only the model type of the result differs, and it has no tokenizer class.
    (out / "config.json").write_text('{"model_type": "hfe_decoder"}')
    found = AutoTokenizer.from_pretrained(out)
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert found.get_vocab() == expected.get_vocab() and found.chat_template == expected.chat_template


def test_a_tokenizer_that_cannot_be_loaded_from_the_result_is_refused(byte_level: Tokenizer, tmp_path: Path) -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
            encoded = super()._encode_plus(*args, **kwargs)
            encoded["input_ids"] = [0, *encoded["input_ids"]]
            return encoded

    with pytest.raises(HFEError, match="the tokenizer of stock, a Own, gives other ids"):
        keep_tokenizer("stock", Own(tokenizer_object=byte_level), tmp_path)


def test_generation_settings_of_config_json(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    stock = Path(shutil.copytree(stock_folder(), tmp_path / "stock"))
    (stock / "generation_config.json").unlink()
    fields = json.loads((stock / "config.json").read_text())
    told = {"do_sample": True, "temperature": 0.3, "top_k": 7, "repetition_penalty": 1.2, "max_new_tokens": 9}
    (stock / "config.json").write_text(json.dumps({**fields, **told}))
    convert(stock, tmp_path / "out", evaluate=False, progress=False)
    found, expected = (
        AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict() for folder in (tmp_path / "out", stock)
    )
    expected.pop("_from_model_config"), found.pop("_from_model_config", None)
    assert found == expected and all(found[name] == value for name, value in told.items())


def test_only_licence_texts_are_copied(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    stock = Path(shutil.copytree(stock_folder(), tmp_path / "stock"))
    for name in ("LICENSES/Apache-2.0.txt", "LICENSES/own.py", "LICENSE", "LICENSE.py", ".cache/huggingface/x"):
        (stock / name).parent.mkdir(parents=True, exist_ok=True)
        (stock / name).write_text(name)
    os.mkfifo(stock / "NOTICE")
    report = convert(stock, tmp_path / "out", evaluate=False, progress=False)
    assert (tmp_path / "out" / "LICENSES" / "Apache-2.0.txt").read_text() == "LICENSES/Apache-2.0.txt"
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"
    left = {"LICENSES/own.py", "LICENSE.py", "NOTICE", ".cache"}
    assert not any((tmp_path / "out" / name).exists() for name in left)
    assert "LICENSE.py, LICENSES/own.py, NOTICE of the source is not the text of a licence" in " ".join(report.warnings)
