"""How fast do rows come from a table in host memory, and what does a step of the optimiser cost that touches few rows?

    python -m benchmarks.row_kernels [--parts device host adamw] [--rows V] [--width F] [--output FOLDER]

The table is that of one STEM layer of a 1B Llama, in bfloat16; rows are distinct and in random places. Rows from the
host are compared with a plain copy of as many bytes over the same bus, everything else with a copy on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, ROTATION_BYTES, copy_bandwidth, describe_machine, time_calls
from benchmarks.plot import plot
from hf_efficient.kernels.contract import deviations
from hf_efficient.kernels.gather_rows.api import gather_rows
from hf_efficient.kernels.gather_rows.configs import LaunchConfig as GatherConfig
from hf_efficient.kernels.gather_rows.configs import launch_config as gather_config
from hf_efficient.kernels.row_adamw.configs import LaunchConfig as StepConfig
from hf_efficient.kernels.row_adamw.record import RECORD as ROW_ADAMW
from hf_efficient.kernels.row_adamw.record import draw as draw_step
from hf_efficient.training.row_sparse_adamw import RowSparseAdamW

PARTS = ("device", "host", "adamw")
GATHERED = (1, 32, 1024, 6636)
# Distinct tokens of 16,384 that follow Zipf's law over the vocabulary.
STEPPED = 6636
PROGRAMS = {"device": (264, 1056), "host": (8, 16, 32, 64, 128)}
TILES = ((512, 4), (1024, 4), (2048, 8), (2048, 16))
# Together they read and write more than a cache holds, however few rows each of them takes.
MOST_CALLS = 2048


@dataclass
class Figure:
    """One line of the results file, before the machine is added to it."""

    case: str
    mode: str
    provider: str
    floor_bytes: int
    copy_gb_per_s: float
    call: list[Callable[[], Any]]
    matches: bool | None = True
    notes: dict[str, Any] = field(default_factory=dict)

    def measured(self, device: torch.device, environment: dict[str, Any]) -> dict[str, Any]:
        """Timed as the harness times: replayed from a CUDA graph where that can be, and called one by one."""
        line = {"case": self.case, "mode": self.mode, "provider": self.provider, "matches_reference": self.matches}
        if self.matches is False:
            return {**line, "ms": None, **environment}
        launched = timing = time_calls(self.call, device)
        if device.type == "cuda" and not self.notes.get("no_graph"):
            try:
                timing = time_calls(self.call, device, graph=True)
            except RuntimeError as error:  # not every provider can be captured
                self.notes["no_graph"] = str(error).splitlines()[0]
        achieved = self.floor_bytes / timing.median / 1e6
        return {
            **line,
            "ms": round(timing.median, 6),
            "ms_p20": round(timing.p20, 6),
            "ms_p80": round(timing.p80, 6),
            "ms_launched": round(launched.median, 6),
            "floor_bytes": self.floor_bytes,
            "gb_per_s": round(achieved, 2),
            "copy_gb_per_s": round(self.copy_gb_per_s, 1),
            "of_copy": round(achieved / self.copy_gb_per_s, 4),
            **self.notes,
            **environment,
        }


# Gathering rows


def id_sets(count: int, rows: int, device: torch.device) -> list[Tensor]:
    """Sets of `count` distinct ids, enough of them that their rows have left the cache when they are used again."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
    return list(order.split(count))[: max(1, min(MOST_CALLS, rows // count))]


def gather_figures(part: str, table: Tensor, count: int, device: torch.device, copy: float) -> Iterator[Figure]:
    """Every way of getting `count` rows of `table`."""
    from hf_efficient.kernels.gather_rows.triton_kernels import launch

    rows, width = table.shape
    row_bytes = width * table.element_size()
    sets = id_sets(count, rows, device)[: max(2, ROTATION_BYTES // (count * row_bytes))]
    outs = [torch.empty(count, width, dtype=table.dtype, device=device) for _ in sets]
    expected = table[sets[0].to(table.device)].to(device)
    on_host = table.device.type != device.type
    moved = count * row_bytes * (1 if on_host else 2)
    if on_host:
        # What the bus carries at best, for as many bytes in one piece.
        pieces = [table[i : i + count] for i in range(0, min(rows - count + 1, count * len(outs)), count)]
        plain = [functools.partial(o.copy_, p, non_blocking=True) for o, p in zip(outs, pieces, strict=False)]
        copy = moved / time_calls(plain, device, graph=True).median / 1e6
        yield Figure(f"{count} rows", part, "plain copy", moved, copy, plain)

    def figure(name: str, function: Callable[[Tensor, Tensor], Any], **notes: Any) -> Figure:
        outs[0].zero_()
        function(outs[0], sets[0])
        calls = [functools.partial(function, out, ids) for out, ids in zip(outs, sets, strict=True)]
        matches = torch.equal(outs[0], expected)
        return Figure(f"{count} rows", part, name, moved, copy, calls, matches, notes)

    def eager(out: Tensor, ids: Tensor) -> None:
        torch.index_select(table, 0, ids, out=out)

    def staged(out: Tensor, ids: Tensor) -> None:
        torch.index_select(table, 0, ids.cpu(), out=staging)
        out.copy_(staging, non_blocking=True)
        torch.cuda.current_stream().synchronize()  # before the buffer is filled again

    if on_host:
        staging = torch.empty(count, width, dtype=table.dtype, pin_memory=True)
        yield figure("processor", staged, no_graph="works on the host")
    else:
        yield figure("eager", eager)
    if device.type != "cuda":
        return
    yield figure("triton", lambda out, ids: gather_rows(table, ids, out=out))
    chosen = gather_config(count, row_bytes, on_host)
    for programs in (*PROGRAMS[part], 0):
        if programs != chosen.programs:
            config = GatherConfig(
                min(16384 if on_host else 4096, chosen.block_bytes * 8), 8 if on_host else 4, programs
            )
            yield figure(
                f"{programs or 'all'} programs",
                lambda out, ids, config=config: launch(out, table, ids, None, None, config),
            )


def beside_products(table: Tensor, device: torch.device) -> list[str]:
    """How much longer do matrix products take while rows come from the host on another stream?"""
    from hf_efficient.kernels.gather_rows.triton_kernels import launch

    ids = id_sets(GATHERED[-1], table.shape[0], device)[0]
    out = torch.empty(len(ids), table.shape[1], dtype=table.dtype, device=device)
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    side = torch.cuda.Stream()

    def products(config: GatherConfig | None) -> None:
        if config is not None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                launch(out, table, ids, None, None, config)
        for _ in range(4):
            x @ x
        torch.cuda.current_stream().wait_stream(side)

    alone = time_calls([lambda: products(None)], device).median
    found = [f"4 products of 8192^3 alone {alone:.3f} ms"]
    for programs in PROGRAMS["host"]:
        both = functools.partial(products, GatherConfig(16384, 8, programs))
        found.append(f"beside {programs} programs {time_calls([both], device).median:.3f} ms")
    return found


# Steps of the optimiser


def step_figures(
    dtype: torch.dtype, rows: int, width: int, count: int, device: torch.device, copy: float
) -> Iterator[Figure]:
    """Every way of updating `count` rows of a table [rows, width], and AdamW of PyTorch over all of it."""
    case = f"{count} of {rows} rows, {str(dtype).removeprefix('torch.')}"
    table = torch.nn.Parameter(torch.empty(rows, width, dtype=dtype, device=device).normal_())
    sets = [ids.sort().values for ids in id_sets(count, rows, device)[:4]]
    grads = [torch.empty(len(ids), width, dtype=dtype, device=device).normal_() for ids in sets]
    numbers = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    small = draw_step(device, dtype, ids=min(count, 100), rows=200, width=width)
    state = {
        "exp_avg": torch.zeros(rows, width, device=device),
        "exp_avg_sq": torch.zeros(rows, width, device=device),
        "steps": torch.zeros(rows, dtype=torch.int32, device=device),
        "log_decays": torch.zeros(rows, dtype=torch.float64, device=device),
    }
    calls = [{"param": table, **state, "ids": i, "grad": g} for i, g in zip(sets, grads, strict=True)]
    for each in calls:
        each.update(numbers, log_decay=0.0, scale=None)
    floor = ROW_ADAMW.forward_cost(calls[0]).bytes

    def figure(name: str, function: Callable[..., Any]) -> Figure:
        matches = all(found.acceptable for found in deviations(ROW_ADAMW, function, small))
        return Figure(
            case, "adamw", name, floor, copy, [functools.partial(function, **each) for each in calls], matches
        )

    yield figure("eager", ROW_ADAMW.peers["eager"])
    if device.type == "cuda":
        yield figure("triton", functools.partial(ROW_ADAMW.api, backend="triton"))
        for tile in TILES:
            yield figure(f"{tile[0]} columns, {tile[1]} warps", functools.partial(launch_step, StepConfig(*tile)))
    calls.clear()  # and with them the moments
    state.clear()

    sparse = [
        torch.sparse_coo_tensor(ids[None], grad, table.shape, is_coalesced=True, check_invariants=False)
        for ids, grad in zip(sets, grads, strict=True)
    ]
    whole: Tensor | None = None
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "RowSparseAdamW.step": lambda: RowSparseAdamW([table], **numbers, weight_decay=0.0),
        "torch SparseAdam.step": lambda: torch.optim.SparseAdam([table], **numbers),
        "torch AdamW.step, all rows": lambda: torch.optim.AdamW([table], **numbers, fused=device.type == "cuda"),
    }
    for name, make in makers.items():
        optimizer = make()
        if "all rows" in name:
            whole = torch.zeros_like(table)

        def step(gradient: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            table.grad = gradient
            optimizer.step()

        given = sparse if whole is None else [whole]
        notes = {"no_graph": "an optimiser's step"}
        yield Figure(case, "adamw", name, floor, copy, [functools.partial(step, g) for g in given], None, notes)
        table.grad = None
        del optimizer, step
        if device.type == "cuda":
            torch.cuda.empty_cache()


def launch_step(config: StepConfig, betas: tuple[float, float], **arguments: Any) -> Tensor:
    """The operation without its checks, in the given configuration."""
    from hf_efficient.kernels.row_adamw.triton_kernels import launch

    launch(beta1=betas[0], beta2=betas[1], config=config, **arguments)
    return arguments["param"]


# Command line


def figures(arguments: argparse.Namespace, device: torch.device, copy: float) -> Iterator[Figure]:
    """All figures that were asked for, one after the other: what one holds in memory is gone when the next comes."""
    rows, width = arguments.rows, arguments.width
    for part in ("device", "host"):
        if part not in arguments.parts or (part == "host" and device.type != "cuda"):
            continue
        resident = torch.empty(rows, width, dtype=torch.bfloat16, device=device).normal_()
        table = resident if part == "device" else torch.empty_like(resident, device="cpu", pin_memory=True)
        if part == "host":
            table.copy_(resident)
        del resident
        for count in GATHERED:
            if count <= rows // 2:
                yield from gather_figures(part, table, count, device, copy)
        if part == "host":
            print("; ".join(beside_products(table, device)), flush=True)
        del table
    if "adamw" in arguments.parts:
        for dtype in (torch.float32, torch.bfloat16):
            yield from step_figures(dtype, rows, width, min(STEPPED, rows // 2), device, copy)


def summary(line: dict[str, Any]) -> str:
    head = f"{line['mode']:<8}{line['case']:<32}{line['provider']:<28}"
    if line["ms"] is None:
        return f"{head}no figure: its result is wrong"
    figures = f"{1e3 * line['ms']:>10.1f} us {line['gb_per_s']:>8.1f} GB/s {100 * line['of_copy']:>6.1f} % of copy"
    return f"{head}{figures}, called from Python {1e3 * line['ms_launched']:.1f} us"


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--rows", type=int, default=128256, help="rows of the table")
    options.add_argument("--width", type=int, default=8192, help="columns of the table")
    options.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for row_kernels.jsonl and row_kernels.png"
    )
    options.add_argument("--commit", help="commit to record where the checkout has no .git")
    arguments = options.parse_args(argv)
    device = torch.device(arguments.device)
    environment = describe_machine(device, arguments.commit)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = []
    # A graph can be captured on any stream but the default one.
    stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
    path = arguments.output / "row_kernels.jsonl"
    with torch.no_grad(), stream, path.open("w", encoding="utf-8") as file:
        copy = copy_bandwidth(device)
        print(f"{environment['device']}: a copy moves {copy:.0f} GB/s", flush=True)
        for figure in figures(arguments, device, copy):
            line = figure.measured(device, environment)
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)
    print("\n".join(summary(line) for line in lines))
    plot(lines, f"Rows of a table [{arguments.rows}, {arguments.width}]", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
