"""Writes the weights of a conversion, one tensor at a time, into the shards of the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_efficient.conversion.measuring.calibration import Calibration
from hf_efficient.conversion.patch import Patch
from hf_efficient.conversion.plan import ConversionPlan
from hf_efficient.conversion.progress import Advance, Progress
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.vocabulary import VocabularyChange
from hf_efficient.conversion.writing.durable_files import write_text
from hf_efficient.conversion.writing.shard_writer import Shard, ShardWriter
from hf_efficient.conversion.writing.workspace import Workspace
from hf_efficient.errors import HFEError


class CheckpointWriter:
    """Writes the tensors of a plan, in its order, into shards; shards that an earlier run finished are kept.

    Finished shards are recorded in the workspace, the folder of an unfinished conversion.
    """

    def __init__(self, plan: ConversionPlan, workspace: Workspace) -> None:
        self._workspace = workspace
        self._shard_of = {tensor.name: shard for shard in plan.shards for tensor in shard.tensors}
        self._finished = {shard.name for shard in plan.shards if workspace.finished_shard(shard.name)}
        self._open: ShardWriter | None = None

    def needs(self, name: str) -> bool:
        """True unless the tensor is in a finished shard; `KeyError` if it is none of the plan."""
        return self._shard_of[name].name not in self._finished

    def add(self, name: str, tensor: Tensor, *, known_finite: bool = False) -> None:
        """Write the next tensor, unless it is in a finished shard; after the last one of a shard, finish and record it.

        Arguments and errors as for `ShardWriter.add`; `KeyError` if the tensor is none of the plan.
        """
        if not self.needs(name):
            return
        shard = self._shard_of[name]
        if self._open is None:
            self._open = ShardWriter(self._workspace.checkpoint, shard)
        self._open.add(name, tensor, known_finite=known_finite)
        if name == shard.tensors[-1].name:
            self._workspace.record_shard(shard.name, self._open.close())
            self._finished.add(shard.name)
            self._open = None

    def close(self) -> None:
        """Close the shard that is being written, if there is one, without finishing it."""
        if self._open is not None:
            self._open.abandon()

    def missing(self) -> str | None:
        """Name of the first shard that is not finished; None if all are."""
        return next((shard.name for shard in self._shard_of.values() if shard.name not in self._finished), None)


def write_weights(
    plan: ConversionPlan,
    source: Source,
    patches: Sequence[Patch],
    calibration: Callable[[], Calibration],
    workspace: Workspace,
    progress: Progress,
    vocabulary: VocabularyChange | None = None,
) -> None:
    """Write every shard of the plan, and then the index if there are several. Holds one tensor in memory at a time.

    What each patch measured is recorded in the workspace under `patch:NAME`. A patch of which this is recorded, and
    whose tensors are all in finished shards, is not run again.

    Args:
        calibration: returns the calibration; called only if a patch that computes tensors needs it.
        progress: has the stages `copying` and `computing`.
        vocabulary: added tokens, whose rows every tensor with a row for each token gets; None if there are none.

    Raises:
        HFEError: a tensor cannot be read, holds NaN or infinity or exceeds its dtype's range, or a patch gives tensors
            in another order or shape than planned, or too few.
        KeyError: a patch gives a tensor that is not in the plan.
        DiskFullError: the disk is full.
    """
    writer = CheckpointWriter(plan, workspace)
    by_token = vocabulary.token_tensors(plan.config) if vocabulary else set()
    try:
        with progress.stage("copying") as advance:
            _copy(plan, source, writer, advance, vocabulary, by_token)
        with progress.stage("computing"):
            for patch in patches:
                key = f"patch:{patch.name}"
                if workspace.result(key) is not None and not any(map(writer.needs, plan.computed[patch.name])):
                    continue
                text = calibration() if patch.needs_calibration else None
                for name, tensor in patch.tensors(plan.config, text):
                    writer.add(name, vocabulary.fill(tensor) if vocabulary and name in by_token else tensor)
                workspace.record_result(key, patch.report())
        missing = writer.missing()
        if missing is not None:
            raise HFEError(
                f"{missing} lacks tensors that a patch was to compute",
                "this is an error in the patch; please report it",
            )
    finally:
        writer.close()
    if len(plan.shards) > 1:
        write_text(workspace.checkpoint / SAFE_WEIGHTS_INDEX_NAME, index_text(plan.shards))


def _copy(
    plan: ConversionPlan,
    source: Source,
    writer: CheckpointWriter,
    advance: Advance,
    vocabulary: VocabularyChange | None,
    by_token: set[str],
) -> None:
    """Write the copied tensors of the plan; `advance(bytes done, total bytes)` is called after each.

    `by_token`: names of the tensors with a row for each token, which `vocabulary` extends. Errors as for
    `write_weights`.
    """
    sizes = {tensor.name: tensor.bytes for shard in plan.shards for tensor in shard.tensors}
    total, done = sum(sizes[name] for name in plan.copied), 0
    for name in plan.copied:
        if writer.needs(name):
            if vocabulary is not None and name in by_token:
                tensor = vocabulary.read(source.reader, name)
            else:
                tensor = source.reader.read(name)
            writer.add(name, tensor, known_finite=True)
        done += sizes[name]
        advance(done, total)


def index_text(shards: list[Shard]) -> str:
    """The text of the index of several weight files: total size in bytes, and tensor name -> file."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(shard.data_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"
