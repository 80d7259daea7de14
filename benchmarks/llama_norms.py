"""A 1B Llama whose norms can be exchanged: stock's decoder with other norms in it, and ours, of one set of weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from benchmarks.generation import SHAPE as LLAMA
from benchmarks.harness import read
from benchmarks.plot import load_pyplot
from hf_efficient.kernels.add_rms_norm.api import add_rms_norm
from hf_efficient.kernels.bhyt_norm.api import bhyt_norm
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytForCausalLM

SHAPE = LLAMA
# To see on a CPU that a benchmark runs.
TINY: dict[str, Any] = {
    **SHAPE,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


# Norms. Each function takes a norm, x and a residual or None, and gives the normalised sum and the sum itself.


def _pytorch(norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    return F.rms_norm(summed, norm.weight.shape, norm.weight, norm.eps), summed


def _liger(norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    # With the settings of Liger's own modules.
    if residual is None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, norm.weight, norm.eps, 0.0, "llama", True, None), x
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, norm.weight, norm.eps, 0.0, "llama", False)


def _ours_rms(norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, norm.weight, norm.eps, residual)


def _bhyt(norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return bhyt_norm(x, norm.weight, norm.lam, norm.eps, residual=residual)[:2]


class Norm(nn.Module):
    """A norm in stock's place; called with a residual it adds it first, and gives the sum too."""

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]], weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.function, self.weight, self.eps = function, weight, eps
        if function is _bhyt:
            self.lam = nn.Parameter(torch.full_like(weight[:1], 1.0))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        normed, summed = self.function(self, x, residual)
        return normed if residual is None else (normed, summed)


class _NormOfSum(nn.Module):
    """A final norm for layers that hand on (what is to be added, the stream)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, pending: tuple[Tensor, Tensor]) -> Tensor:
        return self.norm(*pending)[0]


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "F.rms_norm": _pytorch,
    "Liger": _liger,
    "RMSNorm of ours": _ours_rms,
    "BHyT, exact": _bhyt,
}


@cache
def has_liger() -> bool:
    """Whether Liger's package is to be found; says so once where it is not."""
    if find_spec("liger_kernel") is None:
        print("liger-kernel is not to be found: left out")
        return False
    return True


# Layers of stock's with additions fused into the norms


def _post_fused(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    normed, hidden_states = layer.post_attention_layernorm(mixed, hidden_states)
    return hidden_states + layer.mlp(normed)


def _both_fused(layer: Any, hidden_states: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if isinstance(hidden_states, tuple):
        normed, stream = layer.input_layernorm(*hidden_states)
    else:
        normed, stream = layer.input_layernorm(hidden_states), hidden_states
    mixed, _ = layer.self_attn(hidden_states=normed, **kwargs)
    normed, stream = layer.post_attention_layernorm(mixed, stream)
    return layer.mlp(normed), stream


# Models


def llama(shape: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    """Stock's model, random, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape, attn_implementation="sdpa"), dtype=torch.bfloat16)


def with_norms(base: LlamaForCausalLM, norm: str | None, fused: str = "") -> LlamaForCausalLM:
    """Stock's decoder on the parameters of `base`, with other norms.

    Args:
        norm: a name in `FUNCTIONS`, ``"stock"``, or None for no norms at all.
        fused: additions taken into the norms: ``"post"``, ``"both"``, or an empty text.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config, dtype=torch.bfloat16)
    model.load_state_dict(base.state_dict(keep_vars=True), assign=True)
    model.model.rotary_emb = base.model.rotary_emb
    if norm == "stock":
        return model

    def replaced(stock: Any) -> nn.Module:
        return nn.Identity() if norm is None else Norm(FUNCTIONS[norm], stock.weight, stock.variance_epsilon)

    for layer in model.model.layers:
        layer.input_layernorm = replaced(layer.input_layernorm)
        layer.post_attention_layernorm = replaced(layer.post_attention_layernorm)
        if fused:
            layer.forward = partial({"post": _post_fused, "both": _both_fused}[fused], layer)
    final = replaced(model.model.norm)
    model.model.norm = _NormOfSum(final) if fused == "both" else final
    return model


def ours(base: LlamaForCausalLM, config: PreTrainedConfig, without_norms: bool = False) -> Any:
    """Our decoder of this configuration on the parameters of `base`."""
    with torch.device(base.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(base.state_dict(keep_vars=True), assign=True, strict=False)
    if isinstance(model, BhytForCausalLM):
        model.refresh_branch_variance()
    if without_norms:
        for layer in model.model.layers:
            layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
        model.model.norm = nn.Identity()
    return model


# Results


def lines_of(
    part: str,
    samples: dict[str, list[float]],
    computes: dict[str, str],
    stock_ms: float | None,
    limit_ms: float | None,
    notes: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Lines of the results file: median and spread of each provider, and how that stands to stock and to the limit."""
    lines = []
    for name, found in samples.items():
        ms = statistics.median(found)
        line: dict[str, Any] = {"part": part, "provider": name, "computes": computes[name], "ms": round(ms, 4)}
        line |= {"ms_least": round(min(found), 4), "ms_most": round(max(found), 4), "rounds": len(found)}
        if stock_ms:
            line["stock_over_it"] = round(stock_ms / ms, 4)
        if limit_ms:
            line["above_limit"] = round(ms / limit_ms - 1, 4)
        lines.append({**line, **(notes or {}).get(name, {})})
        print(" ".join(f"{k}={v}" for k, v in lines[-1].items() if k != "computes"), flush=True)
    return lines


def median_of(samples: dict[str, list[float]], name: str) -> float | None:
    """Median of a provider; None where it was not measured."""
    return statistics.median(samples[name]) if name in samples else None


def draw(path: Path, limits: dict[str, str], title: str) -> None:
    """Bars of each part of a results file, with the limit of each as a line, in a PNG beside it."""
    pyplot = load_pyplot()
    if pyplot is None:
        return

    lines = read(path)
    parts = list(dict.fromkeys(line["part"] for line in lines))
    sizes = [sum(line["part"] == part for line in lines) for part in parts]
    size = (11, 0.8 + sum(0.8 + 0.32 * n for n in sizes))
    figure, axes = pyplot.subplots(
        len(parts), 1, figsize=size, squeeze=False, layout="constrained", height_ratios=[2 + n for n in sizes]
    )
    for axis, part in zip(axes[:, 0], parts, strict=True):
        here = [line for line in lines if line["part"] == part]
        names = [line["provider"] for line in here]
        colours = [
            "tab:orange" if "BHyT" in name else "tab:grey" if "no norms" in name else "tab:blue" for name in names
        ]
        bars = axis.barh(names, [line["ms"] for line in here], color=colours)
        axis.bar_label(bars, [f"{line['ms']:.4g}" for line in here], fontsize=8, padding=2)
        limit = next((line["ms"] for line in here if line["provider"] == limits.get(part)), None)
        if limit:
            axis.axvline(limit, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(part, fontsize=10)
        axis.set_xlabel("ms")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.1)
    first = lines[0]
    figure.suptitle(
        f"{title}\n{first['device']}, torch {first['torch']}, transformers {first['transformers']}", fontsize=10
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
