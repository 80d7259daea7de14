"""The model card of a checkpoint, from its configuration and its conversion report."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_efficient import __version__
from hf_efficient.conversion.reading.json_file import read_json
from hf_efficient.conversion.report import REPORT_NAME
from hf_efficient.hub.export import CONFIG
from hf_efficient.registry import ARCHITECTURES, architecture_of

CARD = "README.md"
# Lowest versions that the exported code runs with; the same as in the package's own metadata.
REQUIREMENTS = "torch >= 2.11 and transformers >= 5.17"
# Our cards end with this line and the hash of all before it: a card that somebody edited is theirs, and stays.
_SEAL = "<!-- written by hf-efficient, sha256 {} -->\n"
_PIPELINE_TAGS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
_PIPELINE_TAGS["ForImageClassification"] = "image-classification"
_MEASURED = {
    "reference_nll": "cross-entropy of the source, nats per token",
    "nll": "cross-entropy of this model, nats per token",
    "delta_nll": "rise of the cross-entropy, nats per token",
    "kl": "KL divergence from the source, nats per token",
    "top1_agreement": "share of positions where both predict the same token first",
}
# An absolute path, or one from the home folder or the working folder; its last part is kept.
_LOCAL_PATH = re.compile(r"(?:file://)?(?:[A-Za-z]:[\\/]|~|\.{1,2}[\\/]|(?<![\w.:/])/)[^\s,;'\"]*[\\/]([^\s,;'\"\\/]+)")


def write_card(folder: Path, repo_id: str | None = None) -> str:
    """Write README.md, unless somebody else wrote or edited it. Returns `written` or `kept`.

    Args:
        folder: a checkpoint with `config.json`, and `conversion_report.json` where it was converted.
        repo_id: the repository that the card shows in its example; OWNER/NAME before it is known.
    """
    path = folder / CARD
    if path.exists() and not _is_ours(path.read_text(encoding="utf-8", errors="replace")):
        return "kept"
    path.write_text(render_card(folder, repo_id), encoding="utf-8", newline="\n")
    return "written"


def render_card(folder: Path, repo_id: str | None = None) -> str:
    """The text of the model card. Whatever the report does not say is left out; no local path ever enters."""
    config = read_json(folder / CONFIG)
    report = read_json(folder / REPORT_NAME) if (folder / REPORT_NAME).exists() else {}
    source = _mapping(report.get("source"))
    patches = [patch for patch in report.get("patches") or [] if isinstance(patch, dict) and patch.get("name")]
    names = [str(patch["name"]) for patch in patches]
    base = _repo_or_none(source.get("base_model"))
    title = repo_id or (
        f"{base.rpartition('/')[2]} on {config.get('model_type')}" if base else config.get("model_type")
    )
    parts = [
        _metadata(config, source, base, names),
        f"# {title}",
        _introduction(config, base, source, names),
        *[_note(name) for name in _all_patches(names, source)],
        _loading(config, repo_id or "OWNER/NAME"),
        _measurements(report),
        _sizes(report),
        _patches(patches),
        _provenance(report, source),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    return text + _SEAL.format(_digest(text))


def _is_ours(text: str) -> bool:
    body, separator, seal = text.rpartition("<!-- written by hf-efficient")
    return separator + seal == _SEAL.format(_digest(body))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(config: dict[str, Any], source: dict[str, Any], base: str | None, patches: list[str]) -> str:
    model_type = str(config.get("model_type"))
    class_name = str((config.get("architectures") or [""])[0])
    tag = next((tag for suffix, tag in _PIPELINE_TAGS.items() if class_name.endswith(suffix)), None)
    entries: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "license": _word_or_none(source.get("license")),
        "library_name": "transformers",
        "pipeline_tag": tag,
        "tags": ["custom_code", "hf_efficient", model_type, *[name for name in patches if name != model_type]],
    }
    return f"---\n{ModelCardData(**entries).to_yaml()}\n---"


def _introduction(config: dict[str, Any], base: str | None, source: dict[str, Any], patches: list[str]) -> str:
    model_type = config.get("model_type")
    if not source and not patches:
        return f"A model of the architecture `{model_type}`, with its code, written by hf-efficient {__version__}."
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"a {source.get('model_type', 'stock')} model"
    if base and (revision := _word_or_none(source.get("revision"))):
        origin += f" (revision `{revision}`)"
    named = ", ".join(f"`{name}`" for name in patches)
    how = f"with the patch{'es' if len(patches) > 1 else ''} {named}" if patches else "without a patch"
    return f"Converted from {origin} to the architecture `{model_type}`, {how}, by hf-efficient {__version__}."


def _all_patches(names: list[str], source: dict[str, Any]) -> list[str]:
    """The patches of this conversion, and that of its source where the source was converted before."""
    earlier = architecture_of(str(source.get("model_type")))
    return list(dict.fromkeys([*names, *([earlier.patch] if earlier and earlier.patch else [])]))


def _note(patch: str) -> str:
    """What the patch itself says to readers of a card."""
    options = next((a.patch_options for a in ARCHITECTURES if a.patch == patch), None)
    if options is None:
        return ""
    module, _, name = options.partition(":")
    return str(getattr(import_module(module), name).card_note)


def _loading(config: dict[str, Any], repo_id: str) -> str:
    auto_map = _mapping(config.get("auto_map"))
    saved = [str(name) for name in config.get("architectures") or []]
    auto_class = next((name for name, cls in auto_map.items() if str(cls).rpartition(".")[2] in saved), "AutoModel")
    return f"""## How to load it

The code comes with the checkpoint, so nothing but {REQUIREMENTS} is needed.
Triton kernels run where Triton and a CUDA device are, plain PyTorch elsewhere. `trust_remote_code=True` runs that code
on your machine: pin the commit that you looked at.

```python
from transformers import {auto_class}, AutoTokenizer

repository, commit = "{repo_id}", "..."  # a full commit hash, from the page's history
model = {auto_class}.from_pretrained(repository, revision=commit, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repository, revision=commit, trust_remote_code=True)
```

With hf-efficient installed, `hf-efficient verify {repo_id}` says whether the code is, byte for byte, that of the
release, and `import hf_efficient` loads the checkpoint without `trust_remote_code`."""


def _measurements(report: dict[str, Any]) -> str:
    if not report:
        return ""
    measured = _mapping(report.get("evaluation"))
    found = {key: _mapping(measured.get(key)) for key in _MEASURED}
    rows = [(_MEASURED[key], *_estimate(value)) for key, value in found.items() if _is_number(value.get("mean"))]
    if not rows:
        return "## What was measured\n\nNothing: the conversion was not evaluated against its source."
    text, tokens = _plain(measured.get("text")), measured.get("tokens")
    on = f"Held-out text: {text}" if text else "Held-out text"
    on += f", {tokens:,} tokens" if isinstance(tokens, int) else ""
    on += f" in {measured['sequences']} sequences" if isinstance(measured.get("sequences"), int) else ""
    return f"## What was measured\n\n{on}.\n\n" + _table(("", "mean", "95 % confidence interval"), rows)


def _sizes(report: dict[str, Any]) -> str:
    before, after = _mapping(report.get("before")), _mapping(report.get("after"))
    labels = {"parameters": "parameters", "bytes": "bytes of weights", "flops_per_token": "FLOPs per token"}
    rows = [
        (label, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key] - 1:+.1%}")
        for key, label in labels.items()
        if _is_number(before.get(key)) and _is_number(after.get(key)) and before[key]
    ]
    return "## Size\n\n" + _table(("", "source", "this model", "change"), rows) if rows else ""


def _patches(patches: list[dict[str, Any]]) -> str:
    parts = []
    for patch in patches:
        settings = {**_mapping(patch.get("options")), **_mapping(patch.get("choices"))}
        rows = [(f"`{key}`", f"`{json.dumps(_plain(value))}`") for key, value in settings.items()]
        parts.append(f"### {patch['name']}\n\n" + (_table(("option", "value"), rows) if rows else "All defaults."))
    return "## Patches\n\n" + "\n\n".join(parts) if parts else ""


def _provenance(report: dict[str, Any], source: dict[str, Any]) -> str:
    lines = []
    calibration = _mapping(report.get("calibration"))
    if text := _plain(calibration.get("calibration_text")):
        tokens = calibration.get("calibration_tokens")
        lines.append(f"- Calibrated on {text}" + (f", {tokens:,} tokens." if isinstance(tokens, int) else "."))
    if fingerprint := _word_or_none(source.get("fingerprint")):
        lines.append(f"- Fingerprint of the source: `{fingerprint}`.")
    if versions := _mapping(report.get("versions")):
        lines.append("- Converted with " + ", ".join(f"{name} {_plain(v)}" for name, v in versions.items()) + ".")
    lines += [f"- {_plain(warning)}" for warning in report.get("warnings") or [] if _plain(warning)]
    licence = _word_or_none(source.get("license"))
    lines.append(
        f"- The source's licence, {licence}, holds for the weights; the code is under Apache-2.0."
        if licence
        else "- The source's licence holds for the weights; the code is under Apache-2.0."
    )
    return "## Provenance\n\n" + "\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _estimate(value: dict[str, Any]) -> tuple[str, str]:
    low, high = value.get("low"), value.get("high")
    return f"{value['mean']:.4f}", "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    """The value, with every text in it that looks like a path of somebody's machine reduced to the file's name."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, str):
        return value
    return _LOCAL_PATH.sub(r"\1", value)


def _repo_or_none(value: Any) -> str | None:
    """A repository id, OWNER/NAME; None for anything else, local paths above all."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value) else None


def _word_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value) else None
