"""Small BHyT models, and what they compute written out plainly in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytForCausalLM

SHAPE: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64},
    **{"bhyt_seq_len": 16, "initializer_range": 0.3},
}


def _bhyt_model(**fields: Any) -> BhytForCausalLM:
    """Every parameter random, so that leaving one out shows; lambdas near their initial values."""
    model = BhytForCausalLM(BhytConfig(**(SHAPE | fields)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = 0.2 * torch.randn(tensor.shape, generator=generator)
            if name.endswith(".affine"):  # an estimate is positive, so that nothing depends on where it is cut off
                tensor.add_(noise.abs())
            elif name.endswith((".lam", "norm.weight", ".out_scale")):
                tensor.add_(noise)
            elif name.endswith(".bias"):
                tensor.copy_(noise)
    return model.eval()


def _brute_force(weight: Callable[[str], Tensor], config: BhytConfig, bias: Tensor | None = None) -> Tensor:
    """``(||W_O repeat(W_V)||^2 / (T d), ||W_O repeat(b)||^2 / d)`` in float64; weight("v_proj") gives W_V."""
    groups = config.num_attention_heads // config.num_key_value_heads

    def repeated(x: Tensor) -> Tensor:
        heads = x.double().reshape(config.num_key_value_heads, config.head_dim, -1)
        return heads.repeat_interleave(groups, dim=0).reshape(config.num_attention_heads * config.head_dim, -1)

    outputs = weight("o_proj").detach().double()
    product = outputs @ repeated(weight("v_proj").detach())
    shift = torch.zeros(1) if bias is None else outputs @ repeated(bias.detach())
    share = product.square().sum() / (config.bhyt_seq_len * config.hidden_size)
    return torch.stack((share, shift.square().sum().double() / config.hidden_size))


def _plain_logits(
    tensors: dict[str, Tensor], config: BhytConfig, ids: Tensor, cos: Tensor, sin: Tensor, detached: bool = True
) -> Tensor:
    """Logits [B, S, V] of a model whose every norm is BHyT, from its tensors, as the paper's equations read."""

    def bounded(x: Tensor, mean_square: Tensor, norm: str) -> Tensor:
        root = (mean_square + config.bhyt_eps).sqrt()
        y = tensors[f"{norm}.weight"] * torch.tanh(tensors[f"{norm}.lam"] / config.bhyt_kappa * x / root)
        return y * tensors.get(f"{norm}.out_scale", torch.ones(())).detach()

    def heads(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, config.head_dim).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    x = tensors["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        first, second = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
        mean_square = x.square().mean(-1, keepdim=True)
        y = bounded(x, mean_square, first)
        projected = {}
        for name in "qkv":
            bias = tensors.get(f"{layer}.self_attn.{name}_proj.bias", torch.zeros(()))
            projected[name] = y @ tensors[f"{layer}.self_attn.{name}_proj.weight"].T + bias
        q = rotate(heads(projected["q"], config.num_attention_heads))
        k = rotate(heads(projected["k"], config.num_key_value_heads)).repeat_interleave(3, dim=1)
        v = heads(projected["v"], config.num_key_value_heads).repeat_interleave(3, dim=1)
        scores = q @ k.transpose(-1, -2) / config.head_dim**0.5
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        mixed = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ tensors[f"{layer}.self_attn.o_proj.weight"].T
        kind = config.bhyt_estimate(i)
        if kind == "exact":
            mean_square = x.square().mean(-1, keepdim=True)
        elif kind == "affine":
            slope, intercept = tensors[f"{second}.affine"]
            mean_square = slope * mean_square + intercept
        else:
            c, constant = tensors[f"{second}.branch"].detach()
            lam = tensors[f"{first}.lam"]
            slope, gain = tensors.get(f"{second}.affine", torch.ones(2))
            expected = c * ((lam.detach() if detached else lam) / config.bhyt_kappa) ** 2 + constant
            mean_square = slope * mean_square + gain * expected
        y = bounded(x, mean_square, second)
        gate, up = (y @ tensors[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (nn.functional.silu(gate) * up) @ tensors[f"{layer}.mlp.down_proj.weight"].T
    return bounded(x, x.square().mean(-1, keepdim=True), "model.norm") @ tensors["lm_head.weight"].T


def _some_ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def bhyt_model() -> Callable[..., BhytForCausalLM]:
    """Makes a small BHyT model in evaluation mode, with fields changed."""
    return _bhyt_model


@pytest.fixture(scope="session")
def some_ids() -> Callable[..., Tensor]:
    """Makes ids [batch, length]."""
    return _some_ids


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., Tensor]:
    """The two branch variances of a layer from its weights, in float64."""
    return _brute_force


@pytest.fixture(scope="session")
def plain_logits() -> Callable[..., Tensor]:
    """The whole model from its tensors, in plain PyTorch."""
    return _plain_logits
