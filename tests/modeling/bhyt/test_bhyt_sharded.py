"""BHyT in two processes: sharded by FSDP2 and by tensor parallelism, each rank has what one process has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from two_processes import SAME_LOSS_AND_GRADIENTS, run_on_two_ranks

START = """
import os
import sys
import torch
import torch.distributed as dist
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytForCausalLM
from hf_efficient import bhyt_depth_bound, keep_branch_variance, SaturationMonitor

dist.init_process_group("gloo")
folder = sys.argv[1]
ids = torch.tensor([[5, 9, 40, 5, 17, 60], [8, 8, 55, 30, 4, 51]])

def stored(model):
    return torch.stack([layer.post_attention_layernorm.branch for layer in model.model.layers])

def same_on_all_ranks(tensor):
    everybodys = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, tensor.contiguous())
    return all(torch.equal(each, everybodys[0]) for each in everybodys)
"""

FSDP = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from safetensors.torch import load_file
from peft import LoraConfig, get_peft_model

def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)

def train(model, optimizer, steps):
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

alone = BhytForCausalLM.from_pretrained(folder).train()
model = sharded(BhytForCausalLM.from_pretrained(folder, carry_residual=True).train())
weight = model.model.layers[0].self_attn.v_proj.weight
assert weight.to_local().shape[0] * 2 == weight.shape[0], "each rank holds half of the rows"
assert not any(layer.has_output_hooks() for layer in model.model.layers), "sharding keeps no layer from carrying"
first = stored(model)
optimizers = [torch.optim.AdamW(each.parameters(), lr=0.02) for each in (alone, model)]
for each, optimizer in zip((alone, model), optimizers):
    keep_branch_variance(each, optimizer, every=2)
    train(each, optimizer, 3)
two_steps = stored(model)
assert same_on_all_ranks(two_steps) and not torch.allclose(two_steps, first, rtol=0.01)
torch.testing.assert_close(two_steps, stored(alone), rtol=1e-3, atol=1e-6)

# A call in evaluation mode reads nothing of the other rank; switching to it does, and a saved state has what it needs.
for each in (alone, model):
    each.eval()
    train(each.train(False), torch.optim.SGD(each.parameters(), lr=0), 1)
assert same_on_all_ranks(stored(model)) and not torch.allclose(stored(model), two_steps, rtol=1e-3)
torch.testing.assert_close(stored(model), stored(alone), rtol=1e-3, atol=1e-6)
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
whole = get_model_state_dict(model, options=options)
if dist.get_rank() == 0:
    old = dict(whole)
    for name in whole:
        if name.endswith(".branch"):
            old[name] = torch.zeros(2)
    model.save_pretrained(sys.argv[2], state_dict=old)
    saved = load_file(f"{sys.argv[2]}/model.safetensors")
    saved = torch.stack([saved[f"model.layers.{i}.post_attention_layernorm.branch"] for i in range(3)])
    torch.testing.assert_close(saved, stored(model), rtol=1e-5, atol=0)
dist.barrier()
assert bhyt_depth_bound(model) == bhyt_depth_bound(BhytForCausalLM.from_pretrained(sys.argv[2]))
with SaturationMonitor(model, 0.2) as monitor:
    model(input_ids=ids)
with SaturationMonitor(alone, 0.2) as other:
    alone(input_ids=ids)
seen, expected = monitor.read(), other.read()
assert seen.keys() == expected.keys() and 0.02 < expected["bhyt/saturation/max"]
assert max(abs(seen[name] - expected[name]) for name in seen) < 0.02

# Adapters, sharded like the rest.
torch.manual_seed(1)
adapted = get_peft_model(BhytForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["v_proj", "o_proj"]))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.3)
adapted.eval()(input_ids=ids)
expected = stored(adapted.get_base_model())
inner = sharded(adapted.get_base_model())
for layer in inner.model.layers:
    layer.post_attention_layernorm.branch.zero_()
adapted.eval()
assert same_on_all_ranks(stored(inner))
torch.testing.assert_close(stored(inner), expected, rtol=1e-5, atol=0)
"""

TENSOR_PARALLEL = """
from transformers.distributed.configuration_utils import DistributedConfig

whole = BhytForCausalLM.from_pretrained(folder)
split = BhytForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
weight = split.model.layers[0].self_attn.v_proj.weight
assert weight.to_local().shape[0] * 2 == weight.shape[0], "each rank holds half of the heads"
assert same_on_all_ranks(stored(split))
torch.testing.assert_close(stored(split), stored(whole), rtol=1e-5, atol=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "script"), [("fsdp", FSDP), ("tensor-parallel", TENSOR_PARALLEL + SAME_LOSS_AND_GRADIENTS)]
)
def test_two_processes_have_what_one_has(
    name: str, script: str, bhyt_model: Callable, tmp_path: Path, repository_root: Path
) -> None:
    model = bhyt_model(bhyt_final="bhyt", attention_bias=True, vocab_size=62, tie_word_embeddings=name == "fsdp")
    model.save_pretrained(tmp_path / "model")
    run_on_two_ranks(START + script, tmp_path, repository_root, tmp_path / "model", tmp_path / "saved")
