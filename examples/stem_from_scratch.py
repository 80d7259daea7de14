"""STEM against the dense decoder, trained from scratch on the same text in the same order, at equal active FLOPs.

    python examples/stem_from_scratch.py --text corpus.jsonl --level char bpe
    python examples/stem_from_scratch.py --hidden 64 --intermediate 192 --layers 3 --context 64 --steps 200 \\
        --evaluated-bytes 16384  # on a CPU

Measures the loss on held-out text, the loss by context length, and how many rows of a table a context uses. Writes
stem_from_scratch.json and .png; docs/stem_from_scratch.md describes the method.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import hf_efficient  # noqa: F401  (registers the model types)
from hf_efficient.conversion.measuring.text import load_text
from hf_efficient.errors import HFEError
from hf_efficient.modeling.stem.configuration_stem import stem_layer_preset

DENSE, SAME_SHAPE, SAME_FLOPS = "dense", "STEM, same shape", "STEM, same FLOPs"
LEARNING_RATE = 1e-3
EVALUATIONS = 12  # of a run, beside the one before it
CONTEXTS = [2**k for k in range(6, 16)]  # 64 to 32k tokens


def tokenize(level: str, train: str, held_out: str, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of both texts, and the number of bytes of each id [V]. The BPE is trained on `train`."""
    encode: Callable[[str], list[int]]
    if level == "byte":
        encode, lengths = lambda text: list(text.encode()), [1] * 256
    elif level == "char":
        index = {character: i for i, character in enumerate(sorted(set(train + held_out)))}
        encode, lengths = lambda text: [index[c] for c in text], [len(c.encode()) for c in index]
    else:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        bpe, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator([train], trainer)
        names = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
        encode, lengths = (
            lambda text: bpe.encode(text).ids,
            list(map(len, names)),
        )  # each character of a token is one byte
    return torch.tensor(encode(train)), torch.tensor(encode(held_out)), torch.tensor(lengths)


def configurations(vocabulary: int, options: argparse.Namespace) -> dict[str, PreTrainedConfig]:
    """The three models. L dense layers of width F have the FLOPs of width ``3 L F / (3 L - n)`` with n STEM layers."""
    layers, width = options.layers, options.intermediate
    stem_layers = stem_layer_preset(layers, options.stem_layers)
    wider = 8 * round(3 * layers * width / (3 * layers - len(stem_layers)) / 8)
    common = {"vocab_size": vocabulary, "hidden_size": options.hidden, "num_hidden_layers": layers}
    common |= {"num_attention_heads": max(options.hidden // 64, 1), "max_position_embeddings": options.context}
    return {
        DENSE: AutoConfig.for_model("hfe_decoder", intermediate_size=width, **common),
        SAME_SHAPE: AutoConfig.for_model("hfe_stem", intermediate_size=width, stem_layers=stem_layers, **common),
        SAME_FLOPS: AutoConfig.for_model("hfe_stem", intermediate_size=wider, stem_layers=stem_layers, **common),
    }


def size(config: PreTrainedConfig, context: int) -> dict[str, int]:
    """Parameters, parameters in tables, and FLOPs of one token's forward pass.

    Counted are 2 for each weight of a matrix product, and for each channel 4 for each key of causal attention, of which
    there are ``(context + 1) / 2`` on average.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    channels = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    tables = sum(p.numel() for name, p in model.named_parameters() if "stem_embed" in name)
    flops = 2 * products + 2 * channels * (context + 1)
    return {"parameters": model.num_parameters(), "table_parameters": tables, "flops_per_token": flops}


def token_nll(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy [B, S] in nats of the next tokens in windows [B, S + 1]; bfloat16 products on CUDA."""
    ids, targets = windows[:, :-1], windows[:, 1:]
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
        # An explicit causal mask: detecting packed sequences would synchronise with the device.
        logits = model(ids, attention_mask={"full_attention": None}, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def train(config: PreTrainedConfig, ids: Tensor, order: Tensor, held_out: Tensor, evaluated_at: list[int]) -> Tensor:
    """Train one model on the windows of ids [n] that begin at order [steps, B].

    Returns:
        Nats a token on held_out [N, S + 1], by evaluation [E] and position: [E, S].
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(ids.device)
    groups: tuple[list[nn.Parameter], ...] = ([], [])
    for name, parameter in model.named_parameters():
        groups["stem_embed" in name].append(parameter)
    rate, starts = torch.zeros((), device=ids.device), torch.zeros_like(order[0])
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True, "capturable": ids.is_cuda}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **adamw)

    def step() -> None:
        optimizer.zero_grad()
        token_nll(model, ids[starts[:, None] + torch.arange(held_out.shape[1], device=ids.device)]).mean().backward()
        # As in the paper's code, tables are clipped by their own norm and have the same weight decay.
        for group in groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()

    run, steps, nll = step, len(order), []
    for i in range(steps + 1):
        if i in evaluated_at:
            with torch.no_grad():
                nll.append(torch.cat([token_nll(model, part) for part in held_out.split(64)]).mean(0))
        if i == 3 and ids.is_cuda:  # launching so small a model takes longer than running it
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                step()
            run = graph.replay
        if i < steps:
            warm_up, cosine = min((i + 1) / (0.1 * steps), 1.0), (1 + math.cos(math.pi * i / steps)) / 2
            rate.fill_(LEARNING_RATE * warm_up * (0.1 + 0.9 * cosine))
            starts.copy_(order[i])
            run()
    return torch.stack(nll).cpu()


def distinct_rows(ids: Tensor) -> dict[int, float]:
    """Mean number of distinct ids in contexts of each length, over at most 64 contexts of ids [n]."""
    found = {}
    for context in (length for length in CONTEXTS if length <= len(ids)):
        windows = ids.unfold(0, context, context)
        found[context] = mean(window.unique().numel() for window in windows[:: math.ceil(len(windows) / 64)])
    return found


def compare(level: str, texts: tuple[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Train every model with every seed at one level; returns the level's part of the JSON."""
    ids, held_out, bytes_of = tokenize(level, *texts, options.vocabulary)
    context = options.context
    windows = held_out[bytes_of[held_out].cumsum(0) <= options.evaluated_bytes]
    if min(len(ids), len(windows)) <= context:
        raise HFEError(f"at level {level} the text is shorter than --context {context}", "give more text")
    windows = windows.unfold(0, context + 1, context)
    bytes_per_token = bytes_of[windows[:, 1:]].double().mean().item()
    steps = options.steps or math.ceil(6 * len(ids) / (options.batch * context))
    configs = configurations(len(bytes_of), options)
    models: dict[str, Any] = {name: {**size(config, context), "runs": []} for name, config in configs.items()}
    ratio = models[SAME_FLOPS]["flops_per_token"] / models[DENSE]["flops_per_token"]
    if abs(ratio - 1) > 0.01:
        raise HFEError(f"{SAME_FLOPS} takes {ratio:.3f} of the dense model's FLOPs", "choose another --intermediate")

    print(f"{level}: {len(bytes_of)} ids, {len(ids)} tokens, {steps} steps of {options.batch} x {context}", flush=True)
    evaluated_at = sorted({k * steps // EVALUATIONS for k in range(EVALUATIONS + 1)})
    on_device = ids.to(options.device), windows.to(options.device)
    for seed in range(options.seeds):
        order = torch.randint(len(ids) - context, (steps, options.batch), generator=torch.Generator().manual_seed(seed))
        for name, config in configs.items():
            torch.manual_seed(seed)
            began = time.perf_counter()
            nll = train(config, on_device[0], order.to(options.device), on_device[1], evaluated_at)
            per_byte, seconds = nll.mean(1) / bytes_per_token, time.perf_counter() - began
            best = int(per_byte.argmin())
            # Predictions from 1, 2 to 3, 4 to 7, ... tokens.
            by_context = [
                nll[best, 2**i - 1 : 2 ** (i + 1) - 1].mean().item() for i in range((context - 1).bit_length())
            ]
            run = {"nll_per_byte": per_byte.tolist(), "best": per_byte[best].item(), "end": per_byte[-1].item()}
            models[name]["runs"].append({**run, "nll_by_context": by_context, "seed": seed, "seconds": seconds})
            print(f"  seed {seed}, {name}: best {run['best']:.4f}, end {run['end']:.4f}, {seconds:.1f} s", flush=True)
    counts = {"rows": len(bytes_of), "bytes_per_token": bytes_per_token, "tokens": len(ids)}
    counts |= {"evaluated_tokens": windows[:, 1:].numel(), "evaluated_at": evaluated_at}
    return {**counts, "distinct_rows": distinct_rows(held_out), "models": models}


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is nan for a single value."""
    values = list(values)
    return mean(values), stdev(values) if len(values) > 1 else math.nan


def show(level: dict[str, Any]) -> None:
    """Print the tables of one level."""
    runs = {name: model["runs"] for name, model in level["models"].items()}
    for name, model in level["models"].items():
        print(f"{name}: {model['parameters']:,} parameters, {model['table_parameters']:,} of them in tables; ", end="")
        print(f"{model['flops_per_token']:,} FLOPs a token; nats a byte, held out")
        for point in ("best", "end"):
            loss = spread(run[point] for run in runs[name])
            gap = spread(run[point] - dense[point] for run, dense in zip(runs[name], runs[DENSE], strict=True))
            print(f"  {point}: {loss[0]:.4f} ± {loss[1]:.4f}, minus dense {gap[0]:+.4f} ± {gap[1]:.4f}")
    print("tokens of context: distinct rows, share of a table's parameters")
    for context, rows in level["distinct_rows"].items():
        print(f"  {context}: {rows:.1f}, {rows / level['rows']:.2%}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss over the steps, difference from dense by context, distinct rows; one row of panels for each level."""
    from matplotlib.figure import Figure

    levels = result["levels"]
    figure = Figure(figsize=(13, 0.5 + 3.4 * len(levels)), layout="constrained")
    panels = figure.subplots(len(levels), 3, squeeze=False)
    for (name, level), (loss, by_context, distinct) in zip(levels.items(), panels, strict=True):
        runs = {label: model["runs"] for label, model in level["models"].items()}
        for label in runs:
            curve = zip(*(run["nll_per_byte"][1:] for run in runs[label]), strict=True)
            loss.errorbar(level["evaluated_at"][1:], *zip(*map(spread, curve), strict=True), label=label, capsize=2)
            pairs = list(zip(runs[label], runs[DENSE], strict=True))
            places = range(len(runs[label][0]["nll_by_context"]))
            gaps = [
                spread(run["nll_by_context"][i] - dense["nll_by_context"][i] for run, dense in pairs) for i in places
            ]
            by_context.errorbar([2**i for i in places], *zip(*gaps, strict=True), capsize=2)
        loss.set(title=f"{name}: loss on held-out text", xlabel="steps", ylabel="nats a byte")
        by_context.set(title="minus dense, at the best step", xlabel="tokens of context", ylabel="nats a token")
        lengths = list(map(int, level["distinct_rows"]))
        distinct.plot(lengths, level["distinct_rows"].values(), marker="o", label="rows used")
        distinct.plot(lengths, lengths, color="grey", linestyle=":", label="tokens")
        distinct.axhline(level["rows"], color="grey", label="rows of a table")
        distinct.set(title="distinct rows, held-out text", xlabel="tokens of context", yscale="log")
        for panel in (by_context, distinct):
            panel.set_xscale("log", base=2)
        for panel in (loss, distinct):
            panel.legend(fontsize=8)
    figure.suptitle(f"{result['text']}; mean ± standard deviation over {result['options']['seeds']} seeds", fontsize=10)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help=".txt or .jsonl file; by default the small sample that comes with the package")
    parser.add_argument("--level", nargs="+", choices=("char", "byte", "bpe"), default=["char"])
    parser.add_argument("--vocabulary", type=int, default=4096, help="vocabulary size of the BPE")
    parser.add_argument("--steps", type=int, help="default: six epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("stem-from-scratch"), help="folder to write")
    parser.add_argument("--draw", type=Path, help="only draw the picture from this stem_from_scratch.json")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--intermediate", type=int, default=960, help="feed-forward width of the dense model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--stem-layers", choices=("third", "half", "full"), default="half")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--evaluated-bytes", type=int, default=131072, help="of the held-out text, from its beginning")
    options = parser.parse_args()
    if options.draw:
        return draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device.startswith("cuda"):
        torch.cuda.set_stream(torch.cuda.Stream(options.device))  # the default stream cannot be captured
    text, held_out = load_text(options.text)
    texts = tuple("\n\n".join(part.documents) for part in (text, held_out))
    levels = {}
    for level in options.level:
        levels[level] = compare(level, texts, options)
        show(levels[level])
    settings = {key: value for key, value in vars(options).items() if key not in ("text", "output", "draw")}
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    versions = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    result = {"text": text.name, **versions, "options": settings, "levels": levels}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "stem_from_scratch.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if find_spec("matplotlib"):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
    else:
        print(f"The picture needs matplotlib: python examples/stem_from_scratch.py --draw {path}")


if __name__ == "__main__":
    main()
