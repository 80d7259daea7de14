"""The kernels on rows of a table: host memory, ids outside the table, large tables."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.errors import HFEError
from hf_efficient.kernels.gather_rows.api import gather_rows
from hf_efficient.kernels.gather_rows.configs import DECODE_ROWS
from hf_efficient.kernels.gather_rows.record import draw


def test_gather_rows_gives_zeros_for_ids_outside_the_table(device: torch.device) -> None:
    """The table is the middle of a larger one: a read outside would show. (On the CPU the public function raises.)"""
    from hf_efficient.kernels.gather_rows.triton_kernels import launch

    around = torch.full((9, 40), 7.0, device=device)
    table, cache = around[2:7, 8:32], around[:1, 8:32]
    ids = torch.tensor([-1, 4, 5, 2**40, 0, -(2**40)], device=device)
    for slots in (None, torch.full((5,), -1, dtype=torch.int32, device=device)):
        out = torch.full((6, 24), float("nan"), device=device)
        launch(out, table, ids, None if slots is None else cache, slots)
        assert out[[1, 4]].eq(7.0).all() and out[[0, 2, 3, 5]].eq(0.0).all()


def test_gather_rows_fills_the_output_and_nothing_around_it(device: torch.device) -> None:
    arguments = draw(device, torch.float32, cached=(1, 2))
    whole = torch.full((9, 30), 5.0, device=device)
    out = whole[1:8, 3:27]
    assert gather_rows(**{**arguments, "out": out}, backend="triton") is out
    assert torch.equal(out, gather_rows(**arguments, backend="reference"))
    out.fill_(5.0)
    assert whole.eq(5.0).all()


def _pinned(dtype: torch.dtype, ids: int, width: int, device: torch.device) -> dict:
    arguments = draw(device, dtype, ids=ids, rows=211, width=width, cached=(4, 0, 17, 100))
    return {**arguments, "table": arguments["table"].cpu().pin_memory()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ids", [0, 1, DECODE_ROWS, DECODE_ROWS + 1, 700])
@pytest.mark.parametrize("width", [1, 71, 1024, 8192])
def test_gather_rows_reads_a_pinned_table_bit_for_bit(
    width: int, ids: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = _pinned(dtype, ids, width, device)
    resident = {**arguments, "table": arguments["table"].to(device)}
    for given in ({}, {"cache": None, "cache_slots": None}):
        expected = gather_rows(**{**resident, **given}, backend="reference")
        for backend in ("triton", "reference", None):
            out = gather_rows(**{**arguments, **given}, backend=backend)
            assert out.device.type == device.type and torch.equal(out, expected)


@pytest.mark.gpu
def test_gather_rows_reads_a_slice_of_a_pinned_table(device: torch.device) -> None:
    """Tables of several layers may be adjacent in one allocation."""
    arguments = _pinned(torch.bfloat16, 100, 512, device)
    table = arguments["table"][3:200, 128:384]
    arguments = {**arguments, "table": table, "ids": arguments["ids"] % 190, "cache": None, "cache_slots": None}
    assert torch.equal(gather_rows(**arguments), table.to(device)[arguments["ids"]])


@pytest.mark.gpu
def test_gather_rows_refuses_host_memory_that_is_not_pinned(device: torch.device) -> None:
    arguments = _pinned(torch.bfloat16, 5, 64, device)
    arguments["table"] = torch.empty_like(arguments["table"], pin_memory=False).copy_(arguments["table"])
    for backend in ("triton", "reference", None):
        with pytest.raises(HFEError, match=r"not pinned.*pin_memory\(\)"):
            gather_rows(**arguments, backend=backend)


@pytest.mark.gpu
def test_gather_rows_of_a_pinned_table_is_captured_in_a_cuda_graph(device: torch.device) -> None:
    """On a separate stream, and with other ids and rows in the same memory at the replay."""
    arguments = _pinned(torch.bfloat16, 9, 1024, device)
    arguments["out"] = torch.empty(9, 1024, dtype=torch.bfloat16, device=device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gather_rows(**arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        before = torch.cuda.memory_allocated()  # a capture makes room for the state of the random numbers
        gather_rows(**arguments)
        allocated = torch.cuda.memory_allocated() - before
    assert allocated == 0, "nothing is allocated where the output is given"
    arguments["ids"].copy_(torch.tensor([210, 4, 4, 17, 0, 3, 99, 100, 1], device=device))
    arguments["table"][3].fill_(2.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(arguments["out"], gather_rows(**{**arguments, "out": None}, backend="reference"))
    assert arguments["out"][5].eq(2.5).all()


@pytest.mark.gpu
def test_gather_rows_runs_beside_work_on_another_stream(device: torch.device) -> None:
    """The result is complete after an event, as a model that prefetches rows waits for them."""
    arguments = _pinned(torch.bfloat16, 700, 8192, device)
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    x = torch.randn(2048, 2048, device=device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = gather_rows(**arguments)
        done.record()
    for _ in range(20):
        x = (x @ x).clamp(-1, 1)
    torch.cuda.current_stream().wait_event(done)
    assert torch.equal(out, gather_rows(**arguments, backend="reference"))


@pytest.mark.gpu
def test_gather_rows_addresses_tables_of_more_than_2_to_the_31_elements(device: torch.device) -> None:
    table = torch.zeros(2**18 + 5, 2**13, device=device, dtype=torch.bfloat16)
    table[-1] = 3.0
    ids = torch.tensor([len(table) - 1, 0, 2**18], device=device)
    assert gather_rows(table, ids).float().mean(1).tolist() == [3.0, 0.0, 0.0]
    assert gather_rows(table, ids.repeat(100))[::3].eq(3.0).all()


def test_row_adamw_leaves_out_ids_outside_the_parameter(device: torch.device) -> None:
    """All five tensors are views into larger ones, so that a write outside would show."""
    from hf_efficient.kernels.row_adamw.triton_kernels import launch

    around = {name: torch.full((9, 40), 7.0, device=device) for name in ("param", "exp_avg", "exp_avg_sq")}
    rows = {name: each[2:7, 8:32] for name, each in around.items()}
    of_rows = {
        "steps": torch.full((9,), 7, dtype=torch.int32, device=device),
        "log_decays": torch.full((9,), 7.0, dtype=torch.float64, device=device),
    }
    ids = torch.tensor([-1, 4, 5, 2**40, 0, -(2**40)], device=device)
    grad = torch.ones(6, 24, device=device)
    inner = {name: each[2:7] for name, each in of_rows.items()}
    launch(*rows.values(), *inner.values(), ids, grad, None, 0.1, 0.9, 0.999, 1e-8, 7.5)
    for name, each in {**around, **of_rows}.items():
        changed = rows[name] if name in rows else inner[name]
        assert changed[[0, 4]].ne(7.0).all(), name
        changed[[0, 4]] = 7.0
        assert each.eq(7.0).all(), name


@pytest.mark.gpu
def test_row_adamw_counts_the_steps_of_many_rows_right(device: torch.device) -> None:
    """All threads of a program read the count that one of them writes: a race would show in some row of many."""
    from hf_efficient.kernels.row_adamw.api import row_adamw
    from hf_efficient.kernels.row_adamw.record import draw as draw_step

    for _ in range(20):
        arguments = draw_step(device, torch.float32, ids=20000, rows=20000, width=1024)
        expected = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        row_adamw(**arguments)
        row_adamw(**expected, backend="reference")
        assert torch.equal(arguments["steps"], expected["steps"])
        torch.testing.assert_close(arguments["param"], expected["param"], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_row_adamw_addresses_parameters_of_more_than_2_to_the_31_elements(device: torch.device) -> None:
    from hf_efficient.kernels.row_adamw.api import row_adamw

    rows, width = 2**18 + 5, 2**13
    param = torch.zeros(rows, width, device=device, dtype=torch.bfloat16)
    m, v = torch.zeros(2, rows, width, device=device)
    steps, log_decays = (torch.zeros(rows, dtype=t, device=device) for t in (torch.int32, torch.float64))
    ids = torch.tensor([rows - 1, 3], device=device)
    grad = torch.ones(2, width, device=device)
    row_adamw(param, m, v, steps, log_decays, ids, grad, lr=0.5, betas=(0.9, 0.999), eps=0.0)
    assert param[ids].eq(-0.5).all()
    assert [int(each.count_nonzero()) for each in (param, m, v)] == [2 * width] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_sparse_adamw_steps_without_waiting_and_as_on_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    """With one coalesced gradient a step, as a STEM model gives it: clipping, decay and the state of rows included."""
    from hf_efficient import RowSparseAdamW

    start = torch.randn(50, 300).to(dtype)
    tables = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.to(device))]
    optimizers = [RowSparseAdamW([table], lr=0.01, weight_decay=0.1, max_row_norm=2.0) for table in tables]
    for step in range(8):
        ids = torch.randperm(50)[: 5 + step].sort().values
        rows = torch.randn(len(ids), 300).to(dtype)
        for table, optimizer in zip(tables, optimizers, strict=True):
            table.grad = torch.sparse_coo_tensor(
                ids[None].to(table.device),
                rows.to(table.device),
                table.shape,
                is_coalesced=True,
                check_invariants=False,
            )
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # bfloat16 may fall on the other side of a rounding.
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(tables[1].cpu(), tables[0], rtol=bound, atol=bound)
    for optimizer in optimizers:
        optimizer.flush()
    torch.testing.assert_close(tables[1].cpu(), tables[0], rtol=bound, atol=bound)
    mine, his = optimizers[1].state[tables[1]], optimizers[0].state[tables[0]]
    assert torch.equal(mine["step"].cpu(), his["step"])
    torch.testing.assert_close(mine["exp_avg"].cpu(), his["exp_avg"], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_row_sparse_adamw_adds_up_parts_with_the_same_bits_at_every_run(device: torch.device) -> None:
    from hf_efficient.training.row_gradients import RowGradient, add_up

    parts = [
        RowGradient(torch.randperm(4000, device=device)[:3000].sort().values, torch.randn(3000, 256, device=device))
        for _ in range(5)
    ]
    first = add_up(parts)
    dense = torch.zeros(4000, 256, device=device)
    for part in parts:
        dense[part.ids] += part.rows
    assert torch.equal(first.rows, dense[first.ids])
    assert all(torch.equal(add_up(parts).rows, first.rows) for _ in range(5))
