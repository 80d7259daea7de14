"""How fast does a 1B Llama generate, here and in transformers, and how far is that from what its bytes allow?

    python -m benchmarks.generation [--parts step generate decode prefill] [--providers TEXT ...] [--output FOLDER]

Four questions, one line of JSON for each cell and provider; a cell that is in the results file already is not measured
again, so an interrupted run goes on where it stopped:

- step: one decoding step at position 2048 of a cache of 2304, batch 1 and 32;
- generate: `generate` end to end, 512 prompt tokens and up to 1024 new ones, first and second call;
- decode: 32 steps, by batch and context;
- prefill: time to the first token's logits, by batch and context.

The floor counts each weight and each stored key and value once, at 3.0 TB/s. Weights are random: speed does not see it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.harness import RESULTS, describe_machine, time_interleaved
from benchmarks.plot import load_pyplot
from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.modeling.decoder.decode_cache import DecodeCache
from hf_efficient.modeling.decoder.decode_step import DecodeStep
from hf_efficient.modeling.decoder.graph_capture import step_signature
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM

BYTES_PER_SECOND = 3.0e12
BATCHES, CONTEXTS = (1, 8, 32, 64), (1024, 8192, 32768)
STEPS = 32
PROMPT, NEW = 512, 1024
# At its defaults transformers takes a minute for what a compiled loop does in seconds, so it gets fewer tokens.
NEW_AT_DEFAULTS = 64
SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def models(device: torch.device) -> tuple[LlamaForCausalLM, EfficientDecoderForCausalLM]:
    """Stock and ours, of one set of weights in one memory."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    with torch.device(device):
        stock = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ours = EfficientDecoderForCausalLM(decoder_config(config)).to(torch.bfloat16).eval()
    ours.load_state_dict(stock.state_dict(), assign=True)
    ours.tie_weights()
    return stock, ours


def floor_ms(model: LlamaForCausalLM, batch: int, context: int) -> float:
    """Least time of a decoding step: all weights and the filled part of the cache, read once."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    cache = 2 * batch * context * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return 1e3 * (weights + cache) / BYTES_PER_SECOND


# Steps


def fill(cache: Any, config: LlamaConfig, batch: int, context: int, device: torch.device) -> None:
    """Put `context` random keys and values into a cache, layer by layer."""
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
        cache.update(keys, values, layer)


Step = Callable[[], Any]


def stock_step(model: LlamaForCausalLM, forward: Callable, cache: Any, batch: int, context: int) -> Step:
    """A step of transformers at a fixed position; on a static cache its length is set back each time."""
    device = model.device
    ids = torch.randint(3, SHAPE["vocab_size"], (batch, 1), device=device)
    position = torch.full((batch, 1), context, device=device)

    def step() -> Tensor:
        if isinstance(cache, StaticCache):
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)
        inputs = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, position_ids=position, use_cache=True, logits_to_keep=1
        )
        return forward(**inputs).logits

    return step


def captured(step: Step) -> Step:
    """The step in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # The graph reads tensors that only the step holds on to.
    return lambda: (graph.replay(), step)


def decode_steps(
    name: str, stock: LlamaForCausalLM, ours: EfficientDecoderForCausalLM, batch: int, context: int, capacity: int
) -> Step:
    """A callable that makes one step at `context`, for the provider `name`."""
    device = stock.device
    if name.startswith("hf_efficient"):
        cache = DecodeCache(ours.config, batch, capacity, torch.bfloat16, device)
        fill(cache, stock.config, batch, context, device)
        step = DecodeStep(cache, set(ours.config.layer_types), padded=False)
        step.reset(context, torch.full((batch,), context, device=device), None)
        step.tokens.random_(3, SHAPE["vocab_size"])
        if name.endswith("eager"):
            return lambda: (step.run(ours, cache), cache)
        step.capture(ours, cache, step_signature(ours))
        return lambda: (step.replay(), cache)
    if name == "transformers eager":
        cache = DynamicCache(config=stock.config)
        fill(cache, stock.config, batch, context, device)
        return stock_step(stock, stock, cache, batch, context)
    cache = StaticCache(config=stock.config, max_cache_len=capacity)
    fill(cache, stock.config, batch, context, device)
    if name == "transformers graph":
        return captured(stock_step(stock, stock, cache, batch, context))
    forward = stock.get_compiled_call(CompileConfig())
    return stock_step(stock, forward, cache, batch, context)


def time_steps(step: Step, steps: int, rounds: int = 5) -> float:
    """Milliseconds of a step: median over rounds, after one round that does not count."""
    return statistics.median(time_interleaved({"step": step}, rounds, steps)["step"])


# Parts: each yields the cells it is made of, as (what identifies the cell, providers, how to measure one)

STEP_PROVIDERS = (
    "hf_efficient",
    "hf_efficient eager",
    "transformers graph",
    "transformers eager",
    "transformers static",
)
Cell = tuple[dict[str, int], Sequence[str], Callable[[str], dict[str, float]]]


def step_cells(stock: LlamaForCausalLM, ours: EfficientDecoderForCausalLM) -> Iterator[Cell]:
    for batch in (1, 32):

        def measure(name: str, batch: int = batch) -> dict[str, float]:
            step = decode_steps(name, stock, ours, batch, 2048, 2304)
            return {"ms": time_steps(step, STEPS), "floor_ms": floor_ms(stock, batch, 2048)}

        yield {"batch": batch, "context": 2048}, STEP_PROVIDERS, measure


def decode_cells(stock: LlamaForCausalLM, ours: EfficientDecoderForCausalLM) -> Iterator[Cell]:
    names = ("hf_efficient", "transformers graph", "transformers eager", "transformers static")
    for context in CONTEXTS:
        for batch in BATCHES:

            def measure(name: str, batch: int = batch, context: int = context) -> dict[str, float]:
                step = decode_steps(name, stock, ours, batch, context, context + 6 * STEPS + 64)
                rounds = 1 if name == "transformers eager" else 3
                return {"ms": time_steps(step, STEPS, rounds), "floor_ms": floor_ms(stock, batch, context)}

            yield {"batch": batch, "context": context}, names, measure


def prefill_cells(stock: LlamaForCausalLM, ours: EfficientDecoderForCausalLM) -> Iterator[Cell]:
    for context in CONTEXTS:
        for batch in BATCHES:

            def measure(name: str, batch: int = batch, context: int = context) -> dict[str, float]:
                ids = torch.randint(3, SHAPE["vocab_size"], (batch, context), device=stock.device)
                model: Any = ours if name == "hf_efficient" else stock
                options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}

                def prefill() -> None:
                    if name == "hf_efficient":
                        cache: Any = DecodeCache(ours.config, batch, context + STEPS, torch.bfloat16, ours.device)
                    elif name == "transformers static":
                        cache = StaticCache(config=stock.config, max_cache_len=context + STEPS)
                    else:
                        cache = DynamicCache(config=stock.config)
                    model(ids, past_key_values=cache, **options)

                return {"ms": time_steps(prefill, 1, rounds=1 if batch * context > 300_000 else 2)}

            yield {"batch": batch, "context": context}, ("hf_efficient", "transformers eager"), measure


def generate_cells(stock: LlamaForCausalLM, ours: EfficientDecoderForCausalLM) -> Iterator[Cell]:
    for batch in (1, 32):

        def measure(name: str, batch: int = batch) -> dict[str, float]:
            ids = torch.randint(3, SHAPE["vocab_size"], (batch, PROMPT), device=stock.device)
            model: Any = ours if name == "hf_efficient" else stock
            new = NEW_AT_DEFAULTS if name == "transformers eager" else NEW
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
            if name == "transformers static":
                options["cache_implementation"] = "static"
            times = []
            # The first call pays for compilers and captures, and gives two tokens: a prompt and a step.
            for tokens in (2, new, new):
                torch.cuda.synchronize()
                start = time.perf_counter()
                out = model.generate(ids, max_new_tokens=tokens, **options)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                assert out.shape == (batch, PROMPT + tokens)
            return {
                "ms": 1e3 * times[2] / new,
                "new_tokens": new,
                "first_tokens_s": times[0],
                "first_call_s": times[1],
                "second_call_s": times[2],
            }

        names = ("hf_efficient", "transformers eager", "transformers static")
        yield {"batch": batch, "prompt": PROMPT}, names, measure


PARTS = {"step": step_cells, "generate": generate_cells, "decode": decode_cells, "prefill": prefill_cells}


def release() -> None:
    """Free what the last cell left."""
    gc.collect()
    torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--providers", nargs="+", help="only providers whose name holds one of these texts")
    options.add_argument("--output", type=Path, default=RESULTS, help="folder for generation.jsonl and generation.png")
    options.add_argument("--commit", help="commit to record where the checkout has no .git")
    options.add_argument("--seconds", type=float, default=600, help="start no new cell after so many")
    arguments = options.parse_args(argv)
    start = time.perf_counter()
    device = torch.device("cuda")
    environment = describe_machine(device, arguments.commit)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "generation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    stock, ours = models(device)
    with torch.no_grad(), path.open("a", encoding="utf-8") as file:
        for part in arguments.parts:
            for cell, names, measure in PARTS[part](stock, ours):
                for name in names:
                    key = {"part": part, "provider": name, **cell}
                    known = any(all(line.get(k) == v for k, v in key.items()) for line in lines)
                    wanted = arguments.providers is None or any(text in name for text in arguments.providers)
                    if known or not wanted or time.perf_counter() - start > arguments.seconds:
                        continue
                    torch._dynamo.reset()
                    torch.cuda.reset_peak_memory_stats()
                    try:
                        found: dict[str, Any] = measure(name)
                        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                    except torch.OutOfMemoryError:
                        found = {"out_of_memory": True}
                    ours.free_captured_steps()
                    release()
                    found = {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}
                    line = {**key, **found, **environment}
                    lines.append(line)
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    print(" ".join(f"{k}={v}" for k, v in (key | found).items()), flush=True)
    draw(lines, arguments.output / "generation.png")


# Picture

_COLOURS = {
    "hf_efficient": "tab:orange",
    "transformers graph": "tab:green",
    "transformers static": "tab:blue",
    "transformers eager": "tab:grey",
    "hf_efficient eager": "tab:red",
}


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds by batch and context, one panel for each part, with the byte floor."""
    pyplot = load_pyplot()
    if pyplot is None:
        return

    parts = [part for part in PARTS if any(line["part"] == part for line in lines)]
    if not parts:
        return
    figure, axes = pyplot.subplots(len(parts), 1, figsize=(12, 3.6 * len(parts)), squeeze=False, layout="constrained")
    for axis, part in zip(axes[:, 0], parts, strict=True):
        here = [line for line in lines if line["part"] == part]
        size = "prompt" if part == "generate" else "context"
        cells = sorted({(line[size], line["batch"]) for line in here})
        names = [name for name in _COLOURS if any(line["provider"] == name for line in here)]
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            for place, cell in enumerate(cells):
                line = next((x for x in here if x["provider"] == name and (x[size], x["batch"]) == cell), None)
                if line is None:
                    continue
                x = place + (number - (len(names) - 1) / 2) * width
                if line.get("out_of_memory"):
                    place_on_axis = {"transform": axis.get_xaxis_transform(), "va": "bottom", "ha": "center"}
                    axis.text(x, 0.02, "out of memory", rotation=90, fontsize=6, color=_COLOURS[name], **place_on_axis)
                    continue
                bar = axis.bar(x, line["ms"], width, color=_COLOURS[name], label=name if place == 0 else None)
                axis.bar_label(bar, [f"{line['ms']:.3g}"], fontsize=6, padding=1)
        for place, cell in enumerate(cells):
            floor = next((x["floor_ms"] for x in here if (x[size], x["batch"]) == cell and "floor_ms" in x), None)
            if floor:
                axis.plot([place - 0.42, place + 0.42], [floor, floor], color="black", linewidth=1.2)
        axis.set_yscale("log")
        axis.set_xticks(range(len(cells)), [f"{batch} × {length}" for length, batch in cells], fontsize=8)
        unit = "ms a token" if part == "generate" else "ms a step" if part != "prefill" else "ms"
        axis.set_ylabel(unit)
        axis.set_title(f"{part}: batch × {size} (black: byte floor at 3.0 TB/s)", fontsize=10)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    first = lines[0]
    figure.suptitle(
        f"Llama shape of 1B, bfloat16: {first['device']}, torch {first['torch']}, "
        f"transformers {first['transformers']}, triton {first['triton']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
