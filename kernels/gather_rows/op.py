"""The custom operator of gather_rows, which fills its output in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _load_launcher() -> Callable[..., None]:
    from hf_efficient.kernels.gather_rows.triton_kernels import launch

    return launch


def _fake(out: Tensor, table: Tensor, ids: Tensor, cache: Tensor | None, cache_slots: Tensor | None) -> None:
    """Returns nothing: `out` is changed in place."""


# Fills `out` [u, F] with rows of the table and of the cache.
gather_rows_into = define_operator("gather_rows", _load_launcher, _fake, mutates=("out",))
