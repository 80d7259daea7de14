"""`export_layout`: writes a checkpoint in the layout of another library, for use there."""

from __future__ import annotations

from pathlib import Path

from hf_efficient.conversion.families.family import families
from hf_efficient.conversion.options import size_in_bytes
from hf_efficient.conversion.plan import check_source
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.conversion.writing.durable_files import DiskFullError
from hf_efficient.conversion.writing.layout_writer import write_layout
from hf_efficient.conversion.writing.output_folder import resolve_output
from hf_efficient.conversion.writing.workspace import Workspace, check_output
from hf_efficient.errors import UsageError
from hf_efficient.logging import get_logger


def export_layout(
    source: str | Path,
    output: str | Path,
    layout: str,
    *,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the weights and the configuration of a checkpoint as another library stores them; returns the folder.

    The tensors keep dtype and bytes; only their names and the files change. `output` is created atomically. Settings
    that the layout does not have, such as another attention, are left out, and a warning is logged.

    Args:
        source: a converted folder, or any other source of a conversion of the same family.
        output: folder to create.
        layout: `diffusers` or `original` (the authors' code), for Wan transformers.
        max_shard_size: largest size of a weight file, in bytes or as text such as `5GB`.
        revision, token: branch, tag or commit, and access token, of a Hub source.
        overwrite: replace an existing OUTPUT once the new one is complete.

    Raises:
        UsageError: the layout is unknown, a size is wrong, or `output` exists.
        HFEError: the source cannot be used, or the layout does not have its model, e.g. diffusers the causal variant;
            `output` is unchanged.
    """
    known = list(dict.fromkeys(name for family in families() for name in family.layouts))
    if layout not in known:
        raise UsageError(f"the layout {layout!r} is not known", f"choose one of {', '.join(known)}")
    output = resolve_output(output)
    max_shard_bytes = size_in_bytes("max_shard_size", max_shard_size)
    check_output(output, Path(source).expanduser(), resume=False, overwrite=overwrite)
    opened = open_source(str(source), revision=revision, token=token)
    described = opened.family.layout(layout, opened.config)
    check_source(opened)
    options = {"layout": layout, "source": opened.fingerprint}
    try:
        with Workspace(output, options, resume=False, overwrite=overwrite) as workspace:
            warnings = write_layout(opened, described, workspace, max_shard_bytes=max_shard_bytes)
    except DiskFullError as error:
        raise DiskFullError(error.problem, "free some space and repeat the command") from error
    for warning in warnings:
        get_logger().warning(warning)
    return output
