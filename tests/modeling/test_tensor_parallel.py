"""STEM under the tensor parallelism of transformers: two processes compute what one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from two_processes import SAME_LOSS_AND_GRADIENTS, run_on_two_ranks

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
"""


@pytest.mark.slow
def test_two_ranks_give_the_loss_and_gradients_of_one(
    tiny_model: Callable, tmp_path: Path, repository_root: Path
) -> None:
    tiny_model("hfe_stem", vocab_size=96).save_pretrained(tmp_path / "model")
    run_on_two_ranks(RANK + SAME_LOSS_AND_GRADIENTS, tmp_path, repository_root, tmp_path / "model")
