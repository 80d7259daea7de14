"""Defines PyTorch operators over kernel launchers, so that `torch.compile` sees one opaque call with known shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hf_efficient.kernels.namespace import NS

_OPERATORS = getattr(torch.ops, NS)
# Kept as an attribute of `torch.ops`, not of this module: a collected library takes its operators with it, and the same
# code imported from another place may still be using them.
if not hasattr(_OPERATORS, "_library"):
    _OPERATORS._library = torch.library.Library(NS, "FRAGMENT")


def define_operator(
    name: str, load_launcher: Callable[[], Callable[..., Any]], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """The operator `NS::name`, which launches kernels on CUDA, and on the CPU for Triton's interpreter.

    `torch.library.custom_op` does the same at several times the cost of a call (20 µs instead of 5 without gradients,
    on one slow core), which a decoding step pays in every layer. Operators have no autograd of their own: the
    operation's `torch.autograd.Function` calls them in its forward and backward.

    Defining a name again keeps the first definition. Every loaded copy of the code has a namespace of its own, so a
    second definition comes from the same copy imported again.

    Args:
        name: name within the namespace.
        load_launcher: imports and returns the launcher, a function with the operator's arguments that changes only
            those named in `mutates` and returns new tensors. Called at the operator's first call, so that importing an
            operation does not import Triton.
        fake: the operator's fake implementation: its annotations give the operator's schema, and it returns unfilled
            tensors of the right shape, dtype and device.
        mutates: names of the arguments that are changed in place.
    """
    if not hasattr(_OPERATORS, name):
        library = _OPERATORS._library
        schema = torch.library.infer_schema(fake, mutates_args=mutates)
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        load_launcher = functools.cache(load_launcher)

        # Without this, `torch.compile` traces the launcher wherever a graph break leaves a call uncompiled.
        @torch.compiler.disable
        def launch(*arguments: Any) -> Any:
            return load_launcher()(*arguments)

        for device_type in ("CPU", "CUDA"):
            library.impl(name, launch, device_type)
        torch.library.register_fake(f"{NS}::{name}", fake, lib=library)
    return getattr(_OPERATORS, name).default
