"""RowSparseAdamW where it is used: STEM models under transformers' Trainer and under Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_efficient import HFEError, RowSparseAdamW
from hf_efficient.logging import warn_once
from hf_efficient.modeling.stem.configuration_stem import StemConfig
from hf_efficient.modeling.stem.modeling_stem import StemForCausalLM

VOCABULARY = 24


def tiny_stem(sparse: bool = True, dtype: torch.dtype = torch.float32) -> StemForCausalLM:
    torch.manual_seed(7)
    config = StemConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        stem_layers=[1, 2],
        stem_init_std=0.5,
        stem_sparse_grad=sparse,
        pad_token_id=0,
    )
    return StemForCausalLM(config).to(dtype)


def tables(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "stem_embed" in name}


def sequences(count: int, all_tokens: bool = False) -> list[dict[str, Tensor]]:
    """Sequences of 32 tokens in which one follows from the other: of the whole vocabulary, or of eight tokens each."""
    places = torch.arange(32)
    found = []
    for number in range(count):
        ids = (number + 7 * places) % VOCABULARY if all_tokens else 1 + number % 12 + places % 8
        found.append({"input_ids": ids, "labels": ids})
    return found


def _optimizer(model: PreTrainedModel, kind: type[torch.optim.Optimizer] = RowSparseAdamW) -> torch.optim.Optimizer:
    rest = [p for name, p in model.named_parameters() if "stem_embed" not in name]
    groups = [{"params": list(tables(model).values()), "lr": 0.05, "weight_decay": 0.0}, {"params": rest}]
    return kind(groups, lr=1e-2, weight_decay=0.1)


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    def make(folder: str = "trainer", **changed) -> TrainingArguments:
        given = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**{**given, **changed})

    return make


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_goes_the_way_of_dense_gradients_where_every_token_is_in_every_batch(arguments: Callable) -> None:
    losses, models = [], []
    for sparse, kind in ((True, RowSparseAdamW), (False, torch.optim.AdamW)):
        model = tiny_stem(sparse)
        # Trainer clips by the norm of the dense gradients only: switch it off for the comparison.
        given = arguments(max_grad_norm=0.0)
        trainer = Trainer(model, given, train_dataset=sequences(12, True), optimizers=(_optimizer(model, kind), None))
        trainer.train()
        losses.append(_losses(trainer))
        models.append(model)
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)
    for (name, mine), his in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-3, atol=1e-4, msg=name)


def test_trainer_trains_the_rows_of_its_text_and_clips_the_rest(arguments: Callable) -> None:
    model = tiny_stem()
    before = {name: table.detach().clone() for name, table in tables(model).items()}
    data = sequences(12)
    trainer = Trainer(model, arguments(max_grad_norm=1.0), train_dataset=data, optimizers=(_optimizer(model), None))
    trainer.train()
    losses = _losses(trainer)
    assert losses[-1] < losses[0]
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)
    unused = [i for i in range(VOCABULARY) if all(i not in each["input_ids"] for each in data)]
    assert 0 < len(unused) < VOCABULARY
    for name, table in tables(model).items():
        assert torch.equal(table[unused], before[name][unused])
        assert not torch.equal(table, before[name])


def test_trainer_trains_tables_alone(arguments: Callable) -> None:
    """No parameter has a `.grad` when Trainer computes the gradient norm."""
    model = tiny_stem()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("stem_embed" in name)
    optimizer = RowSparseAdamW(tables(model).values(), lr=0.05, weight_decay=0.0)
    data = sequences(2)
    batch = {name: torch.stack([each[name] for each in data]) for name in data[0]}
    before = model(**batch).loss.item()
    trainer = Trainer(model, arguments(), train_dataset=data * 6, optimizers=(optimizer, None))
    trainer.train()
    assert model(**batch).loss.item() < before
    assert {entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry} == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_resumes_from_its_checkpoint_exactly(arguments: Callable, dtype: torch.dtype) -> None:
    def trainer(folder: str, **changed) -> Trainer:
        model = tiny_stem(dtype=dtype)
        given = arguments(folder, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine", **changed)
        return Trainer(model, given, train_dataset=sequences(16), optimizers=(_optimizer(model), None))

    whole = trainer("whole")
    whole.train()
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    assert resumed.state.global_step == 6
    states = [state for state in resumed.optimizer.state_dict()["state"].values() if "log_decays" in state]
    assert len(states) == len(tables(resumed.model))
    assert all(state["exp_avg"].dtype == torch.float32 and state["step"].dtype == torch.int32 for state in states)
    for (name, mine), his in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, his), name


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accelerate_accumulates_as_one_large_batch(accumulation: int) -> None:
    def train(batch_size: int, steps: int) -> StemForCausalLM:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        model = tiny_stem()
        batches = DataLoader(sequences(24), batch_size)
        model, optimizer, batches = accelerator.prepare(model, _optimizer(model), batches)
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch, use_cache=False).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return accelerator.unwrap_model(model)

    parts, whole = train(8 // accumulation, accumulation), train(8, 1)
    start = tiny_stem()
    for (name, mine), his in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-3, atol=2e-4, msg=name)
    assert not torch.equal(
        tables(parts)["model.layers.1.mlp.stem_embed.weight"], start.model.layers[1].mlp.stem_embed.weight
    )


def test_mixed_precision_with_loss_scaling_is_refused_with_the_remedy() -> None:
    model = tiny_stem()
    optimizer, scaler = _optimizer(model), torch.amp.GradScaler("cpu")
    batch = {name: value[None] for name, value in sequences(1)[0].items()}
    scaler.scale(model(**batch).loss).backward()
    with pytest.raises(HFEError, match="train in bfloat16"):
        scaler.step(optimizer)


def test_gradient_checkpointing_changes_nothing() -> None:
    batch = {name: value[None] for name, value in sequences(1)[0].items()}
    models = [tiny_stem(), tiny_stem()]
    models[1].gradient_checkpointing_enable()
    for model in models:
        model.train()
        optimizer = _optimizer(model)
        for _ in range(3):
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, his in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(mine, his)


def _backward(model: StemForCausalLM) -> None:
    batch = {name: value[None] for name, value in sequences(1)[0].items()}
    model(**batch, use_cache=False).loss.backward()


@pytest.mark.parametrize("forgotten", ["optimiser", "cast of tables on the host"])
def test_sparse_gradients_that_no_optimiser_takes_are_told(forgotten: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model = tiny_stem()
    if forgotten == "optimiser":
        optimizer = torch.optim.AdamW(model.parameters())
    else:
        model = StemForCausalLM(StemConfig(**{**model.config.to_diff_dict(), "stem_offload": "cpu"}))
        optimizer = _optimizer(model)
        _backward(model)
        assert not caplog.records
        model.to(torch.bfloat16)  # replaces the tables that the optimizer holds
    _backward(model)
    optimizer.zero_grad()
    assert [record.message for record in caplog.records if "RowSparseAdamW" in record.message]


def test_several_processes_without_the_optimiser_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`DistributedDataParallel` ignores the tables: the replicas would differ without an error."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    model = tiny_stem()
    with pytest.raises(HFEError, match="the sparse gradients of the STEM tables are not averaged over the 2 processes"):
        _backward(model)
    optimizer = _optimizer(model)
    _backward(model)
    optimizer.zero_grad()


def test_data_parallel_training_leaves_tables_alone_under_an_adapter_too() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["stem_embed"])
    adapted = peft.get_peft_model(tiny_stem(), config)
    named = {name for name, _ in adapted.named_parameters() if "stem_embed" in name}
    assert len(named) == 4 and named <= set(adapted._ddp_params_and_buffers_to_ignore)
