"""Fine-tune a small model for parallel generation: convert it to Multiverse, train LoRA adapters, generate in parallel.

    python examples/fine_tune_multiverse.py SmolLM2-135M-Instruct.gguf smollm-multiverse

The script makes its data: prices, a shopping list, and the question which entry costs the most. Each entry is one path
(look up its price, multiply), and the conclusion needs the results of all paths. LoRA adapters and the embedding rows
of the control tokens are trained; then the adapters are merged, and held-out prompts are answered. Writes the model,
report.json, and topology.png: the segments of one answer and which of them follow which.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import hf_efficient
from hf_efficient import Multiverse, TopologyDataCollator, mark_topology_trained, to_multiverse
from hf_efficient.modeling.topology.grammar.control_tokens import decode_function
from hf_efficient.modeling.topology.grammar.topology import Topology

THINGS = ["apples", "figs", "grapes", "kiwis", "lemons", "limes", "mangos", "melons", "nuts", "onions", "pears"]
BUYERS = ["Anna", "Ben", "Carla", "Dan", "Eva", "Finn", "Gina", "Hugo"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# Data


@dataclass(frozen=True)
class Problem:
    """A shopping list: (thing, number, unit price) in order, and other things that have a price."""

    buyer: str
    list: tuple[tuple[str, int, int], ...]
    others: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, source: random.Random) -> Problem:
        count = source.randint(2, 4)
        names = source.sample(THINGS, count + source.randint(0, 2))
        costs: list[tuple[str, int, int]] = []
        while len({number * price for _, number, price in costs}) < count:  # exactly one of them costs the most
            costs = [(name, source.randint(2, 9), source.randint(2, 9)) for name in names[:count]]
        others = tuple((name, source.randint(2, 9)) for name in names[count:])
        return cls(source.choice(BUYERS), tuple(costs), others)

    @property
    def answer(self) -> str:
        return max(self.list, key=lambda entry: entry[1] * entry[2])[0]

    @property
    def prompt(self) -> str:
        prices = sorted([(name, price) for name, _, price in self.list] + list(self.others))
        priced = ", ".join(f"{name} {price}" for name, price in prices)
        wanted = ", ".join(f"{number} {name}" for name, number, _ in self.list)
        return f"Prices: {priced}.\n{self.buyer} buys {wanted}. What costs the most?\n"

    @property
    def completion(self) -> str:
        steps = [
            {
                "id": name,
                "title": name,
                "text": f"One of the {name} costs {price}. {number} x {price} = {number * price}",
            }
            for name, number, price in self.list
        ]
        results = ", ".join(f"{name} {number * price}" for name, number, price in self.list)
        conclusion = f"{results}. The most is {self.answer}."
        return to_multiverse({"question": "", "steps": steps, "conclusion": conclusion, "answer": self.answer})


def problems(seed: int, without: frozenset[Problem] = frozenset()) -> Iterator[Problem]:
    """An endless iterator of problems, none of them in `without`."""
    source = random.Random(seed)
    while True:
        problem = Problem.draw(source)
        if problem not in without:
            yield problem


# Training


def adapted(model: Any, rank: int) -> Any:
    """The model with LoRA on its projections, and trainable embedding rows of the control tokens."""
    rows = sorted(model.config.topology["token_ids"].values())
    heads = {} if model.config.tie_word_embeddings else {"lm_head": rows}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=PROJECTIONS,
        trainable_token_indices={"embed_tokens": rows, **heads},
    )
    return get_peft_model(model, config)


def train(model: Any, samples: Sequence[Problem], collator: TopologyDataCollator, options: argparse.Namespace) -> Any:
    """Train one epoch with Accelerate; returns the model with merged adapters, and the losses."""
    accelerator = Accelerator(
        mixed_precision="bf16" if torch.cuda.is_available() else "no", cpu=options.device == "cpu"
    )
    model = adapted(model, options.rank)
    model.print_trainable_parameters()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(options.steps // 20, 1), options.steps)
    data = [{"prompt": problem.prompt, "completion": problem.completion} for problem in samples]
    loader = DataLoader(data, batch_size=options.batch, collate_fn=collator)  # type: ignore[arg-type]
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = []
    model.train()
    for step, batch in enumerate(loader):
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % max(options.steps // 10, 1) == 0:
            print(f"step {step:>5}  loss {loss.item():.4f}", flush=True)
    merged = accelerator.unwrap_model(model).merge_and_unload().eval()
    merged.requires_grad_(False)
    return merged, torch.stack(losses).tolist()


# Answers


@dataclass
class Answer:
    """The answer to one problem, and its topology.

    Attributes:
        ids: token ids of prompt and answer [S].
        generated: generated tokens.
        critical_path: generated tokens of the longest chain of segments.
    """

    problem: Problem
    ids: list[int]
    text: str
    topology: Topology
    generated: int
    critical_path: int

    @property
    def branches(self) -> list[str]:
        return [label for label in self.topology.labels if label.isdigit()]

    @property
    def results(self) -> list[tuple[str, str]]:
        """(thing, result) of each path."""
        paths = re.findall(r"<Path>\s*\d+: One of the (\w+) costs \d+\. \d+ x \d+ = (\d+)\s*</Path>", self.text)
        return [(name, result) for name, result in paths]

    @property
    def joined(self) -> list[tuple[str, str]]:
        """(thing, result) pairs of the conclusion."""
        conclusion = re.search(r"<Conclusion>\s*(.*?)\. The most is", self.text, re.DOTALL)
        return re.findall(r"(\w+) (\d+)", conclusion[1]) if conclusion else []

    def is_right(self) -> dict[str, bool]:
        """Whether there is one path for each thing, the products are right, the conclusion repeats the paths' results,
        and the answer is right."""
        wanted = [(name, str(number * price)) for name, number, price in self.problem.list]
        return {
            "forks": self.branches == [str(number + 1) for number in range(len(wanted))],
            "paths": self.results == wanted,
            "joins": bool(self.results) and self.joined == self.results,
            "answer": self.text.rstrip().endswith(f"Answer: {self.problem.answer}"),
        }


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: Sequence[Problem], batch: int, most: int) -> list[Answer]:
    """Greedy answers, all branches of a batch in parallel; `most` is `max_new_tokens`."""
    config, found = model.config.topology, []
    tokenizer.padding_side = "left"
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        inputs = tokenizer([problem.prompt for problem in part], return_tensors="pt", padding=True).to(model.device)
        out = model.generate(
            **inputs,
            tokenizer=tokenizer,
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
        for row, problem in enumerate(part):
            ids = out.sequences[row][out.segment_ids[row] >= 0].tolist()
            decode = decode_function(tokenizer)
            topology = Topology.from_token_ids(
                ids, config["grammar"], config["token_ids"], strict=False, decode=decode, allow_truncated=True
            )
            text = decode([token for token in ids if token != tokenizer.eos_token_id])
            found.append(Answer(problem, ids, text, topology, out.generated_tokens[row], out.critical_path[row]))
    return found


def show(answer: Answer, tokenizer: Any) -> None:
    """Print an answer segment by segment, with the label of its branch."""
    decode, topology = decode_function(tokenizer), answer.topology
    for segment, label in enumerate(topology.labels):
        here = [token for token, of in zip(answer.ids, topology.segment_ids, strict=True) if of == segment]
        after = ", ".join(topology.labels[parent] for parent in topology.parents[segment])
        head = f"[{label}]" + (f" after {after}" if after else "")
        print(head + "".join(f"\n    {line}" for line in decode(here).strip().split("\n")))


def draw(answer: Answer, tokenizer: Any, path: Path) -> None:
    """Draw the segments of an answer as bars over their position ids, with arrows from parents to children."""
    from matplotlib.figure import Figure

    topology, decode = answer.topology, decode_function(tokenizer)
    lanes, spans, texts = [], [], []
    for segment, label in enumerate(topology.labels):
        mine = topology.segment_ids == segment
        positions = topology.position_ids[mine]
        spans.append((int(positions.min()), int(positions.max()) + 1) if len(positions) else (0, 0))
        lanes.append(int(label) if label.isdigit() else 0)
        texts.append(decode([token for token, here in zip(answer.ids, mine, strict=True) if here]))
    last = max(end for _, end in spans)
    # Only the end of the trunk is drawn: the rest is the prompt.
    first = max(spans[0][1] - last // 3, 0)
    figure = Figure(figsize=(12, 1.2 + 1.1 * (max(lanes) + 1)), layout="constrained")
    axis = figure.subplots()
    for segment, (begin, end) in enumerate(spans):
        begin = max(begin, first)
        colour = "tab:orange" if lanes[segment] else "tab:blue"
        axis.barh(lanes[segment], end - begin, left=begin, height=0.8, color=colour, alpha=0.3, edgecolor=colour)
        words = " ".join(re.sub(r"<[^>]*>", " ", texts[segment]).split())
        width = max(int(220 * (end - begin) / (last - first)), 12)  # characters that fit into a line of the bar
        lines = textwrap.wrap(words, width)[-4:]
        axis.text(begin + 0.4, lanes[segment], "\n".join(lines), fontsize=7, va="center")
        for parent in topology.parents[segment]:
            start = (spans[parent][1], lanes[parent])
            arrow = {"arrowstyle": "->", "color": "grey", "connectionstyle": "arc3,rad=0.15"}
            axis.annotate("", xy=(begin, lanes[segment]), xytext=start, arrowprops=arrow)
    axis.set_yticks(range(max(lanes) + 1), ["trunk", *(f"path {n}" for n in range(1, max(lanes) + 1))])
    axis.invert_yaxis()
    axis.set_xlabel("position id")
    axis.set_title(f"{answer.generated} tokens generated, {answer.critical_path} on the longest chain", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id, local folder or .gguf file of a stock checkpoint")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluated", type=int, default=64, help="number of held-out problems")
    parser.add_argument("--max-new-tokens", type=int, default=192, help="tokens of an answer's longest chain, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto or cpu")
    options = parser.parse_args()
    began = time.perf_counter()

    stock = options.output / "untrained"
    options.output.mkdir(parents=True, exist_ok=True)
    hf_efficient.convert(
        options.source, stock, [Multiverse()], dtype="float32", evaluate=False, progress=False, overwrite=True
    )
    tokenizer = AutoTokenizer.from_pretrained(stock)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(stock)
    print(f"converted in {time.perf_counter() - began:.1f} s", flush=True)

    drawn = problems(options.seed)
    held_out = [next(drawn) for _ in range(options.evaluated)]
    fresh = problems(options.seed + 1, without=frozenset(held_out))
    samples = [next(fresh) for _ in range(options.steps * options.batch)]
    torch.manual_seed(options.seed)
    model, losses = train(model, samples, TopologyDataCollator(tokenizer, "multiverse"), options)
    trained = time.perf_counter() - began
    print(f"trained by second {trained:.1f}", flush=True)

    # Now `generate` may write control tokens, and follows them.
    mark_topology_trained(model)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    hf_efficient.export(options.output)

    if torch.cuda.is_available() and options.device != "cpu":
        model = model.to("cuda", torch.bfloat16)
    found = answers(model, tokenizer, held_out, options.batch, options.max_new_tokens)
    right = [answer.is_right() for answer in found]
    shares = {name: sum(each[name] for each in right) / len(right) for name in right[0]}
    generated, critical = (sum(getattr(answer, name) for answer in found) for name in ("generated", "critical_path"))
    shown = max(found, key=lambda answer: (all(answer.is_right().values()), len(answer.branches)))
    show(shown, tokenizer)
    print(f"\n{len(found)} held-out problems: ", end="")
    print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print(f"{generated} tokens in {critical} positions: parallelism {generated / critical:.2f}")
    if shown.topology.n_segments and find_spec("matplotlib"):
        draw(shown, tokenizer, options.output / "topology.png")
    report = {
        "held_out": shares,
        "problems": len(found),
        "parallelism": generated / critical,
        "losses": losses,
        "text": shown.text,
        "texts": [answer.text for answer in found],
        "seconds": time.perf_counter() - began,
        "seconds_until_trained": trained,
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    (options.output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
