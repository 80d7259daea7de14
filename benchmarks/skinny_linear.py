"""How close do the linear layers of a decoding step come to the memory's speed, beside PyTorch's matrix products?

    python -m benchmarks.skinny_linear [--cases TEXT] [--output FOLDER]
    python -m benchmarks.skinny_linear --sweep [--cases TEXT] [--seconds N]

The second form times candidate configurations instead and prints the best for each shape: material for
`kernels/skinny_linear/configs.py`. Shapes are the layers of a 1B Llama and of SmolLM2-135M.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from benchmarks.harness import ROTATION_BYTES, Case, Provider, compiled, parser, run
from benchmarks.plot import plot
from hf_efficient.kernels.contract import Arguments, relative_error
from hf_efficient.kernels.skinny_linear.configs import LaunchConfig, launch_config, row_class
from hf_efficient.kernels.skinny_linear.record import RECORD

# Rows of each weight, K, whether gated, whether a residual is added. Ordered by their share of a step.
LAYERS: dict[str, tuple[tuple[int, ...], int, bool, bool]] = {
    "1B gate, up": ((8192, 8192), 2048, True, False),
    "1B down": ((2048,), 8192, False, True),
    "1B q, k, v": ((2048, 512, 512), 2048, False, False),
    "1B o": ((2048,), 2048, False, True),
    "1B head 32k": ((32768,), 2048, False, False),
    "1B head 128k": ((128256,), 2048, False, False),
    "SmolLM2 gate, up": ((1536, 1536), 576, True, False),
    "SmolLM2 down": ((576,), 1536, False, True),
    "SmolLM2 q, k, v": ((576, 192, 192), 576, False, False),
    "SmolLM2 head": ((49152,), 576, False, False),
}
ROWS = (1, 8, 32, 64)

# What the sweep tries, by rows: block_n, block_k, warps, stages, splits.
VECTOR_TILES = ((1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192), (2, 4, 8), (1,), (1,))
MATRIX_TILES = ((16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5), (1, 2, 4, 8))
# Split-K pays where K is large and few programs would run otherwise.
SPLIT_DEPTH, SPLIT_PROGRAMS = 4096, (128, 256)
# Elements of a tile of the element-by-element kernel: less leaves lanes idle, more spills registers.
VECTOR_ELEMENTS = (2048, 16384)
SHARED_MEMORY = 220 * 1024


def draw(layer: str, rows: int, device: torch.device, seed: int) -> Arguments:
    """Arguments of one call."""
    sizes, depth, gated, added = LAYERS[layer]
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)

    return {
        "x": drawn(rows, depth),
        "weights": [drawn(size, depth).mul_(depth**-0.5) for size in sizes],
        "biases": None,
        "residual": drawn(rows, sum(sizes)) if added else None,
        "gated": gated,
    }


def cases(device: torch.device) -> list[Case]:
    found = []
    for layer, rows in itertools.product(LAYERS, ROWS):
        sizes, depth, _, _ = LAYERS[layer]
        shape = {"rows": rows, "outputs": sum(sizes), "depth": depth}
        drawn = functools.partial(draw, layer, rows, device)
        found.append(Case(f"{layer}, {rows} rows", "decode", shape, torch.bfloat16, drawn))
    return found


# The sweep


def candidates(layer: str, rows: int) -> Iterator[LaunchConfig]:
    """Configurations worth trying, the one in the table first."""
    sizes, depth, gated, _ = LAYERS[layer]
    padded, outputs = row_class(rows), sizes[0] if gated else sum(sizes)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    chosen = launch_config(padded, outputs, depth, 2, gated, capability)
    yield chosen
    for tile in itertools.product(*(VECTOR_TILES if padded == 1 else MATRIX_TILES)):
        config = LaunchConfig(*tile)
        block_n, block_k, warps, stages, splits = tile
        matrices = 2 if gated else 1
        elements = matrices * block_n * block_k
        if config == chosen or block_k >= 2 * depth:
            continue
        if padded == 1:
            # 32 to 128 elements of a tile for each thread: 64 to 256 bytes in flight.
            if not VECTOR_ELEMENTS[0] <= elements <= VECTOR_ELEMENTS[1] or not 32 <= elements // warps // 32 <= 128:
                continue
        else:
            tiles = stages * 2 * (elements + padded * block_k)
            programs = -(-outputs // block_n) * splits
            if tiles > SHARED_MEMORY or programs < min(64, outputs // 16) or (warps == 8 and block_n < 64):
                continue
            if splits > 1 and (
                gated
                or depth < SPLIT_DEPTH
                or block_n < 32
                or warps > 4
                or not SPLIT_PROGRAMS[0] <= programs <= SPLIT_PROGRAMS[1]
            ):
                continue
            # Fewer bytes in flight than this do not hide the memory latency.
            if stages * elements * 2 * min(programs, 132) < min(2**21, matrices * outputs * depth // 2):
                continue
        yield config


def launch_once(arguments: Arguments, config: LaunchConfig | None) -> torch.Tensor:
    """The operation without its checks and in the given configuration; in PyTorch's way where there is none."""
    if config is None:
        return RECORD.peers["eager"](**arguments)
    from hf_efficient.kernels.skinny_linear.triton_kernels import launch

    weights, residual = arguments["weights"], arguments["residual"]
    return launch(arguments["x"], weights, [None] * len(weights), residual, arguments["gated"], config)


def compile_candidate(layer: str, rows: int, config: LaunchConfig) -> str:
    """Leave the compiled kernel in Triton's cache on disk; returns what went wrong. Runs in a process of its own."""
    try:
        launch_once(draw(layer, rows, torch.device("cuda"), 0), config)
        torch.cuda.synchronize()
    except Exception as error:  # a tile too large for the device is no candidate
        return str(error).splitlines()[0][:100]
    return ""


Candidate = tuple[str, int, LaunchConfig]


def compiled_candidates(chosen: list[tuple[str, int]], seconds: float) -> dict[tuple[str, int], list[LaunchConfig]]:
    """The candidates of each case that could be compiled in time, by as many processes as there are processors."""
    tasks: list[Candidate] = [(*case, config) for case in chosen for config in candidates(*case)]
    workers = max(1, min(16, os.cpu_count() or 1))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(compile_candidate, *task): task for task in tasks}
    done, late = wait(futures, timeout=seconds)
    pool.shutdown(wait=True, cancel_futures=True)
    found: dict[tuple[str, int], list[LaunchConfig]] = {case: [] for case in chosen}
    for future, (layer, rows, config) in futures.items():  # in the order of submission: the table's first
        if future in done and not future.result():
            found[layer, rows].append(config)
        elif future in done:
            print(f"  {layer}, {rows} rows, {config}: {future.result()}")
    print(f"{len(done)} of {len(tasks)} configurations compiled, {len(late)} left out for lack of time", flush=True)
    return found


def time_rotation(calls: list[Callable[[], torch.Tensor]], device: torch.device) -> float:
    """Milliseconds of one call, replayed from a CUDA graph of all the calls; the best of five replays."""
    calls[0]()
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return 1e3 * (time.perf_counter() - start)
    calls = list(itertools.islice(itertools.cycle(calls), max(len(calls), 20)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = [call() for call in calls]  # kept, so that each call writes elsewhere
    graph.replay()
    best = float("inf")
    for _ in range(5):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        best = min(best, before.elapsed_time(after))
    del results
    return best / len(calls)


def sweep(device: torch.device, text: str, seconds: float) -> None:
    """Print the best configurations of each case, with that of the table and PyTorch's matrix product beside them."""
    chosen = [(layer, rows) for layer, rows in itertools.product(LAYERS, ROWS) if text in f"{layer}, {rows} rows"]
    by_case = (
        compiled_candidates(chosen, 0.7 * seconds)
        if device.type == "cuda"
        else {case: list(candidates(*case))[:2] for case in chosen}
    )
    print(f"{'case':<28}{'':>8}{'N x K, warps, stages, parts':>28}{'us':>9}{'GB/s':>7}")
    for (layer, rows), configs in by_case.items():
        first = draw(layer, rows, device, 0)
        cost = RECORD.forward_cost(first).bytes
        count = -(-ROTATION_BYTES // cost) if device.type == "cuda" else 1
        rotation = [first, *(draw(layer, rows, device, seed) for seed in range(1, min(count, 400)))]
        found: list[tuple[float, str, LaunchConfig | None]] = []
        for config in (None, *configs):
            calls = [functools.partial(launch_once, arguments, config) for arguments in rotation]
            note = "torch" if config is None else "table" if config == next(candidates(layer, rows)) else ""
            found.append((time_rotation(calls, device), note, config))
        found.sort(key=lambda each: each[0])
        for milliseconds, note, config in found[:4] + [each for each in found[4:] if each[1]]:
            tile = f"{config.block_n} x {config.block_k}, {config.num_warps}, {config.num_stages}" if config else ""
            tile += f", {config.splits}" if config else ""
            rate = cost / milliseconds / 1e6
            print(f"{f'{layer}, {rows} rows':<28}{note:>8}{tile:>28}{1e3 * milliseconds:>9.2f}{rate:>7.0f}")
        # A fast configuration must be right, too.
        best = next((config for _, _, config in found if config is not None), None)
        error = relative_error(launch_once(first, best), RECORD.reference(**first))
        print(f"  of {len(configs)}; relative error of the best {error:.1e}", flush=True)
        del rotation, first
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--sweep", action="store_true", help="time candidate configurations, and write no results")
    options.add_argument("--seconds", type=float, default=100.0, help="time limit of the sweep")
    arguments = options.parse_args(argv)
    device = torch.device(arguments.device)
    if arguments.sweep:
        # A graph can be captured on any stream but the default one.
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):
            sweep(device, arguments.cases, arguments.seconds)
        return
    eager = RECORD.peers["eager"]
    providers = [
        Provider("eager", lambda: eager),
        Provider("compile", compiled(eager)),
        Provider("triton", lambda: functools.partial(RECORD.api, backend="triton")),
    ]
    lines = run("skinny_linear", RECORD, cases(device), providers, arguments)
    plot(lines, "skinny_linear: the linear layers of a decoding step, bfloat16", arguments.output / "skinny_linear.png")


if __name__ == "__main__":
    main()
