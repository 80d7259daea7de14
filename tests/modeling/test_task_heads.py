"""Classification and question answering over every decoder, as over stock Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, pipeline

import hf_efficient

TASKS = {
    "SequenceClassification": {"labels": torch.tensor([2, 0])},
    "TokenClassification": {"labels": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, -100]] * 2)},
    "QuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 8])},
}
HEADS = {"SequenceClassification": {"score.weight"}, "TokenClassification": {"score.weight", "score.bias"}}
HEADS["QuestionAnswering"] = {"qa_outputs.weight", "qa_outputs.bias"}


def auto(task: str) -> Any:
    return getattr(transformers, f"AutoModelFor{task}")


def scores(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=ids)
    return torch.stack((output.start_logits, output.end_logits), -1) if "start_logits" in output else output.logits


@pytest.fixture
def folder(model_type: str, tiny_model: Callable, tmp_path: Path) -> Path:
    """A causal language model of every architecture in turn, with the code to load it anywhere."""
    tiny_model(model_type).save_pretrained(tmp_path / "causal")
    hf_efficient.export(tmp_path / "causal")
    return tmp_path / "causal"


@pytest.mark.parametrize("task", TASKS)
def test_only_the_head_of_a_causal_model_is_new_and_it_trains(
    task: str, folder: Path, model_type: str, token_ids: Callable, tmp_path: Path
) -> None:
    ids = token_ids(2, 9)
    model, info = auto(task).from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert type(model).__name__.endswith(f"For{task}") and model.config.model_type == model_type
    assert set(info["missing_keys"]) == HEADS[task]
    causal = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in causal.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name

    before = scores(model.eval(), ids)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=ids, **TASKS[task]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimiser.step()
    after = scores(model.eval(), ids)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path / "trained")
    again, info = auto(task).from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(scores(again.eval(), ids), after)
    report = hf_efficient.verify(tmp_path / "trained")  # saved with its code, as any model of ours
    assert report.code == "confirmed" and not report.findings


@pytest.mark.parametrize("task", TASKS)
def test_heads_compute_what_those_of_stock_llama_compute(task: str, tiny_config: Callable, token_ids: Callable) -> None:
    config = tiny_config("hfe_decoder", qk_norm=False, num_labels=3)
    fields = {key: value for key, value in config.to_dict().items() if key in LlamaConfig().to_dict()}
    stock = auto(task).from_config(LlamaConfig(**fields | {"model_type": "llama"}, num_labels=3)).eval()
    ours = auto(task).from_config(config).eval()
    # Llama calls its base model so in this task alone.
    ours.load_state_dict({name.replace("transformer.", "model."): t for name, t in stock.state_dict().items()})
    ids = token_ids(2, 9)
    ids[0, :3] = config.pad_token_id
    assert torch.equal(scores(ours, ids), scores(stock, ids))
    assert torch.equal(ours(input_ids=ids, **TASKS[task]).loss, stock(input_ids=ids, **TASKS[task]).loss)


@pytest.mark.parametrize("model_type", ["hfe_decoder"])  # whose exported code includes all patches
def test_exported_code_has_the_heads_too(folder: Path, token_ids: Callable, tmp_path: Path) -> None:
    """In a process that has never seen the package."""
    assert {f"AutoModelFor{task}" for task in TASKS} < json.loads((folder / "config.json").read_text())[
        "auto_map"
    ].keys()
    torch.save(token_ids(2, 9), tmp_path / "ids.pt")
    script = f"""
import sys; sys.modules["hf_efficient"] = None
import torch, transformers
ids, found = torch.load({str(tmp_path / "ids.pt")!r}), []
for task in {list(TASKS)}:
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{{task}}")
    model = auto.from_pretrained({str(folder)!r}, num_labels=3, trust_remote_code=True).eval()
    found.append([model(input_ids=ids)[0], type(model).__module__.split(".")[0]])
torch.save(found, {str(tmp_path / "found.pt")!r})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for task, (found, module) in zip(TASKS, torch.load(tmp_path / "found.pt"), strict=True):
        torch.manual_seed(0)
        model: PreTrainedModel = auto(task).from_pretrained(folder, num_labels=3).eval()
        assert module == "transformers_modules"
        assert torch.equal(found, model(input_ids=token_ids(2, 9))[0])


def test_a_classifier_takes_lora_and_runs_in_a_pipeline(folder: Path, token_ids: Callable, tmp_path: Path) -> None:
    ids = token_ids(2, 9)
    model = auto("SequenceClassification").from_pretrained(folder, num_labels=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    adapted(input_ids=ids, **TASKS["SequenceClassification"]).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    kinds = {next((kind for kind in ("lora_", "score.modules_to_save") if kind in name), name) for name in trained}
    assert kinds == {"lora_", "score.modules_to_save"}
    expected = scores(adapted.eval(), ids)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert torch.equal(scores(again, ids), expected)
    merged = adapted.merge_and_unload()

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "good", "bad"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    answers = pipeline("text-classification", model=merged, tokenizer=fast)(["good bad", "bad"], batch_size=2)
    expected = scores(merged, torch.tensor([[3, 4], [4, 0]])).softmax(-1).max(-1).values
    assert [answer["score"] for answer in answers] == pytest.approx(expected.tolist(), rel=1e-5)
