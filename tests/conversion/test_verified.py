"""Everything that a conversion, `save_pretrained` and a merge write passes verification, key by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.conversion.topology.patch import MedVerse, Multiverse
from hf_efficient.convert_checkpoint import convert
from hf_efficient.hub.verify import verify


def confirmed(folder: Path) -> None:
    report = verify(folder)
    assert report.ok, report.table()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(vocab_size - 3))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=AddedToken("</s>", special=True, lstrip=True),
        pad_token="<pad>",
        additional_special_tokens=["w5"],
        model_max_length=64,
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def test_every_stock_family_and_patch(stock_name: str, stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    for name, patches in {"plain": [], "patched": [Bhyt()]}.items():
        convert(stock_folder(stock_name), tmp_path / name, patches, evaluate=False, progress=False)
        confirmed(tmp_path / name)


@pytest.mark.parametrize("patch", [Multiverse, MedVerse])
@pytest.mark.parametrize("stock", ["llama", "llama-tied"])
def test_a_vocabulary_patch(stock: str, patch: type, stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 97)
    for path in stock_folder(stock).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    convert(tmp_path, tmp_path / "out", [patch()], evaluate=False, progress=False)
    confirmed(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    confirmed(tmp_path / "saved")


@pytest.mark.parametrize("stock", ["qwen2-window", "llama-rope"])
def test_a_model_that_was_changed_and_saved(stock: str, stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Resized, merged, in another dtype, sharded, with its own generation settings and a tokenizer."""
    convert(stock_folder(stock), tmp_path / "out", [Bhyt()], evaluate=False, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    model.resize_token_embeddings(101)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).merge_and_unload()
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, top_p=0.9, eos_token_id=[2, 3])
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    write_tokenizer(tmp_path / "saved", 101)
    confirmed(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "saved")
    confirmed(tmp_path / "saved")


def test_a_measured_conversion(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The report of a calibrated and measured conversion, and a source's settings that transformers does not know."""
    write_tokenizer(tmp_path, 97)
    for path in stock_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "chat_format": "x"}')
    line = json.dumps({"text": "w1 w2 w3 w4 w5 w6 w7 w8 w9 " * 60}) + "\n"
    (tmp_path / "text.jsonl").write_text(line * 8)
    report = convert(
        tmp_path, tmp_path / "out", [Stem(layers=[1])], calibration=tmp_path / "text.jsonl", progress=False
    )
    assert report.evaluation and any("chat_format" in warning for warning in report.warnings)
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.5
    confirmed(tmp_path / "out")
