"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TEXT = "\n\n".join(f"Paragraph {i}: the quick brown fox jumps over the lazy dog, and again." for i in range(80))


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_convert_then_train_the_tables(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    stem, trained = tmp_path / "tiny-stem", tmp_path / "tiny-trained"
    shown = run_example(
        "convert_and_generate.py", tiny_llama, stem, "--layers", "1,2", "--calibration", text, "--max-new-tokens", 4
    )
    assert "Δ nll" in shown and "The capital of France is" in shown

    shown = run_example(
        *("train_tables.py", stem, trained, "--text", text, "--steps", 40),
        *("--sequence-length", 64, "--learning-rate", 0.1),
    )
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[-1] < losses[0] - 0.05, shown

    from hf_efficient import verify

    assert verify(str(trained)).ok


def test_stem_from_scratch_compares_at_equal_flops_and_measures_every_level(text: Path, tmp_path: Path) -> None:
    run_example(
        *("stem_from_scratch.py", "--text", text, "--level", "char", "byte", "bpe", "--vocabulary", 300),
        *(
            "--hidden",
            32,
            "--intermediate",
            64,
            "--layers",
            3,
            "--context",
            32,
            "--steps",
            6,
            "--batch",
            8,
            "--seeds",
            2,
        ),
        *("--device", "cpu", "--output", tmp_path),
    )
    result = json.loads((tmp_path / "stem_from_scratch.json").read_text())
    assert (tmp_path / "stem_from_scratch.png").read_bytes().startswith(b"\x89PNG")
    assert list(result["levels"]) == ["char", "byte", "bpe"]
    for level in result["levels"].values():
        dense, same_shape, same_flops = (model["flops_per_token"] for model in level["models"].values())
        assert same_shape < dense and abs(same_flops / dense - 1) < 0.01
        for model in level["models"].values():
            assert [run["seed"] for run in model["runs"]] == [0, 1]
            for run in model["runs"]:
                untrained = run["nll_per_byte"][0] * level["bytes_per_token"]
                assert untrained == pytest.approx(math.log(level["rows"]), rel=0.02)
                assert run["end"] < run["nll_per_byte"][0] - 0.05
                assert run["best"] == min(run["nll_per_byte"]) and run["end"] == run["nll_per_byte"][-1]
        rows = list(level["distinct_rows"].values())
        assert rows == sorted(rows)
        assert all(used <= min(int(context), level["rows"]) for context, used in level["distinct_rows"].items())
    # English letters are one byte each: as characters and as bytes it is the same text.
    char, byte = (result["levels"][name]["distinct_rows"] for name in ("char", "byte"))
    assert char == byte


@torch.no_grad()
def test_stem_from_scratch_counts_the_flops_that_run() -> None:
    spec = importlib.util.spec_from_file_location("stem_from_scratch", ROOT / "examples" / "stem_from_scratch.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    shape = {"hidden": 32, "intermediate": 64, "layers": 3, "stem_layers": "half", "context": 16}
    for config in example.configurations(40, argparse.Namespace(**shape)).values():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.arange(16)[None], use_cache=False)
        # Eager attention multiplies all 16 keys; causal attention needs (16 + 1) / 2 on average.
        above_the_diagonal = 4 * 3 * 32 * (16 - 17 / 2)
        assert counter.get_total_flops() / 16 - above_the_diagonal == example.size(config, 16)["flops_per_token"]


def test_edit_facts_changes_the_answers_that_it_edits_and_no_others(tmp_path: Path) -> None:
    """Hardly trained, so that answers only lean; what is exact must be exact all the same."""
    shown = run_example(
        *("edit_facts.py", "--output", tmp_path, "--device", "cpu", "--steps", 60, "--singles", 16, "--doubles", 10),
        *("--batch-size", 64, "--learning-rate", 3e-4, "--table-rate", 5e-2),
    )
    report = json.loads((tmp_path / "edit_facts.json").read_text())
    assert (tmp_path / "edit_facts.png").read_bytes().startswith(b"\x89PNG")
    before, after = report["override"]["before"], report["override"]["after"]
    assert before["p_source"] > 1.5 * before["p_target"]
    assert after["p_target"] > before["p_target"] and after["p_source"] < before["p_source"]
    assert report["layers"]["[3]"]["p_source"] == pytest.approx(before["p_source"], rel=1e-5), "nobody reads it later"
    assert len(report["modes"]) == 10
    exact = {name: value for name, value in report["persistent"].items() if isinstance(value, bool)}
    assert len(exact) == 2 and all(exact.values()), exact
    assert "capital, tokens 1 -> 2 average" in shown
    from hf_efficient.modeling.stem.modeling_stem import StemForCausalLM

    model = StemForCausalLM.from_pretrained(tmp_path)
    assert model.config.stem_layers == [1, 2, 3]
    shown = run_example("plot_angular_spread.py", tmp_path, "--output", tmp_path / "spread.png")
    assert shown.count("of random rows") == 3
    assert (tmp_path / "spread.png").read_bytes().startswith(b"\x89PNG")


def test_the_depth_study_finds_what_scale_does_and_what_tanh_does(text: Path, tmp_path: Path) -> None:
    shown = run_example(
        *(
            "bhyt_depth_study.py",
            "--text",
            text,
            "--quick",
            "--layers",
            4,
            "--context",
            32,
            "--steps",
            12,
            "--seeds",
            2,
        ),
        *("--evaluated-bytes", 600, "--device", "cpu", "--output", tmp_path),
    )
    assert (tmp_path / "bhyt_depth_study.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "bhyt_depth_study.json").read_text())
    variants = result["depths"]["4"]
    untrained = {name: found["untrained"]["variance"] for name, found in variants.items()}
    control, bounded = untrained["RMSNorm × 0.1"], untrained["BHyT (1, 1)"]
    assert untrained["RMSNorm"][-1] > 2 * untrained["RMSNorm"][0]
    assert control[-1] < 1.05 * control[0]
    assert bounded == pytest.approx(control, rel=0.02), "untrained, BHyT is its scale"
    for name, found in variants.items():
        assert [run["seed"] for run in found["runs"]] == [0, 1]
        for run in found["runs"]:
            assert run["nll_per_byte"][-1] < run["nll_per_byte"][0] - 0.05
            assert run["evaluated_at"][-1] == 12 and len(run["trained"]["variance"]) == 4
            assert ("estimate_error" in run["trained"]) == ("depth_bound" in run) == name.startswith("BHyT")
    estimates = [variants[name]["untrained"]["estimate_error"] for name in ("BHyT (1, 1)", "BHyT (3, 3)")]
    assert max(estimates[0]) < 0.005 and max(estimates[1]) < 0.02
    spike = {name: found["channel"] for name, found in result["spike"].items()}
    assert spike["RMSNorm"] > 15 and spike["RMSNorm × 0.1"] > 1.5
    assert all(value < 1 for name, value in spike.items() if "BHyT" in name or "DyT" in name)
    assert "One channel times 1000" in shown


def test_fine_tuning_to_multiverse_trains_adapters_and_rows_and_follows_what_the_model_writes(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Random and hardly trained, the model cannot answer; it is converted, trained, merged, saved and asked."""
    shown = run_example(
        *("fine_tune_multiverse.py", tiny_llama, tmp_path / "out", "--device", "cpu", "--steps", 6, "--batch", 4),
        *("--rank", 4, "--evaluated", 3, "--max-new-tokens", 24, "--learning-rate", 1e-2),
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["losses"][-1] < report["losses"][0] - 0.05 and report["problems"] == len(report["texts"]) == 3
    assert "[root]" in shown and "held-out problems: forks 0.0%" in shown

    from safetensors.torch import load_file

    import hf_efficient  # noqa: F401  (registers the model types)

    before, after = (load_file(tmp_path / "out" / part / "model.safetensors") for part in ("untrained", ""))
    assert before.keys() == after.keys()
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1).nonzero()[:, 0].tolist()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    control = set(model.config.topology["token_ids"].values())
    assert rows and set(rows) <= control, "no other row has changed"
    assert model.config.topology["trained"] and not control & set(model.generation_config.suppress_tokens or [])
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    assert (tmp_path / "out" / "topology.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_to_multiverse_judges_answers_by_what_they_say() -> None:
    """A right answer, a slip of arithmetic that is joined rightly, a wrong join, an answer without paths."""
    spec = importlib.util.spec_from_file_location("fine_tune", ROOT / "examples" / "fine_tune_multiverse.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules["fine_tune"] = example  # dataclasses look their module up
    spec.loader.exec_module(example)
    problem = example.Problem("Anna", (("figs", 3, 5), ("pears", 2, 9)), (("nuts", 4),))
    assert problem.answer == "pears" and "figs 5, nuts 4, pears 9" in problem.prompt

    def judged(text: str, labels: list[str]) -> dict[str, bool]:
        topology = example.Topology.from_spec([(1, []) for _ in labels])
        topology.labels = labels
        return example.Answer(problem, [], problem.prompt + text, topology, 1, 1).is_right()

    right, labels = problem.completion, ["root", "1", "2", "join"]
    assert all(judged(right, labels).values())
    slip = right.replace("2 x 9 = 18", "2 x 9 = 19").replace("pears 18", "pears 19")
    assert judged(slip, labels) == {"forks": True, "paths": False, "joins": True, "answer": True}
    assert not judged(right.replace("pears 18", "pears 15"), labels)["joins"]
    assert not judged(right, ["root"])["forks"]
    assert judged("Answer: pears", ["root"]) == {"forks": False, "paths": False, "joins": False, "answer": True}
