"""STEM under the tensor parallelism of transformers: two processes compute what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RANK = """
import os
import sys
import torch
import torch.distributed as dist
import hf_efficient
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

dist.init_process_group("gloo")
folder = sys.argv[1]
ids = torch.tensor([[5, 9, 40, 5, 17, 63], [8, 8, 95, 30, 4, 51]])
whole = AutoModelForCausalLM.from_pretrained(folder)
split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
table = split.model.layers[2].mlp.stem_embed.weight
assert table.to_local().shape == (48, 48), "each rank holds half of the rows"
losses = [model(input_ids=ids, labels=ids).loss for model in (whole, split)]
torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
for loss in losses:
    loss.backward()
gradients = {name: p.grad for name, p in whole.named_parameters()}
for name, parameter in split.named_parameters():
    gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
print("equal on rank", dist.get_rank())
dist.destroy_process_group()
# All is checked; torch 2.13 sometimes aborts while the interpreter takes its communication threads down.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_two_ranks_give_the_loss_and_gradients_of_one(
    tiny_model: Callable, tmp_path: Path, repository_root: Path
) -> None:
    tiny_model("hfe_stem", vocab_size=96).save_pretrained(tmp_path / "model")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    finished = subprocess.run(
        [*launch, str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": str(repository_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("equal on rank") == 2
