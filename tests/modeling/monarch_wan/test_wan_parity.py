"""The transformer against its formulas, written down once more, and against the class of diffusers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanConfig, MonarchWanModel

# Our name, a regular expression -> the name in diffusers.
DIFFUSERS_NAMES = {
    r"text_embedding\.0": "condition_embedder.text_embedder.linear_1",
    r"text_embedding\.2": "condition_embedder.text_embedder.linear_2",
    r"time_embedding\.0": "condition_embedder.time_embedder.linear_1",
    r"time_embedding\.2": "condition_embedder.time_embedder.linear_2",
    r"time_projection\.1": "condition_embedder.time_proj",
    r"\.self_attn\.([qkv])\.": r".attn1.to_\1.",
    r"\.self_attn\.o\.": ".attn1.to_out.0.",
    r"\.cross_attn\.([qkv])\.": r".attn2.to_\1.",
    r"\.cross_attn\.o\.": ".attn2.to_out.0.",
    r"\.self_attn\.norm": ".attn1.norm",
    r"\.cross_attn\.norm": ".attn2.norm",
    r"\.norm3\.": ".norm2.",
    r"\.ffn\.0\.": ".ffn.net.0.proj.",
    r"\.ffn\.2\.": ".ffn.net.2.",
    r"^head\.modulation": "scale_shift_table",
    r"\.modulation": ".scale_shift_table",
    r"^head\.head": "proj_out",
}


def diffusers_name(name: str) -> str:
    for pattern, replacement in DIFFUSERS_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def reference(
    config: MonarchWanConfig, w: dict[str, Tensor], latents: Tensor, timestep: Tensor, text: Tensor
) -> Tensor:
    """The flow of one video [C, F, H, W] with one timestep, in float64, straight from the formulas."""
    w = {name: tensor.double() for name, tensor in w.items()}
    dim, heads = config.hidden_size, config.num_attention_heads
    d = dim // heads

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * w[f"{name}.weight"]

    def norm(x: Tensor, *affine: Tensor) -> Tensor:
        return layer_norm(x, (dim,), *affine, eps=config.eps)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_out = []
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d)
            heads_out.append(scores.softmax(-1) @ v[:, part])
        return torch.cat(heads_out, -1)

    channels, frames, height, width = latents.shape
    places = [(f, r, c) for f in range(frames) for r in range(height // 2) for c in range(width // 2)]
    patches = torch.stack(
        [latents.double()[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for f, r, c in places]
    )
    x = patches @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]

    side = 2 * (d // 6)
    frequencies = [10000.0 ** (-torch.arange(0, n, 2).double() / n) for n in (d - 2 * side, side, side)]
    angles = torch.stack(
        [torch.cat([p * freq for p, freq in zip(place, frequencies, strict=True)]) for place in places]
    )
    rotation = torch.polar(torch.ones_like(angles), angles).repeat(1, heads)

    def rotate(y: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(y.view(len(y), -1, 2)) * rotation).flatten(1)

    half = config.freq_dim // 2
    phase = timestep.double() * 10000.0 ** (-torch.arange(half).double() / half)
    e = linear("time_embedding.2", silu(linear("time_embedding.0", torch.cat((phase.cos(), phase.sin())))))
    e0 = linear("time_projection.1", silu(e)).view(6, dim)
    context = linear("text_embedding.2", gelu(linear("text_embedding.0", text.double()), approximate="tanh"))
    for index in range(config.num_hidden_layers):
        b = f"blocks.{index}."
        shift1, scale1, gate1, shift2, scale2, gate2 = w[b + "modulation"][0] + e0
        y = norm(x) * (1 + scale1) + shift1
        q = rotate(rms(b + "self_attn.norm_q", linear(b + "self_attn.q", y)))
        k = rotate(rms(b + "self_attn.norm_k", linear(b + "self_attn.k", y)))
        x = x + gate1 * linear(b + "self_attn.o", attend(q, k, linear(b + "self_attn.v", y)))
        y = norm(x, w[b + "norm3.weight"], w[b + "norm3.bias"])
        q = rms(b + "cross_attn.norm_q", linear(b + "cross_attn.q", y))
        k = rms(b + "cross_attn.norm_k", linear(b + "cross_attn.k", context))
        x = x + linear(b + "cross_attn.o", attend(q, k, linear(b + "cross_attn.v", context)))
        y = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(b + "ffn.2", gelu(linear(b + "ffn.0", y), approximate="tanh"))
    shift, scale = w["head.modulation"][0] + e
    patches = linear("head.head", norm(x) * (1 + scale) + shift)
    flow = torch.empty(config.out_channels, frames, height, width, dtype=torch.float64)
    for patch, (f, r, c) in zip(patches, places, strict=True):
        flow[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patch.view(2, 2, -1).permute(2, 0, 1)
    return flow


def test_flow_is_that_of_the_formulas(wan: Callable, call: Callable) -> None:
    model, (latents, timestep, text) = wan(), call(3)
    found = model(latents, timestep[:, 0], text).sample
    for row in range(2):
        expected = reference(model.config, model.state_dict(), latents[row], timestep[row, 0], text[row])
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def diffusers_wan() -> Callable[[MonarchWanConfig], Any]:
    """Makes the model of diffusers for a configuration of ours."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")

    def make(config: MonarchWanConfig) -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=tuple(config.patch_size),
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            eps=config.eps,
        ).eval()

    return make


@torch.no_grad()
def test_weights_of_diffusers_give_its_flow(diffusers_wan: Callable, wan: Callable, call: Callable) -> None:
    model, (latents, timestep, text) = wan(), call(3)
    stock = diffusers_wan(model.config)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = stock.state_dict()
    model.load_state_dict({name: weights[diffusers_name(name)] for name in model.state_dict()})
    assert len(weights) == len(model.state_dict())
    expected = stock(latents, timestep[:, 0], text).sample
    torch.testing.assert_close(model(latents, timestep[:, 0], text).sample, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_our_weights_give_our_flow_in_diffusers(diffusers_wan: Callable, wan: Callable, call: Callable) -> None:
    model, (latents, timestep, text) = wan(), call(3)
    stock = diffusers_wan(model.config)
    stock.load_state_dict({diffusers_name(name): tensor for name, tensor in model.state_dict().items()})
    expected = model(latents, timestep[:, 0], text).sample
    torch.testing.assert_close(stock(latents, timestep[:, 0], text).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 1_418_996_800),
        (
            {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40, "intermediate_size": 13824},
            14_288_491_584,
        ),
    ],
    ids=["1.3B", "14B"],
)
def test_names_and_shapes_are_those_of_the_released_checkpoints(fields: dict[str, int], parameters: int) -> None:
    config = MonarchWanConfig(**fields)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in MonarchWanModel(config).state_dict().items()}
    assert len(shapes) == 15 + 27 * config.num_hidden_layers
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    dim, ffn = config.hidden_size, config.intermediate_size
    expected = {
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
        "text_embedding.0.weight": (dim, 4096),
        "text_embedding.2.bias": (dim,),
        "time_embedding.0.weight": (dim, 256),
        "time_projection.1.weight": (6 * dim, dim),
        "blocks.7.modulation": (1, 6, dim),
        "blocks.7.self_attn.norm_k.weight": (dim,),
        "blocks.7.cross_attn.o.bias": (dim,),
        "blocks.7.norm3.bias": (dim,),
        "blocks.7.ffn.0.weight": (ffn, dim),
        "blocks.7.ffn.2.weight": (dim, ffn),
        "head.modulation": (1, 2, dim),
        "head.head.weight": (64, dim),
    }
    assert {name: shapes[name] for name in expected} == expected
