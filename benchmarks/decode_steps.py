"""What do the small steps of a decoding layer cost beside PyTorch: addition and norm, rotation and cache write?

    python -m benchmarks.decode_steps [--cases TEXT] [--output FOLDER]

Shapes are a layer of a 1B Llama (hidden 2048, 32 and 8 heads of 64) and of Qwen3-8B (hidden 4096, 32 and 8 heads of
128, normalised).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import Case, Provider, compiled, parser, run
from benchmarks.plot import plot
from hf_efficient.kernels.add_rms_norm.record import RECORD as ADD_RMS_NORM
from hf_efficient.kernels.contract import Arguments, KernelRecord
from hf_efficient.kernels.rotary_cache.record import RECORD as ROTARY_CACHE
from hf_efficient.kernels.rotary_cache.record import draw as draw_rotary_cache

ROWS = (1, 8, 32, 64)
PREFILL_ROWS = 16384
# Caches are long, but only one column is touched: short ones show the same.
CACHE = 64
# Hidden width, heads of q and of k and v, width of a head, whether q and k are normalised.
MODELS: dict[str, tuple[int, tuple[int, int], int, bool]] = {
    "1B": (2048, (32, 8), 64, False),
    "Qwen3-8B": (4096, (32, 8), 128, True),
}


def draw_add_rms_norm(rows: int, width: int, device: torch.device, seed: int) -> Arguments:
    """Arguments of one call of add_rms_norm."""
    generator = torch.Generator(device).manual_seed(seed)
    x, residual = torch.empty(2, rows, width, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    weight = torch.empty(width, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    return {"x": x, "weight": weight, "eps": 1e-5, "residual": residual}


def cases(record: KernelRecord, device: torch.device) -> list[Case]:
    found = []
    for model, (hidden, heads, width, normalised) in MODELS.items():
        for rows in (*ROWS, *((PREFILL_ROWS,) if record is ADD_RMS_NORM else ())):
            if record is ADD_RMS_NORM:
                shape = {"rows": rows, "width": hidden}
                drawn: Any = functools.partial(draw_add_rms_norm, rows, hidden, device)
            else:
                shape = {"rows": rows, "q_heads": heads[0], "kv_heads": heads[1], "width": width}
                sizes = {"batch": rows, "queries": 1, "heads": heads, "width": width, "cache_len": CACHE}
                sizes["normalised"] = normalised
                drawn = functools.partial(_draw_seeded, sizes, device)
            found.append(Case(f"{model} {rows} rows", "decode", shape, torch.bfloat16, drawn))
    return found


def _draw_seeded(sizes: dict[str, Any], device: torch.device, seed: int) -> Arguments:
    """Other places for every seed; what is in them makes no difference to the time."""
    del seed
    return draw_rotary_cache(device, torch.bfloat16, **sizes)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__).parse_args(argv)
    for record in (ADD_RMS_NORM, ROTARY_CACHE):
        eager = record.peers["eager"]
        providers = [
            Provider("eager", lambda eager=eager: eager),
            Provider("compile", compiled(eager)),
            Provider("triton", lambda record=record: functools.partial(record.api, backend="triton")),
        ]
        lines = run(record.name, record, cases(record, torch.device(arguments.device)), providers, arguments)
        plot(lines, f"{record.name}, bfloat16", arguments.output / f"{record.name}.png")


if __name__ == "__main__":
    main()
