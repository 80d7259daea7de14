"""CUDA graphs of decoding steps: which models support them, how a step is captured, and the pool that keeps them.

Ordinary generation (`decode_step.py`) and generation in parallel branches both capture their steps here. A
graph is replayed only while `step_signature` of the model is the one it was captured with. If a module gains a hook,
an adapter or a wrapper, or a weight changes its type, the step runs without a graph; if a weight moves to another
address or a setting changes, the step is captured again.
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
# callback may have changed it. A check costs 1-2 ms of CPU time.
SIGNATURE_CHECK_INTERVAL = 8
# Modules of other packages whose forward has no side effects. Our own are recognised by their package: this one, or
# that of a checkpoint's code, where all files are flat.
_KNOWN_MODULES = ("torch.nn.modules.", "transformers.activations")
_OWN_PACKAGE = f"{__name__.partition('.modeling.')[0] if '.modeling.' in __name__ else __name__.rpartition('.')[0]}."
# Types of the attributes of a module or configuration that a forward may read besides its tensors.
_SETTINGS = (bool, int, float, str, type(None))
# All captures on a device use one stream, so only one capture runs at a time.
_CAPTURING = threading.Lock()


def capture_obstacle(model: Any, attention: Collection[str]) -> str:
    """The reason why decoding steps of `model` cannot be captured; an empty string if they can be.

    Checks device, configuration and the caller's autograd state; `step_signature` checks the modules and weights.

    Args:
        model: a causal language model.
        attention: names of the attention implementations whose steps can be captured.
    """
    # First, since a model whose weights are offloaded is on the meta device, where the other checks would fail.
    if not can_capture_on(model.device):
        return "the model is not on a CUDA device where Triton runs"
    config = model.config
    tested = {
        f"the attention implementation is {config._attn_implementation}": config._attn_implementation not in attention,
        f"head_dim exceeds {MAX_HEAD_DIM}": (getattr(config, "head_dim", None) or 0) > MAX_HEAD_DIM,
        "the rotary frequencies depend on the length": length_dependent_rope(getattr(config, "rope_parameters", None))
        is not None,
        "HFE_CHECK enables checks that synchronise with the device": check_data(),
        "gradients or autocast are on": torch.is_grad_enabled() or torch.is_autocast_enabled(model.device.type),
    }
    return next((reason for reason, holds in tested.items() if holds), "")


def can_capture_on(device: torch.device) -> bool:
    """True on CUDA with Triton, and on the CPU in Triton's interpreter.

    In the interpreter the same loop runs, but a step is a call of the model, not a CUDA graph.
    """
    if device.type != "cuda" and not (device.type == "cpu" and triton_interpreted()):
        return False
    return select_backend("decode_attention", None, device) == "triton"


def step_signature(model: Any) -> tuple | None:
    """A tuple that identifies every weight and setting that a captured step reads; None if none may be captured.

    A graph captured under an equal signature is still valid. The tuple contains the device, layer types, settings
    (`_settings`) of the configuration, class and settings of each module, and address, dtype, shape and strides of each
    parameter and buffer. It is None if a module is of another package, has a hook, adapter or wrapper, is compiled or
    in training mode, or if a weight is a Tensor subclass (quantised, distributed) or not readable from the device of
    the first one.
    """
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
            # Quantised, distributed and fake weights are Tensor subclasses.
            if type(tensor) not in (nn.Parameter, Tensor) or not _is_readable(tensor, device):
                return None
            signature.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
    return (device, *signature)


def _is_known(module: nn.Module) -> bool:
    """True for a module of this package, of torch.nn or of transformers.activations: no adapters, no wrappers."""
    origin = type(module).__module__
    return origin.startswith(_OWN_PACKAGE) or origin.startswith(_KNOWN_MODULES)


def _is_readable(tensor: Tensor, device: torch.device) -> bool:
    """True for a tensor on `device`, and for one in pinned CPU memory, which CUDA kernels can read as well."""
    return tensor.device == device or (tensor.device.type == "cpu" and device.type == "cuda" and tensor.is_pinned())


def _settings(owner: Any) -> tuple:
    """Name and value of each public attribute of a module or configuration: numbers, strings, booleans and None."""
    return tuple(item for item in vars(owner).items() if type(item[1]) in _SETTINGS and item[0][0] != "_")


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps are captured on: one for each device, because libraries keep a workspace per stream."""
    return torch.cuda.Stream(device)


def capture_graph(
    run: Callable[[], Tensor], device: torch.device, state: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, Tensor, int]:
    """Capture the kernels that `run` launches in a CUDA graph.

    `run` is called twice: a warm-up, which compiles kernels and creates library handles outside the capture, and the
    capture itself, which computes nothing. Only one thread captures at a time.

    Args:
        run: the step; takes no arguments and returns its result on `device`. It must not synchronise with the device.
        device: a CUDA device.
        state: tensors that `run` advances, such as positions; on return, or on an error, they have their old values.

    Returns:
        The graph, the tensor that each replay fills with its result, and the bytes of device memory that PyTorch
        reserved for the graph. The graph holds the addresses of the tensors that `run` reads and writes, but does not
        keep those alive that were allocated before the capture.

    Errors of `run` and of the capture, such as `torch.OutOfMemoryError`, propagate.
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
    """Interface of the entries of `StepPool`: a cache and the steps captured over it.

    Attributes:
        signature: `step_signature` of the model when the steps were captured.
        device: device of the cache.
    """

    @property
    def signature(self) -> tuple | None: ...

    @property
    def device(self) -> torch.device: ...

    def nbytes(self) -> int:
        """Bytes of device memory that the cache and the graphs hold."""

    def report(self) -> list[dict[str, Any]]:
        """Shapes and bytes of each captured step."""


Steps = TypeVar("Steps", bound=CapturedSteps)


class StepPool:
    """Idle caches and their captured steps, kept for the next call of `generate`; bounded in number and memory.

    An entry (`CapturedSteps`) is one cache with its steps. Entries in use are not in the pool: `take` removes an
    entry, `put` returns it. The methods that change the pool are thread-safe.

    Args:
        max_entries: maximum number of idle entries.
        max_memory_fraction: fraction of the device's memory, 0 to 1, that idle entries may hold together.
    """

    def __init__(self, max_entries: int, max_memory_fraction: float) -> None:
        self.max_entries = max_entries
        self.max_memory_fraction = max_memory_fraction
        self._idle: list[CapturedSteps] = []
        self._lock = threading.Lock()

    def take(self, kind: type[Steps], signature: tuple | None, fits: Callable[[Steps], bool]) -> Steps | None:
        """Remove and return the least recently used idle entry that fits; None if there is none.

        Idle entries of any class whose signature is not `signature` are removed: the model has changed since.

        Args:
            kind: class of the entry.
            signature: present `step_signature` of the model.
            fits: called with an entry of this class; True if the caller can use it.
        """
        with self._lock:
            self._idle = [steps for steps in self._idle if steps.signature == signature]
            for i, steps in enumerate(self._idle):
                if isinstance(steps, kind) and fits(steps):
                    del self._idle[i]
                    return steps
        return None

    def put(self, steps: CapturedSteps) -> None:
        """Return a cache and its captured steps to the pool, as the most recently used entry. They must not be in use.

        While the pool exceeds one of its limits, the least recently used entry is evicted, which frees its memory; the
        new entry too if it exceeds the memory limit by itself. `steps.device` must be a CUDA device (in Triton's
        interpreter nothing is captured, so nothing is put).
        """
        limit = self.max_memory_fraction * torch.cuda.get_device_properties(steps.device).total_memory
        with self._lock:
            self._idle.append(steps)
            while len(self._idle) > self.max_entries or (self._idle and self.nbytes() > limit):
                self._idle.pop(0)

    def nbytes(self) -> int:
        """Bytes that the idle caches and graphs hold."""
        return sum(steps.nbytes() for steps in self._idle)

    def report(self) -> list[dict[str, Any]]:
        """Shapes and bytes of each idle captured step."""
        return [entry for steps in self._idle for entry in steps.report()]

    def clear(self, kind: type | None = None) -> None:
        """Remove all idle entries, or those of class `kind`, which frees their memory."""
        with self._lock:
            self._idle = [] if kind is None else [steps for steps in self._idle if not isinstance(steps, kind)]


# Keyed by model, not an attribute of it: models are copied and pickled, which CUDA graphs do not support.
_POOLS: WeakKeyDictionary[nn.Module, StepPool] = WeakKeyDictionary()
MAX_IDLE_CACHES = 4
IDLE_MEMORY_FRACTION = 0.25


def step_pool(model: Any) -> StepPool:
    """The pool of `model`, created on the first call; ordinary and parallel generation share it."""
    if model not in _POOLS:
        _POOLS[model] = StepPool(MAX_IDLE_CACHES, IDLE_MEMORY_FRACTION)
    return _POOLS[model]
