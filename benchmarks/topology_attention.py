"""When is attention that skips hidden blocks faster than FlexAttention, a dense mask, and plain causal attention?

    python -m benchmarks.topology_attention [--parts attention preparation builder] [--cases TEXT ...] [--only TEXT ...]

- attention: forward, and forward with backward, batch 1, bfloat16. With a known topology, whose masks and block
  lists are given, and with a new one at each call, where building them is timed too. All providers are timed
  interleaved in one process. FLOPs are counted on visible pairs, so that within a case the rate is one over the time.
- preparation: building block lists and masks alone.
- builder: the host's work on the tokens of a sample, before anything is on the device.

Plain causal attention computes another function: it shows what the same tokens cost without a topology.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.harness import common_options, describe_machine, read, times, write
from benchmarks.plot import load_pyplot
from benchmarks.topology_cases import WIDTH, Layout, Problem, layouts, sample_ids
from benchmarks.topology_providers import (
    FLEX,
    FLEX_NEW,
    OURS,
    PROVIDERS,
    Attention,
    Flex,
)
from hf_efficient.kernels.contract import relative_error
from hf_efficient.kernels.topology_attention.reference import visible_pairs
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, FULL_KEYS, PARTIAL_KEYS
from hf_efficient.modeling.topology.grammar.topology import Topology

PARTS = ("attention", "preparation", "builder")
MODES = ("forward", "forward+backward")
IDENTITY = ("part", "case", "mode", "provider")
ROUNDS, TURN_MS = 9, 12.0
# Largest relative errors of our kernel in bfloat16; peers may round intermediate results, so their bound is twice that.
FORWARD_BOUND, GRADIENT_BOUND = 1e-2, 2e-2

# Measuring


def differentiated(attend: Attention, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def errors(
    problem: Problem, attend: Attention, causal: bool, gradients: bool, references: dict[Any, dict[str, Tensor]]
) -> dict[str, float]:
    """Largest relative errors, of the first and the last key head and the query heads that belong to them."""
    heads, kv_heads = problem.layout.heads
    group, found = heads // kv_heads, dict[str, float]()
    if gradients:
        out, q, k, v = differentiated(attend, *problem.inputs[0])
    else:
        with torch.no_grad():
            out = attend(*problem.inputs[0][:3])
    for head in {0, kv_heads - 1}:
        if (head, causal) not in references:
            references[head, causal] = problem.expected(head, causal)
        mine = slice(head * group, (head + 1) * group)
        results = {"out": out[0, mine]}
        if gradients:
            results |= {"q": q[0, mine], "k": k[0, head], "v": v[0, head]}
        for name, result in results.items():
            found[name] = max(found.get(name, 0.0), relative_error(result, references[head, causal][name]))
    return found


def each_input(problem: Problem, attend: Attention, mode: str) -> Callable[[], Any]:
    """A call for each of the problem's inputs; what is returned stays until the next time."""

    def forward() -> Any:
        with torch.no_grad():
            return [attend(q, k, v) for q, k, v, _ in problem.inputs]

    def both() -> Any:
        return [differentiated(attend, *tensors) for tensors in problem.inputs]

    return forward if mode == "forward" else both


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of `call` captured in a CUDA graph; the returned function keeps the tensors that the graph reads."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = call()
    return lambda: (graph.replay(), kept, call)


def interleaved(
    calls: dict[str, Callable[[], Any]], number: int, device: torch.device
) -> dict[str, tuple[float, float, float]]:
    """Median, least and most milliseconds of each, where every call runs `number` of them."""
    if not calls:
        return {}
    first = times(calls, 1, 1, device, warm_up=1)
    repeats = max(1, round(TURN_MS / min(samples[0] for samples in first.values())))
    samples = times(calls, ROUNDS, min(repeats, 50), device, warm_up=1)
    return {
        name: (statistics.median(found) / number, min(found) / number, max(found) / number)
        for name, found in samples.items()
    }


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def measure(
    layout: Layout, modes: Sequence[str], only: Sequence[str] | None, device: torch.device
) -> list[dict[str, Any]]:
    """All providers on one layout."""
    torch._dynamo.reset()
    problem, lines = Problem(layout, device), []
    flex, references = Flex(problem), dict[Any, dict[str, Tensor]]()
    blocks = int(problem.blocks.counts[:, [PARTIAL_KEYS, FULL_KEYS]].sum())
    rows = -(-layout.length // BLOCK)
    shape = {
        "length": layout.length,
        "heads": layout.heads[0],
        "kv_heads": layout.heads[1],
        "head_dim": WIDTH,
        "segments": len(layout.segments),
        "visible_of_causal": _rounded(layout.visible_pairs / layout.causal_pairs),
        "blocks_of_causal": _rounded(blocks / (rows * (rows + 1) / 2)),
    }
    wanted = {name: p for name, p in PROVIDERS.items() if only is None or any(text in name for text in only)}
    ready: dict[str, tuple[Attention, dict[str, Any], bool]] = {}
    for name, provider in wanted.items():
        notes: dict[str, Any] = {"topology": provider.topology}
        try:
            attend = provider.prepare(problem, flex)
            # FlexAttention has no backward pass on the CPU.
            gradients = MODES[1] in modes and (device.type == "cuda" or "flex" not in name)
            found = errors(problem, attend, provider.topology == "none", gradients, references)
            notes["relative_error"] = {key: float(f"{value:.3g}") for key, value in found.items()}
            worst = max((value for key, value in found.items() if key != "out"), default=0.0)
            slack = 1 if name.startswith(OURS) else 2
            notes["matches"] = found["out"] <= slack * FORWARD_BOUND and worst <= slack * GRADIENT_BOUND
            ready[name] = attend, notes, gradients
        except RuntimeError as error:  # of memory too; a peer may have no kernel for a shape
            notes["failed"] = str(error).splitlines()[0]
            lines += [{"case": layout.label, "mode": mode, "provider": name, **shape, **notes} for mode in modes]
            print(_summary(lines[-1]), flush=True)
        release(device)
    references.clear()
    for mode in modes:
        flops = 4 * layout.heads[0] * WIDTH * layout.visible_pairs * (1 if mode == "forward" else 3.5)
        calls, peaks = {}, {}
        for name, (attend, notes, gradients) in ready.items():
            if notes["matches"] and (gradients or mode == MODES[0]):
                calls[name] = each_input(problem, attend, mode)
                release(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                    before = torch.cuda.memory_allocated(device)
                    calls[name]()
                    peaks[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
        launched = interleaved(calls, len(problem.inputs), device)
        graphs, refused = {}, {}
        for name, call in calls.items() if device.type == "cuda" else ():
            if PROVIDERS[name].captured:
                try:
                    graphs[name] = captured(call)
                except RuntimeError as error:
                    refused[name] = str(error).splitlines()[0]
        replayed = interleaved(graphs, len(problem.inputs), device)
        graphs.clear()
        release(device)
        timed = {name: replayed.get(name, launched[name]) for name in calls}
        for name, (_, notes, _) in ready.items():
            line = {"case": layout.label, "mode": mode, "provider": name, **shape, **notes}
            if name in timed:
                median, least, most = timed[name]
                line |= {"ms": _rounded(median), "ms_least": _rounded(least), "ms_most": _rounded(most)}
                line |= {"ms_launched": _rounded(launched[name][0]), "from_graph": name in replayed}
                line["tflop_per_s"] = _rounded(flops / median / 1e9)
                # Like with like: from graphs where both are, called from Python where one is not.
                peer = FLEX_NEW if notes["topology"] == "new" else FLEX
                if peer in timed:
                    alike = replayed if name in replayed and peer in replayed else launched
                    line["flex_over_it"] = _rounded(alike[peer][0] / alike[name][0])
                    # Which of FlexAttention's ways that is: where masks are made at each call, it makes the difference.
                    line["flex_is"] = peer
                if name in peaks:
                    line["peak_gib"] = _rounded(peaks[name])
                if name in refused:
                    line["no_graph"] = refused[name]
            lines.append(line)
            print(_summary(line), flush=True)
    return [{"part": "attention", **line} for line in lines]


def _summary(line: dict[str, Any]) -> str:
    head = f"{line['case']:<26}{line['mode']:<17}{line['provider']:<39}"
    if "ms" not in line:
        return f"{head}no figure: {line.get('failed') or line['relative_error']}"
    ratio = f"  flex/it {line['flex_over_it']:.3f}" if "flex_over_it" in line else ""
    figures = f"{line['ms']:>9.4f} ms, from Python {line['ms_launched']:>9.4f} {line['tflop_per_s']:>6.0f} TFLOP/s"
    return f"{head}{figures}{ratio}"


def wall(call: Callable[[], Any], device: torch.device, repeats: int = 30) -> float:
    """Median milliseconds until the result of one call is there, by the host's clock."""
    samples = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(1e3 * (time.perf_counter() - began))
    return statistics.median(samples[3:])


def measure_preparation(layout: Layout, device: torch.device) -> list[dict[str, Any]]:
    """The cost of a new topology before attention starts, from segment ids and visibility on the device."""
    torch._dynamo.reset()
    problem = Problem(layout, device)
    flex = Flex(problem)
    calls: dict[str, Callable[[], Any]] = {
        "topology_blocks": lambda: topology_blocks(problem.segment_ids, problem.segment_visibility),
        "topology_blocks, then flex's mask": flex.new_lists,
        "create_block_mask, compiled": lambda: flex.created(flex.create),
        "create_block_mask": lambda: flex.created(create_block_mask),
        "dense mask": lambda: visible_pairs(problem.segment_ids, problem.segment_visibility),
    }
    lines = []
    for name, call in calls.items():
        line = {"part": "preparation", "case": layout.label, "mode": "preparation", "provider": name}
        line |= {"length": layout.length, "segments": len(layout.segments)}
        try:
            line["ms_launched"] = _rounded(interleaved({name: call}, 1, device)[name][0])
            line["ms_wall"] = _rounded(wall(call, device))
            if device.type == "cuda" and name == "topology_blocks":
                line["ms"] = _rounded(interleaved({name: captured(call)}, 1, device)[name][0])
        except torch.OutOfMemoryError:
            line["out_of_memory"] = True
        release(device)
        lines.append(line)
        print(" ".join(f"{key}={value}" for key, value in line.items() if key not in ("part", "mode")), flush=True)
    return lines


def measure_builder(unit: int, device: torch.device) -> list[dict[str, Any]]:
    """The host's share: tokens to segments and positions, and these to the device."""
    lines = []
    for label, paths, length, ends in (("16k, 8 paths", 8, 1536, 2048), ("32k, 16 paths", 16, 1792, 2048)):
        ids, token_ids = sample_ids(paths, max(8, length // unit), max(8 + 5 * paths, ends // unit))
        build = partial(Topology.from_token_ids, ids, "multiverse", token_ids)
        topology = build()

        def moved(topology: Topology = topology) -> Any:
            return [x.to(device) for x in Topology.stack([topology])]

        for name, call in (("Topology.from_token_ids", build), ("Topology.stack, to the device", moved)):
            line = {"part": "builder", "case": label, "mode": "host", "provider": name, "length": len(ids)}
            line["ms_wall"] = _rounded(wall(call, device))
            lines.append(line)
            print(f"{label:<26}{name:<39}{line['ms_wall']:>9.3f} ms by the host's clock", flush=True)
    return lines


# Picture


def draw(path: Path) -> None:
    """Rates by case, and the time each mode takes over the bars, in a PNG beside the results file."""
    pyplot = load_pyplot()
    if pyplot is None:
        return

    lines = [line for line in read(path) if line["part"] == "attention"]
    if not lines:
        return
    modes = [mode for mode in MODES if any(line["mode"] == mode for line in lines)]
    names = [name for name in PROVIDERS if any(line["provider"] == name for line in lines)]
    figure, axes = pyplot.subplots(len(modes), 1, figsize=(17, 4.2 * len(modes)), squeeze=False, layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        here = [line for line in lines if line["mode"] == mode]
        cases = list(dict.fromkeys(line["case"] for line in here))
        density = {line["case"]: line["visible_of_causal"] for line in here}
        width = 0.86 / len(names)
        for number, name in enumerate(names):
            found = {line["case"]: line for line in here if line["provider"] == name}
            places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(cases))]
            heights = [found.get(case, {}).get("tflop_per_s", 0) for case in cases]
            hatch = "//" if PROVIDERS[name].topology == "none" else None
            bars = axis.bar(places, heights, width, label=name, color=colours[number], hatch=hatch)
            shown = [f"{found[case]['ms']:.3g}" if "ms" in found.get(case, {}) else "–" for case in cases]
            axis.bar_label(bars, shown, fontsize=6, padding=1, rotation=90)
        ticks = [f"{case}\n{100 * density[case]:.0f} % of causal" for case in cases]
        axis.set_xticks(range(len(cases)), ticks, fontsize=8)
        axis.set_ylabel("TFLOP/s on visible pairs")
        axis.set_title(f"{mode} (over the bars: ms; hatched: causal, another function)", fontsize=10)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    first = lines[0]
    versions = f"{first['device']}, torch {first['torch']}, triton {first['triton']}"
    figure.suptitle(f"Topology attention, batch 1, heads of {WIDTH}, bfloat16: {versions}", fontsize=11)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    options = common_options(__doc__, "topology_attention.jsonl and .png")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options.add_argument("--cases", nargs="+", help="only cases whose label holds one of these texts")
    options.add_argument("--only", nargs="+", help="only providers whose name holds one of these texts")
    options.add_argument("--seconds", type=float, default=600, help="start no new case after so many")
    options.add_argument("--tiny", action="store_true", help="short sequences, to see that the benchmark runs")
    options.add_argument("--draw", action="store_true", help="only draw the picture of the results that are there")
    arguments = options.parse_args(argv)
    path = arguments.output / "topology_attention.jsonl"
    if arguments.draw:
        draw(path)
        return
    start, device = time.perf_counter(), torch.device(arguments.device)
    environment = describe_machine(device, arguments.commit)
    unit = 64 if arguments.tiny else 1
    cases = [x for x in layouts(unit) if arguments.cases is None or any(text in x.label for text in arguments.cases)]
    # A graph can be captured on any stream but the default one.
    stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
    with stream:
        for part in arguments.parts:
            if part == "builder":
                write(path, [{**line, **environment} for line in measure_builder(unit, device)], IDENTITY)
                continue
            for layout in cases:
                if time.perf_counter() - start > arguments.seconds:
                    print(f"{part}, {layout.label}: not begun, --seconds are over", flush=True)
                    continue
                began = time.perf_counter()
                try:
                    if part == "attention":
                        lines = measure(layout, arguments.modes, arguments.only, device)
                    else:
                        lines = measure_preparation(layout, device)
                except torch.OutOfMemoryError as error:
                    print(f"{part}, {layout.label}: left out, {str(error).splitlines()[0]}", flush=True)
                    continue
                print(f"{part}, {layout.label}: took {time.perf_counter() - began:.0f} s", flush=True)
                write(path, [{**line, **environment} for line in lines], IDENTITY)
                release(device)
    draw(path)


if __name__ == "__main__":
    main()
