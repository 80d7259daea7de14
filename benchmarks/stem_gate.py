"""How close does STEM's gather ⊙ silu(gate) come to the memory's speed, and what does it gain over plain PyTorch?

    python -m benchmarks.stem_gate [--modes forward backward decode] [--cases TEXT] [--output FOLDER]

Shapes are one STEM feed-forward of named models; ids follow Zipf's law (exponent 1), as words do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from benchmarks.harness import Case, Provider, compiled, parser, run
from benchmarks.plot import plot
from hf_efficient.kernels.contract import Arguments
from hf_efficient.kernels.stem_gate.record import RECORD

# Width of the feed-forward and rows of the table.
MODELS = {
    "1B": {"width": 8192, "rows": 128256},
    "350M": {"width": 2560, "rows": 32000},
    "SmolLM2-360M": {"width": 2560, "rows": 49152},
}
TOKENS = {"forward": (4096, 16384, 65536), "backward": (4096, 16384)}
DECODE_TOKENS = (1, 4, 16, 64, 256)


def zipf_ids(tokens: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    """`tokens` ids; the k-th most frequent has probability proportional to 1 / k. Ids are in no order of frequency."""
    device = generator.device
    frequency = 1.0 / torch.arange(1, rows + 1, device=device, dtype=torch.float64)
    ranks = torch.multinomial(frequency, tokens, replacement=True, generator=generator)
    return torch.randperm(rows, device=device, generator=torch.Generator(device).manual_seed(0))[ranks]


@functools.cache
def table_of(rows: int, width: int, device: torch.device) -> torch.Tensor:
    """A table is gigabytes large: all cases of a model share it."""
    return torch.empty(rows, width, dtype=torch.bfloat16, device=device).normal_()


def draw(tokens: int, rows: int, width: int, device: torch.device, seed: int) -> Arguments:
    """Arguments of one call."""
    generator = torch.Generator(device).manual_seed(seed)
    gate = torch.empty(tokens, width, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    return {"gate": gate, "table": table_of(rows, width, device), "ids": zipf_ids(tokens, rows, generator)}


def cases(device: torch.device) -> list[Case]:
    found = []
    for mode in ("forward", "backward", "decode"):
        for model, sizes in MODELS.items():
            if mode == "decode" and model != "1B":
                continue
            for tokens in DECODE_TOKENS if mode == "decode" else TOKENS[mode]:
                shape = {"tokens": tokens, **sizes}
                drawn = functools.partial(draw, **shape, device=device)
                found.append(Case(f"{model} T={tokens}", mode, shape, torch.bfloat16, lambda s, d=drawn: d(seed=s)))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__).parse_args(argv)
    eager = RECORD.peers["eager"]
    providers = [
        Provider("eager", lambda: eager),
        Provider("compile", compiled(eager)),
        Provider("triton", lambda: functools.partial(RECORD.api, backend="triton")),
    ]
    lines = run("stem_gate", RECORD, cases(torch.device(arguments.device)), providers, arguments)
    plot(lines, "stem_gate: silu(gate) * table[ids], bfloat16", arguments.output / "stem_gate.png")


if __name__ == "__main__":
    main()
