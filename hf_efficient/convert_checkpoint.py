"""`convert`: converts a checkpoint and writes the finished folder."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from hf_efficient import __version__
from hf_efficient.conversion.families.family import check_patches, family_of, target_architecture
from hf_efficient.conversion.measuring.calibration import CALIBRATION_TOKENS, Calibration, prepare_calibration
from hf_efficient.conversion.measuring.evaluation import EVAL_DTYPE, Evaluator, LogitSource
from hf_efficient.conversion.options import ConversionOptions, patch_fields
from hf_efficient.conversion.patch import MeasuringPatch, Patch, VocabularyPatch
from hf_efficient.conversion.plan import ConversionPlan, check_source, plan_conversion
from hf_efficient.conversion.progress import Progress
from hf_efficient.conversion.reading.checkpoint_files import open_folder_reader
from hf_efficient.conversion.reading.source import Source, open_source
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.conversion.report import REPORT_NAME, ConversionReport, Package
from hf_efficient.conversion.writing.checkpoint_writer import write_weights
from hf_efficient.conversion.writing.companion_files import write_companions
from hf_efficient.conversion.writing.durable_files import disk_errors, format_bytes, write_text
from hf_efficient.conversion.writing.output_folder import resolve_output
from hf_efficient.conversion.writing.workspace import Workspace, check_output
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.hub.card import write_card
from hf_efficient.hub.export import export_code
from hf_efficient.hub.push import push
from hf_efficient.hub.repository import check_access
from hf_efficient.json_file import finite_or_null, read_json
from hf_efficient.logging import IN_REPORT, get_logger

# Expected seconds of each stage for a small model on two cores, which set the stages' shares of the progress bar.
_STAGES = {"reading text": 8, "choosing": 0.1, "copying": 5, "computing": 40, "measuring": 30, "finishing": 2}
# Expected seconds of the stage `choosing` if a patch has to run the source model for it.
_MEASURED_CHOICE_SECONDS = 55
_PLANNING_STAGES = ("reading text", "choosing")
# `plan` warns if the result has more than this many times the bytes of the source.
_SIZE_WARNING_RATIO = 1.05


def convert(
    source: str | Path,
    output: str | Path,
    patches: Sequence[Patch] = (),
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    max_shard_size: str | int = "5GB",
    base_model: str | None = None,
    license: str | None = None,
    tokenizer: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    evaluate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    measure: bool = False,
    push_to_hub: str | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Convert a checkpoint to a patched architecture, tensor by tensor.

    `output` is created atomically (renamed when complete) and contains weights, configuration, tokenizer, code, model
    card and report. Until then the files are in `OUTPUT.hfe-partial` next to it, from which `resume=True` continues
    after an interruption or a full disk; any other `HFEError` of a conversion that was not resumed removes them.

    Args:
        source: Hub id, local folder, or local `.gguf` file; the folder may also be a checkpoint of an architecture's
            original training code.
        output: folder to create.
        patches: instances of the patch dataclasses, e.g. `Stem(layers=[1, 4])`. One patch on a stock (unpatched
            transformers) model gives that patch's own architecture; none or several give the architecture of the model
            family that supports any combination of patches.
        dtype: `auto` keeps every tensor's own dtype (GGUF: float32), or float32, bfloat16, float16.
        revision: branch, tag or commit of a Hub source.
        token: access token for the Hub, for downloads and for `push_to_hub`.
        device: device for calibration and evaluation.
        seed: random seed. The state of the caller's generators is restored afterwards.
        max_shard_size: largest size of a weight file, in bytes or as text such as `5GB`.
        base_model, license: Hub id and licence for the model card; by default those in the source's metadata.
        tokenizer: folder or Hub id of a tokenizer, for a source without one, or to use in place of the source's.
        calibration: text for calibration and evaluation, a `.jsonl` or `.txt` file or the Hub id of a data set; by
            default a built-in sample of English documentation.
        calibration_tokens: maximum number of tokens to calibrate on.
        evaluate: measure the loss on held-out text and compare it with the source's.
        resume: continue an interrupted conversion with the same options.
        overwrite: replace an existing OUTPUT once the new one is complete; discard an interrupted conversion.
        dry_run: only plan: nothing is written, nothing is measured, and the report says what a conversion will measure.
        measure: requires `dry_run`: also measure what the patches choose by measurement, such as the layers.
        push_to_hub: repository, OWNER/NAME, to upload `output` to at the end; a new one is private. Write access is
            checked before the source is read.
        progress: show a progress bar on standard error, or a few lines if that is not a terminal.

    Returns:
        The report that was also written to `conversion_report.json`; with `dry_run` the report of the plan.

    Raises:
        UsageError: an option is wrong, the token is malformed, a patch does not suit the model, or `output` exists.
        HFEError: the token may not write to `push_to_hub`, the source or the text cannot be used, another process
            writes `output`, the interrupted conversion had other options, or disk space is insufficient; `output` is
            unchanged. Or the upload failed; then `output` is complete.
    """
    started = time.perf_counter()
    if measure and not dry_run:
        raise UsageError(
            "measure=True (--measure) requires dry_run=True (--dry-run): a conversion always measures",
            "leave it out, or add dry_run=True (--dry-run)",
        )
    output = resolve_output(output)
    options = ConversionOptions(
        patches=patches,
        dtype=dtype,
        max_shard_size=max_shard_size,
        device=device,
        seed=seed,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        evaluate=evaluate,
        base_model=base_model,
        license=license,
        tokenizer=tokenizer,
    )
    if not dry_run:
        check_output(output, Path(source).expanduser(), resume=resume, overwrite=overwrite)
    if push_to_hub is not None:
        check_access(push_to_hub, token=token)
    opened = open_source(
        str(source),
        revision=revision,
        token=token,
        tokenizer=None if tokenizer is None else str(tokenizer),
        accept=lambda fields: _check_patches(fields, options.patches),
    )
    shares = {stage: share for stage, share in _STAGES.items() if not dry_run or stage in _PLANNING_STAGES}
    if any(patch.measures_choice for patch in options.patches):
        shares["choosing"] = _MEASURED_CHOICE_SECONDS
    show = progress and (measure or not dry_run)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with Progress(shares, show=show) as bar, torch.random.fork_rng(devices=cuda):
        # `torch.manual_seed` would also seed devices whose state is not restored here.
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        conversion = _Conversion(opened, options, bar)
        if dry_run:
            report = conversion.report(conversion.plan(measure=measure))
            report.dry_run = True
            return report
        with (
            Workspace(output, conversion.identity(), resume=resume, overwrite=overwrite) as workspace,
            disk_errors(workspace.folder),
        ):
            if workspace.published:
                workspace.discard()
            else:
                conversion.write(workspace, started)
    if push_to_hub is not None:
        _push(output, push_to_hub, token)
    return ConversionReport.from_dict(read_json(output / REPORT_NAME))


def _check_patches(fields: dict[str, Any], patches: Sequence[Patch]) -> None:
    """Raise `UsageError` if a patch does not support the `model_type` in the fields of a config.json.

    A type that no family has is left to the reader of the source: it may be that of an architecture's training code.
    """
    model_type = fields.get("model_type")
    if family_of(model_type) is not None:
        check_patches(str(model_type), [patch.name for patch in patches])


def _push(output: Path, repo_id: str, token: str | None) -> None:
    """Upload the finished folder to the Hub and log its URL.

    Raises:
        HFEError: the upload failed; the message names the command that repeats it.
    """
    try:
        result = push(output, repo_id, token=token)
    except HFEError as error:
        raise HFEError(
            f"{output} is complete, but was not uploaded: {error}", f"hf-efficient push {output} {repo_id}"
        ) from error
    get_logger().warning("uploaded %s to %s (commit %s)", output, result.url, result.commit)


class _Conversion:
    """The steps of one conversion of an opened source: `plan`, then `write` or only `report`.

    Attributes:
        architecture: architecture of the result: its model type, configuration class and model classes.
        left_out: source tensors that the model does not load, name -> reason, e.g. a stored copy of a tied head.
        vocabulary: the tokens that a patch adds, or None.
        workspace: folder of an unfinished conversion, which also stores intermediate results; None in a dry run.
        warnings: texts for the report.
        choices: patch name -> `fields` (the configuration fields that the patch chose), `measured` (what it measured)
            and `to_measure` (fields that a conversion will choose by measurement); set by `plan`.

    Raises:
        UsageError: a patch does not support the model type, or an option of a patch does not suit the model.
        HFEError: the source's tensors do not match its configuration, or its tokenizer does not support added tokens.
    """

    def __init__(self, source: Source, options: ConversionOptions, progress: Progress) -> None:
        self.source = source
        self.options = options
        self.patches = options.patches
        self.progress = progress
        # Raises if a patch does not support this model.
        self.architecture = target_architecture(
            source.stock_config,
            [patch.name for patch in self.patches],
            trained_patches=[] if source.patched else getattr(source.config, "active_patches", []),
        )
        self.left_out = check_source(source)
        for patch in self.patches:
            patch.check(source.config)
        adding = [patch for patch in self.patches if isinstance(patch, VocabularyPatch)]
        self.vocabulary = adding[0].vocabulary(source) if adding else None
        self.workspace: Workspace | None = None
        self._results: dict[str, Any] = {}
        self.warnings: list[str] = []
        for warning in source.warnings:
            self.warn(warning)
        self.choices: dict[str, dict[str, Any]] = {}

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values: a conversion is resumed only if this is unchanged."""
        text = Path(self.options.calibration or "")
        return {
            **self.options.to_dict(),
            "source": self.source.fingerprint,
            "source files changed at": [path.stat().st_mtime_ns for path in self.source.weight_files],
            "calibration file changed at": text.stat().st_mtime_ns if text.is_file() else None,
            "added tokens": self.vocabulary and sorted(self.vocabulary.rows.items()),
            "hf_efficient": __version__,
        }

    @cached_property
    def calibration(self) -> Calibration:
        """Text and source model for calibration and evaluation; prepared on first access, its summary saved.

        Raises:
            HFEError: the source has no usable tokenizer, or the text is missing or too short.
        """
        options = self.options
        prepared = prepare_calibration(
            self.source,
            None if options.calibration is None else str(options.calibration),
            tokens=options.calibration_tokens,
            device=options.device,
            progress=self.progress.step,
        )
        self._save_result("calibration", prepared.summary())
        return prepared

    def plan(self, *, measure: bool = True) -> ConversionPlan:
        """Determine each patch's data-dependent settings (e.g. layers) and plan how each tensor is produced.

        Sets `choices`, saves each patch's choice so that a resumed run reuses it, and warns if the model grows.

        Args:
            measure: False if patches must not run the source model: a `MeasuringPatch`, whose choice depends on a
                measurement, then supplies the settings it expects, and the `choose` of any other patch gets no text.

        Raises:
            HFEError: the tokenizer or the text is unusable, a weight of the source is not finite, no choice meets a
                patch's limits (e.g. no layer is within `max_delta`), or the patches do not cover every tensor.
        """
        self.choices = {patch.name: self._load_result(f"choice:{patch.name}") for patch in self.patches}
        undecided = [patch for patch in self.patches if self.choices[patch.name] is None]
        will_evaluate = self.workspace is not None and self.options.evaluate and self._load_result("evaluation") is None
        will_evaluate = will_evaluate and self.source.family.evaluator(self.source.config) is not None
        with self.progress.stage("reading text"):
            # Load the calibration now even if only the evaluation needs it, so that a missing tokenizer raises before
            # any weight is written.
            if will_evaluate or (measure and any(patch.needs_calibration for patch in undecided)):
                _ = self.calibration
        with self.progress.stage("choosing"):
            for patch in undecided:
                to_measure: dict[str, str] = {}
                if not measure and patch.measures_choice and isinstance(patch, MeasuringPatch):
                    expected = patch.expected_choice(self.source.config)
                    chosen, to_measure = expected.fields, expected.to_measure
                else:
                    text = self.calibration if measure and patch.needs_calibration else None
                    chosen = patch.choose(self.source.config, text)
                # The measurements are saved with the choice, since a resumed run does not repeat them.
                choice = {"fields": chosen, "measured": patch.report(), "to_measure": to_measure}
                self.choices[patch.name] = self._save_result(f"choice:{patch.name}", choice)
        plan = plan_conversion(
            self.source,
            self.patches,
            {name: value for choice in self.choices.values() for name, value in choice["fields"].items()},
            self.architecture,
            dtype=self.options.torch_dtype,
            max_shard_bytes=self.options.max_shard_bytes,
            left_out=self.left_out,
        )
        if plan.after.bytes > _SIZE_WARNING_RATIO * plan.before.bytes:
            self.warn(f"the model grows from {format_bytes(plan.before.bytes)} to {format_bytes(plan.after.bytes)}")
        return plan

    def write(self, workspace: Workspace, started: float) -> None:
        """Write the checkpoint in the workspace, evaluate it, and rename it to the output folder.

        Args:
            started: `time.perf_counter()` at the start of the conversion, for the report.

        Raises:
            HFEError: as `plan`, or there is too little disk space, or a weight is not finite.
        """
        self.workspace = workspace
        folder = workspace.checkpoint
        # First, since most conversions that fail do so because of the tokenizer.
        for warning in write_companions(self.source, folder, self.vocabulary):
            self.warn(warning)
        plan = self.plan()
        needs = f"{format_bytes(plan.disk_bytes)} of disk, {format_bytes(plan.peak_memory_bytes)} of memory for weights"
        get_logger().info("the conversion needs %s", needs)
        workspace.check_space(plan.disk_bytes)
        write_weights(
            plan, self.source, self.patches, lambda: self.calibration, workspace, self.progress, self.vocabulary
        )
        with self.progress.stage("measuring"):
            evaluation = self.compare_with_source(plan, folder) if self.options.evaluate else None
        with self.progress.stage("finishing"):
            write_text(folder / CONFIG_NAME, plan.config.to_json_string(use_diff=True))
            export_code(folder, self.architecture)
            report = self.report(plan)
            report.evaluation = evaluation
            report.seconds = round(time.perf_counter() - started, 1)
            report.peak_memory_bytes = _peak_memory_bytes()
            text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
            write_text(folder / REPORT_NAME, text + "\n")
            write_card(folder)
            workspace.publish()

    def compare_with_source(self, plan: ConversionPlan, folder: Path) -> dict[str, Any] | None:
        """The losses of the written weights and of the source on held-out text, as the report's `evaluation`.

        The result is saved, and that of an interrupted run is returned as it is. None, with a warning, for a model
        without a head that predicts tokens, such as a classifier.

        Raises:
            HFEError: the tokenizer or the text is unusable.
        """
        saved = self._load_result("evaluation")
        if saved is not None:
            return saved
        family = self.source.family
        evaluator = family.evaluator(self.source.config)
        if evaluator is None:
            self.warn(f"the result was not compared with the source: {family.not_evaluated}")
            return None
        text = self.calibration
        calibrated = any(patch.needs_calibration for patch in self.patches)
        result = evaluator.evaluate(
            text.held_out,
            text.held_out_name,
            self._logits(evaluator, family.own_config(plan.config), open_folder_reader(folder), 1),
            self._logits(evaluator, self.source.config, self.source.reader, 0),
            tokenizer=self.source.tokenizer(),
            counts=text.token_counts() if calibrated else None,
        )
        return self._save_result("evaluation", {**result.to_dict(), "dtype": EVAL_DTYPE})

    def report(self, plan: ConversionPlan) -> ConversionReport:
        """The report of `plan`, which the method `plan` returned, and of what has been measured so far."""
        source = self.source
        return ConversionReport(
            source={
                "name": source.name,
                "model_type": source.stock_config.model_type,
                "model_name": source.model_name,
                "base_model": self.options.base_model or source.base_model,
                "revision": source.revision,
                "license": self.options.license or source.license,
                "fingerprint": source.fingerprint,
            },
            model_type=self.architecture.model_type,
            patches=[self._patch_report(patch) for patch in self.patches],
            tensors={
                "copied": len(plan.copied),
                "computed": {name: new.origin for added in plan.computed.values() for name, new in added.items()},
                "dropped": plan.dropped,
                "left_out": plan.left_out,
            },
            before=plan.before,
            after=plan.after,
            dtype=str(plan.config.dtype).removeprefix("torch."),
            options=self.options.to_dict(),
            versions=_versions(),
            estimate={"disk_bytes": plan.disk_bytes, "peak_memory_bytes": plan.peak_memory_bytes},
            warnings=self.warnings,
            calibration=self._load_result("calibration"),
        )

    def warn(self, message: str) -> None:
        """Log a warning and add it to the report."""
        get_logger().warning(message, extra={IN_REPORT: True})
        self.warnings.append(message)

    def _logits(self, evaluator: Evaluator, config: PreTrainedConfig, reader: TensorReader, index: int) -> LogitSource:
        """Logits of one of the two compared checkpoints; `index`, 0 or 1, is its half of the stage's progress."""

        def advance(done: int, total: int) -> None:
            self.progress.advance(index * total + done, 2 * total)

        logits = evaluator.checkpoint_logits(config, reader, device=self.options.device, progress=advance)
        # The source has no logits for added tokens.
        return self.vocabulary.shared_logits(logits) if self.vocabulary and self.vocabulary.rows else logits

    def _patch_report(self, patch: Patch) -> dict[str, Any]:
        """The report's entry for one patch: its options, its choices and what it measured."""
        choice, final = self.choices[patch.name], self._load_result(f"patch:{patch.name}") or {}
        # A patch that is resumed reports only what it measured in this run; the rest was saved with its choice.
        at_choice = {name: value for name, value in choice["measured"].items() if not final.get(name)}
        return {
            "name": patch.name,
            "options": patch_fields(patch),
            "calibrated": patch.needs_calibration,
            "choices": {name: value for name, value in choice["fields"].items() if name not in choice["to_measure"]},
            "measured": {**final, **at_choice},
            **({"to_measure": choice["to_measure"]} if choice["to_measure"] else {}),
        }

    def _load_result(self, key: str) -> Any:
        """The result that this or an interrupted run saved under `key`; None if there is none."""
        return self.workspace.result(key) if self.workspace else self._results.get(key)

    def _save_result(self, key: str, value: Any) -> Any:
        """Save a result for the report and a resumed run, and return it as JSON values: NaN and infinity are None."""
        plain = json.loads(json.dumps(finite_or_null(value), allow_nan=False))
        if self.workspace:
            self.workspace.record_result(key, plain)
        self._results[key] = plain
        return plain


def _versions() -> dict[Package, str]:
    """Versions of Python and of those of the packages in `Package` that are installed."""
    versions: dict[Package, str] = {"hf_efficient": __version__, "python": platform.python_version()}
    for package in get_args(Package):
        if package not in versions:
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
    return versions


def _peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
