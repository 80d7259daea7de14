"""Triton, where it is installed: without it `HAVE_TRITON` is False, and no kernel is defined.

Imported here and nowhere else, since transformers loads the code of a checkpoint without Triton only if every import of
it stands in a `try`.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False
    triton = tl = TensorDescriptor = None

__all__ = ["HAVE_TRITON", "TensorDescriptor", "tl", "triton"]
