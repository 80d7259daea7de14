"""What transformers' own serving needs of every architecture: continuous batching, and classes found by name."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_efficient.hub.export import export
from hf_efficient.registry import ARCHITECTURES

# By default the paged cache takes most of the machine's memory.
SMALL = {"num_blocks": 32, "block_size": 16, "max_batch_tokens": 32}
COMPOSED = {
    "stem_layers": [1],
    "bhyt_layers": [0, 2],
    "bhyt_seq_len": 16,
    "topology": {"grammar": "multiverse"},
}


def compare_batch_with_generate(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    own = model.config._attn_implementation
    assert own in model.captured_attention
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    results = model.generate_batch(
        prompts, generation_config=greedy, continuous_batching_config=ContinuousBatchingConfig(**SMALL)
    )
    assert model.config._attn_implementation == own
    found = [list(result.generated_tokens) for result in results.values()]
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=greedy)[0, len(prompt) :] for prompt in prompts
    ]
    assert found == [tokens.tolist() for tokens in expected]


def test_generate_batch_gives_the_tokens_of_generate(
    model_type: str, tiny_model: Callable, token_ids: Callable
) -> None:
    """With the default attention, which is set again afterwards."""
    compare_batch_with_generate(tiny_model(model_type), [token_ids(1, n)[0].tolist() for n in (3, 1, 20)])


def test_generate_batch_of_composed_patches(tiny_model: Callable, token_ids: Callable) -> None:
    model = tiny_model("hfe_decoder", **COMPOSED)
    compare_batch_with_generate(model, [token_ids(1, n)[0].tolist() for n in (3, 1, 20)])


def test_an_attention_that_the_user_chose_stays(tiny_model: Callable) -> None:
    model = tiny_model("hfe_stem")
    model.set_attn_implementation("eager")
    greedy = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=2, pad_token_id=0)
    manager = model.init_continuous_batching(greedy, ContinuousBatchingConfig(**SMALL))
    assert model.config._attn_implementation == "paged|eager"
    del manager
    gc.collect()


def test_a_refused_batch_leaves_the_attention_as_it_was(tiny_model: Callable) -> None:
    model = tiny_model("hfe_stem")
    own = model.config._attn_implementation
    with pytest.raises(TypeError):
        model.init_continuous_batching(no_such_argument=1)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize(
    "causal_lm",
    [a.auto_classes["AutoModelForCausalLM"] for a in ARCHITECTURES if "AutoModelForCausalLM" in a.auto_classes],
)
def test_transformers_finds_every_class_by_its_name(causal_lm: type) -> None:
    assert getattr(transformers, causal_lm.__name__) is causal_lm


def test_a_class_of_transformers_is_never_replaced(tiny_model: Callable) -> None:
    stock = transformers.LlamaForCausalLM
    type("LlamaForCausalLM", (type(tiny_model("hfe_stem")),), {"__module__": __name__})
    assert transformers.LlamaForCausalLM is stock


SERVED_FOLDER = """
import sys, transformers
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
architecture = getattr(transformers, config.architectures[0])
model = architecture.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "hf_efficient" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
print("loaded", type(model).__name__)
"""


def test_transformers_serve_finds_the_class_that_a_folder_brings(
    tiny_model: Callable, tmp_path: Path, repository_root: Path
) -> None:
    """In a process that never imports this package, by the steps of `transformers serve --trust-remote-code`."""
    tiny_model("hfe_stem").save_pretrained(tmp_path / "model")
    export(tmp_path / "model")
    finished = subprocess.run(
        [sys.executable, "-c", SERVED_FOLDER, str(tmp_path / "model")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.split() == ["loaded", "StemForCausalLM"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")).__module__.startswith("hf_efficient.")
