"""Swap Monarch attention into a small video DiT, and recover the loss with LoRA. Experimental.

    python examples/monarch_wan_finetune.py --data shared/data
    python examples/monarch_wan_finetune.py --data shared/data --device cuda --large

A small model of Wan's class is trained first, with softmax attention, on a clip of 32 frames (Big Buck Bunny). Its
latents are not those of a VAE: squares of 4 x 4 pixels are projected to their 16 principal components, scaled to
variance 1, so that they can be projected back. A model sees `--frames` consecutive frames of 18 x 32 latents, 9 x 16
tokens each. The first 24 frames are for training, the last 8 are held out. Then:

1. dense: the flow-matching loss of the trained model on held-out frames;
2. Monarch: the same weights with Monarch attention, nothing trained;
3. Monarch + LoRA: an adapter of q, k, v and o of the self-attention is trained with Monarch attention, on the same
   training frames with the same loss;
4. dense + LoRA, the control: the same adapter, steps and noise with softmax attention, which shows how much of the
   improvement is only more training.

All are evaluated with the same noise and times. The recovered fraction is (2 - 3) / (2 - 1). The output folder gets
`monarch_wan_finetune.json`, the picture `monarch_wan_frames.png`, and the merged model of the last seed.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_efficient.modeling.monarch.monarch_spec import MonarchGridSpec
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanModel

SQUARE = 4  # pixels on each side of a latent
CHANNELS = 16
TRAINED_FRAMES = 24
LARGE = {"hidden": 384, "layers": 8, "heads": 6, "frames": 8, "batch": 8, "steps": 3000, "lora_steps": 600}
LARGE |= {"learning_rate": 1e-3, "rank": 32}


class Latents:
    """The clip as latents, and latents as frames.

    Attributes:
        clip: [CHANNELS, frames, height / SQUARE, width / SQUARE].
    """

    def __init__(self, frames: Tensor) -> None:
        """Fit the projection to the training frames of `frames`, uint8 [F, 3, height, width]."""
        squares = (frames.float() / 127.5 - 1).unfold(2, SQUARE, SQUARE).unfold(3, SQUARE, SQUARE)
        squares = squares.permute(0, 2, 3, 1, 4, 5).flatten(3)  # [F, height / SQUARE, width / SQUARE, 48]
        seen = squares[:TRAINED_FRAMES].flatten(0, 2)
        self.mean = seen.mean(0)
        self.basis = torch.linalg.svd(seen - self.mean, full_matrices=False)[2][:CHANNELS]
        self.scale = ((seen - self.mean) @ self.basis.T).std(0)
        self.clip = (((squares - self.mean) @ self.basis.T) / self.scale).permute(3, 0, 1, 2).contiguous()

    def frames(self, latents: Tensor) -> Tensor:
        """Frames in 0..1, [F, height, width, 3], of latents [CHANNELS, F, height / SQUARE, width / SQUARE]."""
        squares = (latents.permute(1, 2, 3, 0) * self.scale) @ self.basis + self.mean
        squares = squares.unflatten(3, (3, SQUARE, SQUARE)).permute(0, 1, 4, 2, 5, 3)
        return (squares.flatten(3, 4).flatten(1, 2) / 2 + 0.5).clamp(0, 1)


def predict_flow(model: nn.Module, noisy: Tensor, times: Tensor) -> Tensor:
    """The flow that the model predicts for latents [B, CHANNELS, F, h, w] at times [B] from 0 to 1, without a text."""
    no_text = noisy.new_zeros(noisy.shape[0], 1, 8)
    return model(noisy, 1000 * times, no_text).sample


def flow_losses(model: nn.Module, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Mean squared error [B] of the flow ``noise - latents`` at ``(1 - t) latents + t noise``; tensors as above."""
    t = times[:, None, None, None, None]
    flow = predict_flow(model, (1 - t) * latents + t * noise, times)
    return (flow.float() - (noise - latents)).square().mean((1, 2, 3, 4))


@torch.no_grad()
def held_out_losses(model: nn.Module, clip: Tensor, options: Any) -> Tensor:
    """Losses [E] on the held-out frames, at evenly spaced times; the same noise for every model."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for start in range(TRAINED_FRAMES, clip.shape[1] - options.frames + 1, options.frames):
        for step in range(options.times):
            noise = torch.randn(1, *clip[:, : options.frames].shape, generator=generator).to(clip.device)
            times = torch.full((1,), (step + 0.5) / options.times, device=clip.device)
            losses.append(flow_losses(model, clip[None, :, start : start + options.frames], noise, times))
    return torch.cat(losses)


def train(model: nn.Module, clip: Tensor, steps: int, learning_rate: float, seed: int, options: Any) -> None:
    """Train the parameters that require a gradient on windows of the training frames."""
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that all devices get the same
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    windows = TRAINED_FRAMES - options.frames + 1
    for _ in range(steps):
        starts = torch.randint(windows, (options.batch,), generator=generator).tolist()
        latents = torch.stack([clip[:, start : start + options.frames] for start in starts])
        noise = torch.randn(latents.shape, generator=generator).to(clip.device)
        times = torch.randn(options.batch, generator=generator).sigmoid().to(clip.device)
        loss = flow_losses(model, latents, noise, times).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def with_attention(dense: MonarchWanModel, monarch: dict[str, Any] | None) -> MonarchWanModel:
    """A copy of the model with these Monarch settings; None is softmax attention."""
    config = MonarchWanConfig(**{**dense.config.to_dict(), "monarch": monarch})
    model = MonarchWanModel(config).to(dense.device)
    model.load_state_dict(dense.state_dict())
    return model


def with_lora(model: MonarchWanModel, clip: Tensor, seed: int, options: Any) -> MonarchWanModel:
    """The model after training an adapter of its self-attention and adding it to the weights."""
    projections = [f"self_attn.{name}" for name in "qkvo"]
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=projections))
    train(adapted, clip, options.lora_steps, options.lora_learning_rate, seed + 1000, options)
    return adapted.merge_and_unload()


def run_seed(clip: Tensor, monarch: dict[str, Any], seed: int, options: Any) -> tuple[dict, dict[str, MonarchWanModel]]:
    """Train and evaluate with one seed.

    Returns:
        Name -> held-out loss, and the statistics of the difference; name -> model.
    """
    torch.manual_seed(seed)
    config = MonarchWanConfig(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=8,
        text_len=1,
        freq_dim=64,
    )
    dense = MonarchWanModel(config).to(clip.device)
    train(dense, clip, options.steps, options.learning_rate, seed, options)
    models = {"dense": dense, "Monarch": with_attention(dense, monarch)}
    models["Monarch + LoRA"] = with_lora(with_attention(dense, monarch), clip, seed, options)
    models["dense + LoRA"] = with_lora(with_attention(dense, None), clip, seed, options)
    losses = {name: held_out_losses(model, clip, options) for name, model in models.items()}
    found: dict[str, Any] = {"seed": seed, "losses": {name: loss.mean().item() for name, loss in losses.items()}}
    gap = losses["Monarch"] - losses["dense"]
    found["gap"] = gap.mean().item()
    found["gap_standard_error"] = (gap.std() / len(gap) ** 0.5).item()
    found["recovered"] = ((losses["Monarch"] - losses["Monarch + LoRA"]).mean() / gap.mean()).item()
    return found, models


@torch.no_grad()
def denoise(model: nn.Module, latents: Tensor, begin: float, steps: int) -> Tensor:
    """Latents [1, CHANNELS, F, h, w] with noise up to time `begin` (1: noise alone), denoised in `steps` steps."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).to(latents.device)
    times = torch.linspace(begin, 0, steps + 1, device=latents.device)
    state = (1 - begin) * latents + begin * noise
    for now, after in zip(times, times[1:], strict=False):
        state = state + (after - now) * predict_flow(model, state, now[None])
    return state


def draw(models: dict[str, MonarchWanModel], latents: Latents, path: Path, options: Any) -> None:
    """A row of held-out frames for the clip, for its noisy latents and for each model that denoises them."""
    from matplotlib.figure import Figure

    device = next(iter(models.values())).device
    window = latents.clip[None, :, TRAINED_FRAMES : TRAINED_FRAMES + options.frames]
    rows = {
        "clip": window[0],
        f"noise, t = {options.begin}": denoise(models["dense"], window.to(device), options.begin, 0)[0],
    }
    for name in ("dense", "Monarch", "Monarch + LoRA"):
        rows[name] = denoise(models[name], window.to(device), options.begin, options.denoising_steps)[0]
    shown = [0, options.frames // 3, 2 * options.frames // 3, options.frames - 1]
    figure = Figure(figsize=(11, 1.62 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(shown), squeeze=False)
    for (name, row), line in zip(rows.items(), panels, strict=True):
        frames = latents.frames(row.cpu().float())
        for place, panel in zip(shown, line, strict=True):
            panel.imshow(frames[place].numpy())
            panel.set(xticks=[], yticks=[])
            if row is rows["clip"]:
                panel.set_title(f"frame {TRAINED_FRAMES + place}", fontsize=9)
        line[0].set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=100)


def show(result: dict[str, Any]) -> None:
    """Print the table: a line for each seed and their mean."""
    names = list(result["runs"][0]["losses"])
    print(f"\n| seed | {' | '.join(names)} | gap ± standard error | recovered |\n|---|{'---|' * len(names)}---|---|")
    for run in result["runs"]:
        cells = " | ".join(f"{run['losses'][name]:.4f}" for name in names)
        gap = f"{run['gap']:.4f} ± {run['gap_standard_error']:.4f}"
        print(f"| {run['seed']} | {cells} | {gap} | {run['recovered']:.0%} |")
    means = [sum(run["losses"][name] for run in result["runs"]) / len(result["runs"]) for name in names]
    print(f"| mean | {' | '.join(f'{each:.4f}' for each in means)} | | {result['recovered']:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shared/data"), help="folder of video_bbb_u8.safetensors")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=4, help="frames that the model sees at once")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora-steps", type=int, default=100)
    parser.add_argument("--lora-learning-rate", type=float, default=2e-3)
    parser.add_argument("--f-tied", type=int, default=1)
    parser.add_argument("--h-reduce", type=int, default=1, help="the token grid is 9 x 16: 1, 3 or 9")
    parser.add_argument("--w-reduce", type=int, default=1)
    parser.add_argument("--num-iters", type=int, default=1)
    parser.add_argument("--times", type=int, default=10, help="time steps at which each held-out window is evaluated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--begin", type=float, default=0.8, help="time from which the picture's frames are denoised")
    parser.add_argument("--denoising-steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help=f"other defaults: {LARGE}")
    parser.add_argument("--output", type=Path, default=Path("monarch-wan"), help="folder to write")
    if parser.parse_known_args()[0].large:
        parser.set_defaults(**LARGE)
    options = parser.parse_args()

    latents = Latents(load_file(options.data / "video_bbb_u8.safetensors")["frames"])
    clip = latents.clip.to(options.device)
    names = ("f_tied", "h_reduce", "w_reduce", "num_iters")
    monarch = MonarchGridSpec(**{name: getattr(options, name) for name in names}).to_dict()
    runs, models = [], {}
    for seed in range(options.seeds):
        began = time.perf_counter()
        found, models = run_seed(clip, monarch, seed, options)
        runs.append({**found, "seconds": time.perf_counter() - began})
        print(json.dumps(runs[-1]), flush=True)

    settings = {key: value for key, value in vars(options).items() if key not in ("data", "output", "large")}
    result = {"torch": torch.__version__, "transformers": transformers.__version__, "options": settings}
    result |= {"monarch": monarch, "recovered": sum(run["recovered"] for run in runs) / len(runs), "runs": runs}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "monarch_wan_finetune.json").write_text(json.dumps(result, indent=1) + "\n")
    models["Monarch + LoRA"].save_pretrained(options.output / "model")
    show(result)
    if find_spec("matplotlib"):
        draw(models, latents, options.output / "monarch_wan_frames.png", options)
    else:
        print('The picture needs matplotlib: pip install "hf-efficient[bench]"')


if __name__ == "__main__":
    main()
