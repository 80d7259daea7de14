"""AdamW that updates only the rows of a table that occur in a batch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.row_adamw.api import row_adamw
from hf_efficient.training.row_gradients import (
    RowGradient,
    accumulation_dtype,
    add_up,
    mean_over_processes,
    several_processes,
)

# State entry that parameters with sparse gradients have, and those with dense gradients do not.
_LOG_DECAYS = "log_decays"
# Elements of a table that `flush` processes in one operation, which bounds its temporary memory.
_FLUSH_ELEMENTS = 1 << 24
# Elements of the rows that a step on the CPU processes in one operation.
_CPU_ELEMENTS = 1 << 19


class RowSparseAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that supports sparse gradients, such as those of STEM tables with `stem_sparse_grad`.

    Parameters with dense gradients get `torch.optim.AdamW` itself. Of a matrix with sparse gradients (`nn.Embedding`
    with ``sparse=True``) only the rows that occur are touched, each an AdamW of its own over the steps t = 1, 2, … in
    which it occurs, with its gradient g::

        m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
        p = D p - lr / (1 - β1^t) * m / (sqrt(v / (1 - β2^t)) + eps)        D = product of (1 - lr_k weight_decay)

    over the steps k of the optimizer since the row last occurred, the present one included. Where every row occurs in
    every step this is AdamW. Moments and t of a row do not change while it does not occur. The weight decay of those
    steps is applied later, exactly and for any learning rate schedule, when the row occurs again, or to all rows by
    `flush()`: **call it before saving the model**, or set weight_decay to 0 for tables, which we recommend and the
    source does when it continues training. As in PyTorch, a step in which a parameter has no gradient does not count
    for it.

    A sparse gradient is moved from the parameter to the optimizer as soon as backward has computed it, and `.grad` is
    None again: `clip_grad_norm_` and other code that iterates over gradients, which cannot handle it, does not see it.
    The optimizer keeps it, summed in float32 over micro-batches, until `step()` or `zero_grad()`; `model.zero_grad()`
    does not clear it. So the class can be passed to `transformers.Trainer(..., optimizers=(RowSparseAdamW(...), None))`
    and to Accelerate as it is.

    Data-parallel training: `step()` averages the rows over the processes, in the order of the ranks, so that all
    replicas stay the same bit for bit. `DistributedDataParallel` must ignore the tables: their names belong in the
    model's `_ddp_params_and_buffers_to_ignore` (STEM models set it), and every process must start from the same
    weights. Each process receives the float32 rows of all, padded to the most rows. Where only tables are trained,
    `DistributedDataParallel` raises an error, since no parameter is left for it: use the model without it.

    Memory: two float32 moments (float64 for float64 tables) for each element of a table, allocated as zeros at its
    first sparse gradient, and 12 bytes a row. The state is saved and loaded in these types, whatever the type of the
    table. A table in half precision is rounded to nearest at each step; small changes are lost there, so train tables
    in float32.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        max_row_norm: the norm that the sparse gradients of all parameters together are clipped to, after they have been
            averaged over the processes; None: not clipped. The norm before clipping is then in `row_norm`.
        process_group: processes to average over; None: the default group, if one is initialised; False: never.
        options: further ones of `torch.optim.AdamW`; `amsgrad` and `maximize` are for dense gradients only.

    Raises:
        HFEError: `max_row_norm` is not positive. From `step()`: a gradient scaler (float16 training) is used, which
            cannot see the collected gradients; an option that is for dense gradients only; a parameter whose gradients
            change between sparse and dense, or differ in this between processes; ``lr * weight_decay`` of 1 or more; or
            capture in a CUDA graph. From `backward()` or `step()`: a sparse gradient that is not one of whole rows of a
            matrix. From `load_state_dict()`: the state of a table of another shape.

    Source: AdamW, arXiv:1711.05101; the separate clipping norm follows the released training code of STEM,
        arXiv:2601.10639.
    """

    # A gradient scaler then passes its scale to `step` instead of searching `.grad`, which is None here.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_row_norm: float | None = None,
        process_group: dist.ProcessGroup | Literal[False] | None = None,
        **options: Any,
    ) -> None:
        if max_row_norm is not None and not max_row_norm > 0:
            raise HFEError(f"max_row_norm={max_row_norm} must be positive", "pass None to leave rows unclipped")
        self.max_row_norm = max_row_norm
        self.process_group = process_group
        self.row_norm: Tensor | None = None
        self._reset_hooks()
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)

    # Collecting gradients

    def _reset_hooks(self) -> None:
        """Start with no collected gradients and no hooks; hooks are removed when the optimizer is deleted."""
        self._collected: dict[Tensor, list[RowGradient]] = {}
        self._coalesced: dict[Tensor, int] = {}
        self._hooks: dict[Tensor, tuple[Any, ...]] = {}
        weakref.finalize(self, _remove_hooks, self._hooks).atexit = False

    def _register_hooks(self) -> None:
        """Register hooks that collect sparse gradients, on parameters that require gradients and have no hook yet."""
        this = weakref.ref(self)
        for parameter in self._parameters():
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = (
                    parameter.register_hook(
                        _weak_hook(this, RowSparseAdamW._remember_coalesced, weakref.ref(parameter))
                    ),
                    parameter.register_post_accumulate_grad_hook(_weak_hook(this, RowSparseAdamW._collect)),
                )

    def _remember_coalesced(self, gradient: Tensor, owner: weakref.ref[Tensor]) -> None:
        """Remember the address of a coalesced gradient's indices: accumulation drops the flag `is_coalesced`."""
        parameter = owner()
        if parameter is not None and gradient.is_sparse and gradient.is_coalesced():
            self._coalesced[parameter] = gradient.indices().data_ptr()

    def _collect(self, parameter: Tensor) -> None:
        """Move a sparse `.grad` to the optimizer's list for this parameter; dense gradients stay.

        `HFEError` if it is not sparse in the rows of a matrix.
        """
        known = self._coalesced.pop(parameter, 0)
        if parameter.grad is None or not parameter.grad.is_sparse:
            return
        if parameter.grad._indices().data_ptr() == known:
            parameter.grad._coalesced_(True)  # `.grad` is the gradient itself, not a sum
        parts = self._collected.setdefault(parameter, [])
        parts.append(RowGradient.of(parameter, parameter.grad))
        parameter.grad = None
        # Micro-batches share rows. Summing only once the later ones hold as many rows as the sum so far bounds the
        # memory by twice the sum, and synchronises with the device only then.
        if sum(part.ids.shape[0] for part in parts[1:]) > parts[0].ids.shape[0]:
            self._collected[parameter] = [add_up(parts)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; registers the hooks that collect sparse gradients."""
        super().add_param_group(param_group)
        self._register_hooks()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in PyTorch; collected gradients are dropped."""
        self._collected.clear()
        super().zero_grad(set_to_none)

    # Steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for all parameters that have a gradient; returns the loss of `closure`, else None.

        Errors: see the class.
        """
        self._check_no_loss_scaling()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self._parameters():
            self._collect(parameter)  # gradients that were assigned, or computed before the hook was registered
            if parameter.grad is not None and _LOG_DECAYS in self.state.get(parameter, {}):
                raise _changed_kind(parameter, "dense")
        _without_step_hooks(torch.optim.AdamW.step)(self)
        self._step_rows()
        self._register_hooks()
        return loss

    def _step_rows(self) -> None:
        """Sum, average over processes, clip and apply the collected sparse gradients."""
        parameters = list(self._parameters())
        gradients = [add_up(self._collected[p]) if p in self._collected else None for p in parameters]
        self._collected.clear()
        group = self.process_group
        if group is not False and several_processes(group):
            gradients = mean_over_processes(gradients, parameters, group)
        scale = self._clip([gradient for gradient in gradients if gradient is not None])
        options = (group for group in self.param_groups for _ in group["params"])
        for parameter, gradient, chosen in zip(parameters, gradients, options, strict=True):
            if gradient is not None:
                self._step_table(parameter, gradient, chosen, scale)

    def _clip(self, gradients: list[RowGradient]) -> Tensor | None:
        """Factor of at most 1 that bounds the norm of all rows together by `max_row_norm`; sets `row_norm`.

        Both are float32 scalars; without a limit or gradients the factor is None and `row_norm` unchanged. No device
        synchronisation.
        """
        if self.max_row_norm is None or not gradients:
            return None
        norms = [torch.linalg.vector_norm(g.rows, dtype=accumulation_dtype(g.rows.dtype)).float() for g in gradients]
        self.row_norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        return (self.max_row_norm / (self.row_norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it

    def _step_table(
        self, parameter: Tensor, gradient: RowGradient, options: dict[str, Any], scale: Tensor | None
    ) -> None:
        """AdamW on the rows of `gradient`; `options` is the parameter's group, `scale` the clipping factor.

        Raises:
            HFEError: an option is for dense gradients only, the step is captured in a CUDA graph, the parameter had
                dense gradients before, or ``lr * weight_decay`` is 1 or more.
        """
        for name in ("amsgrad", "maximize", "differentiable"):
            if options[name]:
                raise HFEError(
                    f"{name}=True, and a parameter of shape {tuple(parameter.shape)} has a sparse gradient",
                    f"put it into a parameter group with {name}=False",
                )
        if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            raise HFEError(
                "a step with sparse gradients was to be captured in a CUDA graph, which would repeat one learning rate",
                "leave optimizer.step() out of the captured part",
            )
        state = self._state_of_rows(parameter)
        # Read on the CPU, without device synchronisation, unless they are tensors on the device (capturable=True).
        lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
        beta1, beta2 = options["betas"]
        if lr * weight_decay >= 1:
            raise HFEError(f"lr={lr} times weight_decay={weight_decay} is 1 or more", "lower either of them")
        state["log_decay"] += math.log1p(-lr * weight_decay)
        # On the CPU the operation makes temporary tensors, which for all rows together would not fit into the caches.
        count = gradient.ids.shape[0] if parameter.is_cuda else _CPU_ELEMENTS // parameter.shape[1]
        for ids, rows in zip(gradient.ids.split(max(1, count)), gradient.rows.split(max(1, count)), strict=True):
            row_adamw(
                parameter,
                state["exp_avg"],
                state["exp_avg_sq"],
                state["step"],
                state[_LOG_DECAYS],
                ids,
                rows,
                lr=lr,
                betas=(float(beta1), float(beta2)),
                eps=options["eps"],
                log_decay=state["log_decay"].item(),
                scale=None if scale is None else scale.to(parameter.device),
            )

    def _state_of_rows(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of a table, created with zeros at its first sparse gradient; `HFEError` if it had dense ones before."""
        state = self.state[parameter]
        if state and _LOG_DECAYS not in state:
            raise _changed_kind(parameter, "sparse")
        if not state:
            rows, device = parameter.shape[0], parameter.device
            moments = accumulation_dtype(parameter.dtype)
            state["step"] = torch.zeros(rows, dtype=torch.int32, device=device)
            state["exp_avg"] = torch.zeros(parameter.shape, dtype=moments, device=device)
            state["exp_avg_sq"] = torch.zeros(parameter.shape, dtype=moments, device=device)
            # Sum of log(1 - lr weight_decay): over all steps, and up to the last step of each row. In double precision
            # the two can be subtracted after any number of steps.
            state["log_decay"] = torch.zeros((), dtype=torch.float64)
            state[_LOG_DECAYS] = torch.zeros(rows, dtype=torch.float64, device=device)
        return state

    def _check_no_loss_scaling(self) -> None:
        """Raise `HFEError` if a gradient scaler has set its attributes on this optimizer, and remove them."""
        given = [self.__dict__.pop(name) for name in ("grad_scale", "found_inf") if name in self.__dict__]
        if given:
            raise HFEError(
                "a gradient scaler was used with RowSparseAdamW, which it cannot see the sparse gradients of",
                "train in bfloat16 or float32, which need no loss scaling",
            )

    @torch.no_grad()
    def flush(self) -> None:
        """Apply the outstanding weight decay to all rows; call it before the model is saved or evaluated.

        Training continues as without it, up to rounding. Without weight decay this does nothing.
        """
        for parameter in self._parameters():
            state = self.state.get(parameter, {})
            if _LOG_DECAYS not in state or state["log_decay"].item() == 0.0:
                continue
            factors = (state["log_decay"].item() - state[_LOG_DECAYS]).exp().to(state["exp_avg"].dtype)
            rows = max(1, _FLUSH_ELEMENTS // parameter.shape[1])
            for part, factor in zip(parameter.split(rows), factors.split(rows), strict=True):
                part.mul_(factor[:, None])
            state["log_decay"].zero_()
            state[_LOG_DECAYS].zero_()

    # Saving and loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, except that the state of tables keeps its dtypes; collected gradients are dropped.

        Raises:
            HFEError: the state of a table has another shape than its parameter.
        """
        of_rows = {key: state for key, state in state_dict["state"].items() if _LOG_DECAYS in state}
        dense = {key: state for key, state in state_dict["state"].items() if key not in of_rows}
        super().load_state_dict({**state_dict, "state": dense})
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, parameter in zip(keys, self._parameters(), strict=True):
            if key in of_rows:
                self.state[parameter] = _placed(of_rows[key], parameter)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without hooks and collected gradients."""
        own = {"max_row_norm": self.max_row_norm, "process_group": self.process_group, "row_norm": self.row_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore that state, drop collected gradients, and register the hooks."""
        super().__setstate__(state)
        if "_hooks" not in self.__dict__:  # a copied or unpickled optimizer, which __init__ did not run for
            self._reset_hooks()
        self._collected.clear()
        self._register_hooks()

    def _parameters(self) -> Iterator[Tensor]:
        """The parameters of all groups, in order."""
        return chain.from_iterable(group["params"] for group in self.param_groups)


def _weak_hook(
    optimizer: weakref.ref[RowSparseAdamW], method: Callable[..., None], *more: Any
) -> Callable[[Tensor], None]:
    """A tensor hook that calls a method of the optimizer through a weak reference."""

    def call(tensor: Tensor) -> None:
        alive = optimizer()
        if alive is not None:
            method(alive, tensor, *more)

    return call


def _remove_hooks(hooks: dict[Tensor, tuple[Any, ...]]) -> None:
    """Remove every hook, parameter -> its hooks."""
    for hook in chain.from_iterable(hooks.values()):
        hook.remove()


def _without_step_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` of a class without PyTorch's wrapper, which calls the step hooks: our own `step` has it already."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


def _changed_kind(parameter: Tensor, kind: str) -> HFEError:
    """The error (not raised) for a parameter whose gradients change between sparse and dense."""
    return HFEError(
        f"a parameter of shape {tuple(parameter.shape)} has a {kind} gradient and had others before",
        "keep stem_sparse_grad (nn.Embedding's sparse) as it is during training, and in a resumed one",
    )


def _placed(state: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """A saved state of a table, moved to the device of its parameter.

    Raises:
        HFEError: it belongs to a table of another shape.
    """
    if state["exp_avg"].shape != parameter.shape:
        raise HFEError(
            f"the saved state is that of a table of shape {tuple(state['exp_avg'].shape)}, and the parameter has shape "
            f"{tuple(parameter.shape)}",
            "resume with the model that the state was saved with",
        )
    return {name: value.to("cpu" if name == "log_decay" else parameter.device) for name, value in state.items()}
