"""Scripts that run on two ranks of `gloo` on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The last lines of every script.
END = """
print("agreed on rank", dist.get_rank())
dist.destroy_process_group()
# All checks are done; torch 2.13 sometimes aborts at exit, when its communication threads are stopped.
sys.stdout.flush()
os._exit(0)
"""
# Loss and gradients of the model `split`, in tensor parallelism, are those of `whole` for the token ids `ids`.
SAME_LOSS_AND_GRADIENTS = """
losses = [model(input_ids=ids, labels=ids).loss for model in (whole, split)]
torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
for loss in losses:
    loss.backward()
gradients = {name: p.grad for name, p in whole.named_parameters()}
for name, parameter in split.named_parameters():
    gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
"""


def run_on_two_ranks(script: str, folder: Path, root: Path, *arguments: Path) -> None:
    """Run a script, which must reach its end on both ranks; it is written into `folder`, the package is in `root`."""
    path = folder / "rank.py"
    path.write_text(script + END, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
    finished = subprocess.run(
        [*launch, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("agreed on rank") == 2
