"""What does decoding branches side by side gain, against decoding the same tokens one after the other?

    python -m benchmarks.topology_generation [--models 1b 7b] [--parts transcripts branches] [--cases TEXT ...]

Transcripts are forced, so that random weights write a given structure: the models compute all their logits, and what
they would have chosen is replaced. Both sides are this package's `generate` on one set of weights, bfloat16, captured
in CUDA graphs, from prompts of one length to the same number of tokens, the prompt's time included. The bound is tokens
over the longest chain of tokens: what could be gained if a step of many branches cost what a step of one does.

- transcripts: A, 8 paths of 1024 tokens; B, two blocks of 4 paths of 512; C, MedVerse-like, 6 steps of 96, two deep;
- branches: one block of 1 to 16 paths of 256 tokens, by batch.

A long sequential run is not made whole: tokens are timed at several lengths of the context, and the times are joined by
straight lines and summed. `sequential_from` says so in each line; `--whole` makes all runs whole. Of runs that
are alike, of which the first captures graphs, the shortest one counts on either side.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.harness import common_options, describe_machine, read, write
from benchmarks.plot import load_pyplot
from benchmarks.scripted_sampler import ScriptedSampler
from benchmarks.topology_transcripts import Transcript, medverse, multiverse, tokenizer_of
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.topology.generation.generation_topology import parallel_generate
from hf_efficient.modeling.topology.generation.topology_step import TopologyStep
from hf_efficient.modeling.topology.grammar.control_tokens import GRAMMARS, control_token_ids

PARTS = ("transcripts", "branches")
IDENTITY = ("part", "model", "case", "batch")
COMMON: dict[str, Any] = {"max_position_embeddings": 32768, "bos_token_id": None, "pad_token_id": None}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {  # Llama 3.2 1B
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "7b": {  # Qwen2.5 7B
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
}
# More tokens than this are not decoded whole one after the other.
MOST_WHOLE = {"1b": 10_000, "7b": 1_000, "tiny": 100}
PLACES, TIMED_TOKENS = 4, 65
RUNS = 2
STEPS = {1: [], 2: [], 3: [], 4: [1, 2], 5: [2, 3], 6: [1, 3]}
BRANCHES, BATCHES, LARGE_BATCH = (1, 2, 4, 8, 16), (1, 4, 16), 16


def models(shape: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A decoder for each grammar, of one set of random weights in one memory."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for grammar in GRAMMARS:
        topology = {"grammar": grammar, "token_ids": control_token_ids(tokenizer_of(grammar), grammar)}
        config = EfficientDecoderConfig(**shape, **COMMON, eos_token_id=None, topology=topology)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        if found:
            model.load_state_dict(found[GRAMMARS[0]].state_dict(), assign=True)
            model.tie_weights()
        found[grammar] = model
    return found


def transcripts(unit: int) -> dict[str, Transcript]:
    """The cases A, B and C, with lengths divided by `unit`."""

    def cut(*lengths: int) -> list[int]:
        return [length and max(length // unit, 64) for length in lengths]

    prompt, path, conclusion = cut(1024, 1024, 256)
    short, before, between, step, plan, end = cut(512, 128, 256, 96, 700, 200)
    return {
        "A: 8 paths of 1024": multiverse(max(prompt, 160), [(8, path)], [0, conclusion]),
        "B: 2 blocks of 4 paths of 512": multiverse(prompt, [(4, short)] * 2, [before, between, before]),
        "C: 6 steps of 96": medverse(max(plan, 200), STEPS, step, end),
    }


# Both ways of decoding


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """What a call takes until its result is there, by the host's clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


class Timeline:
    """When the device begins and ends each captured or called step of parallel generation."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        execute = TopologyStep.execute

        def watched(step: TopologyStep, *arguments: Any) -> Tensor:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            result = execute(step, *arguments)
            after.record()
            self.events.append((before, after))
            return result

        TopologyStep.execute = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            TopologyStep.execute = execute  # type: ignore[method-assign]

    def summary(self) -> dict[str, float]:
        """Device time of a step, and the share of the time from step to step in which no step runs.

        Empty where steps are called without a look at their graph.
        """
        if len(self.events) < 2:
            return {}
        torch.cuda.synchronize()
        busy = [before.elapsed_time(after) for before, after in self.events]
        apart = [x[0].elapsed_time(y[0]) for x, y in zip(self.events, self.events[1:], strict=False)]
        return {
            "device_ms_per_step": round(statistics.median(busy), 5),
            "ms_from_step_to_step": round(statistics.median(apart), 5),
            "host_share": round(1 - sum(busy[:-1]) / sum(apart), 4),
        }


def parallel(model: Any, transcript: Transcript, batch: int) -> dict[str, Any]:
    """Seconds of parallel generation, after a run that captures, and how they were spent."""
    tokenizer, device = tokenizer_of(transcript.grammar), model.device
    ids = torch.tensor([transcript.prompt] * batch, device=device)
    scripts = {(row, path): tokens for row in range(batch) for path, tokens in transcript.scripts.items()}

    def call() -> Any:
        return parallel_generate(
            model,
            ids,
            attention_mask=torch.ones_like(ids),
            tokenizer=tokenizer,
            sampler=ScriptedSampler(scripts),
            max_new_tokens=transcript.critical_path + 8,
            min_fork_budget=0,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
        )

    first, out = seconds(call, device)
    asked = [transcript.tokens] * batch, [transcript.critical_path] * batch
    got = list(out.generated_tokens), list(out.critical_path)
    if got != asked:
        raise SystemExit(f"asked for {asked[0][0]} tokens, {asked[1][0]} in the longest chain; got {got}")
    times = [seconds(call, device)[0] for _ in range(RUNS)]
    found: dict[str, Any] = {
        "parallel_s": min(times),
        "parallel_s_runs": [round(value, 5) for value in times],
        "parallel_first_call_s": first,
        "forward_passes": out.num_forward_passes,
    }
    if device.type == "cuda":
        timeline = Timeline()
        with timeline.watching():
            call()
        found |= timeline.summary()
        found["captured"] = [step["queries"] for step in model.captured_steps() if "queries" in step]
    return found


def plain(model: Any, ids: Tensor, tokens: int) -> float:
    """Seconds of the decoder's usual generation of so many tokens."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    took, out = seconds(lambda: model.generate(ids, max_new_tokens=tokens, **options), model.device)
    if out.shape[1] != ids.shape[1] + tokens:
        raise SystemExit(f"asked for {tokens} tokens, got {out.shape[1] - ids.shape[1]}")
    return took


@dataclass
class Sequential:
    """Sequential decoding of one model: whole, or summed from tokens timed at several contexts, which are kept."""

    model: Any
    most_whole: int
    known: dict[tuple[int, int], float] = field(default_factory=dict)

    def __call__(self, prompt: Sequence[int], tokens: int, batch: int, longest: int | None = None) -> dict[str, Any]:
        """Seconds for `tokens` after the prompt. `longest` is the largest number of tokens that will be asked for."""
        ids = torch.tensor([list(prompt)] * batch, device=self.model.device)
        if tokens <= self.most_whole:
            taken = min(plain(self.model, ids, tokens) for _ in range(RUNS))  # the first run captures
            found: dict[str, Any] = {"sequential_s": taken, "sequential_from": "whole runs"}
        else:
            contexts = np.linspace(len(prompt), len(prompt) + (longest or tokens), PLACES + 1).round().astype(int)
            timed = {int(context): self.at(int(context), batch) for context in contexts}
            each = np.interp(np.arange(2, tokens) + len(prompt), list(timed), list(timed.values()))
            plain(self.model, ids, 2)
            begun = min(plain(self.model, ids, 2) for _ in range(RUNS))
            found = {
                "sequential_s": begun + float(each.sum()) / 1e3,
                "sequential_from": f"the prompt, and {TIMED_TOKENS} tokens around each of {len(timed)} contexts",
                "sequential_ms_at": {str(context): round(ms, 5) for context, ms in timed.items()},
            }
        if self.model.device.type == "cuda" and not self.model.captured_steps():
            raise SystemExit("sequential decoding was not captured in a graph: HFE_LOG=INFO says why")
        self.model.free_captured_steps()
        return found

    def at(self, context: int, batch: int) -> float:
        """Milliseconds of a token at this context: the mean of tokens around it."""
        key = context, batch
        if key not in self.known:
            # The tokens are those with 2, 3, … before them after the prompt.
            length = max(context - (TIMED_TOKENS + 3) // 2, 1)
            ids = torch.randint(10, 300, (batch, length), device=self.model.device)
            plain(self.model, ids, TIMED_TOKENS + 2)  # captures
            short, long = (min(plain(self.model, ids, tokens) for _ in range(RUNS)) for tokens in (2, TIMED_TOKENS + 2))
            self.known[key] = 1e3 * (long - short) / TIMED_TOKENS
        return self.known[key]


# Parts


@dataclass(frozen=True)
class Task:
    """One line: a transcript in a batch, and the number of tokens of sequential decoding that is compared."""

    part: str
    case: str
    transcript: Transcript
    batch: int
    longest: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def tasks(part: str, unit: int) -> list[Task]:
    """What a part measures."""
    if part == "transcripts":
        found = transcripts(unit)
        last = list(found)[-1]
        batches = [(case, 1) for case in found] + [(last, LARGE_BATCH)]
        return [Task(part, case, found[case], batch) for case, batch in batches]
    length, conclusion = max(256 // unit, 32), 64
    made = {n: multiverse(max(1024 // unit, 320), [(n, length)], [0, conclusion]) for n in BRANCHES}
    longest = made[BRANCHES[-1]].tokens
    return [
        Task(part, f"{n} paths of {length}", made[n], batch, longest, {"branches": n})
        for batch in BATCHES
        for n in BRANCHES
    ]


def measure(model: Any, task: Task, sequential: Sequential) -> dict[str, Any]:
    """The fields of one line."""
    transcript, batch, device = task.transcript, task.batch, model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = parallel(model, transcript, batch)
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    model.free_captured_steps()
    gc.collect()
    found |= sequential(transcript.prompt, transcript.tokens, batch, task.longest)
    ratio = found["sequential_s"] / found["parallel_s"]
    return {
        "prompt": len(transcript.prompt),
        "tokens": transcript.tokens,
        "forced_tokens": transcript.forced,
        "critical_path": transcript.critical_path,
        "bound": transcript.bound,
        "speedup": ratio,
        "of_bound": ratio / transcript.bound,
        **found,
        "ms_per_forward_pass": 1e3 * found["parallel_s"] / found["forward_passes"],
        "sequential_ms_per_token": 1e3 * found["sequential_s"] / transcript.tokens,
        "parallel_tokens_per_s": batch * transcript.tokens / found["parallel_s"],
        "sequential_tokens_per_s": batch * transcript.tokens / found["sequential_s"],
    }


def lines_of(name: str, shape: dict[str, Any], arguments: argparse.Namespace, path: Path, start: float) -> None:
    """Measure one model's tasks, each line written as soon as it is there."""
    device = torch.device(arguments.device)
    environment = describe_machine(device, arguments.commit)
    unit = 16 if name == "tiny" else 1
    by_grammar = models(shape, device)
    most_whole = 10**9 if arguments.whole else MOST_WHOLE[name]
    sequential = {grammar: Sequential(model, most_whole) for grammar, model in by_grammar.items()}
    for task in (task for part in arguments.parts for task in tasks(part, unit)):
        if arguments.cases is not None and not any(text in task.case for text in arguments.cases):
            continue
        if time.perf_counter() - start > arguments.seconds:
            print(f"{name}, {task.case}, batch {task.batch}: not begun, --seconds are over", flush=True)
            continue
        line: dict[str, Any] = {"part": task.part, "model": name, "case": task.case, "batch": task.batch, **task.notes}
        grammar = task.transcript.grammar
        runs = sequential[grammar]
        if task.part == "branches" and not arguments.whole:
            # Batch by batch, the same few contexts serve all numbers of branches.
            runs = Sequential(runs.model, 0, runs.known)
        try:
            line |= measure(by_grammar[grammar], task, runs)
        except torch.OutOfMemoryError:
            line["out_of_memory"] = True
        by_grammar[grammar].free_captured_steps()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        line = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()}
        write(path, [{**line, **environment}], IDENTITY)
        shown = ("model", "case", "batch", "bound", "speedup", "parallel_s", "sequential_s", "host_share")
        shown += ("device_ms_per_step", "ms_per_forward_pass", "sequential_ms_per_token", "out_of_memory")
        print(" ".join(f"{key}={line[key]}" for key in shown if key in line), flush=True)


# Picture


def draw(path: Path) -> None:
    """Speed-up and bound of the transcripts, and by number of branches and batch, in a PNG beside the results file."""
    pyplot = load_pyplot()
    if pyplot is None:
        return

    lines = [line for line in read(path) if "speedup" in line]
    if not lines:
        return
    branches = [line for line in lines if line["part"] == "branches"]
    names = list(dict.fromkeys(line["model"] for line in branches))
    figure, axes = pyplot.subplots(
        1, 1 + len(names), figsize=(7 + 5.5 * len(names), 4.6), squeeze=False, layout="constrained"
    )
    axis = axes[0, 0]
    whole = [line for line in lines if line["part"] == "transcripts"]
    ticks = [f"{line['model']}, batch {line['batch']}\n{line['case']}" for line in whole]
    bars = axis.barh(ticks, [line["speedup"] for line in whole], color="tab:orange")
    axis.bar_label(bars, [f"{line['speedup']:.2f}" for line in whole], fontsize=8, label_type="center")
    for place, line in enumerate(whole):
        axis.plot([line["bound"]] * 2, [place - 0.4, place + 0.4], color="black")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_title("times faster than sequential (black: bound)", fontsize=10)
    for axis, name in zip(axes[0, 1:], names, strict=True):
        here = [line for line in branches if line["model"] == name]
        for batch in dict.fromkeys(line["batch"] for line in here):
            found = sorted((line["branches"], line["speedup"]) for line in here if line["batch"] == batch)
            axis.plot(*zip(*found, strict=True), marker="o", label=f"batch {batch}")
        bound = sorted({(line["branches"], line["bound"]) for line in here})
        axis.plot(*zip(*bound, strict=True), color="black", linestyle=":", label="bound")
        axis.set_xscale("log", base=2)
        axis.set_xticks([n for n, _ in bound], [str(n) for n, _ in bound])
        axis.set(
            xlabel="paths", ylabel="times faster than sequential", title=f"{name}, {here[0]['prompt']} tokens before"
        )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.legend(fontsize=8)
    first = lines[0]
    versions = f"{first['device']}, torch {first['torch']}, transformers {first['transformers']}"
    figure.suptitle(f"Parallel generation of forced transcripts, bfloat16: {versions}", fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    options = common_options(__doc__, "topology_generation.jsonl and .png")
    options.add_argument("--models", nargs="+", choices=SHAPES, default=["1b", "7b"])
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--cases", nargs="+", help="only cases whose label holds one of these texts")
    options.add_argument("--whole", action="store_true", help="decode all of the sequential runs")
    options.add_argument("--seconds", type=float, default=600, help="start no new case after so many")
    options.add_argument("--draw", action="store_true", help="only draw the picture of the results that are there")
    arguments = options.parse_args(argv)
    path = arguments.output / "topology_generation.jsonl"
    start = time.perf_counter()
    if not arguments.draw:
        for name in arguments.models:
            lines_of(name, SHAPES[name], arguments, path, start)
            gc.collect()
    draw(path)


if __name__ == "__main__":
    main()
