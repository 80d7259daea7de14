"""The model card of a checkpoint, from its configuration and its conversion report."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import CONFIG_NAME

from hf_efficient import __version__
from hf_efficient.conversion.families.family import family_of
from hf_efficient.conversion.report import REPORT_NAME
from hf_efficient.hub.card_snippets import auto_class_of, citations, note, usage
from hf_efficient.json_file import read_json
from hf_efficient.modeling.base.saved_code import replace_file
from hf_efficient.registry import architecture_of

CARD = "README.md"
# Last line of a generated card, with the hash of the text before it: a card without it, or edited since, is kept.
_SIGNATURE = "<!-- written by hf-efficient, sha256 {} -->\n"
_MEASURED = {
    "reference_nll": "cross-entropy of the source, nats per token",
    "nll": "cross-entropy of this model, nats per token",
    "delta_nll": "rise of the cross-entropy, nats per token",
    "kl": "KL divergence from the source, nats per token",
    "top1_agreement": "share of positions where both predict the same token first",
}
# Figures of the model index -> their metric type.
_LOSSES = {"nll": "loss", "delta_nll": "loss_difference", "kl": "kl_divergence"}
# An absolute path, or one from the home folder or the working folder; its last part is kept.
_LOCAL_PATH = re.compile(
    r"(?:file://|(?<![A-Za-z])[A-Za-z]:[\\/]|~|\.{1,2}[\\/]|(?<![\w.:/])/)[^\s,;'\"]*[\\/]([^\s,;'\"\\/]+)"
)


def write_card(folder: Path, repo_id: str | None = None) -> str:
    """Write README.md and return `written`; a card that was edited, or not generated here, stays: `kept`.

    Args:
        folder: a checkpoint with `config.json`, and `conversion_report.json` where it was converted.
        repo_id: the repository that the card shows in its example; OWNER/NAME before it is known.
    """
    path = folder / CARD
    # A symbolic link is replaced: its target is not part of the checkpoint, and may be private.
    if (
        path.exists()
        and not path.is_symlink()
        and not _is_generated(path.read_text(encoding="utf-8", errors="replace"))
    ):
        return "kept"
    replace_file(path, render_card(folder, repo_id))
    return "written"


def render_card(folder: Path, repo_id: str | None = None) -> str:
    """The text of the model card, without what the report does not hold; local paths are cut to the file's name."""
    config = read_json(folder / CONFIG_NAME)
    report = read_json(folder / REPORT_NAME) if (folder / REPORT_NAME).exists() else {}
    source = _mapping(report.get("source"))
    patches = [patch for patch in report.get("patches") or [] if isinstance(patch, dict) and patch.get("name")]
    names = [str(patch["name"]) for patch in patches]
    base = _repo_or_none(source.get("base_model"))
    all_names = _all_patches(names, source)
    title = repo_id.rpartition("/")[2] if repo_id else _model_name(config, source, base, all_names)
    parts = [
        _metadata(config, report, base, names, title),
        f"# {title}",
        _introduction(config, base, source, names),
        *[note(name) for name in all_names],
        usage(folder, config, repo_id or "OWNER/NAME"),
        _measurements(report),
        _sizes(report),
        _patches(patches),
        _provenance(report, source),
        citations(all_names),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    return text + _SIGNATURE.format(_digest(text))


def _is_generated(text: str) -> bool:
    body, separator, signature = text.rpartition("<!-- written by hf-efficient")
    return separator + signature == _SIGNATURE.format(_digest(body))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _model_name(config: dict[str, Any], source: dict[str, Any], base: str | None, patches: list[str]) -> str:
    """Name of a model that has no repository yet: that of its source, followed by the patches."""
    named = _plain(source.get("model_name"))
    name = base.rpartition("/")[2] if base else named if isinstance(named, str) else None
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") if name else ""
    return "-".join([name, *patches]) if name else str(config.get("model_type"))


def _metadata(config: dict[str, Any], report: dict[str, Any], base: str | None, patches: list[str], title: str) -> str:
    """The card's YAML header."""
    source = _mapping(report.get("source"))
    model_type = str(config.get("model_type"))
    tag = _pipeline_tag(config)
    entries: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "license": _word_or_none(source.get("license")),
        "library_name": "transformers",
        "pipeline_tag": tag,
        **({"model_name": title, "eval_results": results} if (results := _eval_results(report, tag)) else {}),
        "tags": ["custom_code", "hf_efficient", model_type, *[name for name in patches if name != model_type]],
    }
    return f"---\n{ModelCardData(**entries).to_yaml()}\n---"


def _pipeline_tag(config: dict[str, Any]) -> str | None:
    """The Hub's name of the task that the model's class has."""
    family = family_of(config.get("model_type"))
    return family.pipeline_tags.get(auto_class_of(config)) if family is not None else None


def _eval_results(report: dict[str, Any], tag: str | None) -> list[EvalResult] | None:
    """The measured losses for the model index; None where nothing was measured."""
    measured = _mapping(report.get("evaluation"))
    text = _plain(measured.get("text"))
    means = {key: _mapping(measured.get(key)).get("mean") for key in _LOSSES}
    results = [
        EvalResult(
            task_type=tag or "other",
            dataset_type="text",
            dataset_name=text if isinstance(text, str) and text else "held-out text",
            metric_type=metric,
            metric_name=_MEASURED[key],
            metric_value=round(float(mean), 6),
        )
        for key, metric in _LOSSES.items()
        if isinstance(mean := means[key], (int, float)) and _is_number(mean)
    ]
    return results or None


def _introduction(config: dict[str, Any], base: str | None, source: dict[str, Any], patches: list[str]) -> str:
    """One sentence: what was converted, to which architecture, with which patches."""
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


def _measurements(report: dict[str, Any]) -> str:
    """The section with the measured losses; empty without a report."""
    if not report:
        return ""
    measured = _mapping(report.get("evaluation"))
    found = {key: _mapping(measured.get(key)) for key in _MEASURED}
    rows = [(_MEASURED[key], *_estimate(value)) for key, value in found.items() if _is_number(value.get("mean"))]
    if not rows:
        return "## What was measured\n\nNothing: the conversion was not evaluated against its source."
    text, tokens = _plain(measured.get("text")), measured.get("tokens")
    on = f"Held-out text: {text}" if text else "Held-out text"
    kind = "masked tokens" if measured.get("objective") == "masked tokens" else "tokens"
    on += f", {tokens:,} {kind}" if isinstance(tokens, int) else ""
    on += f" in {measured['sequences']} sequences" if isinstance(measured.get("sequences"), int) else ""
    dtype = _word_or_none(measured.get("dtype"))
    on += f". Computed in {dtype} from the weights as they are stored" if dtype else ""
    on += f" ({stored})" if dtype and (stored := _word_or_none(report.get("dtype"))) else ""
    return f"## What was measured\n\n{on}.\n\n" + _table(("", "mean", "95 % confidence interval"), rows)


def _sizes(report: dict[str, Any]) -> str:
    """The section with parameters, bytes and FLOPs before and after; empty where the report has none."""
    before, after = _mapping(report.get("before")), _mapping(report.get("after"))
    labels = {"parameters": "parameters", "bytes": "bytes of weights", "flops_per_token": "FLOPs per token"}
    rows = [
        (label, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key] - 1:+.1%}")
        for key, label in labels.items()
        if _is_number(before.get(key)) and _is_number(after.get(key)) and before[key]
    ]
    return "## Size\n\n" + _table(("", "source", "this model", "change"), rows) if rows else ""


def _patches(patches: list[dict[str, Any]]) -> str:
    """The section with options and choices of each patch; empty without patches."""
    parts = []
    for patch in patches:
        settings = {**_mapping(patch.get("options")), **_mapping(patch.get("choices"))}
        rows = [(f"`{key}`", f"`{json.dumps(_plain(value))}`") for key, value in settings.items()]
        parts.append(f"### {patch['name']}\n\n" + (_table(("option", "value"), rows) if rows else "All defaults."))
    return "## Patches\n\n" + "\n\n".join(parts) if parts else ""


def _provenance(report: dict[str, Any], source: dict[str, Any]) -> str:
    """The section with calibration text, fingerprint, versions, warnings and licence."""
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
    """The value, with every text in it that looks like a local path cut to the file's name."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, str):
        return value
    return _LOCAL_PATH.sub(r"\1", value)


def _repo_or_none(value: Any) -> str | None:
    """A repository id, OWNER/NAME; None for anything else, such as a local path."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value) else None


def _word_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value) else None
