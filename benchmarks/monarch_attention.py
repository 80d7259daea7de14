"""When is Monarch attention faster than softmax attention, and than the kernels of the Monarch-RT authors?

    python -m benchmarks.monarch_attention [--parts video training sequence start] [--authors FILE]

- video: the self-attention of Wan 2.1 (batch 1, 12 heads of 128, bfloat16, views of [B, N, H * D]), whole videos and
  one new chunk of 3 frames against 21 cached frames.
- training: forward with backward of the whole video.
- sequence: text and image encoders (batch 1, 12 heads of 64, float16), by sequence length.
- start: seconds until the first result of a process, compilation included, then for every key-value length of a video.

`--authors` names `wan/modules/monarch_attn.py` of a snapshot of Infini-AI-Lab/MonarchRT, whose autotuning takes more
than two minutes for each tiling. Softmax attention computes another function: it shows what a user would run instead.
A provider of Monarch attention whose result differs from the float64 reference gets no figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import common_options, describe_machine, read, times, write
from benchmarks.plot import load_pyplot
from hf_efficient.kernels.contract import relative_error
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout
from hf_efficient.kernels.monarch_attention.reference import monarch_attention as reference_monarch_attention

PARTS = ("video", "training", "sequence", "start")
IDENTITY = ("part", "case", "provider")
OURS = "monarch (ours)"
AUTHORS = "monarch (authors)"
SOFTMAX = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
FORWARD_BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT_BOUND = 2e-2
ROUNDS = 9
VIDEO_HEADS, VIDEO_DIM, SEQUENCE_HEADS, SEQUENCE_DIM = 12, 128, 12, 64
SIZES = {"480p": (30, 52), "720p": (45, 80)}
FRAMES, CHUNK = 21, 3
# (size, (f_tied, h_reduce, w_reduce), query frames)
VIDEO_CASES = (
    ("480p", (1, 1, 1), FRAMES),
    ("480p", (1, 2, 1), FRAMES),
    ("480p", (1, 1, 2), FRAMES),
    ("480p", (3, 1, 1), FRAMES),
    ("480p", (1, 1, 1), CHUNK),
    ("480p", (1, 2, 1), CHUNK),
    ("720p", (1, 1, 1), FRAMES),
    ("720p", (3, 1, 1), FRAMES),
)
TRAINING_CASES = (("480p", (1, 1, 1), FRAMES), ("480p", (1, 2, 1), FRAMES))
SEQUENCES = {1024: 32, 2048: 32, 4096: 64, 8192: 64, 16384: 128, 32768: 128}
# Heads whose result is compared with the reference, which takes minutes for all of them.
CHECKED_HEADS = 1

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape. `tokens` are those of the queries and of the keys."""

    part: str
    label: str
    shape: dict[str, int]
    layout: GridLayout | SequenceLayout
    tokens: tuple[int, int]
    dtype: torch.dtype

    def draw(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """q, k and v [1, H, N, D], views of [1, N, H * D]."""
        heads, dim = (VIDEO_HEADS, VIDEO_DIM) if isinstance(self.layout, GridLayout) else (SEQUENCE_HEADS, SEQUENCE_DIM)
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn((1, tokens, heads * dim), device=device, generator=generator)
            .to(self.dtype)
            .view(1, tokens, heads, dim)
            .transpose(1, 2)
            for tokens in (self.tokens[0], self.tokens[1], self.tokens[1])
        ]


def video_cases(part: str) -> list[Case]:
    """The cases of `video` or `training`."""
    cases = []
    for size, tiling, frames in VIDEO_CASES if part == "video" else TRAINING_CASES:
        height, width = SIZES[size]
        layout = GridLayout(height, width, *tiling)
        label = f"{size} {tiling}" + ("" if frames == FRAMES else f", {frames} new frames")
        shape = dict(zip(("f_tied", "h_reduce", "w_reduce"), tiling, strict=True)) | {"query_frames": frames}
        tokens = (frames * height * width, FRAMES * height * width)
        cases.append(Case(part, label, shape, layout, tokens, torch.bfloat16))
    return cases


def sequence_cases() -> list[Case]:
    """The cases of `sequence`."""
    return [
        Case(
            "sequence", str(length), {"length": length, "block_size": block}, SequenceLayout(block), (length, length),
            torch.float16,
        )
        for length, block in SEQUENCES.items()
    ]  # fmt: skip


def softmax(backend: SDPBackend) -> Attention:
    """Softmax attention with one of torch's kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return attend


def authors_module(path: Path) -> Any:
    """The authors' file as a module."""
    spec = importlib.util.spec_from_file_location("monarch_rt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def authors_attention(module: Any, layout: GridLayout) -> Attention:
    """The authors' function, which takes [B, N, H, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiling = (layout.f_tied, layout.h_reduce, layout.w_reduce, layout.height, layout.width)
        return module.monarch_attn(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *tiling).transpose(1, 2)

    return attend


def providers(case: Case, authors: Any) -> dict[str, Attention]:
    """Name -> attention: ours, softmax, and where the case allows it the authors'."""
    found: dict[str, Attention] = {OURS: partial(monarch_attention, layout=case.layout)}
    if authors is not None and case.label.startswith("480p") and case.shape.get("f_tied") == 1:
        whole = case.shape["query_frames"] == FRAMES and case.shape["w_reduce"] == 1
        if whole and (case.part == "video" or case.shape["h_reduce"] == 1):
            found[AUTHORS] = authors_attention(authors, case.layout)
    # One tiling shows softmax attention, which knows none.
    first = case.shape.get("f_tied", 1) == case.shape.get("h_reduce", 1) == case.shape.get("w_reduce", 1) == 1
    return found | ({name: softmax(backend) for name, backend in SOFTMAX.items()} if first else {})


# Measuring


def differentiated(attend: Attention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def expected(case: Case, inputs: list[Tensor]) -> Tensor:
    """The reference's output in float64 of the checked heads."""
    return reference_monarch_attention(*(x[:, :CHECKED_HEADS].double() for x in inputs), layout=case.layout)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of `call` captured in a CUDA graph, which costs no time of the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = call()
    return lambda: (graph.replay(), kept)


def measure(case: Case, device: torch.device, authors: Any) -> Iterator[dict[str, Any]]:
    """A line for each provider, all timed interleaved."""
    inputs = case.draw(device)
    training = case.part == "training"
    upstream = torch.randn_like(inputs[0]) if training else None
    # The reference of the gradients does not fit in memory at the size of a video; that of 720p takes minutes.
    wanted = expected(case, inputs) if not training and case.tokens[0] <= 40000 else None
    calls: dict[str, Callable[[], Any]] = {}
    lines: dict[str, dict[str, Any]] = {}
    for name, attend in providers(case, authors).items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        run = partial(differentiated, attend, inputs, upstream) if training else partial(attend, *inputs)
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        line = {"first_call_s": round(time.perf_counter() - began, 2)}
        if device.type == "cuda":
            run()
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if wanted is not None and "monarch" in name:
            error = relative_error(result[:, :CHECKED_HEADS], wanted)
            line["relative_error"] = float(f"{error:.3g}")
            if name == OURS and error > FORWARD_BOUND[case.dtype]:
                raise SystemExit(f"{case.label}: {name} differs from the reference by {error}")
        lines[name] = line
        calls[name] = captured(run) if device.type == "cuda" and not training else run
        del result
    repeats = 3 if isinstance(case.layout, GridLayout) else 30
    samples = times(calls, ROUNDS, repeats, device, warm_up=1)
    for name, found in samples.items():
        yield {
            "part": case.part,
            "case": case.label,
            "provider": name,
            **case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "ms": round(statistics.median(found), 4),
            "ms_min": round(min(found), 4),
            "ms_max": round(max(found), 4),
            **lines[name],
        }


def measure_start(device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds of the first call, and of the first calls with every other key-value length of a video."""
    height, width = SIZES["480p"]
    for tiling in ((1, 1, 1), (1, 2, 1)):
        layout = GridLayout(height, width, *tiling)
        for frames in range(CHUNK, FRAMES + 1, CHUNK):
            case = Case("start", "", {}, layout, (CHUNK * height * width, frames * height * width), torch.bfloat16)
            q, k, v = case.draw(device)
            began = time.perf_counter()
            monarch_attention(q, k, v, layout)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            yield {
                "part": "start",
                "case": f"480p {tiling}, {CHUNK} new frames against {frames}",
                "provider": OURS,
                "seconds": round(seconds, 3),
            }


# Drawing


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Two panels: video shapes as bars, sequences as curves by length."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    figure, (videos, sequences) = pyplot.subplots(1, 2, figsize=(15, 5.5), layout="constrained", width_ratios=(3, 2))
    names = [name for name in (OURS, AUTHORS, *SOFTMAX) if any(line["provider"] == name for line in lines)]
    shown = [line for line in lines if line["part"] in ("video", "training")]
    cases = list(dict.fromkeys((line["part"], line["case"]) for line in shown))
    for number, name in enumerate(names):
        found = {(line["part"], line["case"]): line["ms"] for line in shown if line["provider"] == name}
        places = [place + 0.2 * (number - 1.5) for place, case in enumerate(cases) if case in found]
        bars = videos.bar(places, [found[case] for case in cases if case in found], 0.2, label=name)
        videos.bar_label(bars, fmt="%.3g", fontsize=7)
        curve = sorted(
            (line["length"], line["ms"]) for line in lines if line["part"] == "sequence" and line["provider"] == name
        )
        if curve:
            sequences.plot(*zip(*curve, strict=True), marker="o", label=name)
    labels = [case + (" fwd+bwd" if part == "training" else "") for part, case in cases]
    videos.set_xticks(range(len(cases)), labels, rotation=20, ha="right", fontsize=8)
    if cases:
        videos.set_yscale("log")
    videos.set_ylabel("milliseconds")
    videos.set_title("Wan 2.1 self-attention: (f_tied, h_reduce, w_reduce)", fontsize=10)
    videos.legend(fontsize=8)
    sequences.set_xscale("log", base=2)
    if sequences.lines:
        sequences.set_yscale("log")
    sequences.set_xlabel("sequence length")
    sequences.set_title("Encoders: 12 heads of 64, one iteration", fontsize=10)
    sequences.legend(fontsize=8)
    first = lines[0]
    figure.suptitle(f"{first['device']}, torch {first['torch']}, triton {first['triton']}", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream on which graphs can be captured."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def main() -> None:
    options = common_options(__doc__, "monarch_attention.jsonl and monarch_attention.png")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--cases", default="", help="measure only the cases whose label holds this text")
    options.add_argument("--authors", type=Path, help="monarch_attn.py of a snapshot of Infini-AI-Lab/MonarchRT")
    arguments: argparse.Namespace = options.parse_args()
    device = torch.device(arguments.device)
    environment = describe_machine(device, arguments.commit)
    authors = authors_module(arguments.authors) if arguments.authors else None
    path = arguments.output / "monarch_attention.jsonl"
    with side_stream(device):
        # First, while nothing is compiled.
        if "start" in arguments.parts:
            write(path, [line | environment for line in measure_start(device)], IDENTITY)
        cases = [case for part in ("video", "training") if part in arguments.parts for case in video_cases(part)]
        cases += sequence_cases() if "sequence" in arguments.parts else []
        for case in cases:
            if arguments.cases not in case.label:
                continue
            for line in measure(case, device, authors):
                write(path, [line | environment], IDENTITY)
                error = line.get("relative_error", "")
                print(
                    f"{line['part']:9s} {line['case']:26s} {line['provider']:18s} {line['ms']:8.3f} ms  first call "
                    f"{line['first_call_s']} s  {line.get('peak_gib', '')} GiB  {error}",
                    flush=True,
                )
    draw(read(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
