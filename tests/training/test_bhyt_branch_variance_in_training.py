"""Branch variances are recomputed from the weights in training, every few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_efficient import BranchVarianceCallback, HFEError, UsageError, keep_branch_variance
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytForCausalLM
from hf_efficient.training.branch_variance import steps_between_refreshes

TINY: dict[str, Any] = {
    **{"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bhyt_seq_len": 8, "initializer_range": 0.2},
}
DATA = [{"input_ids": [(i + j) % 23 for j in range(8)], "labels": [(i + j) % 23 for j in range(8)]} for i in range(12)]


@pytest.fixture
def model() -> BhytForCausalLM:
    return BhytForCausalLM(BhytConfig(**TINY)).train()


def stored(model: Any) -> Tensor:
    return torch.stack([layer.post_attention_layernorm.branch for layer in model.model.layers]).double()


def right(model: Any) -> Tensor:
    """From the present weights; two consecutive query heads share a value head."""
    found = []
    for layer in model.model.layers:
        value, output = (getattr(layer.self_attn, name).weight.detach().double() for name in ("v_proj", "o_proj"))
        wide = value.view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16)
        found.append(torch.stack(((output @ wide).square().sum() / (8 * 16), output.new_zeros(()))))
    return torch.stack(found)


def is_right(model: Any) -> bool:
    return torch.allclose(stored(model), right(model), rtol=1e-5, atol=0)


def test_the_interval_is_a_fiftieth_within_bounds() -> None:
    assert [steps_between_refreshes(n) for n in (0, 1, 49, 100, 5_000, 10**6)] == [1, 1, 1, 2, 100, 1000]


class Watch(TrainerCallback):
    """Records after which steps the values match the weights; it is added after the callback under test."""

    def __init__(self) -> None:
        self.right: list[int] = []
        self.at_begin = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at_begin = is_right(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if is_right(model):
            self.right.append(state.global_step)


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6]), (None, [1, 2, 3, 4, 5, 6, 7]), ("none", [])])
def test_in_a_trainer(every: Any, expected: list[int], model: BhytForCausalLM, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=7, learning_rate=0.01, report_to=[], use_cpu=True, save_strategy="no"
    )
    watch = Watch()
    callbacks = [watch] if every == "none" else [BranchVarianceCallback(every), watch]
    for layer in model.model.layers:
        layer.post_attention_layernorm.branch.fill_(5)
    Trainer(model, arguments, train_dataset=DATA, callbacks=callbacks).train()
    assert watch.right == expected
    assert watch.at_begin == is_right(model) == (every != "none")


def steps(model: Any, optimizer: Any, count: int) -> list[bool]:
    found = []
    for step in range(count):
        ids = torch.tensor([DATA[step]["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(is_right(getattr(model, "module", model)))
    return found


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_in_a_loop_of_ones_own(options: dict[str, bool], model: BhytForCausalLM) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    model.model.layers[1].post_attention_layernorm.branch.fill_(5)
    handle = keep_branch_variance(model, optimizer, every=2)
    assert is_right(model)
    assert steps(model, optimizer, 4) == [False, True, False, True]
    handle.remove()
    assert steps(model, optimizer, 4) == [False] * 4
    handle = keep_branch_variance(model, optimizer, max_steps=150)
    assert steps(model, optimizer, 6) == [False, False, True] * 2


def test_with_accelerate(model: BhytForCausalLM) -> None:
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    keep_branch_variance(prepared, optimizer, every=2)
    assert steps(prepared, optimizer, 4) == [False, True, False, True]


def test_a_bhyt_model_within_another_is_found(model: BhytForCausalLM) -> None:
    whole = nn.ModuleDict({"inner": model, "other": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    keep_branch_variance(whole, optimizer, every=1)
    assert steps(model, optimizer, 2) == [True, True]


def test_weights_that_are_trained_but_cannot_be_read(model: BhytForCausalLM) -> None:
    """Without an update the value would be outdated without an error; with frozen weights it stays right."""
    projection = model.model.layers[1].self_attn.v_proj
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection.weight = nn.Parameter(projection.weight.detach().flatten()[:10])
    with pytest.raises(HFEError, match="v_proj and o_proj of layer 1 are trained.*FSDP2"):
        keep_branch_variance(model, optimizer, every=1)
    for part in (projection, model.model.layers[1].self_attn.o_proj):
        part.requires_grad_(False)
    keep_branch_variance(model, optimizer, every=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, o: keep_branch_variance(m, o), "neither `every` nor `max_steps`"),
        (lambda m, o: keep_branch_variance(m, o, every=0), "every=0 must be at least 1"),
        (lambda m, o: BranchVarianceCallback(-1), "every=-1 must be at least 1"),
    ],
)
def test_wrong_intervals(call: Callable[..., Any], message: str, model: BhytForCausalLM) -> None:
    with pytest.raises(UsageError, match=message):
        call(model, torch.optim.SGD(model.parameters(), lr=0.1))
