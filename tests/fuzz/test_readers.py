"""Every reader of files, on changed files: see conftest.py."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from hf_efficient.conversion.measuring.text import load_text
from hf_efficient.conversion.plan import check_source
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.conversion.writing.workspace import partial_folder
from hf_efficient.convert_checkpoint import convert
from hf_efficient.hub.export import export
from hf_efficient.hub.verify import verify
from hf_efficient.inspection import inspect

Fuzz = Callable[..., None]
VOCABULARY, WIDTH, INNER, LAYERS = 24, 16, 16, 2
SHAPE: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
CONFIG_KEYS = (
    *("rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "quantization_config"),
    *("num_experts", "torch_dtype", "dtype", "attribute_map", "per_layer_config", "architectures", "auto_map"),
    *("is_causal", "configuration_files", "transformers_weights", "head_dim", "hidden_act", "attention_bias"),
    *("id2label", "num_labels", "temperature", "suppress_tokens", "text_config", "transformers_version"),
)
QUIET: dict[str, Any] = {"evaluate": False, "progress": False}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A whole tiny Llama: configuration, weights in one file, tokenizer, generation settings."""
    folder = tmp_path / "place" / "stock"
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


def reads_all(folder: Path) -> None:
    """Open, check against the configuration, read every tensor."""
    source = open_source(str(folder))
    check_source(source)
    for name in source.reader.names():
        source.reader.read(name)


def plans(folder: Path) -> None:
    """Inspect, then plan a conversion."""
    inspect(str(folder))
    convert(folder, folder.parent / "out", [], dry_run=True, **QUIET)


def converts(folder: Path) -> None:
    """Convert, and remove the result."""
    out = folder.parent / "out"
    try:
        convert(folder, out, **QUIET)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_safetensors(fuzz: Fuzz, stock: Path) -> None:
    fuzz("safetensors", reads_all, stock, ["model.safetensors"])


def test_safetensors_header(fuzz: Fuzz, stock: Path) -> None:
    """Change the JSON of the header, and put it in front of the data again."""
    data = (stock / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    whole = _changed_header(header, rest)
    fuzz("safetensors_header", reads_all, stock, [], more={"model.safetensors": whole})


@st.composite
def _changed_header(draw: st.DrawFn, header: dict[str, Any], rest: bytes) -> bytes:
    names = sorted(header)
    changed = json.loads(json.dumps(header))
    for _ in range(draw(st.integers(1, 3))):
        entry = changed[draw(st.sampled_from(names))]
        field = draw(st.sampled_from(("dtype", "shape", "data_offsets", "format", "x")))
        number = st.integers(-2, 1 << 70) | st.integers(0, 2048) | st.sampled_from((0, 1, -1, 1 << 62))
        value = draw(
            st.sampled_from(("F64", "F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "", None, 1, {}, []))
            | st.lists(number | st.none() | st.text(max_size=2), max_size=5)
            | number
        )
        entry[field] = value
    if draw(st.booleans()):
        changed[draw(st.sampled_from(("__metadata__", "lm_head.weight", "a\0", "model.layers.9.x", "é")))] = draw(
            st.sampled_from((None, {}, [], {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}))
        )
    text = json.dumps(changed).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_index(fuzz: Fuzz, stock: Path) -> None:
    tensors = load_file(stock / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, stock / f"model-{number}.safetensors")
    place = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (stock / "model.safetensors.index.json").write_text(json.dumps(index))
    (stock / "model.safetensors").unlink()
    fuzz("index", reads_all, stock, ["model.safetensors.index.json"], ("weight_map", names[0]))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_config(fuzz: Fuzz, stock: Path, model_type: str) -> None:
    fields = json.loads((stock / "config.json").read_text())
    fields |= {"model_type": model_type, "max_window_layers": 1, "use_sliding_window": False, "sliding_window": 8}
    if model_type == "llama":
        fields.pop("sliding_window")
    (stock / "config.json").write_text(json.dumps(fields))
    tensors = load_file(stock / "model.safetensors")
    for i in range(LAYERS):
        layer = f"model.layers.{i}.self_attn"
        if model_type == "qwen2":
            tensors |= {f"{layer}.{p}_proj.bias": torch.ones(16 if p == "q" else 8) for p in "qkv"}
        if model_type == "qwen3":
            tensors |= {f"{layer}.{p}_norm.weight": torch.ones(8) for p in "qk"}
    save_file(tensors, stock / "model.safetensors")
    fuzz(f"config_{model_type}", plans, stock, ["config.json"], CONFIG_KEYS)


@pytest.mark.parametrize("patch", ["stem", "bhyt", "multiverse"])
def test_config_of_ours(fuzz: Fuzz, stock: Path, patch: str) -> None:
    from hf_efficient.cli.options import patch_classes

    made = stock.parent.parent / "made" / "stock"
    options = {"second_site": "exact"} if patch == "bhyt" else {}
    if patch == "stem":
        fields = json.loads((stock / "config.json").read_text())
        fields |= {"model_type": "hfe_stem", "stem_layers": [1], "architectures": ["StemForCausalLM"]}
        tensors = load_file(stock / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.1.mlp.stem_embed.weight"] = torch.ones(VOCABULARY, INNER)
        made = Path(shutil.copytree(stock, made))
        (made / "config.json").write_text(json.dumps(fields))
        save_file(tensors, made / "model.safetensors")
    else:
        made.parent.mkdir()
        convert(stock, made, [patch_classes()[patch](**options)], **QUIET)
    fuzz(f"config_{patch}", plans, made, ["config.json"], (*CONFIG_KEYS, "stem_layers", "bhyt_eps", "topology"))


def test_gguf(fuzz: Fuzz, tmp_path: Path) -> None:
    folder = tmp_path / "place" / "gguf"
    folder.mkdir(parents=True)
    _write_gguf(folder / "tiny.gguf")
    fuzz("gguf", lambda place: reads_all(place / "tiny.gguf"), folder, ["tiny.gguf"])


def _write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", LAYERS)
    writer.add_uint32("llama.context_length", 64)
    writer.add_uint32("llama.embedding_length", 32)
    writer.add_uint32("llama.feed_forward_length", 32)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.attention.head_count_kv", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("llama.rope.dimension_count", 16)
    writer.add_token_list(["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0, 2.0])
    writer.add_bos_token_id(1)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, 32), "output_norm": (32,)}
    for i in range(LAYERS):
        parts = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
        parts |= {"attn_output": (32, 32), "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in parts.items()}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        data = generator.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LINGUA: dict[str, Any] = {
    **{"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim_multiplier": None, "multiple_of": 16},
    **{"norm_eps": 1e-5, "rope_theta": 1e4, "max_seqlen": 64, "vocab_size": VOCABULARY, "stem_layers": [1]},
}


@pytest.fixture
def lingua(tmp_path: Path) -> Path:
    """A training step: params.json, the backbone, two shards of one table."""
    folder = tmp_path / "place" / "0001"
    (folder / "stem_shards").mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps({"model": LINGUA}))
    torch.save({"model": _backbone(), "optim": {"step": 1}}, folder / "consolidated.pth")
    for rank in range(2):
        shard = {"stem_embeddings.0.weight": torch.ones(VOCABULARY, 24)}
        torch.save(shard, folder / "stem_shards" / f"stem_model_mp{rank}.pt")
    return folder


def _backbone() -> dict[str, torch.Tensor]:
    shapes = {"tok_embeddings": (VOCABULARY, 16), "norm": (16,), "output": (VOCABULARY, 16)}
    for i in range(2):
        parts = {"attention.wq": (16, 16), "attention.wk": (8, 16), "attention.wv": (8, 16), "attention.wo": (16, 16)}
        parts |= {"feed_forward.w1": (48, 16), "feed_forward.w2": (16, 48), "attention_norm": (16,), "ffn_norm": (16,)}
        parts |= {} if i == 1 else {"feed_forward.w3": (48, 16)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in parts.items()}
    return {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


def _saved(value: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


@st.composite
def _odd_backbone(draw: st.DrawFn) -> bytes:
    """A pickle of a backbone with one thing that no model has."""
    state: dict[Any, Any] = dict(_backbone())
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(map(str, state)))) if state else "x"
        odd: Any = draw(
            st.sampled_from(
                (
                    *(None, 1, "text", [1], {"a": torch.ones(1)}, torch.ones(()), torch.ones(0), torch.ones(3, 3, 3)),
                    *(torch.ones(16, 16, dtype=torch.complex64), torch.ones(16, 16, dtype=torch.int64)),
                    *(torch.ones(16, 16).to_sparse(), torch.ones(16, 16).t(), torch.ones(1).expand(1 << 20, 1 << 10)),
                    *(
                        torch.full((16, 16), float("nan")),
                        torch.ones(16, 16).bool(),
                        torch.nn.Parameter(torch.ones(16)),
                    ),
                    *(torch.ones(24, 16)[::2], torch.empty(16, 16, device="meta"), torch.ones(16, 16).double()),
                    torch.Size([1]),
                )
            )
        )
        place = draw(st.sampled_from((key, "module." + key, "stem_embeddings.0.weight", "stem_embeddings.7.weight", 3)))
        if draw(st.booleans()):
            state.pop(key, None)
        state[place] = odd
    wrapped = draw(st.sampled_from((state, {"model": state}, {"model": [state]}, [state], {"model": {"model": state}})))
    return _saved(wrapped, _use_new_zipfile_serialization=draw(st.sampled_from((True, True, True, False))))


def test_lingua_params(fuzz: Fuzz, lingua: Path) -> None:
    fuzz(
        "lingua_params",
        reads_all,
        lingua,
        ["params.json"],
        ("rope_scaling", "head_dim", "sliding_window", "model_type"),
    )


def test_lingua_weights(fuzz: Fuzz, lingua: Path) -> None:
    files = ["consolidated.pth", "stem_shards/stem_model_mp0.pt"]
    odd = {"consolidated.pth": _odd_backbone(), "stem_shards/stem_model_mp1.pt": _odd_backbone()}
    fuzz("lingua_weights", reads_all, lingua, files, more=odd)


@pytest.mark.parametrize("kind", ["bhyt", "bhytstar"])
def test_bhyt_release(fuzz: Fuzz, stock: Path, kind: str) -> None:
    fields = json.loads((stock / "config.json").read_text())
    fields |= {"norm_type": kind, "input_layer_lam": 2.0, "post_layer_lam": 1.0, "last_layer_lam": 0.0, "seq_len": 6}
    fields |= {"learnable_lam": True, "bhyt_kappa": 10.0, "var_approx_method": "beta", "var_approx_exact_layers": 0}
    (stock / "config.json").write_text(json.dumps(fields))
    tensors = load_file(stock / "model.safetensors")
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.{n}.lam": torch.ones(1) for n in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"model.layers.{i}.var_beta"] = torch.ones(())
    save_file(tensors, stock / "model.safetensors")
    keys = ("bhyt_layer_range", "fallback_norm_type", "var_approx_exact_layer_list", "bhyt_gamma_folded", "norm_type")
    fuzz(f"bhyt_release_{kind}", reads_all, stock, ["config.json", "model.safetensors"], keys)


def test_files_of_the_tokenizer(fuzz: Fuzz, stock: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    keys = ("auto_map", "tokenizer_class", "chat_template", "added_tokens_decoder", "suppress_tokens", "eos_token_id")
    fuzz("tokenizer_files", converts, stock, names, keys, shrink=False)


def test_state_of_an_interrupted_conversion(fuzz: Fuzz, stock: Path) -> None:
    """For any state file, the conversion is resumed, started again or refused; a retry with overwrite works."""
    kept = stock.parent.parent / "kept"
    out = stock.parent / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_efficient.convert_checkpoint.write_card", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(stock, out, **QUIET)
    partial = partial_folder(out).rename(kept)
    place = stock.parent / "place"
    place.mkdir()
    shutil.copy(partial / "state.json", place / "state.json")

    def resumes(folder: Path) -> None:
        os_out = folder.parent / "out"
        shutil.copytree(partial, partial_folder(os_out))
        shutil.copy(folder / "state.json", partial_folder(os_out) / "state.json")
        try:
            convert(stock, os_out, resume=True, **QUIET)
        finally:
            shutil.rmtree(os_out, ignore_errors=True)
            if partial_folder(os_out).exists():
                convert(stock, os_out, overwrite=True, **QUIET)
                shutil.rmtree(os_out)

    fuzz("state", resumes, place, ["state.json"], ("checkpoint", "complete", "results"), shrink=False)


def test_verify(fuzz: Fuzz, stock: Path) -> None:
    made = stock.parent.parent / "made" / "stock"
    made.parent.mkdir()
    convert(stock, made, **QUIET)
    names = ["code_manifest.json", "config.json", "tokenizer_config.json", "generation_config.json"]
    names += ["tokenizer.json", "conversion_report.json", "model.safetensors"]
    keys = ("auto_map", "quantization_config", "version", "files", "architectures", "attn_implementation")
    fuzz("verify", verify, made, names, keys, shrink=False)


def test_export_and_card(fuzz: Fuzz, stock: Path) -> None:
    from hf_efficient.hub.card import render_card

    made = stock.parent.parent / "made" / "stock"
    made.parent.mkdir()
    convert(stock, made, **QUIET)

    def writes(folder: Path) -> None:
        copy = Path(shutil.copytree(folder, folder.parent / "copy"))
        try:
            export(copy)
            render_card(copy)
        finally:
            shutil.rmtree(copy)

    names = ["code_manifest.json", "config.json", "conversion_report.json"]
    fuzz("export_and_card", writes, made, names, shrink=False)


@pytest.mark.parametrize("name", ["text.jsonl", "text.txt"])
def test_text(fuzz: Fuzz, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "place" / "text"
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": f"page {i}"}) for i in range(6)]
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else "\n\n".join(lines))
    fuzz(name.replace(".", "_"), lambda place: load_text(os.fspath(place / name)), folder, [name])
