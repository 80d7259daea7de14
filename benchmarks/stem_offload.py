"""What does a STEM model pay for keeping its tables in host memory?

    python -m benchmarks.stem_offload [--parts decode prefill memory] [--output FOLDER]
    python -m benchmarks.stem_offload --parts hits --tokenizer FOLDER --text FILE.jsonl      (needs no GPU)

- decode: a captured step of a 1B model with five tables of 128,256 rows, tables on the device and in host memory;
- prefill: a prompt of 16,384 tokens;
- memory: what the device holds with either;
- hits: which share of real text finds its rows in a cache of so many, by the policy of `modeling/stem/row_cache.py`.

Ids follow Zipf's law (exponent 1) where it is speed that is measured; hits need text, and count what really comes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import SHAPE as LLAMA_1B
from benchmarks.generation import fill
from benchmarks.harness import RESULTS, describe_machine, time_interleaved
from benchmarks.plot import load_pyplot
from benchmarks.stem_gate import zipf_ids
from hf_efficient.modeling.decoder.decode_cache import DecodeCache
from hf_efficient.modeling.decoder.decode_step import DecodeStep
from hf_efficient.modeling.decoder.graph_capture import step_signature
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM
from hf_efficient.modeling.stem.row_cache import FrequencyPolicy

SHAPE: dict[str, Any] = {**LLAMA_1B, "vocab_size": 128256}
CONTEXT, STEPS, ROUNDS = 2048, 32, 9
BATCHES = (1, 8, 32)
PROMPT = 16384
CACHE_ROWS = 2048
VARIANTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"stem_offload": "cpu"},
    "host, cache of 2048 rows": {"stem_offload": "cpu", "stem_cache_rows": CACHE_ROWS},
    "host, through a buffer": {"stem_offload": "disk"},  # as from a file: pages that the device cannot read
}


def build(device: torch.device) -> dict[str, StemForCausalLM]:
    """The variants, of one set of weights: on the device in one memory, and the tables on the host in another."""
    torch.manual_seed(0)
    resident = _model(device)
    with torch.no_grad():
        for parameter in resident.parameters():
            parameter.normal_(std=0.02)
    state = resident.state_dict()
    on_host = {name: tensor.cpu() for name, tensor in state.items() if "stem_embed" in name}
    models = {"resident": resident}
    for name, options in VARIANTS.items():
        if name != "resident":
            models[name] = _model(torch.device("meta"), **options)
            for layer, module in models[name].named_modules():
                if module.__class__.__name__ == "StemTable" and module.weight is None:
                    rows = on_host[f"{layer}.weight"].clone()  # a memory of its own, which stays unpinned
                    module.weight = torch.nn.Parameter(rows, requires_grad=False)
            own = {} if options.get("stem_offload") == "disk" else on_host
            shared = {key: tensor for key, tensor in state.items() if "stem_embed" not in key}
            models[name].load_state_dict({**shared, **own}, assign=True, strict=False)
            models[name].tie_weights()
            models[name].model.rotary_emb = resident.model.rotary_emb
    for model in models.values():
        model.requires_grad_(False)
    return models


def _model(device: torch.device, **options: Any) -> StemForCausalLM:
    with torch.device(device):
        return StemForCausalLM(StemConfig(**SHAPE, **options)).to(torch.bfloat16).eval()


def _lines(part: str, cell: dict[str, Any], samples: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    base = statistics.median(samples["resident"])
    for name, values in samples.items():
        ms = statistics.median(values)
        yield {"part": part, **cell, "variant": name, "ms": round(ms, 5), "over_resident": round(ms / base - 1, 4)}


def decode(models: dict[str, StemForCausalLM], device: torch.device) -> Iterator[dict[str, Any]]:
    """A captured step; one through a buffer cannot be captured, so it is left out."""
    for batch in BATCHES:
        tokens = zipf_ids(batch * 256, SHAPE["vocab_size"], torch.Generator(device).manual_seed(batch)).view(
            256, batch, 1
        )
        calls: dict[str, Callable[[], Any]] = {}
        for name, model in models.items():
            if step_signature(model) is not None or name != "host, through a buffer":
                _warm_cache(model, device)
                calls[name] = _step(model, batch, tokens, device)
        yield from _lines("decode", {"batch": batch, "context": CONTEXT}, time_interleaved(calls, ROUNDS, STEPS))


def _warm_cache(model: StemForCausalLM, device: torch.device) -> None:
    """A prompt, which pins tables and fills the row cache."""
    ids = zipf_ids(4096, SHAPE["vocab_size"], torch.Generator(device).manual_seed(99))[None]
    model(ids, logits_to_keep=1)


def _step(model: StemForCausalLM, batch: int, tokens: Tensor, device: torch.device) -> Callable[[], Any]:
    cache = DecodeCache(model.config, batch, CONTEXT + 8 * STEPS * ROUNDS, torch.bfloat16, device)
    fill(cache, model.config, batch, CONTEXT, device)
    step = DecodeStep(cache, set(model.config.layer_types), padded=False)
    step.reset(CONTEXT, torch.full((batch,), CONTEXT, device=device), None)
    signature = step_signature(model)
    assert signature is not None
    step.capture(model, cache, signature)
    count = 0

    def call() -> tuple[Tensor, DecodeCache]:
        nonlocal count
        step.tokens.copy_(tokens[count % len(tokens)])  # other rows every time
        count += 1
        return step.replay(), cache

    return call


def prefill(models: dict[str, StemForCausalLM], device: torch.device) -> Iterator[dict[str, Any]]:
    prompts = [
        zipf_ids(PROMPT, SHAPE["vocab_size"], torch.Generator(device).manual_seed(seed))[None] for seed in range(4)
    ]
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():

        def call(model: StemForCausalLM = model, count: list[int] = [0]) -> Any:  # noqa: B006  (a counter of its own)
            count[0] += 1
            cache = DecodeCache(model.config, 1, PROMPT + 1, torch.bfloat16, device)
            return model(prompts[count[0] % len(prompts)], past_key_values=cache, logits_to_keep=1)

        calls[name] = call
    cell = {"batch": 1, "context": PROMPT, "distinct": int(prompts[0].unique().numel())}
    yield from _lines("prefill", cell, time_interleaved(calls, 5, 2))


def memory(models: dict[str, StemForCausalLM], device: torch.device) -> Iterator[dict[str, Any]]:
    for name, model in models.items():
        held = {t.data_ptr(): t.nbytes for t in model.parameters() if t.device.type == "cuda"}
        yield {
            "part": "memory",
            "variant": name,
            "device_gb": round(sum(held.values()) / 1e9, 3),
            **model.model.row_fetches(),
        }


def hits(tokenizer: str, text: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """Prompts of 512 tokens of one document each, and what follows in it as the tokens that decoding would ask for."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    encoded = [encode(document).input_ids[:1024] for document in documents]
    encoded = [ids for ids in encoded if len(ids) > 640]
    vocabulary = len(encode)
    for capacity in (512, 1024, 2048, 4096, 8192):
        policy = FrequencyPolicy(vocabulary, capacity)
        asked = found = decoded = decoded_found = 0
        for number, ids in enumerate(encoded):
            prompt, rest = torch.tensor(ids[:512]), torch.tensor(ids[512:])
            distinct, counts = prompt.unique(return_counts=True)
            if number >= len(encoded) // 4:  # once it is warm
                asked += len(distinct)
                found += int(policy.hits(distinct).sum())
            policy.commit(policy.admit(distinct, counts))
            if number >= len(encoded) // 4:
                decoded += len(rest)
                decoded_found += int(policy.hits(rest).sum())
        yield {
            "part": "hits",
            "cache_rows": capacity,
            "vocabulary": vocabulary,
            "documents": len(encoded),
            "of_distinct_prompt_tokens": round(found / asked, 4),
            "of_decoded_tokens": round(decoded_found / decoded, 4),
        }


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parts", nargs="+", choices=("decode", "prefill", "memory", "hits"))
    options.add_argument("--tokenizer", help="for hits")
    options.add_argument("--text", type=Path, help="for hits: a .jsonl with a field text")
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--commit", help="commit to record where the checkout has no .git")
    arguments = options.parse_args(argv)
    parts = arguments.parts or ["decode", "prefill", "memory"]
    device = torch.device("cpu" if parts == ["hits"] else "cuda")
    environment = describe_machine(device, arguments.commit)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "stem_offload.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in kept if line["part"] not in parts]
    start = time.perf_counter()
    with torch.no_grad():
        models = {} if parts == ["hits"] else build(device)
        for part in parts:
            measured = {
                "decode": lambda: decode(models, device),
                "prefill": lambda: prefill(models, device),
                "memory": lambda: memory(models, device),
                "hits": lambda: hits(arguments.tokenizer, arguments.text, device),
            }[part]()
            for line in measured:
                kept.append({**line, **environment})
                print(
                    " ".join(f"{k}={v}" for k, v in line.items()), f"({time.perf_counter() - start:.0f} s)", flush=True
                )
                path.write_text("".join(json.dumps(each) + "\n" for each in kept), encoding="utf-8")
    draw(kept, arguments.output / "stem_offload.png")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Decoding and prompts by variant, and hits by the size of the cache."""
    pyplot = load_pyplot()
    if pyplot is None:
        return

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for axis, part, unit in ((axes[0], "decode", "ms a step"), (axes[1], "prefill", "ms")):
        here = [line for line in lines if line["part"] == part]
        cells = sorted({(line["batch"], line["context"]) for line in here})
        names = [name for name in VARIANTS if any(line["variant"] == name for line in here)]
        for number, name in enumerate(names):
            mine = {(line["batch"], line["context"]): line for line in here if line["variant"] == name}
            places = [place + (number - (len(names) - 1) / 2) * 0.25 for place in range(len(cells))]
            bars = axis.bar(places, [mine[cell]["ms"] if cell in mine else 0 for cell in cells], 0.24, label=name)
            labels = [f"{100 * mine[c]['over_resident']:+.1f} %" if c in mine and number else "" for c in cells]
            axis.bar_label(bars, labels, fontsize=6, padding=2)
        axis.set_xticks(range(len(cells)), [f"batch {batch}, {context} tokens" for batch, context in cells], fontsize=8)
        axis.set(title=f"{part}: tables on the device and in host memory", ylabel=unit)
        axis.margins(y=0.25)
        if here:
            axis.legend(fontsize=7, loc="upper left", ncols=2)
    found = sorted((line for line in lines if line["part"] == "hits"), key=lambda line: line["cache_rows"])
    for key, label in (
        ("of_decoded_tokens", "decoded tokens"),
        ("of_distinct_prompt_tokens", "distinct prompt tokens"),
    ):
        axes[2].plot([x["cache_rows"] for x in found], [100 * x[key] for x in found], marker="o", label=label)
    axes[2].set(
        title="rows found in the cache, web text", xlabel="rows cached", ylabel="%", xscale="log", ylim=(0, 100)
    )
    axes[2].set_xticks([x["cache_rows"] for x in found], [str(x["cache_rows"]) for x in found])
    axes[2].minorticks_off()
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
