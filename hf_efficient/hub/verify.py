"""Say whether a checkpoint's code is the code that a release of this package writes, before anybody runs it.

Nothing in the checkpoint is believed: the code is written anew from the installed package and compared byte by byte.
Nothing in the checkpoint is imported, unpickled or run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_efficient import __version__
from hf_efficient.conversion.reading.json_file import MAX_TOKENIZER_BYTES, parse_json, read_bytes_of, read_json
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.hub.export import CODE_MANIFEST, CONFIG, CodeExport, render_code
from hf_efficient.hub.findings import Finding, Verdict, VerificationReport
from hf_efficient.hub.repository import check_repo_id, fetch_skeleton
from hf_efficient.hub.weights import check_weights
from hf_efficient.registry import ARCHITECTURES, architecture_of

_CODE_SUFFIXES = (
    *(".py", ".pyc", ".pyo", ".pyd", ".pyx", ".pyz", ".pth", ".ipynb", ".whl", ".egg"),
    *(".so", ".dylib", ".dll", ".exe", ".wasm", ".jar", ".class", ".cubin", ".ptx", ".hsaco"),
    *(".sh", ".bash", ".bat", ".cmd", ".ps1", ".js", ".mjs", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z"),
)
_PICKLE_SUFFIXES = (
    *(".bin", ".pt", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill"),
    *(".npy", ".npz", ".h5", ".keras", ".pb"),
)
_DATA_SUFFIXES = (".json", ".jsonl", ".safetensors", ".md", ".txt", ".jinja", ".model", ".png", ".svg", ".jpg", ".yaml")
_MAGIC = {
    b"\x7fELF": "a program (ELF)",
    b"MZ": "a program (Windows)",
    b"\xcf\xfa\xed\xfe": "a program (Mach-O)",
    b"\xca\xfe\xba\xbe": "a program (Mach-O or Java)",
    b"PK\x03\x04": "an archive (zip), which may hold a pickle",
    b"#!": "a script",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
}
_REMEDY_FOREIGN = "delete it, or do not load this checkpoint with trust_remote_code"
_REMEDY_EXPORT = "if the checkpoint is yours, write its code again with hf_efficient.export(folder)"


def verify(folder_or_repo: str | Path, *, revision: str | None = None, token: str | None = None) -> VerificationReport:
    """Verify a checkpoint folder or a repository of the Hub; of a repository's weights only the headers are downloaded.

    Checks that every code file equals what the installed release writes for the architecture that `config.json` names,
    that nothing else in the checkpoint can run (other code, `auto_map` entries, pickles, links out of the folder), and
    that index and headers of the weights fit the configuration.

    Args:
        folder_or_repo: a local folder, or OWNER/NAME on the Hub.
        revision: branch, tag or commit of the repository.
        token: token for a private repository; by default the one that `hf auth login` stored.

    Raises:
        UsageError: the argument is neither a folder nor a repository id, or `revision` is given for a folder.
        HFEError: the repository cannot be read. What is wrong with a checkpoint is not raised but reported.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"revision={revision!r} was given for the folder {folder}", "a folder has no revisions")
        return _verify_folder(folder, str(folder_or_repo), commit=None)
    if folder.exists():
        raise UsageError(f"{folder} is a file", "name the folder of a checkpoint, or OWNER/NAME on the Hub")
    repo_id = str(folder_or_repo)
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as skeleton:
        commit = fetch_skeleton(repo_id, Path(skeleton), revision, token)
        return _verify_folder(Path(skeleton), repo_id, commit)


def _verify_folder(folder: Path, source: str, commit: str | None) -> VerificationReport:
    findings: list[Finding] = []
    fields = _read_or_find(folder / CONFIG, findings)
    manifest = _read_or_find(folder / CODE_MANIFEST, findings)
    model_type, release = fields.get("model_type"), manifest.get("version")
    architecture = architecture_of(str(model_type))
    exported: CodeExport | None = None
    verdict: Verdict = "not confirmable"
    tensors = 0
    if architecture is None:
        if fields:
            known = ", ".join(a.model_type for a in ARCHITECTURES)
            findings.append(
                Finding(CONFIG, f"names model_type {model_type!r}; hf-efficient {__version__} writes code for {known}")
            )
    else:
        exported = render_code(architecture)
        verdict, differences = _compare_code(folder, exported, manifest)
        tensors, faults = check_weights(folder, architecture, fields)
        findings += differences + faults
    findings += _foreign_files(folder, set(exported.files) if exported else set())
    findings += _foreign_references(folder, exported.auto_map if exported else {})
    return VerificationReport(
        source=source,
        commit=commit,
        model_type=model_type,
        release=release,
        installed=__version__,
        code=verdict,
        code_files=len(exported.files) if exported else 0,
        tensors=tensors,
        findings=tuple(findings),
    )


def _read_or_find(path: Path, findings: list[Finding]) -> dict[str, Any]:
    """The JSON object in a file that every checkpoint of ours has; what is wrong with it becomes a finding."""
    if not path.is_file():
        findings.append(Finding(path.name, "is missing", _REMEDY_EXPORT))
        return {}
    try:
        return read_json(path)
    except HFEError as error:
        findings.append(Finding(path.name, error.problem, error.remedy))
        return {}


def _compare_code(folder: Path, exported: CodeExport, manifest: dict[str, Any]) -> tuple[Verdict, list[Finding]]:
    """The code files and their manifest against what the installed release writes."""
    code, claimed = exported.code, str(manifest.get("source_hash"))
    findings, renamed = [], []
    for name, text in exported.files.items():
        path, expected = folder / name, text.encode()
        if not path.is_file():
            findings.append(Finding(name, "is missing", _REMEDY_EXPORT))
            continue
        found = path.read_bytes()
        # Other sources have another hash, which stands in every file. Set it aside: the files that really differ count.
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
        findings.append(Finding(CODE_MANIFEST, problem, _REMEDY_EXPORT))
    if not findings:
        path, expected = folder / CODE_MANIFEST, exported.manifest.encode()
        # A missing manifest was reported where it was read.
        if not path.is_file() or path.read_bytes() == expected:
            return "confirmed", []
        findings = [_first_difference(CODE_MANIFEST, expected, path.read_bytes())]
    release = manifest.get("version")
    if release not in (None, __version__):
        # What differs says nothing when another release wrote it. The claim is not believed either: it only tells with
        # which release to look again.
        problem = f"the code says that it comes from hf-efficient {release}; installed is {__version__}"
        return "not confirmable", [Finding(CODE_MANIFEST, problem, f"verify with hf-efficient {release} installed")]
    return "altered", findings


def _first_difference(name: str, expected: bytes, found: bytes) -> Finding:
    """Line, column and byte of the first difference, and what stands there."""
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
    """The text around a byte, to the end of its line."""
    if offset == len(data):
        return "the end of the file"
    start, stop = max(line_start, offset - width), data.find(b"\n", offset + 1)
    return repr(data[start : min(offset + width, len(data) if stop < 0 else stop)].decode(errors="backslashreplace"))


def _foreign_files(folder: Path, own: set[str]) -> Iterator[Finding]:
    """Files that hold or may hold code, other than the code files of the release."""
    for directory, names, files in os.walk(folder):
        here = Path(directory)
        if here == folder and ".git" in names:
            names.remove(".git")  # a clone's own records: neither loaded nor uploaded
        for name in sorted(names):
            if (here / name).is_symlink():
                yield Finding(_relative(folder, here / name), "is a link to a folder", _REMEDY_FOREIGN)
        for name in sorted(files):
            path = here / name
            relative = _relative(folder, path)
            if path.is_symlink() and not _stays_inside(folder, path):
                yield Finding(relative, f"is a link to {path.resolve()}, outside the checkpoint", _REMEDY_FOREIGN)
            elif relative not in own and (kind := _kind_of_danger(path)):
                yield Finding(relative, f"is {kind}, not part of what the release writes", _REMEDY_FOREIGN)


def _stays_inside(folder: Path, link: Path) -> bool:
    target, folder = link.resolve(), folder.resolve()
    # In the Hub's cache a snapshot's files are links to the blobs of the same repository.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return target.is_relative_to(folder) or target.is_relative_to(blobs)


def _kind_of_danger(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if path.parent.name == "custom_generate":
        return "custom generation code"
    if suffix in _CODE_SUFFIXES:
        return "code"
    if suffix in _PICKLE_SUFFIXES:
        return "a file that may hold a pickle"
    if suffix in _DATA_SUFFIXES:
        return None
    try:
        with path.open("rb") as file:
            first = file.read(8)
    except OSError:
        return "unreadable"
    return next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), None)


def _foreign_references(folder: Path, auto_map: dict[str, str]) -> Iterator[Finding]:
    """Entries of any JSON file that make transformers load code, other than the release's own `auto_map`."""
    for path in sorted(folder.rglob("*.json")):
        relative = _relative(folder, path)
        if not path.is_file() or relative.startswith(".git/"):
            continue
        try:
            value: Any = parse_json(relative, read_bytes_of(path, MAX_TOKENIZER_BYTES))
        except HFEError as error:
            if "not an object" not in error.problem and relative not in (CONFIG, CODE_MANIFEST):
                yield Finding(relative, error.problem, error.remedy)
            continue
        if relative == CONFIG:
            yield from _auto_map_differences(value.pop("auto_map", None), auto_map)
        for key, entry in _code_entries(value):
            yield Finding(relative, f"{key} names code: {json.dumps(entry)[:200]}", _REMEDY_FOREIGN)


def _auto_map_differences(found: Any, expected: dict[str, str]) -> Iterator[Finding]:
    if not isinstance(found, dict):
        if expected:
            yield Finding(CONFIG, "has no auto_map", _REMEDY_EXPORT)
        return
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            rule = f"{expected[name]!r} is expected" if name in expected else "the release has no such entry"
            yield Finding(CONFIG, f"auto_map[{name!r}] is {found.get(name)!r}; {rule}", _REMEDY_EXPORT)


def _code_entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys, at any depth, by which a configuration makes transformers load code."""
    if isinstance(value, list):
        for item in value:
            yield from _code_entries(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            # A vocabulary may hold a token of this name; its value is a number.
            names_code = key in ("auto_map", "custom_pipelines") and isinstance(item, (dict, list, str)) and item
            # An implementation with a slash is a repository of kernels.
            names_kernels = key.endswith("_implementation") and "/" in str(item)
            if names_code or names_kernels:
                yield key, item
            else:
                yield from _code_entries(item)


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
