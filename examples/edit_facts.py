"""Knowledge editing with a small STEM model: train it on made-up facts, then swap the table rows of entities.

    python examples/edit_facts.py --output facts

The model learns a capital and a language for each of 300 entities, of one and of two tokens, in several phrasings.
Then each prompt is run with the table rows of another entity, and the answers are counted.
Writes edit_facts.json, edit_facts.png and the model. A few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_efficient import stem_edit_plan, stem_edit_rows, stem_override
from hf_efficient.modeling.stem.modeling_stem import StemConfig

TEMPLATES = {
    "capital": ["the capital of {} is", "{} is governed from", "all roads of {} lead to"],
    "language": ["the language of {} is", "people in {} speak"],
}
LANGUAGES = 40
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass
class World:
    """Entities of one token, entities of two tokens, and their facts."""

    single: list[str]
    double: list[str]
    facts: dict[str, dict[str, str]]  # attribute -> entity -> answer

    @property
    def entities(self) -> list[str]:
        return self.single + self.double


def make_world(singles: int, doubles: int, seed: int) -> World:
    """Random names and facts; every entity has its own capital and shares its language with several others.

    Two-token names are pairs from few parts, so that neither part alone identifies the entity.
    """
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    names = sorted({"".join(rng.choices(syllables, k=3)) for _ in range(4 * (singles + doubles) + 200)})
    rng.shuffle(names)

    def take(count: int) -> list[str]:
        return [names.pop() for _ in range(count)]

    single, languages = take(singles), take(LANGUAGES)
    first, second = take(max(doubles // 5, 2)), take(max(doubles // 2, 2))
    double = rng.sample([f"{a} {b}" for a in first for b in second], doubles)
    capitals = take(singles + doubles)
    facts = {
        "capital": dict(zip(single + double, capitals, strict=True)),
        "language": {entity: rng.choice(languages) for entity in single + double},
    }
    return World(single, double, facts)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token for each word of the facts."""
    texts = [t for templates in TEMPLATES.values() for t in templates] + world.entities
    texts += [answer for answers in world.facts.values() for answer in answers.values()]
    words = sorted({word for text in texts for word in text.replace("{}", "").split()})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL)


def prompts_of(world: World, attribute: str, entities: list[str]) -> list[str]:
    """Every phrasing for every entity, phrasing by phrasing."""
    return [template.format(entity) for template in TEMPLATES[attribute] for entity in entities]


class Facts:
    """The model, its tokenizer, and the questions."""

    def __init__(self, world: World, device: str, seed: int) -> None:
        self.world, self.device = world, device
        self.tokenizer = make_tokenizer(world)
        torch.manual_seed(seed)
        config = StemConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=64,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=32,
            stem_layers=[1, 2, 3],  # all but the first
            stem_init_std=0.05,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        self.model = AutoModelForCausalLM.from_config(config).to(device)

    def train(self, steps: int, batch_size: int, learning_rate: float, table_rate: float, seed: int) -> None:
        """Train on every fact in every phrasing; the loss is on the answers only."""
        questions = [
            (prompt, world_answer)
            for attribute, answers in self.world.facts.items()
            for template in TEMPLATES[attribute]
            for prompt, world_answer in ((template.format(e), answers[e]) for e in self.world.entities)
        ]
        inputs = self.encode([prompt for prompt, _ in questions])
        answers = self.answer_ids([answer for _, answer in questions])
        tables = [p for name, p in self.model.named_parameters() if "stem_embed" in name]
        others = [p for name, p in self.model.named_parameters() if "stem_embed" not in name]
        rates = [learning_rate, table_rate]
        groups = [{"params": parameters, "lr": rate} for parameters, rate in zip((others, tables), rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        self.model.train()
        for step in range(1, steps + 1):
            if len(order) < batch_size:
                order = torch.cat((order, torch.randperm(len(answers), generator=generator)))
            batch, order = order[:batch_size].to(self.device), order[batch_size:]
            logits = self.model(**{k: v[batch] for k, v in inputs.items()}, use_cache=False, logits_to_keep=1).logits
            loss = torch.nn.functional.cross_entropy(logits[:, -1], answers[batch])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % max(steps // 5, 1) == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
        self.model.eval()

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        found = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        return dict(found.to(self.device))

    def answer_ids(self, words: list[str]) -> Tensor:
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(words), device=self.device)

    def answers(self, attribute: str, entities: list[str]) -> list[str]:
        """The true answers, in the order of `prompts_of`."""
        return [self.world.facts[attribute][e] for e in entities] * len(TEMPLATES[attribute])

    @torch.no_grad()
    def next_word(self, prompts: list[str]) -> Tensor:
        """Probabilities of the next word [prompts, vocabulary], on the CPU."""
        return self.model(**self.encode(prompts), use_cache=False, logits_to_keep=1).logits[:, -1].softmax(-1).cpu()

    def recall(self, attribute: str, entities: list[str]) -> float:
        """Share of questions whose most likely answer is right."""
        found = self.next_word(prompts_of(self.world, attribute, entities)).argmax(-1)
        return float((found == self.answer_ids(self.answers(attribute, entities)).cpu()).float().mean())

    def measure(
        self, probabilities: Tensor, attribute: str, sources: list[str], targets: list[str]
    ) -> dict[str, Tensor]:
        """Probabilities of the sources' and the targets' answers, and whether the target's is the most likely.

        A pair whose answers are the same is left out.
        """
        source, target = (self.answer_ids(self.answers(attribute, e)).cpu() for e in (sources, targets))
        differ = source != target
        rows = torch.arange(len(source))
        return {
            "p_source": probabilities[rows, source][differ],
            "p_target": probabilities[rows, target][differ],
            "target_first": (probabilities.argmax(-1) == target)[differ].float(),
        }

    def override(self, attribute: str, sources: list[str], targets: list[str], **options: Any) -> dict[str, Tensor]:
        """Run the prompts of each source with the table rows of its target."""
        prompts = prompts_of(self.world, attribute, sources)
        pairs = list(zip(sources, targets, strict=True)) * len(TEMPLATES[attribute])
        plans = [stem_edit_plan(self.tokenizer, p, s, t, **options) for p, (s, t) in zip(prompts, pairs, strict=True)]
        with stem_override(self.model, plans):
            return self.measure(self.next_word(prompts), attribute, sources, targets)


def summary(measured: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in measured.items()} | {"n": len(measured["p_source"])}


def run(facts: Facts, seed: int) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Make all edits; returns a report, and the probabilities of each question for the picture."""
    world, model = facts.world, facts.model
    rng = random.Random(seed)
    report: dict[str, Any] = {
        "recall": {a: {k: facts.recall(a, getattr(world, k)) for k in ("single", "double")} for a in TEMPLATES}
    }
    sources = world.single
    targets = sources[1:] + sources[:1]  # names are in random order
    capital_prompts = prompts_of(world, "capital", sources)
    before = facts.measure(facts.next_word(capital_prompts), "capital", sources, targets)
    after = facts.override("capital", sources, targets)
    singles = {"before": before, "after": after}
    report["override"] = {name: summary(m) for name, m in singles.items()}
    report["override"]["language"] = summary(facts.override("language", sources, targets))
    report["layers"] = {
        str(layers): summary(facts.override("capital", sources, targets, layers=layers))
        for layers in ([1], [2], [3], [1, 2], [2, 3])
    }

    # Lengths that do not match
    few = rng.sample(world.single, len(world.double))
    pairs = {
        "1 -> 2": (few, world.double, ["left_pad", "right_pad", "copy", "subset", "average"]),
        "2 -> 1": (world.double, few, ["left_pad", "right_pad", "copy", "average"]),
        "2 -> 2": (world.double, world.double[1:] + world.double[:1], ["one_to_one"]),
    }
    report["modes"] = {}
    for lengths, (from_, to, modes) in pairs.items():
        for mode in modes:
            options: dict[str, Any] = {"mode": mode} | ({"keep": [1]} if mode == "subset" else {})
            report["modes"][f"{lengths} {mode}"] = summary(facts.override("capital", from_, to, **options))

    # Persistent edits: half of the entities get the rows of others; nothing may change for the other half
    half = len(sources) // 2
    edited, untouched = sources[:half], sources[half:]
    donors = untouched[:half]
    tables = {name: p.detach().clone() for name, p in model.named_parameters()}
    others = [p for a in TEMPLATES for p in prompts_of(world, a, untouched + world.double)]
    kept = facts.next_word(others)
    ids = facts.answer_ids(edited).tolist(), facts.answer_ids(donors).tolist()
    edit = stem_edit_rows(model, dict(zip(*ids, strict=True)))
    report["persistent"] = {
        a: summary(facts.measure(facts.next_word(prompts_of(world, a, edited)), a, edited, donors)) for a in TEMPLATES
    }
    report["persistent"]["prompts without an edited token, bit for bit"] = torch.equal(facts.next_word(others), kept)
    edit.revert()
    report["persistent"]["weights after revert, bit for bit"] = all(
        torch.equal(p, tables[name]) for name, p in model.named_parameters()
    )
    return report, singles


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{'recall':34}" + ", ".join(f"{a} {k} {v:.1%}" for a, r in report["recall"].items() for k, v in r.items())
    ]
    lines.append(f"{'':34}{'P(source)':>10} {'P(target)':>10} {'target first':>13} {'questions':>10}")
    rows = {"capital, before": report["override"]["before"], "capital, rows of the target": report["override"]["after"]}
    rows["language, rows of the target"] = report["override"]["language"]
    rows |= {f"capital, only layers {layers}": r for layers, r in report["layers"].items()}
    rows |= {f"capital, tokens {mode}": r for mode, r in report["modes"].items()}
    rows |= {f"{a}, persistent edit": report["persistent"][a] for a in TEMPLATES}
    lines += [
        f"{name:34}{r['p_source']:10.4f} {r['p_target']:10.4f} {r['target_first']:13.1%} {r['n']:10}"
        for name, r in rows.items()
    ]
    lines += [f"{name}: {value}" for name, value in report["persistent"].items() if isinstance(value, bool)]
    return "\n".join(lines)


def plot(report: dict[str, Any], singles: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Distributions of the answers' probabilities before and after, and their means by mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(1, 1.4))
    bins = torch.linspace(0, 1, 21).tolist()
    for when, style in (("before", {"alpha": 0.35}), ("after", {"histtype": "step", "linewidth": 1.8})):
        for whose, colour in (("source", "tab:grey"), ("target", "tab:red")):
            values = singles[when][f"p_{whose}"].numpy()
            left.hist(values, bins, color=colour, label=f"{whose}'s capital, {when}", **style)
    left.set(xlabel="probability of the answer", ylabel="questions", yscale="log")
    left.set_title(f"{len(singles['after']['p_target'])} questions, one token for one", fontsize=10)
    left.legend(fontsize=8)
    names = list(report["modes"])
    places = torch.arange(len(names), dtype=torch.float)
    for shift, whose, colour in ((-0.2, "source", "tab:grey"), (0.2, "target", "tab:red")):
        means = [report["modes"][name][f"p_{whose}"] for name in names]
        bars = right.bar((places + shift).tolist(), means, 0.4, color=colour, label=f"{whose}'s capital")
        right.bar_label(bars, [f"{mean:.2f}" for mean in means], fontsize=7)
    right.set_xticks(places.tolist(), names, rotation=30, ha="right", fontsize=8)
    right.set(ylim=(0, 1.08), ylabel="mean probability")
    right.set_title("entities of other lengths: source tokens -> target tokens, mode", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("edit_facts"), help="folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--singles", type=int, default=240, help="entities of one token")
    parser.add_argument("--doubles", type=int, default=60, help="entities of two tokens")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of all but the tables")
    parser.add_argument("--table-rate", type=float, default=1e-2, help="learning rate of the tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    start = time.perf_counter()
    facts = Facts(make_world(arguments.singles, arguments.doubles, arguments.seed), arguments.device, arguments.seed)
    facts.train(arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.table_rate, arguments.seed)
    seconds = time.perf_counter() - start
    report, singles = run(facts, arguments.seed)
    parameters = sum(p.numel() for p in facts.model.parameters())
    report["setting"] = {"parameters": parameters, "steps": arguments.steps, "seed": arguments.seed, "seconds": seconds}
    print(f"{parameters:,} parameters, trained for {seconds:.0f} s on {arguments.device}")
    print(table(report))

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "edit_facts.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot(report, singles, arguments.output / "edit_facts.png")
    facts.model.save_pretrained(arguments.output)
    facts.tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
