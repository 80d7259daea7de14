"""What does a training step of a 1B Llama cost with BHyT in place of RMSNorm, and what without any norm?

    PYTHONPATH=FOLDER_WITH_LIGER python -m benchmarks.bhyt_train [--parts eager compiled] [--only TEXT ...]

One step: forward, backward and fused AdamW, batch 4 x 2048, weights and moments in bfloat16. All providers share one
set of parameters and moments in one process, and are timed interleaved. "No norms" is the limit: stock's decoder with
norms that do nothing. `compiled` compiles whole models with torch.compile, and starts no further one after `--seconds`.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.harness import common_options, describe_machine, times, write
from benchmarks.llama_norms import (
    SHAPE,
    TINY,
    draw,
    has_liger,
    lines_of,
    llama,
    median_of,
    ours,
    with_norms,
)
from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig

PARTS = ("eager", "compiled")
BATCH = 4, 2048
SHOWN = "1B Llama, batch 4 x 2048"
ROUNDS, REPEATS = 10, 2
STOCK, LIMIT = "stock", "stock's decoder, no norms"
# Compiling one takes half a minute.
COMPILED = (STOCK, "stock's decoder, F.rms_norm", LIMIT, "ours, BHyT exact", "ours, BHyT approximate, carried")

Build = Callable[[LlamaForCausalLM], Any]


def providers(shape: dict[str, Any], length: int) -> dict[str, tuple[str, Build]]:
    """By name: what is computed, and how the model is made of the shared weights."""

    def bhyt(site: str, carried: bool, final: str = "bhyt") -> Build:
        fields = {"bhyt_second_site": site, "bhyt_seq_len": length, "carry_residual": carried, "bhyt_final": final}
        fields["bhyt_lambda_input"] = 1.0  # as in stock's decoder, so that exact ones compute the same
        return lambda base: ours(base, BhytConfig(**shape, **fields))

    def rms(carried: bool = False, without_norms: bool = False) -> Build:
        config = EfficientDecoderConfig(**shape, carry_residual=carried)
        return lambda base: ours(base, config, without_norms)

    apart, post, both = "additions apart", "addition after attention fused", "both additions fused"
    found: dict[str, tuple[str, Build]] = {
        STOCK: ("transformers' Llama as it is", lambda base: with_norms(base, "stock")),
        "stock's decoder, F.rms_norm": (f"RMSNorm, {apart}", lambda base: with_norms(base, "F.rms_norm")),
        "stock's decoder, Liger": (f"RMSNorm, {apart}", lambda base: with_norms(base, "Liger")),
        "stock's decoder, Liger, carried": (f"RMSNorm, {both}", lambda base: with_norms(base, "Liger", "both")),
        "stock's decoder, BHyT exact": (f"BHyT at all norms, {apart}", lambda base: with_norms(base, "BHyT, exact")),
        LIMIT: (f"no norms, {apart}", lambda base: with_norms(base, None)),
        "ours, RMSNorm": (f"RMSNorm, {apart}, PyTorch's steps", rms()),
        "ours, BHyT exact": (f"BHyT, exact, the final norm too, {post}", bhyt("exact", False)),
        "ours, BHyT exact, carried": (f"BHyT, exact, the final norm too, {both}", bhyt("exact", True)),
        "ours, BHyT approximate": (f"BHyT, second site estimated, final norm exact, {post}", bhyt("approx", False)),
        "ours, BHyT approximate, carried": (
            f"BHyT, second site estimated, final norm exact, {both}",
            bhyt("approx", True),
        ),
        "ours, BHyT approximate, carried, RMSNorm last": (
            f"BHyT, second site estimated, final RMSNorm in PyTorch's steps, {both}",
            bhyt("approx", True, "rms"),
        ),
        "ours, no norms": (f"no norms, {apart}", rms(without_norms=True)),
    }
    return found if has_liger() else {name: entry for name, entry in found.items() if "Liger" not in name}


def training_step(model: Any, call: Any, ids: Tensor, moments: dict[Tensor, Any]) -> Callable[[], Tensor]:
    """A step of `model` through `call`, with AdamW; moments of shared parameters are shared too."""
    # A learning rate at which no other provider's step spoils the weights.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)
    optimizer.state.update({p: moments[p] for p in model.parameters() if p in moments})

    def step() -> Tensor:
        loss = call(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step()
    moments.update(optimizer.state)
    return step


def measure(part: str, names: Sequence[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(arguments.device)
    shape, (batch, length) = (TINY, (2, 32)) if arguments.tiny else (SHAPE, BATCH)
    found = providers(shape, length)
    base = llama(shape, device)
    ids = torch.randint(3, shape["vocab_size"], (batch, length), device=device)
    moments: dict[Tensor, Any] = {}
    models = {name: found[name][1](base).train() for name in names if name in found}
    for model in models.values():  # transformers registers a class at its first call, and compiled code looks there
        model(ids[:, :16], use_cache=False)
    steps: dict[str, Callable[[], Tensor]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        if part == "compiled" and time.perf_counter() - arguments.began > arguments.seconds:
            print(f"{part}: {name} is left out, for want of time", flush=True)
            continue
        call = torch.compile(model, dynamic=False) if part == "compiled" else model
        began = time.perf_counter()
        steps[name] = training_step(model, call, ids, moments)
        notes[name] = {"first_step_s": round(time.perf_counter() - began, 2)}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        notes[name]["loss"] = round(steps[name]().item(), 4)
        if device.type == "cuda":
            notes[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    samples = times(steps, ROUNDS, REPEATS, device, warm_up=2)
    computes = {name: found[name][0] for name in steps}
    return lines_of(part, samples, computes, median_of(samples, STOCK), median_of(samples, LIMIT), notes)


def main(argv: Sequence[str] | None = None) -> None:
    options = common_options(__doc__, "bhyt_train.jsonl and bhyt_train.png")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--only", nargs="+", help="only providers whose name holds one of these texts")
    options.add_argument("--seconds", type=float, default=150, help="compile nothing more after so many")
    options.add_argument("--tiny", action="store_true", help="a tiny model, to see that the benchmark runs")
    options.add_argument("--draw", action="store_true", help="only draw the picture of the results that are there")
    arguments = options.parse_args(argv)
    arguments.began = time.perf_counter()
    environment = describe_machine(torch.device(arguments.device), arguments.commit)
    environment |= {"shape": "tiny" if arguments.tiny else SHOWN}
    path = arguments.output / "bhyt_train.jsonl"
    for part in () if arguments.draw else arguments.parts:
        names = COMPILED if part == "compiled" else tuple(providers(TINY, 32))
        wanted = [name for name in names if arguments.only is None or any(text in name for text in arguments.only)]
        write(path, [{**line, **environment} for line in measure(part, wanted, arguments)])
        gc.collect()
        torch.cuda.empty_cache()
    draw(path, dict.fromkeys(PARTS, LIMIT), f"A training step of a {SHOWN}, bfloat16, fused AdamW (black: no norms)")


if __name__ == "__main__":
    main()
