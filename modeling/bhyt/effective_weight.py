"""The matrix that a linear module applies: adapters included, gathered if it is sharded, dequantized.

PEFT's adapters are recognised by their attributes, so that PEFT need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def effective_weight(module: Any, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias such that ``x @ weight.T + bias`` is what `module` computes in evaluation mode.

    A weight that is sharded as a DTensor is gathered: all processes of its mesh must call this. A module of another
    type than `nn.Linear` or PEFT's LoRA is called on the unit vectors, in the dtype and on the device of `like`, unless
    it belongs to a serving engine; errors of that call propagate. Gradients are recorded unless the caller disables
    them.

    Args:
        module: a linear module, with or without adapters, quantised or not.
        like: any tensor; only its dtype and device are used.

    Returns:
        Weight [out, in] and bias [out] or None, in the module's dtype, float32 where adapters were added or the module
        was called. They may be the module's own parameters, not copies. None instead of both if they are not available:
        the weights are on the meta device, belong to a serving engine, or are sharded in an unknown layout.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    if type(module) is nn.Linear and (type(module.weight) in (nn.Parameter, Tensor) or is_sharded(module.weight)):
        weight, bias = full_tensor(module.weight), full_tensor(module.bias)
        if weight.is_floating_point():
            return (weight, bias) if weight.shape == (module.out_features, module.in_features) else None
    adapters = _low_rank_adapters(module)
    if adapters is None:  # sharded parts cannot be called with a plain tensor
        # A serving engine's projection has no `in_features`, and may hold only a part of the weight.
        unreadable = not hasattr(module, "in_features") or any(map(is_sharded, module.parameters()))
        return None if unreadable else _by_calling(module, like)
    base = effective_weight(module.base_layer, like)
    if base is None:
        return None
    weight, bias = base
    for name, sign in adapters:
        down, up = module.lora_A[name], module.lora_B[name]
        factors = full_tensor(up.weight), full_tensor(down.weight)
        if factors[0].shape[0] != weight.shape[0] or factors[1].shape[1] != weight.shape[1]:
            return None
        scale = sign * module.scaling[name]
        weight = weight.float() + scale * (factors[0].float() @ factors[1].float())
        if up.bias is not None:
            change = scale * full_tensor(up.bias).float()
            bias = change if bias is None else bias.float() + change
    return weight, bias


def fingerprint(module: Any) -> Hashable:
    """Return a value that changes when `effective_weight` may change and is much cheaper; None if weights are sharded.

    It is made of addresses and version counters of the parameters and of the state of adapters, so it misses
    writes through `Tensor.data`, which some optimizers make, in-place writes to inference tensors, and buffers.
    """
    identity: list[Any] = []
    if type(module) is not nn.Linear:
        adapters = (getattr(module, name, ()) for name in ("active_adapters", "merged_adapters"))
        scaling = getattr(module, "scaling", None)
        identity += [id(module), *map(tuple, adapters), getattr(module, "disable_adapters", None)]
        identity.append(tuple(scaling.values()) if isinstance(scaling, dict) else None)
    for tensor in _parameters(module):
        if type(tensor) is not nn.Parameter and is_sharded(tensor):
            return None
        # A tensor made in inference mode has no version counter.
        identity += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return tuple(identity)


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters as `nn.Module.parameters` does, but faster: a shared parameter is yielded repeatedly."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    for child in module._modules.values():
        if child is not None and (child._modules or child._parameters):
            yield from _parameters(child)


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, of which this process may hold only a shard."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Any:
    """Return `tensor`, gathered if it is a DTensor: then all processes of its mesh must call this. None stays None."""
    return tensor.full_tensor() if tensor is not None and is_sharded(tensor) else tensor


def _low_rank_adapters(module: Any) -> list[tuple[str, int]] | None:
    """The LoRA adapters to add to or subtract from the weight of a PEFT module's `base_layer`, as (name, sign) pairs.

    Sign 1: add; an active adapter that is not merged into the base weight. Sign -1: subtract; a merged adapter while
    adapters are disabled. If any adapter is merged, active ones that are not are ignored, as in PEFT. None if `module`
    is not a LoRA module of PEFT, or one of these adapters is of another kind, such as DoRA.
    """
    factors = getattr(module, "lora_A", None)
    if not isinstance(factors, nn.ModuleDict) or not isinstance(getattr(module, "base_layer", None), nn.Module):
        return None
    merged = set(module.merged_adapters)
    wanted = set() if module.disable_adapters else merged or set(module.active_adapters) & set(factors)
    changes = [(name, 1) for name in sorted(wanted - merged)] + [(name, -1) for name in sorted(merged - wanted)]
    variants = getattr(module, "lora_variant", ())  # DoRA and others, which do not only add
    plain = all(isinstance(factors[name], nn.Linear) and name not in variants for name, _ in changes)
    return changes if plain else None


def _by_calling(module: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 weight [out, in] and bias [out] of an affine module, from its outputs at zero and unit vectors.

    The module is called twice, with `training` False in all its parts (restored afterwards) and inputs in the dtype and
    on the device of `like`. Gradients are recorded unless the caller disables them. Errors of the call propagate.
    """
    parts = [(part, part.training) for part in module.modules()]  # type: ignore[attr-defined]
    for part, _ in parts:
        part.training = False  # no dropout; `eval()` could run overridden methods
    try:
        points = torch.eye(module.in_features, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        bias = module(torch.zeros_like(points[:1]))[0].float()
        return (module(points).float() - bias).T, bias
    finally:
        for part, training in parts:
            part.training = training
