"""Code snippets and citations of a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import IMAGE_PROCESSOR_NAME

from hf_efficient import __version__
from hf_efficient.conversion.families.family import family_of
from hf_efficient.conversion.writing.known_sentence_transformers import MODULES_NAME
from hf_efficient.environment import TESTED_TORCH, TESTED_TRANSFORMERS
from hf_efficient.errors import HFEError
from hf_efficient.hub.weight_names import weight_sets
from hf_efficient.json_file import read_json
from hf_efficient.registry import patch_classes

# Lowest versions that the exported code runs with; the same as in the package's own metadata.
REQUIREMENTS = f"torch >= {TESTED_TORCH[0]} and transformers >= {TESTED_TRANSFORMERS[0]}"


def usage(folder: Path, config: dict[str, Any], repo_id: str) -> str:
    """The card's section on loading and running the model: generation, chat if the tokenizer has a template, LoRA.

    Args:
        folder: the checkpoint.
        config: the fields of its config.json.
        repo_id: the repository that the code names.
    """
    auto_class = auto_class_of(config)
    # File of settings -> (variable, Auto class) of what the model's inputs are made with; a model has one of them.
    makers = {TOKENIZER_CONFIG_FILE: ("tokenizer", "AutoTokenizer"), IMAGE_PROCESSOR_NAME: _PROCESSOR}
    variable, maker = next((each for name, each in makers.items() if (folder / name).is_file()), ("", ""))
    imported = ", ".join(sorted(name for name in (auto_class, maker) if name))
    # Without the plain weight files, transformers must be given the variant.
    named = next((found.variant for found in weight_sets(path.name for path in folder.iterdir())), None)
    variant = f'variant="{named}", ' if named else ""
    lines = [
        f"from transformers import {imported}",
        "",
        f'repository, commit = "{repo_id}", "..."  # a full commit hash, from the page\'s history',
        f"model = {auto_class}.from_pretrained(repository, revision=commit, {variant}trust_remote_code=True)",
    ]
    if maker:
        lines.append(f"{variable} = {maker}.from_pretrained(repository, revision=commit, trust_remote_code=True)")
    parts = [_LOADING.format(requirements=REQUIREMENTS), _python("\n".join(lines))]
    family = family_of(config.get("model_type"))
    if family is not None and (maker or not family.companion_files):
        for sentence, code in family.snippets(auto_class, chat=_has_chat_template(folder)).items():
            parts += [sentence, _python(code)]
    if (folder / MODULES_NAME).is_file():
        parts += ["With the package sentence-transformers:", _python(_SENTENCES.format(repo_id=repo_id))]
    oldest, newest = TESTED_TRANSFORMERS
    tested = _VERSIONS.format(version=__version__, oldest=oldest, newest=newest, repo_id=repo_id)
    return "\n\n".join([*parts, tested])


def note(patch: str, config: dict[str, Any]) -> str:
    """The paragraph about a patch in the model card; empty for an unknown one. `config`: fields of config.json."""
    options: Any = patch_classes().get(patch)
    family = family_of(config.get("model_type"))
    own = str(options.card_note) if options else ""
    return own if family is None else family.patch_notes.get(patch, own)


def citations(patches: list[str], config: dict[str, Any]) -> str:
    """The card's section with the BibTeX of the patches' papers; empty without known patches.

    `config`: the fields of config.json.
    """
    known: dict[str, Any] = patch_classes()
    family = family_of(config.get("model_type"))
    entries = [str(known[patch].citation) for patch in patches if patch in known]
    entries += [family.patch_citations[patch] for patch in patches if family and patch in family.patch_citations]
    return "## Citation\n\n```bibtex\n" + "\n\n".join(entries) + "\n```" if entries else ""


_LOADING = """## How to use it

The code comes with the checkpoint, so nothing but {requirements} is needed.
Triton kernels run where Triton and a CUDA device are, plain PyTorch elsewhere. `trust_remote_code=True` runs that code
on your machine: pin the commit that you looked at."""
_PROCESSOR = ("processor", "AutoImageProcessor")
_SENTENCES = """from sentence_transformers import SentenceTransformer

embedder = SentenceTransformer("{repo_id}", revision="...", trust_remote_code=True)
print(embedder.encode(["A first text.", "A second one."]).shape)"""
_VERSIONS = """The code is that of hf-efficient {version}, tested with transformers {oldest} to {newest}. For a newer
transformers, `pip install -U hf-efficient` and `hf-efficient export FOLDER` write the code of a newer release into a
downloaded copy. `hf-efficient verify {repo_id}` says whether the code is, byte for byte, that of the release, and
`import hf_efficient` loads the checkpoint without `trust_remote_code`."""


def auto_class_of(config: dict[str, Any]) -> str:
    """Name of the Auto class of the class in `architectures`, by `auto_map`; `AutoModel` if there is none.

    `config`: the fields of a config.json.
    """
    auto_map = config.get("auto_map")
    saved = [str(name) for name in config.get("architectures") or []]
    entries = auto_map.items() if isinstance(auto_map, dict) else ()
    return next((str(name) for name, cls in entries if str(cls).rpartition(".")[2] in saved), "AutoModel")


def _has_chat_template(folder: Path) -> bool:
    """True if the tokenizer in `folder` has a chat template, in a file or in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(read_json(folder / TOKENIZER_CONFIG_FILE).get("chat_template"))
    # A damaged file is reported when the tokenizer is loaded; the card is written nevertheless.
    except HFEError:
        return False


def _python(code: str) -> str:
    """A Markdown block of Python code."""
    return f"```python\n{code}\n```"
