"""Programmatic dependent launch: a kernel's programs start while the kernel before it in the stream still runs.

It hides the launch latency and the load of the first weights. It pays where a step is a chain of short kernels that fit
on the device together, that is with one row of activations; with more rows, waiting programs occupy shared memory that
running ones need, and a step gets slower. So the default is on for one row, off for more rows, and off before compute
capability 9.0. `HFE_OVERLAP=1` or `0` overrides it.

Why no result can change. A kernel launched this way may run concurrently with its predecessor, and with kernels before
that one, which may have started early too. The kernels follow four rules on every path:

1. Every load and every store comes after `gdc_wait()`, weights included: CUDA guarantees that the writes of earlier
   kernels are visible only after the wait, even where the predecessor does not use dependent launch and signals
   implicitly when its last block ends. A weight may have been written by the previous kernel, in an optimizer step.
2. Before the wait there is only `prefetch`. It loads lines of weights into the L2 cache and returns nothing. Every
   write on the device goes through the L2 cache, so a line written afterwards is up to date.
3. Every program waits. So a kernel cannot finish before all kernels ahead of it have finished: waiting for the
   predecessor is waiting for all of them, and none of them still reads what is written after the wait.
4. `gdc_launch_dependents()` only allows the next kernel to start early, which it does only if it was launched with the
   attribute. PyTorch's kernels are not, and start when all programs have finished.

Sources: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol` and
`prefetch`.
"""

from __future__ import annotations

import functools

import torch

from hf_efficient.environment import overlap_launches, triton_interpreted
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

OLDEST_CAPABILITY = (9, 0)
# Rows of activations up to which launches overlap by default.
MOST_ROWS = 1


if HAVE_TRITON:
    # Bytes that one prefetch loads at least: a sector of the cache.
    SECTOR: tl.constexpr = tl.constexpr(32)

    @triton.jit
    def prefetch(pointers):
        """Prefetch the sectors of these addresses into the L2 cache; no effect on any result."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@functools.cache
def _options(device: torch.device, few: bool) -> dict[str, bool]:
    wanted = overlap_launches()
    overlap = (
        (few if wanted is None else wanted)
        and not triton_interpreted()
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    )
    # Without overlap `launch_pdl` is left out, so that versions of Triton without the option work.
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


def overlap_options(device: torch.device, rows: int) -> dict[str, bool]:
    """Keyword arguments of a launch on `device`: the kernel's constant `OVERLAP`, and Triton's `launch_pdl` with it.

    Args:
        device: the tensors' device.
        rows: rows of activations in the decoding step, one for each token.
    """
    return _options(device, rows <= MOST_ROWS)
