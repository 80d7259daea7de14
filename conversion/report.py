"""The report of a conversion: as a table for a terminal, and as `conversion_report.json`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypedDict

from hf_efficient.conversion.measuring.evaluation import metric_labels
from hf_efficient.conversion.plan import ModelSize
from hf_efficient.conversion.writing.durable_files import format_bytes
from hf_efficient.errors import HFEError

REPORT_NAME = "conversion_report.json"
# Largest number of ranges of integers that `_ranges` writes.
_MAX_RANGES = 12
_METRIC_LABELS = metric_labels("source")


Package = Literal["hf_efficient", "python", "torch", "transformers", "safetensors", "huggingface_hub", "numpy", "gguf"]


class SourceSummary(TypedDict, total=False):
    """Name and origin of the source, see `ConversionReport.source`."""

    name: str
    model_name: str | None
    model_type: str
    base_model: str | None
    revision: str | None
    license: str | None
    fingerprint: str


class TensorSummary(TypedDict, total=False):
    """Number of copied tensors, `computed` (name -> how), `dropped` (names) and `left_out` (name -> reason)."""

    copied: int
    computed: dict[str, str]
    dropped: list[str]
    left_out: dict[str, str]


class PlannedSize(TypedDict, total=False):
    """Bytes of disk, and of memory for weights, that a conversion needs by its plan."""

    disk_bytes: int
    peak_memory_bytes: int


@dataclass
class ConversionReport:
    """What one conversion did and measured. It contains no path of the machine on which it ran.

    Attributes:
        source: `name`, `model_name` from a GGUF file's metadata, `model_type`, `base_model`, `revision`, `license`, and
            `fingerprint`, the SHA-256 of the configuration, tensor headers and file sizes.
        model_type: model type of the result.
        patches: for each patch its `name`, `options`, `choices`, whether it was `calibrated` and what it `measured`;
            `measured["summary"]` maps labels to texts, which the table shows. After a dry run `to_measure` maps
            each choice that a conversion will measure to what is known of it.
        tensors: `copied` (a number), `computed` (name -> how), `dropped` (names), `left_out` (name -> reason).
        before, after: size of source and result; `ModelSize` has the formulas.
        dtype: dtype of new tensors, and of most others.
        options: the options of the conversion.
        calibration: texts and their token counts; None if nothing was calibrated or evaluated.
        evaluation: loss on held-out text, compared with the source's, each metric with a 95 % confidence interval, and
            split by how often the input token occurs in the calibration text; None if not evaluated.
        warnings: the warnings that were logged.
        versions: package -> version, Python included.
        estimate: `disk_bytes` and `peak_memory_bytes` as planned.
        seconds, peak_memory_bytes: wall time and peak resident memory of the process; None for a dry run.
    """

    source: SourceSummary
    model_type: str
    patches: list[dict[str, Any]]
    tensors: TensorSummary
    before: ModelSize
    after: ModelSize
    dtype: str
    options: dict[str, Any]
    versions: dict[Package, str]
    estimate: PlannedSize
    warnings: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConversionReport:
        """The report from the result of `to_dict`; `HFEError` if keys are missing or unknown."""
        try:
            sizes = {key: ModelSize(**values[key]) for key in ("before", "after")}
            return cls(**{**values, **sizes})
        except (KeyError, TypeError) as error:
            raise HFEError(f"{REPORT_NAME} is not a report of this release ({error})", "convert again") from error

    def table(self) -> str:
        """The report as a table for a terminal, one line for each label."""
        before, after = self.before, self.after
        names = ", ".join(patch["name"] for patch in self.patches) or "none"
        rows = [
            ("source", f"{self.source['name']} ({self.source['model_type']})"),
            ("result", f"{self.model_type}, patches: {names}, {self.dtype}"),
            ("tensors", self._tensor_counts()),
            ("parameters", _format_change(before.parameters, after.parameters, "{:,}".format)),
            ("bytes", _format_change(before.bytes, after.bytes, format_bytes)),
            ("FLOPs per token", _format_change(before.flops_per_token, after.flops_per_token, "{:.4g}".format)),
            *[row for patch in self.patches for row in _choice_rows(patch)],
            *[row for patch in self.patches for row in patch["measured"].get("summary", {}).items()],
            *self._evaluation_rows(),
            *[("warning", warning) for warning in self.warnings],
        ]
        if self.dry_run:
            rows.append(("needs", f"{format_bytes(self.estimate['disk_bytes'])} of disk"))
            rows.append(("weights in memory", format_bytes(self.estimate["peak_memory_bytes"])))
            unmeasured = any(map(_to_measure, self.patches))
            more = ", and nothing measured (--measure measures the choices)" if unmeasured else ""
            rows.append(("dry run", f"nothing was written{more}"))
        elif self.seconds is not None and self.peak_memory_bytes is not None:
            rows.append(("took", f"{self.seconds:.1f} s, peak memory {format_bytes(self.peak_memory_bytes)}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _tensor_counts(self) -> str:
        """Numbers of copied, computed, dropped and left out tensors, as text."""
        counts = {name: len(self.tensors[name]) for name in ("computed", "dropped", "left_out")}
        return (
            f"{self.tensors['copied']} copied, {counts['computed']} computed, {counts['dropped']} dropped, "
            f"{counts['left_out']} left out"
        )

    def _evaluation_rows(self) -> list[tuple[str, str]]:
        """(label, value) of the calibration text, the evaluated text and each metric; empty if neither was used."""
        rows = []
        if self.calibration and any(patch.get("calibrated", True) for patch in self.patches):
            text, count = self.calibration["calibration_text"], self.calibration["calibration_tokens"]
            rows.append(("calibrated on", f"{text}, {count:,} tokens"))
        if self.evaluation:
            measured = self.evaluation
            kind = measured.get("objective", "tokens").removeprefix("next ").replace("embeddings", "tokens")
            rows.append(("measured on", f"{measured['text']}, {measured['tokens']:,} {kind}"))
            rows += [
                (label, _format_estimate(measured[key])) for key, label in _METRIC_LABELS.items() if measured.get(key)
            ]
            if measured.get("cosine_min") is not None:
                rows.append(("smallest cosine", _format_metric(measured["cosine_min"])))
            rows += _by_count_rows(measured.get("by_count") or {})
        return rows


def _format_change(before: int, after: int, form: Callable[[int], str]) -> str:
    """`before -> after (+x %)`, with numbers formatted by `form`."""
    change = "unchanged" if before == after else f"{(after - before) / before:+.1%}"
    return f"{form(before)} -> {form(after)} ({change})"


def _choice_rows(patch: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of the fields that a patch chose, and of those that a conversion will choose by measurement."""
    name = patch["name"]
    # The label already names the patch; fields that are False, None or empty are not shown.
    shown = {key.removeprefix(f"{name}_"): value for key, value in patch["choices"].items() if value or value == 0}
    shown = {key: value for key, value in shown.items() if value is not False}
    chosen = ", ".join(f"{key} {_short(value)}" for key, value in shown.items())
    rows = [(f"{name} chose", chosen)] if chosen else []
    for key, known in _to_measure(patch).items():
        label = f"{name} {key.removeprefix(f'{name}_').replace('_', ' ')}"
        rows.append((label, f"chosen by measurement during conversion, {known}"))
    return rows


def _to_measure(patch: dict[str, Any]) -> dict[str, str]:
    """The choices of a patch that a dry run did not measure -> what is known of each."""
    return patch.get("to_measure") or {}


def _short(value: Any) -> str:
    """A value as text: consecutive integers as ranges, floats with four digits, a dict inside a dict as its size."""
    if isinstance(value, dict):
        parts = (f"{len(part)} {key}" if isinstance(part, dict) else f"{key} {part!r}" for key, part in value.items())
        return f"({', '.join(parts)})"
    if isinstance(value, list) and value and all(type(index) is int for index in value):
        return _ranges(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ranges(indices: list[int]) -> str:
    """`[0, 1, 2, 5]` as `[0-2, 5]`; two consecutive integers as `0, 1`.

    More than `_MAX_RANGES` ranges are written as the first `_MAX_RANGES` - 1, the last and the number of integers.
    """
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][-1] + 1:
            ranges[-1].append(index)
        else:
            ranges.append([index])
    shown = [f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in ranges]
    if len(shown) > _MAX_RANGES:
        shown = [*shown[: _MAX_RANGES - 1], "…", shown[-1]]
        return f"[{', '.join(shown)}] ({len(indices)} in all)"
    return f"[{', '.join(shown)}]"


def _format_estimate(estimate: dict[str, Any]) -> str:
    """A mean, with its 95 % confidence interval if it has one."""
    low, high = estimate["low"], estimate["high"]
    interval = "" if low is None or high is None else f"  [{low:.4f}, {high:.4f}]"
    return f"{_format_metric(estimate['mean'])}{interval}"


def _format_metric(value: float | None) -> str:
    """A metric with four decimals; None, which stands for NaN and infinity, as `not finite`."""
    return "not finite" if value is None else f"{value:.4f}"


def _by_count_rows(buckets: dict[str, dict[str, float | None]]) -> list[tuple[str, str]]:
    """(label, value) of each metric that compares with the source, by bucket; empty without buckets.

    A bucket is a range of counts in the calibration text, and a column of the values. The first row names them, with
    their share of the tokens.
    """
    if not buckets:
        return []

    def line(cells: list[str]) -> str:
        return "  ".join(f"{cell:>12}" for cell in cells)

    heads = [f"{name} ({bucket['share_of_tokens']:.0%})" for name, bucket in buckets.items()]
    compared = {
        key: label for key, label in _METRIC_LABELS.items() if all(key in bucket for bucket in buckets.values())
    }
    return [
        ("times in calibration", line(heads)),
        *[
            (f"  {compared[key]}", line([_format_metric(bucket[key]) for bucket in buckets.values()]))
            for key in ("delta_nll", "kl", "top1_agreement")
            if key in compared
        ],
    ]
