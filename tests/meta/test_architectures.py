"""Only an architecture's own rooms name it: everything else reads the registry."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_efficient.conversion.architecture import ArchitectureSpec, load
from hf_efficient.registry import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
# Architectures without a patch of their own are the common ground of the others.
NAMES = {"stem", "bhyt", "topology", "multiverse", "medverse", "monarch"}
# Folders of an architecture, of its operations, and of what is made for one: knowledge editing, training, texts.
ROOMS = (
    *(f"modeling/{name}/" for name in NAMES),
    *(f"conversion/{name}/" for name in NAMES),
    # One folder for what its models share, and one for each model.
    "modeling/monarch_",
    # What is made for the video transformer: its family, its checkpoints and its use inside another library.
    *("conversion/wan/", "conversion/families/video.py", "hf_efficient/diffusers_processor.py"),
    *("kernels/stem_gate/", "kernels/bhyt_norm/", "kernels/topology_attention/", "kernels/topology_blocks/"),
    *(
        "kernels/gather_rows/",
        "kernels/monarch_attention/",
        "hf_efficient/editing/",
        "hf_efficient/data/",
        "hf_efficient/training/",
    ),
    # The decoder that combines them, the record of all of them, and the public names.
    *("modeling/efficient_decoder/", "hf_efficient/registry.py", "hf_efficient/__init__.py"),
    # A demonstration of one conversion.
    "hf_efficient/cli/demo.py",
)
SOURCES = [
    path
    for folder in ("kernels", "modeling", "conversion", "hf_efficient")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not str(path.relative_to(ROOT)).startswith(ROOMS)
]
# In help texts, lines with an example of a command may name a patch.
EXAMPLE = re.compile(r"\bhf-efficient \w+ |e\.g\. |for example ")


def words(text: str) -> set[str]:
    """Words of identifiers and text: `MedVerseConfig`, `stem_embed` and `hfe_bhyt` hold the names."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text.replace("MedVerse", "Medverse"))
    return {word.lower() for word in re.findall(r"[A-Za-z]+", spaced)}


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier, imported name and string constant."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        # The last part of a file's name without its suffix is called so by pathlib.
        elif isinstance(node, ast.Attribute) and node.attr != "stem":
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield line, node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, f"{node.name} {node.asname or ''}"
        elif isinstance(node, ast.ImportFrom):
            yield line, node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((line, text) for text in node.value.splitlines() if not EXAMPLE.search(text))


def test_no_other_file_names_an_architecture() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()[:100]}"
        for path in SOURCES
        for line, text in named(ast.parse(path.read_text(encoding="utf-8")))
        if words(text) & NAMES
    ]
    assert not found, found


def test_the_names_are_those_of_the_registry() -> None:
    """A new patch comes under the rule by itself: its name is among those above."""
    assert {spec.patch for spec in ARCHITECTURES if spec.patch} <= NAMES


@pytest.mark.parametrize("spec", ARCHITECTURES, ids=lambda spec: spec.model_type)
def test_every_name_in_an_entry_leads_to_an_object(spec: ArchitectureSpec) -> None:
    named_objects = [spec.family, spec.patch_options, spec.writes_special_tokens, *spec.release_readers]
    for name in named_objects:
        assert name is None or load(name) is not None
    assert spec.generation is None or load(f"{spec.generation}:parallel_generate")
    fields = spec.config_class.__dataclass_fields__.keys()
    assert {*spec.runtime_fields, *spec.inspected_fields} <= fields
    assert (
        list(spec.auto_classes)[0] == "AutoConfig" and spec.auto_classes["AutoModel"].config_class is spec.config_class
    )
    assert spec.model_type.startswith("hfe_")
    assert spec.peft_targets[0]


def test_one_architecture_of_each_stock_model_takes_every_combination() -> None:
    for spec in ARCHITECTURES:
        beside = [
            each for each in ARCHITECTURES if (each.family, each.source_types) == (spec.family, spec.source_types)
        ]
        assert len([each for each in beside if each.combines]) == 1
