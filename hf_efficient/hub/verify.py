"""Compares a checkpoint with what the installed release writes, before its code is run.

Nothing in the checkpoint is trusted: the code is generated from the installed package and compared byte by byte.
Nothing in the checkpoint is imported, unpickled or run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from hf_efficient import __version__
from hf_efficient.conversion.families.family import family_of
from hf_efficient.conversion.writing.companion_files import is_licence
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.hub.contents import FIRST_BYTES, FolderContents, folder_contents, size_limit
from hf_efficient.hub.export import CodeExport, render_code
from hf_efficient.hub.findings import Finding, Verdict, VerificationReport
from hf_efficient.hub.folder import REMEDY, UntrustedFolder
from hf_efficient.hub.repository import check_repo_id, download_headers
from hf_efficient.hub.settings import REMEDY_EXPORT, check_config, check_settings, read_settings
from hf_efficient.hub.weight_names import is_index, weight_sets
from hf_efficient.hub.weights import check_weights
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST
from hf_efficient.registry import ARCHITECTURES, architecture_of

_REMEDY_NO_CONFIG = (
    "give the folder of a converted checkpoint; an adapter is merged into its base model first "
    "(PeftModel.merge_and_unload, then save_pretrained)"
)
# Files that no checkpoint of ours has but transformers would load -> what they do.
_KNOWN_DANGERS = {
    "adapter_config.json": "makes from_pretrained load the base that it names from elsewhere",
    "adapter_model.safetensors": "is an adapter, which from_pretrained would put on the model",
}
_MAGIC = {
    b"\x7fELF": "a program (ELF)",
    b"MZ": "a program (Windows)",
    b"\xcf\xfa\xed\xfe": "a program (Mach-O)",
    b"\xca\xfe\xba\xbe": "a program (Mach-O or Java)",
    b"PK\x03\x04": "an archive (zip), which may hold a pickle",
    b"#!": "a script",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
}


def verify(folder_or_repo: str | Path, *, revision: str | None = None, token: str | None = None) -> VerificationReport:
    """Verify a checkpoint folder or a repository of the Hub; of a repository's weights only the headers are downloaded.

    Every file, and every key of every JSON file at any depth, must be one that the installed release or
    `save_pretrained` writes for the architecture that `config.json` names, with a value of its type; every code file
    must equal the release's; index and headers of the weights must fit the configuration. Anything else is a finding.
    Files that the Trainer writes beside a model are listed in `not_part`: they are not loaded with it.

    Args:
        folder_or_repo: a local folder, or OWNER/NAME on the Hub.
        revision: branch, tag or commit of the repository.
        token: token for a private repository; by default the one that `hf auth login` stored.

    Raises:
        UsageError: the argument is neither a folder nor a repository id, `revision` is given for a folder, or the token
            is malformed.
        HFEError: the repository cannot be read, or it or the folder has too many files to be a checkpoint (2,000 or
            20,000). Other faults of a checkpoint are reported, not raised.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"revision={revision!r} was given for the folder {folder}", "a folder has no revisions")
        return _verify_folder(UntrustedFolder(folder), str(folder_or_repo), commit=None)[0]
    if folder.exists():
        raise UsageError(f"{folder} is a file", "name the folder of a checkpoint, or OWNER/NAME on the Hub")
    repo_id = str(folder_or_repo)
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        commit = download_headers(repo_id, Path(temporary), revision, token)
        return _verify_folder(UntrustedFolder(Path(temporary)), repo_id, commit)[0]


def verify_upload(folder: str | Path) -> tuple[VerificationReport, tuple[str, ...]]:
    """Verify only the files of a checkpoint folder that `push` uploads; returns (report, their names).

    All other files, but those of git and of huggingface_hub's downloads, are listed in `not_part` of the report.

    Raises:
        HFEError: the folder has more than 20,000 files.
    """
    folder = Path(folder)
    listed = UntrustedFolder(folder)
    report, contents = _verify_folder(listed, str(folder), commit=None, only_model=True)
    return report, contents.model


def _verify_folder(
    folder: UntrustedFolder, source: str, commit: str | None, *, only_model: bool = False
) -> tuple[VerificationReport, FolderContents]:
    """(report on a folder, its files by kind); with `only_model`, only files that `push` uploads can have findings.

    `source` and `commit` are named in the report. Faults of the folder are findings, not errors.
    """
    findings: list[Finding] = []
    remedy = REMEDY_EXPORT if CONFIG_NAME in folder else _REMEDY_NO_CONFIG
    missing = [Finding(name, "is missing", remedy) for name in (CONFIG_NAME, CODE_MANIFEST) if name not in folder]
    fields = read_settings(folder, CONFIG_NAME, findings) if CONFIG_NAME in folder else {}
    manifest = read_settings(folder, CODE_MANIFEST, findings) if CODE_MANIFEST in folder else {}
    model_type, release = fields.get("model_type"), manifest.get("version")
    architecture = architecture_of(model_type) if isinstance(model_type, str) else None
    exported = render_code(architecture) if architecture else None
    family = family_of(model_type) if architecture else None
    contents = folder_contents(folder.files, exported.files if exported else (), family)
    verdict: Verdict = "not confirmable"
    tensors = 0
    if architecture is None or exported is None:
        if fields:
            known = ", ".join(a.model_type for a in ARCHITECTURES)
            problem = f"names model_type {model_type!r}; hf-efficient {__version__} writes code for {known}"
            findings.append(Finding(CONFIG_NAME, problem))
    else:
        verdict, differences = _compare_code(folder, exported, manifest)
        foreign_fields = check_config(fields, architecture, exported.auto_map)
        tensors, faults = check_weights(folder, contents.model, architecture, fields, known=not foreign_fields)
        findings += differences + foreign_fields + faults
    findings += check_settings(folder, contents.model, architecture)
    findings += [finding for name in contents.model if (finding := _text_finding(folder, name))]
    others: tuple[str, ...] = contents.training
    if only_model:
        others = tuple(sorted({*others, *contents.foreign, *(finding.file for finding in folder.findings)}))
    else:
        findings += folder.findings
        findings += [Finding(name, _kind_of_foreign(folder, name), REMEDY) for name in contents.foreign]
        empty = [name for name in folder.empty_folders() if name.partition("/")[0] not in (".git", ".cache")]
        findings += [Finding(name, "is a folder that no checkpoint has", "delete it") for name in empty]
    report = VerificationReport(
        source=source,
        commit=commit,
        model_type=model_type if isinstance(model_type, str) else None,
        release=release if isinstance(release, str) else None,
        installed=__version__,
        code=verdict,
        code_files=len(exported.files) if exported else 0,
        tensors=tensors,
        findings=tuple(missing + findings),
        not_part=others,
    )
    return report, contents


def _compare_code(
    folder: UntrustedFolder, exported: CodeExport, manifest: dict[str, Any]
) -> tuple[Verdict, list[Finding]]:
    """Compare the code files and their manifest with those of the installed release; returns (verdict, findings).

    `manifest` is the content of code_manifest.json; empty if it is missing or cannot be read.
    """
    code, claimed = exported.code, str(manifest.get("source_hash"))
    findings, renamed = [], []
    for name, text in exported.files.items():
        if name not in folder:
            findings.append(Finding(name, "is missing", REMEDY_EXPORT))
            continue
        try:
            found = folder.read(name, size_limit(name))
        except HFEError as error:
            findings.append(Finding(name, error.problem, error.remedy))
            continue
        expected = text.encode()
        # Every file holds the hash of all sources: replace it, to list only files with other differences.
        alike = found
        if len(claimed) == len(code.source_hash):
            alike = alike.replace(claimed.encode(), code.source_hash.encode())
            alike = alike.replace(f"hfe_{claimed[:16]}".encode(), code.namespace.encode())
        if alike != expected:
            findings.append(_first_difference(name, expected, alike))
        elif found != expected:
            renamed.append(name)
    if renamed:
        installed = code.source_hash[:16]
        problem = f"{len(renamed)} code files name the sources {claimed[:16]}…; the installed ones are {installed}…"
        findings.append(Finding(CODE_MANIFEST, problem, REMEDY_EXPORT))
    if not findings:
        # A manifest that is missing or cannot be read was reported where it was read.
        if not manifest:
            return "confirmed", []
        expected, found = exported.manifest.encode(), folder.read(CODE_MANIFEST, size_limit(CODE_MANIFEST))
        if found == expected:
            return "confirmed", []
        findings = [_first_difference(CODE_MANIFEST, expected, found)]
    release = manifest.get("version")
    if release not in (None, __version__):
        # Differences mean nothing when another release wrote the code. The release is not trusted: it only says with
        # which one to verify again.
        problem = f"the code says that it comes from hf-efficient {release}; installed is {__version__}"
        return "not confirmable", [Finding(CODE_MANIFEST, problem, f"verify with hf-efficient {release} installed")]
    return "altered", findings


def _first_difference(name: str, expected: bytes, found: bytes) -> Finding:
    """A finding with line, column and byte of the first difference, and the text there on both sides."""
    shorter = min(len(expected), len(found))
    offset = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
    line_start = found.rfind(b"\n", 0, offset) + 1
    old, new = (data.split(b"\n") for data in (expected, found))
    changed = abs(len(old) - len(new)) + sum(a != b for a, b in zip(old, new, strict=False))
    line = found[:offset].count(b"\n") + 1
    return Finding(
        name,
        f"line {line}, column {offset - line_start + 1} (byte {offset}): expected "
        f"{_excerpt(expected, line_start, offset)}, found {_excerpt(found, line_start, offset)}; {changed} "
        f"line{'s differ' if changed > 1 else ' differs'}",
        "do not load it with trust_remote_code",
    )


def _excerpt(data: bytes, line_start: int, offset: int, width: int = 40) -> str:
    """Up to `width` bytes on each side of byte `offset`, within its line, as the repr of a text."""
    if offset == len(data):
        return "the end of the file"
    start, stop = max(line_start, offset - width), data.find(b"\n", offset + 1)
    return repr(data[start : min(offset + width, len(data) if stop < 0 else stop)].decode(errors="backslashreplace"))


def _kind_of_foreign(folder: UntrustedFolder, name: str) -> str:
    """What is wrong with a file that is not part of a checkpoint, from its name and its first bytes."""
    if name in _KNOWN_DANGERS:
        return _KNOWN_DANGERS[name]
    if is_index(name):
        (weight_set,) = (each for each in weight_sets(folder.files) if each.index == name)
        return f"stands beside {weight_set.single}: loaders differ in which of the two they read"
    if name.endswith(".py"):
        return "is code, not part of what the release writes"
    first = _first_bytes(folder, name)
    kind = next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), "a file")
    return f"is {kind} that is not part of what the release or save_pretrained writes for this architecture"


def _text_finding(folder: UntrustedFolder, name: str) -> Finding | None:
    """A finding if a chat template, card or licence is not text, or a chat template is too large; None otherwise."""
    if name.endswith(".jinja") and folder.files[name] > size_limit(name):
        return Finding(name, f"has {folder.files[name]:,} bytes, too many for a chat template", REMEDY)
    if not (name.endswith((".jinja", ".md")) or is_licence(name)):
        return None
    first = _first_bytes(folder, name)
    kind = next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), None)
    if kind is None and b"\0" in first:
        kind = "no text"
    return Finding(name, f"is {kind}", REMEDY) if kind else None


def _first_bytes(folder: UntrustedFolder, name: str) -> bytes:
    """The first bytes of a listed file; empty where it cannot be read, which another finding reports."""
    try:
        return folder.read_start(name, FIRST_BYTES)
    except HFEError:
        return b""
