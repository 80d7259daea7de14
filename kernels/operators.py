"""Defines PyTorch operators over kernel launchers, so that `torch.compile` sees one opaque call with known shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_efficient.kernels.namespace import NS

_OPERATORS = getattr(torch.ops, NS)
# Kept by PyTorch's own name space, not by this module: a library that is collected takes its operators with it, and the
# same code imported from another place may still be using them.
if not hasattr(_OPERATORS, "_library"):
    _OPERATORS._library = torch.library.Library(NS, "FRAGMENT")


def define_operator(
    name: str, launch: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """The operator `NS::name`, which runs `launch` on CUDA, and on the CPU for Triton's interpreter.

    `torch.library.custom_op` would do the same at several times the cost of a call (20 µs instead of 5 without
    gradients, on one slow core), which a decoding step pays in every layer. Operators get no autograd of their own: the
    operation's `torch.autograd.Function` calls them in its forward and backward.

    Defining a name again keeps the first definition. Every loaded copy of the code has a name space of its own, so that
    is one copy imported again.

    Args:
        name: name within the name space.
        launch: function of tensors and numbers whose annotations give the operator's schema. It changes none of its
            arguments but those named in `mutates`, and returns new tensors.
        fake: function with the same arguments that returns tensors of the right shape, dtype and device, unfilled.
        mutates: names of the arguments that `launch` changes in place; a compiler must know them.
    """
    if not hasattr(_OPERATORS, name):
        library = _OPERATORS._library
        schema = torch.library.infer_schema(launch, mutates_args=mutates)
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        # A launcher is opaque: in the uncompiled parts of a compiled program it must not be traced either.
        opaque = torch.compiler.disable(launch)
        for device_type in ("CPU", "CUDA"):
            library.impl(name, opaque, device_type)
        torch.library.register_fake(f"{NS}::{name}", fake, lib=library)
    return getattr(_OPERATORS, name).default
