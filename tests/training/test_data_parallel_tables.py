"""RowSparseAdamW in two processes: the replicas stay bit-identical, and match training in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from two_processes import run_on_two_ranks

# Common to the scripts of both ranks and to the one process that sees the whole batch.
COMMON = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from hf_efficient import HFEError, RowSparseAdamW

def same_on_all_ranks(tensors):
    for tensor in tensors:
        bits = tensor.detach().contiguous()
        everybodys = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        dist.all_gather(everybodys, bits)
        if not all(torch.equal(each, everybodys[0]) for each in everybodys):
            return False
    return True
"""

TABLES = (
    COMMON
    + """
class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.often, self.seldom, self.never = (nn.Embedding(20, 4, sparse=True) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        # The second table is not called where the batch has no id of it, so it has no gradient there.
        hidden = torch.tanh(self.often(ids))
        chosen = ids >= 12
        if chosen.any():
            hidden = hidden.clone()
            hidden[chosen] = hidden[chosen] * self.seldom(ids[chosen])
        return F.cross_entropy(self.head(hidden), ids % 3)

# In some steps one rank has no id of the second table, in some neither has, in some a rank accumulates two parts.
BATCHES = [
    [[1, 2, 13, 3], [4, 5, 6, 7]],
    [[2, 2, 2, 2], [14, 14, 1, 15]],
    [[1, 0, 3, 8], [9, 9, 0, 1]],
    [[12, 13, 14, 1], [19, 13, 18, 0]],
    [[0, 1, 2, 3], [3, 2, 1, 0]],
]

def options():
    return {"lr": 0.05, "weight_decay": 0.2, "max_row_norm": 0.05}

def train_alone():
    model = Tables()
    optimizer = RowSparseAdamW(model.parameters(), **options(), process_group=False)
    for step in BATCHES * 3:
        # The mean over the ranks of the means over their ids.
        (sum(model(torch.tensor(ids)) for ids in step) / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    return model

dist.init_process_group("gloo")
rank = dist.get_rank()
model = Tables()
model._ddp_params_and_buffers_to_ignore = ["often.weight", "seldom.weight", "never.weight"]
ddp = nn.parallel.DistributedDataParallel(model)
optimizer = RowSparseAdamW(model.parameters(), **options())
for number, step in enumerate(BATCHES * 3):
    ids = torch.tensor(step[rank])
    if number % 2:  # in two parts, on one rank unlike on the other
        parts = ids.split(2) if rank else ids.split(3)
        with ddp.no_sync():
            (ddp(parts[0]) * len(parts[0]) / 4).backward()
        (ddp(parts[1]) * len(parts[1]) / 4).backward()
    else:
        ddp(ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert same_on_all_ranks(model.parameters()), f"the replicas differ after step {number}"
states = [state for state in optimizer.state.values() if "log_decays" in state]
assert len(states) == 2 and same_on_all_ranks(tensor for state in states for tensor in state.values())
assert model.never.weight not in optimizer.state
optimizer.flush()
for (name, mine), his in zip(model.named_parameters(), train_alone().parameters()):
    torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5, msg=name)

# Without averaging the replicas differ.
apart = Tables()
optimizer = RowSparseAdamW(apart.parameters(), **options(), process_group=False)
apart(torch.tensor(BATCHES[0][rank])).backward()
optimizer.step()
assert not same_on_all_ranks([apart.often.weight])

# Sparse on one rank, dense on the other: an error on both, and no deadlock.
mixed = nn.Embedding(5, 2, sparse=rank == 0)
optimizer = RowSparseAdamW(mixed.parameters())
mixed(torch.tensor([1])).sum().backward()
try:
    optimizer.step()
except HFEError as error:
    assert "sparse gradient on rank 0 and a dense one on rank 1" in str(error), error
else:
    raise AssertionError("was not refused")
"""
)

STEM = (
    COMMON
    + """
from accelerate import Accelerator
from torch.utils.data import DataLoader
from hf_efficient.modeling.stem.configuration_stem import StemConfig
from hf_efficient.modeling.stem.modeling_stem import StemForCausalLM

def tiny():
    torch.manual_seed(7)
    shape = dict(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    return StemForCausalLM(StemConfig(**shape, stem_layers=[1, 2], stem_init_std=0.5, stem_sparse_grad=True))

def optimizer_of(model, **options):
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["stem_embed" in name].append(parameter)
    tables = {"params": groups[True], "lr": 0.05, "weight_decay": 0.0}
    return RowSparseAdamW([tables, {"params": groups[False]}], lr=1e-2, **options)

data = [(number % 12 + torch.arange(16) % 8) for number in range(24)]
accelerator = Accelerator(cpu=True)
model = tiny()
model, optimizer, batches = accelerator.prepare(model, optimizer_of(model), DataLoader(data, 2))
assert isinstance(model, nn.parallel.DistributedDataParallel)
for batch in batches:
    accelerator.backward(model(input_ids=batch, labels=batch, use_cache=False).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert same_on_all_ranks(model.parameters())
mine = accelerator.unwrap_model(model)
alone = tiny()
single = optimizer_of(alone, process_group=False)
for batch in DataLoader(data, 4):
    alone(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
    single.step()
    single.zero_grad()
for (name, each), his in zip(mine.named_parameters(), alone.parameters()):
    torch.testing.assert_close(each, his, rtol=1e-3, atol=1e-4, msg=name)
assert not torch.equal(mine.model.layers[1].mlp.stem_embed.weight, tiny().model.layers[1].mlp.stem_embed.weight)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("script", [TABLES, STEM], ids=["tables", "stem"])
def test_two_processes_train_the_same_model_as_one(script: str, tmp_path: Path, repository_root: Path) -> None:
    """Also where a rank's batch has no row of a table, and where no rank's has."""
    run_on_two_ranks(script, tmp_path, repository_root)
