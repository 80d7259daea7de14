"""Patched model architectures for the Hugging Face stack, on Triton kernels.

``import hf_efficient`` registers every architecture with the Auto classes; everything else is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

# In a source checkout (editable installs too) `kernels`, `modeling` and `conversion` are beside this folder, in a
# wheel inside it.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").exists() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))

from hf_efficient.modeling.base.tested_releases import check_transformers  # noqa: E402  (needs the path above)

check_transformers()

from hf_efficient.modeling.base.registered_config import RegisteredConfig  # noqa: E402
from hf_efficient.registry import register_architectures  # noqa: E402

__version__ = "0.1.0"

register_architectures()


def _installed_code(config_class: type) -> Any:
    """The code that a saved configuration comes with; the exporter is imported when something is saved.

    `CodeExport`, or None for a class that is not registered: see `installed_code` of `hub/export.py`.
    """
    return import_module("hf_efficient.hub.export").installed_code(config_class)


RegisteredConfig.code_source = staticmethod(_installed_code)

# Public name -> the module that defines it. Resolved on first use, so that importing the package stays cheap.
_PUBLIC = {
    "Bhyt": "hf_efficient.conversion.bhyt.patch",
    "BranchVarianceCallback": "hf_efficient.training.branch_variance",
    "ConversionReport": "hf_efficient.conversion.report",
    "HFEError": "hf_efficient.errors",
    "MedVerse": "hf_efficient.conversion.topology.patch",
    "Monarch": "hf_efficient.conversion.monarch.patch",
    "MonarchGridSpec": "hf_efficient.modeling.monarch.monarch_spec",
    "MonarchSpec": "hf_efficient.modeling.monarch.monarch_spec",
    "MonarchWanAttnProcessor": "hf_efficient.diffusers_processor",
    "Multiverse": "hf_efficient.conversion.topology.patch",
    "RowSparseAdamW": "hf_efficient.training.row_sparse_adamw",
    "SaturationCallback": "hf_efficient.training.saturation",
    "SaturationMonitor": "hf_efficient.training.saturation",
    "Stem": "hf_efficient.conversion.stem.patch",
    "TopologyDataCollator": "hf_efficient.data.topology_collator",
    "UsageError": "hf_efficient.errors",
    "bhyt_depth_bound": "hf_efficient.training.saturation",
    "convert": "hf_efficient.convert_checkpoint",
    "disable_monarch_wan": "hf_efficient.diffusers_processor",
    "enable_monarch": "hf_efficient.modeling.monarch.monarch_layers",
    "enable_monarch_wan": "hf_efficient.diffusers_processor",
    "evaluate": "hf_efficient.evaluation",
    "export": "hf_efficient.hub.export",
    "export_layout": "hf_efficient.layout_export",
    "gather_rows": "hf_efficient.kernels.gather_rows.api",
    "inspect": "hf_efficient.inspection",
    "keep_branch_variance": "hf_efficient.training.branch_variance",
    "mark_topology_trained": "hf_efficient.data.topology_collator",
    "push": "hf_efficient.hub.push",
    "row_adamw": "hf_efficient.kernels.row_adamw.api",
    "stem_ablate": "hf_efficient.editing.stem_analysis",
    "stem_angular_spread": "hf_efficient.editing.stem_analysis",
    "stem_compare_dense": "hf_efficient.editing.stem_analysis",
    "stem_edit_plan": "hf_efficient.editing.stem_edit_plan",
    "stem_edit_rows": "hf_efficient.editing.stem_row_edits",
    "stem_gate": "hf_efficient.kernels.stem_gate.api",
    "stem_inject": "hf_efficient.editing.stem_row_edits",
    "stem_load_edit": "hf_efficient.editing.stem_row_edits",
    "stem_override": "hf_efficient.editing.stem_overrides",
    "stem_row_report": "hf_efficient.editing.stem_analysis",
    "to_medverse": "hf_efficient.data.structured_text",
    "to_multiverse": "hf_efficient.data.structured_text",
    "verify": "hf_efficient.hub.verify",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_efficient' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
