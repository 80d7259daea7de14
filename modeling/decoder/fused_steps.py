"""Linear layers by the fused kernel `skinny_linear`, used only when bypassing the modules cannot change the result.

A kernel reads a module's weights instead of calling the module. With an adapter, a hook, an offloading wrapper, a
parametrisation, a quantised or distributed weight, autocast or a gradient, the modules are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN

from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.skinny_linear.api import skinny_linear
from hf_efficient.kernels.skinny_linear.configs import MAX_ROWS

# Classes of the activation SiLU, which the kernel computes; transformers has two names for it.
SILU = (type(ACT2FN["silu"]), type(ACT2FN["swish"]))


def is_unhooked(module: nn.Module) -> bool:
    """True when calling `module` only runs the forward of its class: no hook, also no global one, no wrapper."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__  # where accelerate and others put their wrapper
        and not _has_any_global_hook()
    )


def is_bare(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """True when `module` has no hook and is exactly of a class in `kinds`: an adapter or parametrisation changes it."""
    return type(module) in kinds and is_unhooked(module)


def has_plain_weight(module: Any, like: Tensor) -> bool:
    """True when `module.weight` is an `nn.Parameter` in the dtype and on the device of `like`.

    Quantised and distributed weights are of another type.
    """
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == like.dtype and weight.device == like.device


def may_fuse(x: Tensor) -> bool:
    """True when fused kernels without a backward pass may run on `x`.

    That is for a non-empty floating-point tensor (not float64) where Triton runs, without gradients and autocast. Not
    inside `torch.compile`, which fuses by itself.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and type(x) is Tensor
        and x.is_floating_point()
        and x.dtype != torch.float64
        and x.numel() > 0
        and select_backend("skinny_linear", None, x.device) == "triton"
    )


def may_fuse_linear(x: Tensor, modules: tuple[nn.Module, ...]) -> bool:
    """True when `skinny_linear` may be used in place of calling these linear modules on `x` [..., K].

    `may_fuse` must hold, `x` must have at most `MAX_ROWS` rows, and each module must be exactly an `nn.Linear` without
    hooks, whose weight has the dtype and device of `x`.
    """
    return (
        may_fuse(x)
        and x.numel() // x.shape[-1] <= MAX_ROWS
        and all(is_bare(module, (nn.Linear,)) and has_plain_weight(module, x) for module in modules)
    )


def fused_linear(x: Tensor, modules: tuple[Any, ...], residual: Tensor | None = None) -> Tensor | None:
    """Return the concatenated outputs of linear modules on the same input, in one kernel.

    Args:
        x: [..., K].
        modules: linear modules, module i from K to N_i channels, with or without bias.
        residual: [..., sum of N_i], added to the result; None to add nothing.

    Returns:
        [..., sum of N_i], or None if the modules must be called instead, see `may_fuse_linear`.
    """
    if not may_fuse_linear(x, modules):
        return None
    weights, biases = [m.weight for m in modules], [m.bias for m in modules]
    return skinny_linear(x, weights, biases, residual=residual)


def linear(x: Tensor, module: nn.Module, residual: Tensor | None = None) -> Tensor:
    """Return ``module(x)`` [..., N] of `x` [..., K], plus `residual` [..., N] if given; fused where possible."""
    out = fused_linear(x, (module,), residual)
    if out is not None:
        return out
    return module(x) if residual is None else residual + module(x)


def fused_gate(x: Tensor, gate_proj: Any, up_proj: Any, act_fn: nn.Module) -> Tensor | None:
    """Return ``act_fn(gate_proj(x)) * up_proj(x)`` [..., N] of `x` [..., K] in one kernel, if `act_fn` is SiLU.

    None if the modules must be called instead: another activation, or `may_fuse_linear` is False.
    """
    if not is_bare(act_fn, SILU) or not may_fuse_linear(x, (gate_proj, up_proj)):
        return None
    modules = (gate_proj, up_proj)
    return skinny_linear(x, [m.weight for m in modules], [m.bias for m in modules], gated=True)
