"""What does training a STEM feed-forward cost beside the dense one, with sparse gradients of the table?

    python -m benchmarks.stem_train [--parts backward step] [--output FOLDER]

- backward: of ``silu(gate) * table[ids]`` alone, the gradients of gate and table, at the 1B shape;
- step: forward, backward and optimiser of one feed-forward block at 16,384 tokens: the dense SwiGLU block, compiled,
  with fused AdamW, against STEM with sparse gradients and `RowSparseAdamW`, and against STEM with dense gradients.

Ids follow Zipf's law (exponent 1). `bfloat16`: all weights and tables in bfloat16; `mixed`: float32 under autocast.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, describe_machine, time_interleaved
from benchmarks.plot import load_pyplot
from benchmarks.stem_gate import zipf_ids
from hf_efficient.kernels.stem_gate.api import stem_gate
from hf_efficient.modeling.decoder.decoder_layer import GatedMLP
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemMLP
from hf_efficient.modeling.stem.token_rows import TokenRows
from hf_efficient.training.row_sparse_adamw import RowSparseAdamW

TOKENS, HIDDEN, WIDTH, ROWS = 16384, 2048, 8192, 128256
ROUNDS, REPEATS = 7, 4


def _config(**options: Any) -> StemConfig:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "vocab_size": ROWS}
    return StemConfig(**sizes, num_hidden_layers=2, num_attention_heads=32, stem_layers=[1], **options)


def _time(call: Callable[[], Any]) -> tuple[float, float]:
    """Median milliseconds of a call, queued behind others, and the spread between rounds."""
    samples = time_interleaved({"call": call}, ROUNDS, REPEATS, warm_up=2)["call"]
    return statistics.median(samples), max(samples) - min(samples)


# The gated product alone


def _eager(gate: Tensor, table: Tensor, ids: Tensor, sparse: bool = False) -> Tensor:
    return F.silu(gate) * F.embedding(ids, table, sparse=sparse)


def backward(device: torch.device) -> Iterator[dict[str, Any]]:
    """The backward pass alone: the autograd graph is retained and run again."""
    ids = zipf_ids(TOKENS, ROWS, torch.Generator(device).manual_seed(0))
    gate = torch.randn(TOKENS, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(ROWS, WIDTH, device=device, dtype=torch.bfloat16)
    dout = torch.randn_like(gate)
    embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    table = embedding.weight

    def ours() -> Tensor:
        tokens = TokenRows(ids)
        return stem_gate(gate, tokens.rows(embedding), tokens.slots)

    forwards = {
        "PyTorch": lambda: _eager(gate, table, ids),
        "PyTorch, sparse": lambda: _eager(gate, table, ids, sparse=True),
        "dense": lambda: stem_gate(gate, table, ids),
        "sparse": ours,
    }
    reference: dict[str, Tensor] = {}
    for name, forward in forwards.items():
        out = forward()

        def run(out: Tensor = out) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, (gate, table), dout, retain_graph=True)

        dgate, dtable = run()
        found = dtable.coalesce().to_dense() if dtable.is_sparse else dtable
        reference = reference or {"gate": dgate.clone(), "table": found.clone()}
        errors = {
            "gate": ((dgate - reference["gate"]).norm() / reference["gate"].norm()).item(),
            "table": ((found - reference["table"]).norm() / reference["table"].norm()).item(),
        }
        del dgate, dtable, found
        ms, spread = _time(run)
        yield {"part": "backward", "name": name, "ms": ms, "spread": spread, "difference": max(errors.values())}
        del out


# The block


def _blocks(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any, bool]]]]:
    """Name, and a function that gives module, optimiser, and whether it takes token ids."""

    def make(kind: type[nn.Module], **options: Any) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            module = kind(_config(**options)).to(dtype)
        if isinstance(module, StemMLP):
            nn.init.normal_(module.stem_embed.weight, std=1.0)
        return module

    fused = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}

    def dense(compiled: bool) -> tuple[nn.Module, Any, bool]:
        module = make(GatedMLP)
        optimizer = torch.optim.AdamW(module.parameters(), **fused)
        return (torch.compile(module) if compiled else module), optimizer, False

    def stem(sparse: bool) -> tuple[nn.Module, Any, bool]:
        module = make(StemMLP, stem_sparse_grad=sparse)
        tables = {"params": [module.stem_embed.weight], "weight_decay": 0.0}
        others = {"params": [*module.gate_proj.parameters(), *module.down_proj.parameters()]}
        return module, (RowSparseAdamW if sparse else torch.optim.AdamW)([others, tables], **fused), True

    yield "dense SwiGLU, compiled, fused AdamW", lambda: dense(True)
    yield "dense SwiGLU, eager, fused AdamW", lambda: dense(False)
    yield "STEM, sparse gradients, RowSparseAdamW", lambda: stem(True)
    yield "STEM, dense gradients, fused AdamW", lambda: stem(False)


def step(device: torch.device) -> Iterator[dict[str, Any]]:
    batches = [zipf_ids(TOKENS, ROWS, torch.Generator(device).manual_seed(seed))[None] for seed in range(4)]
    for dtype_name, dtype in (("bfloat16", torch.bfloat16), ("mixed", torch.float32)):
        for name, build in _blocks(device, dtype):
            found = {"part": "step", "dtype": dtype_name, "name": name}
            try:
                yield {**found, **_measure_block(build, batches, autocast=dtype == torch.float32)}
            except torch.OutOfMemoryError:
                yield {**found, "out_of_memory": True}
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()


def _measure_block(
    build: Callable[[], tuple[nn.Module, Any, bool]], batches: list[Tensor], autocast: bool
) -> dict[str, float]:
    """Milliseconds of a whole step, and of its forward pass alone; the most memory that a step took."""
    module, optimizer, takes_ids = build()
    sparse = takes_ids and module.stem_embed.sparse
    x = torch.randn(1, TOKENS, HIDDEN, device=batches[0].device, dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn_like(x)
    order = itertools.cycle(batches)

    def forward() -> Tensor:
        ids = next(order)
        with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            return module(x, TokenRows(ids) if sparse else ids) if takes_ids else module(x)

    def train() -> None:
        forward().backward(dout)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None

    torch.cuda.reset_peak_memory_stats()
    ms, spread = _time(train)
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"ms": ms, "spread": spread, "forward_ms": _time(forward)[0], "peak_gb": peak}


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parts", nargs="+", choices=("backward", "step"), default=["backward", "step"])
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--commit", help="commit to record where the checkout has no .git")
    arguments = options.parse_args(argv)
    device = torch.device("cuda")
    environment = describe_machine(device, arguments.commit)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "stem_train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["part"] not in arguments.parts]
    for part in arguments.parts:
        for found in {"backward": backward, "step": step}[part](device):
            found = {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}
            lines.append({**found, "tokens": TOKENS, **environment})
            print(" ".join(f"{k}={v}" for k, v in found.items()), flush=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw(lines, arguments.output / "stem_train.png")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Bars of each part."""
    pyplot = load_pyplot()
    if pyplot is None:
        return

    groups = [
        ("backward of the gated product, bfloat16", [x for x in lines if x["part"] == "backward"]),
        *((f"step of a block, {name}", [x for x in lines if x.get("dtype") == name]) for name in ("bfloat16", "mixed")),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 3.2), layout="constrained")
    for axis, (title, here) in zip(axes, groups, strict=True):
        names = [line["name"] + (" (out of memory)" if line.get("out_of_memory") else "") for line in here]
        bars = axis.barh(names, [line.get("ms", 0) for line in here], color="tab:blue")
        axis.bar_label(bars, [f"{line['ms']:.2f}" if "ms" in line else "" for line in here], fontsize=8, padding=2)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("ms")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
