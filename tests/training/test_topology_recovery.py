"""An adapter learns to combine the results of parallel paths; a path cannot learn what it does not see."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

import hf_efficient  # noqa: F401  (registers the model types)
from hf_efficient.modeling.topology.grammar.control_tokens import MULTIVERSE
from hf_efficient.modeling.topology.grammar.topology import Topology

TAGS = {tag: 1 + number for number, tag in enumerate(MULTIVERSE)}
ONE, TWO, COLON, FIRST, SECOND, SECRET, AND = range(13, 20)
VALUES = torch.arange(24, 40)
IGNORED = -100


def values(count: int, number: int, seed: int) -> list[Tensor]:
    """Columns of random values, different from each other in each row."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, len(VALUES), generator=generator).argsort(1)[:, :number]
    return list(VALUES[drawn].unbind(1))


def rows(count: int, parts: list[Any]) -> Tensor:
    return torch.stack([torch.full((count,), part) if isinstance(part, int) else part for part in parts], dim=1)


def plain(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three marked values, then the marks again in some order: each is to be followed by its value."""
    found = torch.stack(values(count, 3, seed), dim=1)
    order = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)).argsort(1)
    marks = torch.tensor([FIRST, SECOND, SECRET])
    said = torch.stack((marks.expand(count, 3), found), dim=2).flatten(1)
    asked = torch.stack((marks[order], found.gather(1, order)), dim=2).flatten(1)
    labels = torch.full((count, 12), IGNORED)
    labels[:, 7::2] = asked[:, 1::2]
    return torch.cat((said, asked), dim=1), labels


def structured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Path 1 has two values and path 2 one; the conclusion takes one of each, and path 2 is asked for the other."""
    x, y, z = values(count, 3, seed)
    tag = TAGS
    outlines = [part for n in (ONE, TWO) for part in (tag["<Outline>"], n, COLON, tag["</Outline>"])]
    parts = [tag["<Parallel>"], tag["<Goal>"], *outlines, tag["</Goal>"]]
    parts += [tag["<Path>"], ONE, COLON, FIRST, x, SECRET, z, tag["</Path>"]]
    parts += [tag["<Path>"], TWO, COLON, SECOND, y, SECRET, z, tag["</Path>"]]
    leak = len(parts) - 2
    join = len(parts) + 1
    parts += [tag["<Conclusion>"], x, AND, y, tag["</Conclusion>"], tag["</Parallel>"]]
    ids = rows(count, parts)
    labels = torch.full_like(ids, IGNORED)
    learnt = [leak, join, join + 2]
    labels[:, learnt] = ids[:, learnt]
    return ids, labels


def logits_of(model: Any, ids: Tensor, parallel: bool) -> Tensor:
    """Logits [B, S - 1, V] of the next tokens; `parallel` under the text's topology, else as plain text."""
    given: dict[str, Tensor] = {}
    if parallel:
        batch = Topology.stack([Topology.from_token_ids(ids[0], "multiverse", TAGS)] * len(ids))
        given = batch._asdict()
    return model(ids, use_cache=False, **given).logits[:, :-1]


def train(model: Any, task: Any, steps: int, rate: float, parallel: bool) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        ids, labels = task(64, 1000 + step)
        loss = cross_entropy(logits_of(model, ids, parallel).flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Any, task: Any, parallel: bool) -> list[float]:
    """Share of right tokens at each place that has a label."""
    ids, labels = task(512, 1)
    best = logits_of(model.eval(), ids, parallel).argmax(-1)
    places = (labels[0] != IGNORED).nonzero()[:, 0].tolist() if task is structured else range(7, 12, 2)
    found = [(best[:, place - 1] == ids[:, place]).double().mean().item() for place in places]
    model.train()
    return found


@pytest.fixture(scope="module")
def base() -> Any:
    """A model trained to recall a marked value in plain text, on texts without control tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "hfe_multiverse",
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        topology={"token_ids": TAGS},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    train(model, plain, 400, 5e-3, parallel=False)
    assert min(accuracy(model, plain, parallel=False)) > 0.99
    return model


def test_adapters_learn_to_join_two_paths_and_no_path_learns_what_its_sibling_has(base: Any) -> None:
    """Chance is 1 in 16, or 1 in 14 when the visible values are ruled out."""
    before = accuracy(base, structured, parallel=True)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        trainable_token_indices={"embed_tokens": sorted(TAGS.values())},
    )
    model = peft.get_peft_model(base, config)
    train(model, structured, 200, 1e-2, parallel=True)
    leak, first, second = accuracy(model, structured, parallel=True)
    assert min(before[1:]) < 0.5, before
    assert min(first, second) > 0.95, (leak, first, second)
    assert leak < 1 / 14 + 4 * (1 / 14 / 512) ** 0.5, leak

    # Exactly: another value in path 1 changes nothing in path 2, and something in the conclusion.
    ids, _ = structured(8, 2)
    other = ids.clone()
    path = (ids[0] == TAGS["<Path>"]).nonzero()[:, 0].tolist()
    other[:, [path[0] + 4, path[0] + 6]] = other[:, [path[0] + 6, path[0] + 4]]
    with torch.no_grad():
        one, two = (logits_of(model.eval(), each, parallel=True) for each in (ids, other))
    in_path, after = slice(path[1], path[1] + 6), slice(path[1] + 8, None)
    assert torch.equal(one[:, in_path], two[:, in_path])
    assert (one[:, after] - two[:, after]).abs().max() > 1


def test_mixed_precision_trains_under_a_topology(base: Any) -> None:
    """Accelerate's and Trainer's bf16: rotary embeddings leave queries in float32, and values are half."""
    ids, labels = structured(8, 3)
    losses = {}
    for dtype in (torch.bfloat16, None):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found = logits_of(base.train(), ids, parallel=True)
        losses[dtype] = cross_entropy(found.float().flatten(0, 1), labels[:, 1:].flatten())
    gradients = torch.autograd.grad(losses[torch.bfloat16], [p for p in base.parameters() if p.requires_grad])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert losses[torch.bfloat16].item() == pytest.approx(losses[None].item(), rel=0.03)
