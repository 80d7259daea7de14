"""The example that fine-tunes a video DiT with Monarch attention runs as it stands, and measures what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanModel


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "monarch_wan_finetune.py"
    spec = importlib.util.spec_from_file_location("monarch_wan_finetune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latents_are_projected_back_to_the_frames(example: ModuleType, shared_data: Path) -> None:
    frames = load_file(shared_data / "video_bbb_u8.safetensors")["frames"]
    latents = example.Latents(frames)
    assert latents.clip.shape == (16, 32, 18, 32)
    torch.testing.assert_close(latents.clip[:, :24].flatten(1).std(1), torch.ones(16))
    error = (latents.frames(latents.clip) - frames.permute(0, 2, 3, 1) / 255).square().mean()
    assert -10 * torch.log10(error) > 33, "decibels"


def test_the_true_flow_has_no_loss_and_leads_back_to_the_latents(example: ModuleType) -> None:
    latents = torch.randn(2, 16, 2, 4, 4)

    class TrueFlow(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=(noisy - latents) / (timestep / 1000)[:, None, None, None, None])

    losses = example.flow_losses(TrueFlow(), latents, torch.randn_like(latents), torch.tensor([0.3, 0.9]))
    assert losses.shape == (2,) and losses.max() < 1e-8
    latents = latents[:1]
    noisy = example.denoise(TrueFlow(), latents, 0.7, 0)
    assert (noisy - 0.3 * latents).std() == pytest.approx(0.7, rel=0.1)
    torch.testing.assert_close(example.denoise(TrueFlow(), latents, 0.7, 5), latents, atol=1e-5, rtol=1e-5)


def test_the_example_trains_swaps_recovers_and_draws(shared_data: Path, tmp_path: Path) -> None:
    """Hardly trained, so that nothing is recovered; what must hold for any training is checked."""
    command = [
        sys.executable,
        "examples/monarch_wan_finetune.py",
        "--data",
        str(shared_data),
        "--output",
        str(tmp_path),
    ]
    small = {"hidden": 24, "heads": 2, "layers": 2, "frames": 2, "steps": 12, "lora-steps": 4, "rank": 2, "times": 2}
    small |= {"seeds": 2, "denoising-steps": 2, "h-reduce": 3}
    command += [word for name, value in small.items() for word in (f"--{name}", str(value))]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "monarch_wan_finetune.json").read_text())
    assert [run["seed"] for run in result["runs"]] == [0, 1] and "| mean |" in done.stdout
    for run in result["runs"]:
        dense, monarch, recovered, control = run["losses"].values()
        assert max(run["losses"].values()) < 2.0, "the flow of an untrained model is 0, and its loss 2"
        assert len({dense, monarch, recovered, control}) == 4
        assert run["gap"] == pytest.approx(monarch - dense, abs=1e-6)
        assert run["recovered"] == pytest.approx((monarch - recovered) / run["gap"], rel=0.05, abs=0.05)
    model = MonarchWanModel.from_pretrained(tmp_path / "model")
    assert model.config.monarch["h_reduce"] == 3 and model.blocks[0].self_attn.active_spec is not None
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    assert (tmp_path / "monarch_wan_frames.png").read_bytes().startswith(b"\x89PNG")
