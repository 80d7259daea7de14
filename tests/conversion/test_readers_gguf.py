"""The GGUF reader gives the same bits as transformers' loader, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_efficient.conversion.reading.gguf_reader import GGUFReader, gguf_special_tokens
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.errors import HFEError

# Rows of quantised tensors hold whole blocks of 32 elements.
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 2, 64, 96, 4, 2, 40
_METADATA = {
    "context_length": 128,
    "block_count": LAYERS,
    "feed_forward_length": INNER,
    "embedding_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    kind: str = "F32",
    head_dim: int = HIDDEN // HEADS,
    tied: bool = False,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a random model as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, value in {**_METADATA, **(metadata or {})}.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 5e4)
    if architecture == "llama":
        writer.add_uint32("llama.rope.dimension_count", head_dim)
        writer.add_uint32("llama.vocab_size", VOCAB)
    else:
        writer.add_uint32(f"{architecture}.attention.key_length", head_dim)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    generator = np.random.default_rng(0)

    def add(tensor: str, *shape: int) -> None:
        data = generator.standard_normal(shape, dtype=np.float32)
        stored = gguf.GGMLQuantizationType[kind] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor, gguf.quantize(data, stored), raw_dtype=stored)

    add("token_embd.weight", VOCAB, HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", VOCAB, HIDDEN)
    for i in range(LAYERS):
        for part, shape in {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * head_dim, HIDDEN),
            "attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
            "attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * head_dim),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }.items():
            add(f"blk.{i}.{part}", *shape)
        if architecture == "qwen2":
            for part, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                add(f"blk.{i}.attn_{part}.bias", rows * head_dim)
        if architecture == "qwen3":
            add(f"blk.{i}.attn_q_norm.weight", head_dim)
            add(f"blk.{i}.attn_k_norm.weight", head_dim)
    for tensor, data in (extra or {}).items():
        writer.add_tensor(tensor, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equals_transformers(path: Path) -> None:
    """Compare every tensor bit for bit, and the configuration."""
    source = open_source(str(path))
    stock = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = stock.state_dict()
    if stock.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert set(source.reader.names()) == set(state)
    for name, tensor in state.items():
        assert torch.equal(source.reader.read(name), tensor), name
    ours = source.stock_config.to_dict()
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    place = {"_name_or_path", "_model_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in place} == {k: v for k, v in theirs.items() if k not in place}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_block_types_equal_transformers(tmp_path: Path, kind: str) -> None:
    assert_equals_transformers(write_gguf(tmp_path / "tiny.gguf", kind=kind))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"tied": True}),
        ("llama", {"head_dim": 32}),
        ("qwen2", {}),
        ("qwen2", {"tied": True}),
        ("qwen3", {"head_dim": 128}),  # the only architecture that transformers 5.17 reads correctly
    ],
)
def test_architectures_equal_transformers(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    assert_equals_transformers(write_gguf(tmp_path / "tiny.gguf", architecture, **options))


def test_rows_are_those_of_the_tensor(tmp_path: Path) -> None:
    reader = GGUFReader(write_gguf(tmp_path / "tiny.gguf", kind="Q8_0"))
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        assert torch.equal(reader.read_rows(name, 5, 9), reader.read(name)[5:9])
    assert torch.equal(reader.read_rows("lm_head.weight", VOCAB - 2, VOCAB + 9), reader.read("lm_head.weight")[-2:])


def test_special_tokens_come_from_the_metadata(tmp_path: Path) -> None:
    reader = GGUFReader(write_gguf(tmp_path / "tiny.gguf"))
    assert gguf_special_tokens(reader.file) == {"bos_token": 1, "eos_token": 2}


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kind="Q8_0")
    whole = path.read_bytes()
    for length in [0, 3, 10, 23, 30, 200, 500, 2000, len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(HFEError, match=r"truncated|not a GGUF file"):
            GGUFReader(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2', which is not a supported family"),
        ({"metadata": {"expert_count": 8}}, "mixture of 8 experts"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "scales its rotary frequencies"),
        ({"metadata": {"rope.scaling.type": "linear"}}, "scales its rotary frequencies"),
        ({"metadata": {"rope.scaling.factor": 4}}, r"scales its rotary frequencies \(rope.scaling.factor 4"),
        ({"metadata": {"rope.scale_linear": 2}}, r"scales its rotary frequencies \(rope.scale_linear 2"),
        ({"metadata": {"rope.dimension_sections": 3}}, "sets llama.rope.dimension_sections=3"),
        ({"metadata": {"logit_scale": 3}}, "sets llama.logit_scale=3"),
        ({"metadata": {"attention.causal": 0}}, "has bidirectional attention"),
        ({"metadata": {"attention.sliding_window": 64}}, "has a sliding window of 64 positions"),
        ({"metadata": {"attention.value_length": 8}}, "value_length 8 where heads are 16 wide"),
        ({"metadata": {"attention.key_length": 32}}, "rope.dimension_count 16 where heads are 32 wide"),
        ({"architecture": "qwen2", "head_dim": 32}, "key_length 32 where heads are 16 wide"),
        ({"extra": {"rope_freqs.weight": np.full(8, 2.0, np.float32)}}, "scales its rotary frequencies"),
    ],
)
def test_files_that_cannot_be_converted(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(HFEError, match=words):
        open_source(str(path))


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scale_linear": 1, "attention.causal": 1, "attention.sliding_window": 128, "logit_scale": 0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 8, "attention.value_length": 16},
    ],
)
def test_keys_without_effect_are_accepted(tmp_path: Path, metadata: dict[str, Any]) -> None:
    assert_equals_transformers(write_gguf(tmp_path / "tiny.gguf", metadata=metadata))


def test_upper_case_and_files_of_a_split_model(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "TINY.GGUF")
    assert open_source(str(whole)).gguf_file == "TINY.GGUF"
    with pytest.raises(HFEError, match=f"has no config.json, but the file TINY.GGUF; name the file: {whole}"):
        open_source(str(tmp_path))
    part = whole.rename(tmp_path / "tiny-00001-of-00003.gguf")
    with pytest.raises(HFEError, match=r"tiny-00001-of-00003.gguf is one of 3 files .*llama-gguf-split --merge"):
        open_source(str(part))
    with pytest.raises(HFEError, match="there is no file or folder nowhere.GGUF"):
        open_source("nowhere.GGUF")


def test_rotary_factors_of_one_are_accepted(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert "rope_freqs.weight" not in open_source(str(path)).reader.names()


@pytest.mark.real_model
def test_real_model_equals_transformers(smollm_gguf: Path) -> None:
    assert_equals_transformers(smollm_gguf)


@pytest.mark.real_model
def test_real_tokenizer_has_the_eos_token_of_the_chat_template(smollm_gguf: Path, tmp_path: Path) -> None:
    tokenizer = open_source(str(smollm_gguf)).tokenizer()
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    saved = type(tokenizer).from_pretrained(tmp_path)
    assert (saved.eos_token, saved.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = "The whale is 30 metres long."
    assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert saved.decode(saved(text)["input_ids"]) == text
