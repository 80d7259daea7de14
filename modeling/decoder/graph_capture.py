"""CUDA graphs of decoding steps: which models may have one, how it is recorded, and the pool that keeps it.

Ordinary generation (`decode_step.py`) and parallel generation both record their steps here. A graph is replayed only
while `step_signature` of the model is the one it was recorded with: a module with a hook, an adapter or a wrapper, a
weight of another type or one that moved, and the step is called instead.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_efficient.environment import check_data, triton_interpreted
from hf_efficient.kernels.decode_attention.api import MAX_HEAD_DIM
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.modeling.decoder.cache_contract import restored
from hf_efficient.modeling.decoder.configuration_decoder import length_dependent_rope
from hf_efficient.modeling.decoder.fused_steps import is_unhooked

# Generated tokens, or steps of parallel generation, between two checks that the model still has its signature: a
# callback may have changed it. A check takes the host a millisecond or two.
SIGNATURE_CHECK_INTERVAL = 8
# Modules of other packages whose forward only computes; our own are recognised by their package.
_KNOWN_MODULES = ("torch.nn.modules.", "transformers.activations")
_OWN_PACKAGE = f"{__name__.partition('.modeling.')[0] if '.modeling.' in __name__ else __name__.rpartition('.')[0]}."
# Types of the attributes of a module or configuration that a forward may read beside its tensors.
_SETTINGS = (bool, int, float, str, type(None))
# All captures on a device use one stream, so only one capture runs at a time.
_CAPTURING = threading.Lock()


def capture_obstacle(model: Any, attention: Collection[str]) -> str:
    """Why decoding steps of `model` cannot be captured, or an empty string.

    Args:
        model: a causal language model.
        attention: the attention implementations whose steps can be captured.
    """
    # First, since a model whose weights are offloaded is on the meta device, of which nothing else can be asked.
    if not can_capture_on(model.device):
        return "the model is not on a CUDA device where Triton runs"
    config = model.config
    tested = {
        f"the attention implementation is {config._attn_implementation}": config._attn_implementation not in attention,
        "heads are wider than the kernel takes": (getattr(config, "head_dim", None) or 0) > MAX_HEAD_DIM,
        "the rotary frequencies depend on the length": length_dependent_rope(getattr(config, "rope_parameters", None))
        is not None,
        "HFE_CHECK asks for checks that wait for the device": check_data(),
        "gradients or autocast are on": torch.is_grad_enabled() or torch.is_autocast_enabled(model.device.type),
    }
    return next((reason for reason, holds in tested.items() if holds), "")


def can_capture_on(device: torch.device) -> bool:
    """True on CUDA with Triton; and in Triton's interpreter on the CPU, where steps are called, not captured."""
    if device.type != "cuda" and not (device.type == "cpu" and triton_interpreted()):
        return False
    return select_backend("decode_attention", None, device) == "triton"


def step_signature(model: Any) -> tuple | None:
    """Identity of every weight and setting that a captured step reads; None when the step may not be captured."""
    signature: list[Any] = [tuple(model.config.layer_types), _settings(model.config)]
    device = None
    for module in model.modules():
        if not _is_known(module) or not is_unhooked(module) or module.training or module._compiled_call_impl:
            return None
        signature.append((type(module), _settings(module)))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            device = device or tensor.device
            # Quantised, distributed and fake weights have types of their own.
            if type(tensor) not in (nn.Parameter, Tensor) or not _is_readable(tensor, device):
                return None
            signature.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
    return (device, *signature)


def _is_known(module: nn.Module) -> bool:
    origin = type(module).__module__
    return origin.startswith(_OWN_PACKAGE) or origin.startswith(_KNOWN_MODULES)


def _is_readable(tensor: Tensor, device: torch.device) -> bool:
    """True on the device, and in pinned memory, which kernels may read as well."""
    return tensor.device == device or (tensor.device.type == "cpu" and device.type == "cuda" and tensor.is_pinned())


def _settings(owner: Any) -> tuple:
    """Public attributes of a module or configuration that are numbers, strings, booleans or None."""
    return tuple(item for item in vars(owner).items() if type(item[1]) in _SETTINGS and item[0][0] != "_")


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps are captured on, one per device, since libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def record_graph(
    run: Callable[[], Tensor], device: torch.device, state: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, Tensor, int]:
    """Record what `run` launches in a CUDA graph.

    `run` is called once before the recording: that compiles kernels and creates library handles, neither of which
    belongs in a graph.

    Args:
        run: the step; returns its result.
        device: the CUDA device.
        state: tensors that `run` changes and whose values a step needs; they are restored, after an error too.

    Returns:
        The graph, the tensor that each replay fills with its result, and the bytes of device memory the graph holds.
    """
    stream = _capture_stream(device)
    with _CAPTURING, restored(state):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        reserved = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        # Another thread, such as a data loader's, may use the device during the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return graph, result, max(torch.cuda.memory_reserved(device) - reserved, 0)


class CapturedSteps(Protocol):
    """A cache with the steps captured over it, as the pool keeps them.

    Attributes:
        signature: `step_signature` of the model when the steps were captured.
        device: where the cache is.
    """

    @property
    def signature(self) -> tuple | None: ...

    @property
    def device(self) -> torch.device: ...

    def nbytes(self) -> int:
        """Bytes of the cache and of the graphs."""

    def report(self) -> list[dict[str, Any]]:
        """Shapes and bytes of each captured step."""


Steps = TypeVar("Steps", bound=CapturedSteps)


class StepPool:
    """Captured steps that wait for the next call of `generate`: at most a number of caches and a share of memory.

    Args:
        max_entries: caches that may wait.
        memory_share: of the device's memory that waiting caches and graphs may hold.
    """

    def __init__(self, max_entries: int, memory_share: float) -> None:
        self.max_entries = max_entries
        self.memory_share = memory_share
        self._idle: list[CapturedSteps] = []
        self._lock = threading.Lock()

    def take(self, kind: type[Steps], signature: tuple | None, fits: Callable[[Steps], bool]) -> Steps | None:
        """Remove and return waiting steps of this class that `fits` accepts; None when there are none.

        Steps of every class that were captured from a model of another signature are freed.
        """
        with self._lock:
            self._idle = [steps for steps in self._idle if steps.signature == signature]
            for i, steps in enumerate(self._idle):
                if isinstance(steps, kind) and fits(steps):
                    del self._idle[i]
                    return steps
        return None

    def put(self, steps: CapturedSteps) -> None:
        """Keep steps for later; the longest unused are freed while the pool is over one of its limits."""
        limit = self.memory_share * torch.cuda.get_device_properties(steps.device).total_memory
        with self._lock:
            self._idle.append(steps)
            while len(self._idle) > self.max_entries or (self._idle and self.nbytes() > limit):
                self._idle.pop(0)

    def nbytes(self) -> int:
        """Bytes that the waiting caches and graphs hold."""
        return sum(steps.nbytes() for steps in self._idle)

    def report(self) -> list[dict[str, Any]]:
        """Shapes and bytes of each waiting captured step."""
        return [entry for steps in self._idle for entry in steps.report()]

    def clear(self, kind: type | None = None) -> None:
        """Free all waiting steps, or those of one class."""
        with self._lock:
            self._idle = [] if kind is None else [steps for steps in self._idle if not isinstance(steps, kind)]


# Pools are kept beside the models, not in their attributes: a model is copied, pickled and moved, a graph cannot be.
_POOLS: WeakKeyDictionary[nn.Module, StepPool] = WeakKeyDictionary()
MAX_IDLE_CACHES = 4
IDLE_MEMORY_SHARE = 0.25


def step_pool(model: Any) -> StepPool:
    """The pool of `model`, for ordinary and parallel generation together."""
    if model not in _POOLS:
        _POOLS[model] = StepPool(MAX_IDLE_CACHES, IDLE_MEMORY_SHARE)
    return _POOLS[model]
