"""The stock Trainer on every architecture: precision, checkpointing, a resumed run, Liger."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import liger

from example_inputs import example_inputs
from hf_efficient.logging import get_logger, warn_once


def train(
    model: PreTrainedModel, token_ids: Callable, folder: Path, resume: bool = False, stop_at: int = 0, **options: Any
) -> Trainer:
    """Three steps of two examples each; with `stop_at` the run breaks off there, after a checkpoint."""
    if model.main_input_name == "input_ids":
        data = [{"input_ids": row, "labels": row} for row in token_ids(6, 12)]
    elif model.main_input_name == "pixel_values":
        size, noise = model.config.image_size, torch.Generator().manual_seed(3)
        images = torch.randn(6, model.config.num_channels, size, size, generator=noise)
        data = [{"pixel_values": image, "labels": torch.tensor(i % 5)} for i, image in enumerate(images)]
    else:
        # The flow is its own target; the model computes no loss.
        videos = {name: torch.cat((x, x.flip(-1), -x.abs())) for name, x in example_inputs(model.config).items()}
        videos |= {"timestep": videos["timestep"].abs(), "labels": videos["hidden_states"].roll(1, 0)}
        data = [{name: x[i] for name, x in videos.items()} for i in range(6)]
        options |= {"label_names": ["labels"]}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop_at

    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    loss = None if "labels" in inspect.signature(model.forward).parameters else squared_error
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Stop()], compute_loss_func=loss)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def squared_error(output: Any, labels: Tensor, **options: Any) -> Tensor:
    return (output[0] - labels).square().mean()


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_checkpointing_changes_no_step(
    bf16: bool, any_model_type: str, tiny_model: Callable, token_ids: Callable, tmp_path: Path
) -> None:
    plain, checkpointed = tiny_model(any_model_type), tiny_model(any_model_type)
    before = {name: p.clone() for name, p in plain.named_parameters()}
    first = train(plain, token_ids, tmp_path / "a", bf16=bf16, save_strategy="no")
    second = train(checkpointed, token_ids, tmp_path / "b", bf16=bf16, save_strategy="no", gradient_checkpointing=True)
    assert len(losses(first)) == 3 and losses(first) == pytest.approx(losses(second), rel=1e-4)
    changed = {name for name, p in plain.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert changed == {name for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter, dict(plain.named_parameters())[name], rtol=1e-3, atol=1e-3)


def test_a_run_is_taken_up_from_its_checkpoint(
    any_model_type: str, auto_class: Any, tiny_model: Callable, token_ids: Callable, tmp_path: Path
) -> None:
    whole = train(tiny_model(any_model_type), token_ids, tmp_path / "whole")
    train(tiny_model(any_model_type), token_ids, tmp_path / "parts", stop_at=2)
    assert (tmp_path / "parts/checkpoint-2").is_dir() and not (tmp_path / "parts/checkpoint-3").exists()
    again = auto_class.from_pretrained(tmp_path / "parts/checkpoint-2")
    resumed = train(again, token_ids, tmp_path / "parts", resume=True)
    assert resumed.state.global_step == 3
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_liger_is_accepted_and_said_to_change_nothing(
    tiny_model: Callable, token_ids: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A stand-in for the package, which ignores unknown model types as Liger does."""
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = lambda model, **options: None  # type: ignore[attr-defined]
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(get_logger(), "propagate", True)
    plain = train(tiny_model("hfe_stem"), token_ids, tmp_path / "a", save_strategy="no")
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_efficient"):
        tiny_model("hfe_stem").train()
        assert not [record for record in caplog.records if "use_liger_kernel" in record.message]
        for module in (ModuleType("liger_kernel"), package, patches):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        found = train(tiny_model("hfe_stem"), token_ids, tmp_path / "b", save_strategy="no", use_liger_kernel=True)
    said = [record.message for record in caplog.records if "use_liger_kernel" in record.message]
    assert len(said) == 1 and "changes nothing in hfe_stem models" in said[0]
    assert losses(found) == losses(plain)
