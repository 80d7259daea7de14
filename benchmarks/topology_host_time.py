"""What a step of parallel generation costs on the host, without a model: tokens taken, the next step packed.

    python benchmarks/topology_host_time.py

The forward pass waits for this time, so it is to be small beside a step on the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler
from hf_efficient.modeling.topology.generation.topology_step import TopologyStep
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.control_tokens import MULTIVERSE
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText

TOKEN_IDS = {tag: i for i, tag in enumerate(MULTIVERSE)}
# (rows, branches of each)
CASES = ((1, 1), (1, 4), (1, 8), (1, 16), (16, 6))
TEXT = len(MULTIVERSE) + ord("x")


def encode(text: str) -> list[int]:
    """Ids of a text: tags, and one for each character."""
    ids: list[int] = []
    while text:
        tag = next((tag for tag in MULTIVERSE if text.startswith(tag)), text[0])
        ids.append(TOKEN_IDS.get(tag, len(MULTIVERSE) + ord(tag[0])))
        text = text[len(tag) :]
    return ids


def decode(ids: Sequence[int]) -> str:
    return "".join(MULTIVERSE[i] if i < len(MULTIVERSE) else chr(i - len(MULTIVERSE)) for i in ids)


def microseconds(rows: int, branches: int, steps: int, rounds: int) -> list[float]:
    """Host time of a step in each round."""
    outlines = "".join(f"<Outline>{n}: a</Outline>" for n in range(1, branches + 1))
    prompt = encode("x" * 1024 + f"<Parallel><Goal>{outlines}</Goal>")
    forced = ForcedText("multiverse", TOKEN_IDS, encode)
    schedulers = [
        SequenceScheduler(
            b,
            prompt,
            TopologyBuilder("multiverse", TOKEN_IDS, strict=False, decode=decode),
            forced,
            Limits(steps * rounds * 2),
        )
        for b in range(rows)
    ]
    offsets = [0] * rows
    for row in schedulers:
        row.schedule()
        row.num_computed_tokens = len(row.tokens)
    chosen = torch.zeros(rows * branches, dtype=torch.int64)
    step = TopologyStep(rows, 1 << (branches - 1).bit_length(), 1, False, chosen, None)
    answer = torch.zeros(1, rows, step.queries, dtype=torch.int64)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            step.fetch_async(answer)()
            for row in schedulers:
                row.accept([TEXT] * len(row.active_branches))
                row.schedule()
            step.load(schedulers, offsets)
        found.append((time.perf_counter() - start) / steps * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for rows, branches in CASES:
        times = microseconds(rows, branches, arguments.steps, arguments.rounds)
        line = {"rows": rows, "branches": branches, "us_median": statistics.median(times), "us_least": min(times)}
        print(json.dumps({name: round(value, 1) for name, value in line.items()}))


if __name__ == "__main__":
    main()
