"""The readers of Wan checkpoints, on changed files: see conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_efficient.conversion.plan import check_source
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.convert_checkpoint import convert
from hf_efficient.inspection import inspect
from wan_checkpoints import DIFFUSERS, ORIGINAL, WEIGHTS, in_diffusers, tensors, write

Fuzz = Callable[..., None]
KEYS = ("image_dim", "qk_norm", "window_size", "model_type", "_class_name", "transformers_weights", "out_channels")


def plans(source: Path) -> None:
    """Inspect, then plan a conversion."""
    inspect(str(source))
    convert(source, source.parent.parent / "out", [], dry_run=True, progress=False)


def reads_all(source: Path) -> None:
    """Open, check against the configuration, read every tensor."""
    opened = open_source(str(source))
    check_source(opened)
    for name in opened.reader.names():
        opened.reader.read(name)


@pytest.mark.parametrize("layout", ["diffusers", "original", "causal"])
def test_wan_config(fuzz: Fuzz, layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "place" / "wan"
    if layout == "diffusers":
        write(folder, in_diffusers(tensors()), DIFFUSERS)
    else:
        name = "CausalWanModel" if layout == "causal" else "WanModel"
        write(folder, tensors(), {**ORIGINAL, "_class_name": name, "local_attn_size": -1, "sink_size": 0})
    fuzz(f"wan_config_{layout}", plans, folder, ["config.json"], KEYS)


def test_wan_index(fuzz: Fuzz, tmp_path: Path) -> None:
    folder = write(tmp_path / "place" / "wan", in_diffusers(tensors()), DIFFUSERS, shards=2)
    fuzz("wan_index", reads_all, folder, [f"{WEIGHTS}.index.json"], ("weight_map",))


def test_wan_training_file(fuzz: Fuzz, tmp_path: Path) -> None:
    folder = tmp_path / "place" / "wan"
    folder.mkdir(parents=True)
    torch.save({"generator_ema": tensors()}, folder / "weights.pt")
    fuzz("wan_training_file", lambda place: reads_all(place / "weights.pt"), folder, ["weights.pt"])
