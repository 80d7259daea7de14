"""gather_rows over the Triton kernel, as an operator for tracing that fills its output in place."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _launch(out: Tensor, table: Tensor, ids: Tensor, cache: Tensor | None, cache_slots: Tensor | None) -> None:
    from hf_efficient.kernels.gather_rows.triton_kernels import launch

    launch(out, table, ids, cache, cache_slots)


# fills `out` [u, F] with rows of the table and of the cache
gather_rows_into = define_operator("gather_rows", _launch, lambda *_: None, mutates=("out",))
