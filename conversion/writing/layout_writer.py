"""Writes a checkpoint in the layout of another library, tensor by tensor."""

from __future__ import annotations

import json

from transformers.utils import CONFIG_NAME

from hf_efficient.conversion.families.family import Layout
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.writing.checkpoint_writer import index_text
from hf_efficient.conversion.writing.companion_files import copy_licences
from hf_efficient.conversion.writing.durable_files import write_text
from hf_efficient.conversion.writing.shard_writer import ShardWriter, StoredTensor, split_into_shards
from hf_efficient.conversion.writing.workspace import Workspace


def write_layout(source: Source, layout: Layout, workspace: Workspace, *, max_shard_bytes: int) -> list[str]:
    """Write weights, config.json and licences of `source` in `layout` and publish the folder; returns warnings.

    Each tensor keeps its dtype and its bytes; memory holds one at a time.

    Args:
        source: an opened checkpoint whose tensors were checked (`check_source` of `conversion/plan.py`).
        layout: names and configuration in the layout, of the model of the source.
        workspace: the working folder, entered.
        max_shard_bytes: largest size of a weight file.

    Raises:
        HFEError: a tensor cannot be read, or holds NaN or infinity.
        DiskFullError: the disk is full.
    """
    reader, folder = source.reader, workspace.checkpoint
    ours = {theirs: name for name, theirs in layout.names.items()}
    stored = [StoredTensor(theirs, reader.shape(name), reader.dtype(name)) for theirs, name in ours.items()]
    # Wider elements first, so that every tensor in a file is aligned to its element size.
    stored.sort(key=lambda tensor: -tensor.dtype.itemsize)
    shards = split_into_shards(stored, max_shard_bytes, layout.weights)
    workspace.check_space(sum(len(shard.header()) + shard.data_bytes for shard in shards))
    for shard in shards:
        writer = ShardWriter(folder, shard)
        try:
            for tensor in shard.tensors:
                writer.add(tensor.name, reader.read(ours[tensor.name]), known_finite=True)
            writer.close()
        finally:
            writer.abandon()
    if len(shards) > 1:
        write_text(folder / f"{layout.weights}.index.json", index_text(shards))
    write_text(folder / CONFIG_NAME, json.dumps(layout.fields, indent=2) + "\n")
    warnings = [] if source.single_file else copy_licences(source.files, folder)
    workspace.publish()
    return layout.left_out + warnings
