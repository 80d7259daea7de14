"""Programmatic dependent launch: a kernel's programs start while the kernel before it in the stream still runs.

It hides the launch, and the wait for the first weights. It pays where a step is a chain of short kernels whose programs
leave room beside each other, that is with one row of activations; with more rows, programs that wait hold shared memory
which those at work need, and a step gets slower. So the default is: one row on, more rows off, and nothing before
compute capability 9.0. `HFE_OVERLAP=1` or `0` overrides it.

Why no result can change. A kernel that is launched so may run beside its predecessor, and beside kernels before that
one, as it may itself have started early. Four rules follow, which the kernels keep on every path:

1. Every load and every store comes after `gdc_wait()`, weights included: CUDA promises that what earlier kernels wrote
   is visible after the wait, and not before, not even where the predecessor knows nothing of early launches and counts
   as having signalled when its last block is done. A weight may have been written right before, by an optimiser.
2. Before the wait there is only `prefetch`. It brings lines of weights to the L2 cache, which every write on the device
   goes through, and returns nothing: a line written afterwards is right there.
3. Every program waits. So a kernel cannot finish before all kernels ahead of it have; to wait for the predecessor is to
   wait for all of them, and what is written after the wait is read by none of them any more.
4. `gdc_launch_dependents()` only invites the next kernel, which heeds it only if it was launched so. PyTorch's kernels
   are not, and start when all is finished.

Sources: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol` and
`prefetch`.
"""

from __future__ import annotations

import functools

import torch

from hf_efficient.environment import overlap_launches, triton_interpreted

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

OLDEST_CAPABILITY = (9, 0)
# Rows of activations up to which launches overlap by default.
MOST_ROWS = 1


if HAVE_TRITON:
    # Bytes that one prefetch surely brings, a sector of the cache.
    SECTOR: tl.constexpr = tl.constexpr(32)

    @triton.jit
    def prefetch(pointers):
        """Ask for the sectors that these addresses are in to come to the L2 cache; no effect on any result."""
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
    # Versions of Triton that do not know the switch still launch without it.
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


def overlap_options(device: torch.device, rows: int) -> dict[str, bool]:
    """Keyword arguments of a launch on `device`: the kernel's constant `OVERLAP`, and Triton's own switch with it.

    Args:
        device: the tensors' device.
        rows: rows of activations in the decoding step, one for each token.
    """
    return _options(device, rows <= MOST_ROWS)
