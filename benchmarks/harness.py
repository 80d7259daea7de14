"""Benchmarks several providers of the same operation in one run.

A provider whose result does not match the float64 reference gets no figure. Calls rotate over inputs that together are
larger than the cache. They are timed twice: replayed from a CUDA graph, which gives the device time and the figure that
is compared (`ms`), and called one by one from Python (`ms_launched`), where a small call costs its launch. Every figure
is one line of JSON, with the shape, versions, device and commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_efficient.kernels.contract import (
    Arguments,
    Cost,
    KernelRecord,
    deviations,
    named_outputs,
    present,
    upstream_gradient,
)

RESULTS = Path(__file__).resolve().parent / "results"
MODES = ("forward", "backward", "decode")
# Inputs that together are this large have left the cache when they are used again (an H100 has 50 MB of L2).
ROTATION_BYTES = 256 * 2**20
MAX_ROTATION = 4096
SECONDS_PER_FIGURE = 0.15
BATCHES = 25


@dataclass(frozen=True)
class Case:
    """One shape. `draw(seed)` gives new arguments of the operation; `shape` is recorded in the results file."""

    label: str
    mode: str
    shape: dict[str, int]
    dtype: torch.dtype
    draw: Callable[[int], Arguments]


@dataclass(frozen=True)
class Provider:
    """An implementation of the operation. `prepare` is called once for each case, to reset a compiler."""

    name: str
    prepare: Callable[[], Callable[..., torch.Tensor]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the quantiles at 20 % and 80 %, over batches of calls."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, *_, high = statistics.quantiles(samples, n=5)
        return cls(statistics.median(samples), low, high)


@dataclass
class Result:
    """One line of the results file."""

    case: Case
    provider: str
    matches: bool
    errors: dict[str, float]
    timing: Timing | None = None
    cost: Cost | None = None
    copy_gb_per_s: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float | None:
        """The fewest bytes that must move (`cost.bytes`) per second, whatever the provider moves in addition."""
        return self.cost.bytes / self.timing.median / 1e6 if self.timing and self.cost else None

    def line(self, environment: dict[str, Any]) -> dict[str, Any]:
        achieved = self.gb_per_s
        return {
            "case": self.case.label,
            "mode": self.case.mode,
            **self.case.shape,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "provider": self.provider,
            "matches_reference": self.matches,
            "relative_error": {name: float(f"{error:.3g}") for name, error in self.errors.items()},
            "ms": self.timing and round(self.timing.median, 6),
            "ms_p20": self.timing and round(self.timing.p20, 6),
            "ms_p80": self.timing and round(self.timing.p80, 6),
            "floor_bytes": self.cost and self.cost.bytes,
            "gb_per_s": achieved and round(achieved, 1),
            "copy_gb_per_s": round(self.copy_gb_per_s, 1),
            "of_copy": achieved and round(achieved / self.copy_gb_per_s, 4),
            **self.notes,
            **environment,
        }


# Timing


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(calls: list[Callable[[], Any]], device: torch.device, graph: bool = False) -> Timing:
    """Time of one call, over batches that rotate over `calls`. With `graph`, a batch is one replay of a CUDA graph."""
    for call in calls[:3]:
        call()
    _synchronize(device)
    start = time.perf_counter()
    for call in calls:
        call()
    _synchronize(device)
    once = max((time.perf_counter() - start) / len(calls), 1e-7)
    rounds = max(1, round(SECONDS_PER_FIGURE / BATCHES / once / len(calls)))

    # Keep each result until its call runs again: freed immediately, all results would share one cached buffer.
    results: deque[Any] = deque(maxlen=len(calls))

    def batch() -> None:
        for _ in range(rounds):
            for call in calls:
                results.append(call())

    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
            batch()
        batch = captured.replay
    batch()
    samples = []
    for _ in range(BATCHES):
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            batch()
            after.record()
            after.synchronize()
            elapsed = before.elapsed_time(after)
        else:
            start = time.perf_counter()
            batch()
            elapsed = 1e3 * (time.perf_counter() - start)
        samples.append(elapsed / rounds / len(calls))
    return Timing.of(samples)


def time_interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each call as called from Python, one figure per round of `repeats` calls queued back to back.

    A round runs all of `calls`, so that changes of the machine's speed affect all alike; the first `warm_up` rounds are
    not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for _ in range(repeats):
                call()
            after.record()
            after.synchronize()
            if turn >= warm_up:
                samples[name].append(before.elapsed_time(after) / repeats)
    return samples


def times(
    calls: dict[str, Callable[[], Any]], rounds: int, repeats: int, device: torch.device, warm_up: int
) -> dict[str, list[float]]:
    """As `time_interleaved`; on the CPU, where a benchmark is only tested, the milliseconds of one call of each."""
    if device.type == "cuda":
        return time_interleaved(calls, rounds, repeats, warm_up)
    found = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        found[name] = [1e3 * (time.perf_counter() - began)]
    return found


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read and written counted: the ceiling for other figures."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / time_calls([lambda: target.copy_(source)], device).median / 1e6


# Measuring


def rotation_of(record: KernelRecord, case: Case) -> list[Arguments]:
    """Enough argument sets that none is still in a cache when it is used again. All providers get the same ones."""
    first = case.draw(0)
    count = min(MAX_ROTATION, max(2, -(-ROTATION_BYTES // max(record.forward_cost(first).bytes, 1))))
    return [first, *(case.draw(seed) for seed in range(1, count))]


def _backward_calls(
    function: Callable[..., torch.Tensor], rotation: list[Arguments], differentiable: tuple[str, ...]
) -> Iterator[Callable[[], Any]]:
    for arguments in rotation:
        leaves = {name: arguments[name].detach().requires_grad_() for name in present(arguments, differentiable)}
        outputs = named_outputs(function(**{**arguments, **leaves})).values()
        outputs = [out for out in outputs if out.requires_grad]
        upstream = [upstream_gradient(out) for out in outputs]
        yield lambda outputs=outputs, leaves=leaves, upstream=upstream: torch.autograd.grad(
            outputs, list(leaves.values()), upstream, retain_graph=True
        )


def measure(
    record: KernelRecord, case: Case, provider: Provider, rotation: list[Arguments], copy_gb_per_s: float
) -> Result:
    """Check the provider on this case, then time it; a provider that does not match is not timed."""
    backward = case.mode == "backward"
    function = provider.prepare()
    first = rotation[0]
    device = next(v.device for v in first.values() if isinstance(v, torch.Tensor))
    found = deviations(record, function, first, gradients=backward)
    # Peers may round intermediate results, which the record's bounds for our kernels do not allow for.
    slack = 1.0 if provider.name == "triton" else 4.0
    result = Result(
        case,
        provider.name,
        matches=all(d.error <= slack * d.bound for d in found),
        errors={d.result: d.error for d in found},
        copy_gb_per_s=copy_gb_per_s,
    )
    if not result.matches:
        return result
    result.cost = record.backward_cost(first) if backward else record.forward_cost(first)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if backward:
        calls = list(_backward_calls(function, rotation, record.differentiable))
    else:
        calls = [lambda arguments=arguments: function(**arguments) for arguments in rotation]
    with torch.set_grad_enabled(backward):
        result.timing = time_calls(calls, device)
        result.notes["ms_launched"] = round(result.timing.median, 6)
        if device.type == "cuda":
            try:
                result.timing = time_calls(calls, device, graph=True)
            except RuntimeError as error:  # not every provider can be captured; its figure then includes launches
                result.notes["no_graph"] = str(error).splitlines()[0]
            result.notes["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return result


def describe_machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """GPU, driver, versions and commit, recorded with every figure."""
    here = Path(__file__).resolve().parent
    if commit is None:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
        commit = asked.stdout.strip() if asked.returncode == 0 else "unknown"
    driver = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def write(path: Path, lines: Sequence[dict[str, Any]], identity: Sequence[str] = ("part", "provider")) -> None:
    """Add `lines` to a results file, replacing those that agree with them in all fields of `identity`."""

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line.get(name) for name in identity)

    old = read(path) if path.exists() else []
    new = {key(line) for line in lines}
    merged = [line for line in old if key(line) not in new] + list(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in merged), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compiled(function: Callable[..., torch.Tensor]) -> Callable[[], Callable[..., torch.Tensor]]:
    """`prepare` of the provider that compiles `function` with torch.compile, after a reset, for each case."""

    def prepare() -> Callable[..., torch.Tensor]:
        torch._dynamo.reset()
        # The backward pass is timed many times over one forward pass, so it may not reuse the forward's buffers.
        torch._functorch.config.donated_buffer = False
        return torch.compile(function, dynamic=False)

    return prepare


# Command line


def common_options(description: str | None, files: str) -> argparse.ArgumentParser:
    """A parser with device, folder of the results and commit; `files` names the results in that folder."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--output", type=Path, default=RESULTS, help=f"folder of {files}")
    options.add_argument("--commit", help="commit to record where the checkout has no .git")
    return options


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark of one operation takes."""
    options = common_options(description, "NAME.jsonl and NAME.png")
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options.add_argument("--cases", default="", help="measure only the cases whose label holds this text")
    return options


def run(
    name: str, record: KernelRecord, cases: list[Case], providers: list[Provider], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure every provider on every case, write `NAME.jsonl` and return its lines."""
    device = torch.device(arguments.device)
    environment = describe_machine(device, arguments.commit)
    cases = [case for case in cases if case.mode in arguments.modes and arguments.cases in case.label]
    if not cases:
        raise SystemExit(f"no case has a label that holds {arguments.cases!r}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = []
    # A graph can be captured on any stream but the default one, and a backward pass runs on the stream of its forward.
    stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
    with stream, (arguments.output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        copy = copy_bandwidth(device)
        print(f"{environment['device']}: a copy moves {copy:.0f} GB/s", flush=True)
        for case in cases:
            rotation = rotation_of(record, case)
            for provider in providers:
                line = measure(record, case, provider, rotation, copy).line(environment)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                file.write(json.dumps(line) + "\n")
                file.flush()
                lines.append(line)
                print(summary(line), flush=True)
    return lines


def summary(line: dict[str, Any]) -> str:
    """One result as a line for the terminal."""
    head = f"{line['mode']:<9}{line['case']:<34}{line['provider']:<9}"
    if not line["matches_reference"]:
        return f"{head} no figure: relative error {line['relative_error']}"
    figures = f"{1e3 * line['ms']:>10.2f} us  {line['gb_per_s']:>7.0f} GB/s  {100 * line['of_copy']:>5.1f} % of copy"
    return f"{head}{figures}, called from Python {1e3 * line['ms_launched']:.1f} us"
