"""How activations grow with depth, untrained and trained: RMSNorm, RMSNorm scaled down, LayerNorm scaling, DyT, BHyT.

    python examples/bhyt_depth_study.py --text corpus.jsonl
    python examples/bhyt_depth_study.py --quick  # a minute or two on a CPU

One decoder with different norms before attention and feed-forward, the same weights, data, learning rate and steps.
Writes bhyt_depth_study.json and .png; docs/bhyt_from_scratch.md describes the method.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_efficient.conversion.measuring.text import load_text
from hf_efficient.errors import HFEError
from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytForCausalLM
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.modeling_decoder import DecoderForCausalLM, DecoderModel
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm
from hf_efficient.training.saturation import SaturationMonitor, bhyt_depth_bound

BYTES = 256  # the vocabulary: bytes of UTF-8
# Shape of the untrained decoder that is measured: small enough for a CPU at 64 layers.
UNTRAINED = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
UNTRAINED_TOKENS = 4, 64
STOCK_DEVIATION = 0.02
EVALUATIONS = 8  # of a run, beside the one before it
QUICK = {"layers": [16], "hidden": 64, "intermediate": 172, "heads": 2, "context": 64, "batch": 8, "steps": 100}
QUICK |= {"evaluated_bytes": 4096}


class DyT(nn.Module):
    """Dynamic tanh, ``weight * tanh(alpha x) + bias``: no statistic of the row (arXiv:2503.10622)."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.alpha = nn.Parameter(torch.tensor([alpha]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class ScaledRMSNorm(DecoderRMSNorm):
    """RMSNorm times a constant: LayerNorm scaling is ``1 / sqrt(l)`` in layer l, from 1 (arXiv:2502.05795)."""

    def __init__(self, width: int, eps: float, scale: float) -> None:
        super().__init__(width, eps)
        self.scale = scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.scale * super().forward(hidden_states)


Build = Callable[[dict[str, Any]], DecoderForCausalLM]


def with_norms(build_norm: Callable[[DecoderConfig, int], nn.Module]) -> Build:
    """The decoder with norms that `build_norm(config, layer_idx)` makes in its layers, and RMSNorm as the last norm."""

    class Model(DecoderModel):
        def build_norm(self, position: str, layer_idx: int | None = None) -> nn.Module:
            return super().build_norm(position) if layer_idx is None else build_norm(self.config, layer_idx)

    class CausalLM(DecoderForCausalLM):
        model_class = Model

    return lambda shape: CausalLM(DecoderConfig(**shape))


def with_bhyt(bound_input: float, bound_post: float) -> Build:
    """BHyT as in its paper: second norm estimated, RMSNorm as the last norm; arguments are the initial lambdas."""
    bounds = {"bhyt_lambda_input": bound_input, "bhyt_lambda_post": bound_post}
    return lambda shape: BhytForCausalLM(BhytConfig(**shape, **bounds, bhyt_seq_len=shape["max_position_embeddings"]))


CONTROL = "RMSNorm × 0.1"
VARIANTS: dict[str, Build] = {
    "RMSNorm": lambda shape: DecoderForCausalLM(DecoderConfig(**shape)),
    # BHyT (1, 1) without tanh and without the estimate.
    CONTROL: with_norms(lambda config, _: ScaledRMSNorm(config.hidden_size, config.rms_norm_eps, 0.1)),
    "LayerNorm scaling": with_norms(
        lambda config, layer: ScaledRMSNorm(config.hidden_size, config.rms_norm_eps, (layer + 1) ** -0.5)
    ),
    "DyT, α = 1": with_norms(lambda config, _: DyT(config.hidden_size, 1.0)),
    "BHyT (1, 1)": with_bhyt(1.0, 1.0),
    "BHyT (2, 1)": with_bhyt(2.0, 1.0),
    "BHyT (3, 3)": with_bhyt(3.0, 3.0),
}


def build(
    name: str, layers: int, shape: dict[str, int], context: int, seed: int, device: str = "cpu"
) -> DecoderForCausalLM:
    """A fresh model in float32. All variants get the same weights: N(0, 1 / width) and, in the embedding, N(0, 1)."""
    with torch.device(device):
        sizes = {"vocab_size": BYTES, "num_hidden_layers": layers, "max_position_embeddings": context, **shape}
        model = VARIANTS[name](sizes)
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that all devices get the same
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                deviation = 1.0 if "embed_tokens" in parameter_name else shape["hidden_size"] ** -0.5
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
    refresh(model)
    return model


@torch.no_grad()
def shrink(model: DecoderForCausalLM, deviation: float) -> None:
    """Rescale every weight matrix of a fresh model, the embedding included, to this standard deviation."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(deviation / parameter.std())
    refresh(model)


def refresh(model: DecoderForCausalLM) -> None:
    """Recompute the branch variance of BHyT's second norms from the attention's weights."""
    if isinstance(model, BhytForCausalLM):
        model.refresh_branch_variance()


def token_logits(model: nn.Module, ids: Tensor) -> Tensor:
    # An explicit causal mask: detecting packed sequences would synchronise with the device.
    return model(ids, attention_mask={"full_attention": None}, use_cache=False).logits


def token_nll(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the next bytes in windows [B, S + 1]."""
    return cross_entropy(token_logits(model, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


# Measurements


@torch.no_grad()
def growth(model: DecoderForCausalLM, ids: Tensor) -> dict[str, list[float]]:
    """Of each layer's output: the biased variance over channels and the L2 norm, means over the tokens of ids [B, S].

    For BHyT also the relative error of its estimate of the second norm's root mean square: mean and largest.
    """
    found: dict[str, list[Tensor]] = {}

    def record(**values: Tensor) -> None:
        for key, value in values.items():
            found.setdefault(key, []).append(value)

    def record_output(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        record(variance=output.var(-1, correction=0).mean(), norm=output.norm(dim=-1).mean())

    def record_estimate(norm: Any, inputs: Any, outputs: Any) -> None:
        variance, bound = inputs[2]  # of the layer's input norm
        expected = variance + norm.branch[0] * (bound / norm.kappa) ** 2 + norm.branch[1]
        error = ((expected / outputs[1].square().mean(-1)).sqrt() - 1).abs()
        record(estimate_error=error.mean(), largest_estimate_error=error.max())

    hooks = [layer.register_forward_hook(record_output) for layer in model.model.layers]
    if isinstance(model, BhytForCausalLM):
        hooks += [layer.post_attention_layernorm.register_forward_hook(record_estimate) for layer in model.model.layers]
    token_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(values).tolist() for name, values in found.items()}


@torch.no_grad()
def spike(name: str) -> dict[str, float]:
    """The output of the first norm for N(0, 1) rows whose first channel is multiplied by 1000.

    Returns:
        Mean magnitude of its output in that channel, and root mean square of the others.
    """
    norm = build(name, 1, UNTRAINED, 64, seed=0).model.layers[0].input_layernorm
    x = torch.randn(512, UNTRAINED["hidden_size"], generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1000
    out = norm(x)
    out = out[0] if isinstance(out, tuple) else out  # BHyT also returns its statistic
    return {"channel": out[:, 0].abs().mean().item(), "others": out[:, 1:].square().mean().sqrt().item()}


def train(model: DecoderForCausalLM, text: Tensor, order: Tensor, held_out: Tensor, options: Any) -> dict[str, Any]:
    """Train on the windows of text [n] that begin at order [steps, B].

    Returns:
        Nats a byte on held_out [N, S + 1] by evaluation, and `growth` on its first windows at the end; for BHyT also
        the share of saturated elements there, and the largest ``lambda / kappa * sqrt(L)``.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    plain = [
        parameter for parameter in model.parameters() if parameter.ndim < 2
    ]  # no weight decay for gains and lambdas
    rate, starts = torch.zeros((), device=text.device), torch.zeros_like(order[0])
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=text.is_cuda)

    def step() -> None:
        optimizer.zero_grad()
        token_nll(model, text[starts[:, None] + torch.arange(held_out.shape[1], device=text.device)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    run, steps, nll = step, len(order), []
    evaluated_at = {k * steps // EVALUATIONS for k in range(EVALUATIONS + 1)}
    for i in range(steps + 1):
        if i % min(max(steps // 50, 1), 1000) == 0:
            refresh(model)
        if i in evaluated_at:
            with torch.no_grad():
                nll.append(torch.stack([token_nll(model, part) for part in held_out.split(options.batch)]).mean())
        if i == 3 and text.is_cuda:  # launching so small a model takes longer than running it
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                step()
            run = graph.replay
        if i < steps:
            warm_up, cosine = min((i + 1) / (0.1 * steps), 1.0), (1 + math.cos(math.pi * i / steps)) / 2
            rate.fill_(options.learning_rate * warm_up * (0.1 + 0.9 * cosine))
            starts.copy_(order[i])
            run()
    found: dict[str, Any] = {"evaluated_at": sorted(evaluated_at), "nll_per_byte": torch.stack(nll).tolist()}
    seen = held_out[: options.batch, :-1]
    if isinstance(model, BhytForCausalLM):
        with SaturationMonitor(model) as monitor:
            token_logits(model, seen)
        found |= {"saturation": monitor.read(), "depth_bound": bhyt_depth_bound(model)}
    return {**found, "trained": growth(model, seen)}


def study(layers: int, text: Tensor, held_out: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Measure every variant at one depth; returns the depth's part of the JSON."""
    device = options.device
    batch, length = UNTRAINED_TOKENS
    random_ids = torch.randint(BYTES, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    shape = {"hidden_size": options.hidden, "intermediate_size": options.intermediate}
    shape["num_attention_heads"] = options.heads
    found: dict[str, Any] = {}
    for name in VARIANTS:
        model = build(name, layers, UNTRAINED, length, 0, device)
        found[name] = {"runs": [], "untrained": growth(model, random_ids)}
        shrink(model, STOCK_DEVIATION)
        found[name]["untrained, stock deviation"] = growth(model, random_ids)
        for seed in range(options.seeds):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randint(len(text) - options.context, (options.steps, options.batch), generator=generator)
            began = time.perf_counter()
            model = build(name, layers, shape, options.context, seed, device)
            run = {"seed": seed, **train(model, text, order.to(device), held_out, options)}
            run["seconds"] = time.perf_counter() - began
            found[name]["runs"].append(run)
            print(f"  {layers} layers, {name}: {run['nll_per_byte'][-1]:.4f}, {run['seconds']:.1f} s", flush=True)
    return found


# Output


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def trained_curve(found: dict[str, Any], key: str) -> list[float]:
    """A statistic by layer after training, mean over the seeds."""
    return [mean(list(values)) for values in zip(*(run["trained"][key] for run in found["runs"]), strict=True)]


def show(depths: dict[str, Any], spikes: dict[str, Any]) -> None:
    """Print a table for each depth, and the output for one large channel."""
    for depth, variants in depths.items():
        layers = int(depth)
        print(f"\n{depth} layers: variance over channels after layer 1, {layers // 2} and {depth}")
        heads = f"{'':<20}{'untrained':>27}{'trained':>27}{'L2 norm':>10}{'nats a byte':>13}"
        print(f"{heads}{'λ/κ·√L':>9}{'|tanh| > 0.9':>14}")
        for name, found in variants.items():
            curves = found["untrained"]["variance"], trained_curve(found, "variance")
            cells = "".join(f"{curve[i]:>9.3g}" for curve in curves for i in (0, layers // 2 - 1, layers - 1))
            loss = mean([run["nll_per_byte"][-1] for run in found["runs"]])
            line = f"{name:<20}{cells}{trained_curve(found, 'norm')[-1]:>10.1f}{loss:>13.4f}"
            if "depth_bound" in found["runs"][0]:
                line += f"{max(run['depth_bound'] for run in found['runs']):>9.2f}"
                saturated = (run["saturation"]["bhyt/saturation/mean"] for run in found["runs"])
                line += f"{mean(list(saturated)):>14.2%}"
            print(line)
    print("\nEstimate of the second norm's root mean square: mean and largest relative error over layers and tokens")
    for depth, variants in depths.items():
        for name, found in variants.items():
            if "estimate_error" in found["untrained"]:
                stages = [found["untrained"], *(run["trained"] for run in found["runs"])]
                cells = (f"{mean(x['estimate_error']):>9.4f}{max(x['largest_estimate_error']):>9.4f}" for x in stages)
                print(f"{name + ', ' + depth + ' layers':<24}untrained, then trained by seed:{''.join(cells)}")
    print("\nOne channel times 1000: magnitude of it after the norm, and of the others")
    for name, found in spikes.items():
        print(f"{name:<20}{found['channel']:>9.3f}{found['others']:>12.2e}")


def draw(result: dict[str, Any], path: Path) -> None:
    """A row of panels for each depth: variance by layer untrained and trained, loss over the steps."""
    from matplotlib.figure import Figure

    depths = result["depths"]
    figure = Figure(figsize=(14, 0.6 + 3.6 * len(depths)), layout="constrained")
    panels = figure.subplots(len(depths), 3, squeeze=False)
    for (depth, variants), (untrained, trained, loss) in zip(depths.items(), panels, strict=True):
        places = range(1, int(depth) + 1)
        for name, found in variants.items():
            style = {"linestyle": "--" if name == CONTROL else "-", "label": name}
            untrained.plot(places, found["untrained"]["variance"], **style)
            trained.plot(places, trained_curve(found, "variance"), **style)
            steps = found["runs"][0]["evaluated_at"]
            curves = zip(*(run["nll_per_byte"] for run in found["runs"]), strict=True)
            loss.plot(steps[1:], [mean(list(values)) for values in curves][1:], **style)
        untrained.set(title=f"{depth} layers, untrained", xlabel="layer", ylabel="variance over channels", yscale="log")
        trained.set(title=f"{depth} layers, trained", xlabel="layer", ylabel="variance over channels", yscale="log")
        loss.set(title=f"{depth} layers, held-out text", xlabel="steps", ylabel="nats a byte")
        loss.legend(fontsize=8)
    figure.suptitle(f"{result['text']}; {result['device']}", fontsize=10)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help=".txt or .jsonl file; by default the small sample that comes with the package")
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--evaluated-bytes", type=int, default=32768, help="of the held-out text, from its beginning")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("bhyt-depth-study"), help="folder to write")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    parser.add_argument("--draw", type=Path, help="only draw the picture from this bhyt_depth_study.json")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    if options.draw:
        return draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    name = options.device
    if options.device.startswith("cuda"):
        torch.cuda.set_stream(torch.cuda.Stream(options.device))  # the default stream cannot be captured
        name = torch.cuda.get_device_name(options.device)

    parts = load_text(options.text)
    joined = (bytearray("\n\n".join(part.documents).encode()) for part in parts)
    text, held_out = (torch.frombuffer(part, dtype=torch.uint8).long().to(options.device) for part in joined)
    held_out = held_out[: options.evaluated_bytes]
    if min(len(text), len(held_out)) <= options.context:
        raise HFEError(f"the text is shorter than --context {options.context}", "give more text")
    windows = held_out.unfold(0, options.context + 1, options.context)
    spikes = {variant: spike(variant) for variant in VARIANTS}
    depths = {str(layers): study(layers, text, windows, options) for layers in options.layers}
    show(depths, spikes)

    settings = {key: value for key, value in vars(options).items() if key not in ("text", "output", "draw")}
    result = {"text": parts[0].name, "device": name, "torch": torch.__version__}
    result |= {"transformers": transformers.__version__, "options": settings, "spike": spikes, "depths": depths}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "bhyt_depth_study.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if find_spec("matplotlib"):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
    else:
        print(f"The picture needs matplotlib: python examples/bhyt_depth_study.py --draw {path}")


if __name__ == "__main__":
    main()
