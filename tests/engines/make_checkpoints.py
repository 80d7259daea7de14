"""Writes tiny checkpoints of every architecture for `serve_with_vllm.py`, as users publish them: with their own code.

python tests/engines/make_checkpoints.py FOLDER
"""

from __future__ import annotations

import shutil
import string
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import hf_efficient

# Heads of 32 channels are the narrowest that vLLM computes on a CPU. Large weights keep greedy decoding away from ties.
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write_source(folder: Path, config: PreTrainedConfig) -> Path:
    """A random stock model with a chat template, and a tokenizer whose tokens are one or two letters each.

    Tokens of bytes that are not complete characters would decode differently when streamed than as a whole.
    """
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    visible = [chr(code) for code in range(33, 127)]
    # How a byte-level tokenizer represents a space and a line break.
    singles = ["<pad>", "<s>", "</s>", "\u0120", "\u010a", *visible]
    pairs = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    vocabulary = {token: i for i, token in enumerate([*singles, *pairs][: SHAPE["vocab_size"]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special).save_pretrained(folder)
    return folder


def merged_adapter(source: Path, folder: Path) -> None:
    """`source` with a random LoRA adapter merged into its weights, saved like the source."""
    model = AutoModelForCausalLM.from_pretrained(source)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    shutil.copytree(source, folder)
    adapted.merge_and_unload().save_pretrained(folder)
    hf_efficient.export(folder)


def approximate_bhyt(folder: Path, tokenizer: Path) -> None:
    """BHyT as trained from scratch: post-attention norms estimate their statistic from the attention's weights."""
    from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytForCausalLM

    torch.manual_seed(0)
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    BhytForCausalLM(BhytConfig(**SHAPE, bhyt_seq_len=64)).save_pretrained(folder)
    hf_efficient.export(folder)


def main(folder: Path) -> None:
    sources = folder / "sources"
    llama = write_source(sources / "llama", LlamaConfig(**SHAPE, tie_word_embeddings=True))
    wide = {**SHAPE, "vocab_size": 32000}
    stock = {
        "mistral": MistralConfig(**SHAPE, sliding_window=24),
        "qwen2": Qwen2Config(**SHAPE),
        "qwen3": Qwen3Config(**SHAPE, head_dim=32),
        "wide": LlamaConfig(**wide),
    }
    for name, config in stock.items():
        write_source(sources / name, config)
    stem, bhyt, multiverse = hf_efficient.Stem(layers=[1, 3]), hf_efficient.Bhyt(), hf_efficient.Multiverse()
    conversions: dict[str, tuple[Path, list[Any]]] = {
        "decoder": (llama, []),
        "decoder-mistral": (sources / "mistral", []),
        "decoder-qwen2": (sources / "qwen2", []),
        "decoder-qwen3": (sources / "qwen3", []),
        "stem": (llama, [stem]),
        "stem-qwen3": (sources / "qwen3", [stem]),
        "stem-large-tables": (sources / "wide", [hf_efficient.Stem(layers=[1, 2, 3])]),
        "bhyt": (llama, [bhyt]),
        "multiverse": (llama, [multiverse]),
        "medverse": (llama, [hf_efficient.MedVerse()]),
        "composed": (llama, [stem, bhyt, multiverse]),
    }
    for name, (source, patches) in conversions.items():
        hf_efficient.convert(source, folder / name, patches, evaluate=False, progress=False)
    merged_adapter(folder / "composed", folder / "composed-merged-adapter")
    approximate_bhyt(folder / "bhyt-from-scratch", llama)
    shutil.rmtree(sources)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
