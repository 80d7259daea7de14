"""The model card: valid metadata, measured figures, and no path of the machine that wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_efficient.conversion.plan import ModelSize
from hf_efficient.conversion.reading.hub_files import gguf_names
from hf_efficient.conversion.report import REPORT_NAME, ConversionReport
from hf_efficient.environment import TESTED_TRANSFORMERS
from hf_efficient.hub.card import CARD, render_card, write_card
from hf_efficient.hub.verify import verify

REPORT = ConversionReport(
    source={
        "name": "/home/someone/models/smollm",
        "model_type": "llama",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "license": "apache-2.0",
        "fingerprint": "ab12",
    },
    model_type="hfe_stem",
    patches=[{"name": "stem", "options": {"init": "gated_mean"}, "choices": {"stem_layers": [1, 2]}, "measured": {}}],
    tensors={"copied": 10, "computed": {}, "dropped": [], "left_out": {}},
    before=ModelSize(1000, 4000, 2000),
    after=ModelSize(1500, 6000, 1800),
    dtype="bfloat16",
    options={"calibration": "/home/someone/texts/private.jsonl"},
    versions={"hf_efficient": "0.1.0", "torch": "2.13.0"},
    estimate={"disk_bytes": 1, "peak_memory_bytes": 1},
    warnings=["the model grows by 50 %", "read from ~/models/smollm/model.safetensors"],
    calibration={"calibration_text": "/home/someone/texts/private.jsonl", "calibration_tokens": 18432},
    evaluation={
        "text": "file:///home/someone/texts/held.txt",
        "dtype": "float32",
        "tokens": 8176,
        "sequences": 16,
        "sequence_length": 512,
        "nll": {"mean": 3.5, "low": 3.25, "high": 3.75},
        "delta_nll": {"mean": 1.09, "low": 1.01, "high": 1.17},
        "kl": {"mean": 0.0, "low": None, "high": None},
        "top1_agreement": None,
    },
).to_dict()


def card_of(folder: Path, report: dict[str, Any] | None) -> ModelCard:
    if report is not None:
        (folder / REPORT_NAME).write_text(json.dumps(report))
    return ModelCard(render_card(folder, "tester/stem"))


def test_metadata_names_base_licence_task_and_patch(checkpoint: Path) -> None:
    data = card_of(checkpoint, REPORT).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.base_model_relation == "finetune"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["custom_code", "hf_efficient", "hfe_stem", "stem"]
    assert data.model_name == "stem" and [
        (result.metric_type, result.metric_value, result.dataset_name) for result in data.eval_results
    ] == [("loss", 3.5, "held.txt"), ("loss_difference", 1.09, "held.txt"), ("kl_divergence", 0.0, "held.txt")]


def test_text_says_what_a_user_must_know(checkpoint: Path) -> None:
    text = card_of(checkpoint, REPORT).text
    assert "is lossy" in text
    assert 'repository, commit = "tester/stem"' in text
    assert "AutoModelForCausalLM.from_pretrained(repository, revision=commit, trust_remote_code=True)" in text
    assert "| increase in cross-entropy, nats per token | 1.0900 | 1.0100 to 1.1700 |" in text
    assert "| KL divergence from the source, nats per token | 0.0000 |  |" in text
    assert "8,176 tokens in 16 sequences" in text
    assert "Computed in float32 from the weights as they are stored (bfloat16)." in text
    assert text.lstrip().startswith("# stem\n")
    assert f"tested with transformers {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[1]}" in text
    assert "hf-efficient export FOLDER" in text and "eprint = {2601.10639}" in text
    assert "| parameters | 1,000 | 1,500 | +50.0% |" in text
    assert "`[1, 2]`" in text and "18,432 tokens" in text and "grows by 50 %" in text


def test_no_local_path_enters_a_card(checkpoint: Path) -> None:
    text = render_card(checkpoint)
    assert str(checkpoint) not in text and "/tmp" not in text
    text = str(card_of(checkpoint, REPORT).content)
    assert "someone" not in text and "~" not in text and "file:" not in text
    linked = {**REPORT, "warnings": ["see https://example.org/a/b.html"]}
    assert "see https://example.org/a/b.html" in card_of(checkpoint, linked).content
    assert "private.jsonl" in text and "held.txt" in text  # a file's name is not a path
    local = {**REPORT, "source": {**REPORT["source"], "base_model": "/home/someone/models", "revision": "../x"}}
    card = card_of(checkpoint, local)
    assert card.data.base_model is None and "someone" not in card.content and "../x" not in card.content


def test_a_further_conversion_still_tells_what_the_first_one_cost(checkpoint: Path) -> None:
    further = {**REPORT, "source": {"model_type": "hfe_stem"}, "patches": [], "evaluation": None}
    text = card_of(checkpoint, further).text
    assert "is lossy" in text and "without a patch" in text and "Nothing: the conversion was not evaluated" in text


@pytest.mark.parametrize("missing", sorted(REPORT))
def test_a_report_without_some_field_still_gives_a_card(checkpoint: Path, missing: str) -> None:
    card = card_of(checkpoint, {key: value for key, value in REPORT.items() if key != missing})
    assert card.data.library_name == "transformers" and "## How to use it" in card.text


@pytest.mark.parametrize("report", [None, {}])
def test_a_model_that_was_not_converted_has_a_card(checkpoint: Path, report: dict[str, Any] | None) -> None:
    card = card_of(checkpoint, report)
    assert card.data.tags == ["custom_code", "hf_efficient", "hfe_stem"]
    assert "lossy" not in card.text and "measured" not in card.text


def test_the_card_states_the_versions_that_the_package_needs(checkpoint: Path, repository_root: Path) -> None:
    project = (repository_root / "pyproject.toml").read_text()
    text = render_card(checkpoint)
    for package in ("torch", "transformers"):
        lowest = re.search(rf'"{package}>=([\d.]+)', project)
        assert lowest and f"{package} >= {lowest[1]}" in text


def test_an_edited_card_is_kept_and_an_own_one_renewed(checkpoint: Path) -> None:
    assert write_card(checkpoint) == "written"
    assert write_card(checkpoint, "tester/stem") == "written"
    assert (checkpoint / CARD).read_text() == render_card(checkpoint, "tester/stem")
    edited = (checkpoint / CARD).read_text().replace("# stem\n", "# My model\n")
    (checkpoint / CARD).write_text(edited)
    assert write_card(checkpoint) == "kept"
    assert (checkpoint / CARD).read_text() == edited


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ({"base_model": "maker/Small-1B"}, "Small-1B-stem"),
        ({"base_model": None, "model_name": "Small 1B (8k)"}, "Small-1B-8k-stem"),
        ({"base_model": None, "model_name": "../../etc"}, "etc-stem"),
        ({"base_model": None}, "hfe_stem"),
    ],
)
def test_the_title_is_the_name_of_the_model(checkpoint: Path, source: dict[str, Any], title: str) -> None:
    (checkpoint / REPORT_NAME).write_text(json.dumps({**REPORT, "source": {"model_type": "llama", **source}}))
    assert f"\n# {title}\n" in render_card(checkpoint)
    assert "\n# chosen\n" in render_card(checkpoint, "tester/chosen")


def test_what_was_not_measured_is_in_no_model_index(checkpoint: Path) -> None:
    for evaluation in (None, {**REPORT["evaluation"], "nll": None, "delta_nll": None, "kl": None}):
        card = card_of(checkpoint, {**REPORT, "evaluation": evaluation})
        assert card.data.eval_results is None and "model-index" not in card.content
        assert "model_name" not in card.content


def test_the_snippets_of_a_card_run(
    checkpoint: Path, run_python: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Run unchanged except for the repository, without the package; the chat snippet only with a chat template."""
    assert "Chat:" not in render_card(checkpoint)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    text = render_card(checkpoint, "tester/stem")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 4 and "Chat:" in text
    script = "\n".join(snippets).replace('"tester/stem", "..."', f"{str(checkpoint)!r}, None")
    script += """
import json
from transformers import AutoModelForCausalLM
again = AutoModelForCausalLM.from_pretrained("merged", trust_remote_code=True)
print(json.dumps({"model": type(model).__name__, "again": type(again).__name__, "module": type(again).__module__}))
"""
    found = run_python(script)
    assert found["model"] == "PeftModelForCausalLM" and found["again"] == "StemForCausalLM"
    assert found["module"].startswith("transformers_modules.merged.")
    assert verify(tmp_path / "merged").ok, verify(tmp_path / "merged").table()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"general.repo_url": "https://huggingface.co/maker/small"}, "maker/small"),
        ({"general.source.huggingface.repository": "maker/small"}, "maker/small"),
        ({"general.source.url": "https://huggingface.co/maker/small/tree/main"}, "maker/small"),
        ({"general.repo_url": "https://example.org/maker/small", "general.source.url": "https://hf.co/a/b/"}, "a/b"),
        ({"general.base_model.count": 1, "general.base_model.0.repo_url": "https://huggingface.co/a/b"}, "a/b"),
        ({"general.base_model.count": 2, "general.base_model.0.repo_url": "https://huggingface.co/a/b"}, None),
        ({"general.source.url": "https://huggingface.co/datasets/text"}, None),
        ({"general.repo_url": 7, "general.source.url": "/home/someone/small"}, None),
    ],
)
def test_the_base_model_of_a_gguf_file(metadata: dict[str, Any], expected: str | None) -> None:
    assert gguf_names({**metadata, "general.name": "Small"}) == (expected, "Small")
