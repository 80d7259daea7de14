"""README and docs match the package: length, links, commands and flags, imported names, numbers of the figure."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

import hf_efficient
from hf_efficient.cli.main import SUBCOMMANDS, app

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
NOTES = sorted((ROOT / "kernels").glob("*/README.md"))
PAGES = [*TOP, *DOCS]
# Their options are another program's: `transformers serve`, and the benchmark's own.
PASSED_ON = {"serve", "bench"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _fenced(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each fenced block."""
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield block[1], block[2]


def _commands(text: str) -> Iterator[str]:
    """Command lines of the page: lines of fenced and indented blocks, and inline code; continued lines are joined."""
    blocks = [code for language, code in _fenced(text) if language != "python"]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += [line[4:] for line in re.sub(r" \\\n +", " ", outside).splitlines() if line.startswith("    ")]
    inline = re.findall(r"`([^`]+)`", outside)
    for line in [line for block in blocks for line in block.splitlines()] + inline:
        yield re.split(r"\s#\s|\s{2,}#", line.strip().removeprefix("$ "))[0].strip()


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def _flags(subcommand: str) -> set[str]:
    """Flags that the subcommand takes."""
    group = typer.main.get_command(app)
    command = group.get_command(None, subcommand)  # type: ignore[attr-defined, arg-type]
    return {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}


@pytest.fixture(scope="module")
def source_text() -> str:
    folders = ("kernels", "modeling", "conversion", "hf_efficient", "benchmarks", "examples", "tests")
    paths = [
        path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "test_docs.py"
    ]
    return "\n".join(f"{path.stem}\n{path.read_text(encoding='utf-8')}" for path in paths)


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=_name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(target)
    assert not broken, broken


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=_name)
def test_paths_of_the_source_tree_exist(page: Path) -> None:
    folders = "kernels|modeling|conversion|hf_efficient|tests|benchmarks|examples|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w/.]+)`", page.read_text(encoding="utf-8")))
    placeholders = {path for path in named if "/x/" in path}
    missing = {path for path in named - placeholders if not (ROOT / path).exists()}
    assert not missing - {"tests/test_modeling_common.py"}, missing  # of transformers


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=_name)
def test_identifiers_with_an_underscore_occur_in_the_source(page: Path, source_text: str) -> None:
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    named = {word for span in spans for word in re.findall(r"\b[a-z]\w*_\w+", span)}
    # Of transformers' tests, the authors' files, other engines, texts, and placeholders.
    others = r"test_\w+|causal_lm_tester|consolidated_stem|pipeline_parallel_size|cpu_ram_efficient_loading"
    others += r"|c4_en_\w+|\w+_x|lambda_in²"
    missing = {word for word in named if word not in source_text and not re.fullmatch(others, word)}
    assert not missing, missing


def test_every_page_of_docs_is_linked_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", index)}
    assert {page.name for page in DOCS} - {"index.md"} <= linked


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=_name)
def test_every_command_and_flag_exists(page: Path) -> None:
    benchmarks = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    wrong = []
    for command in _commands(page.read_text(encoding="utf-8")):
        words = _words(command)
        flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
        if words[:1] == ["hf-efficient"] and len(words) > 1 and re.match(r"[a-z]", words[1]):
            known_name = words[1] in SUBCOMMANDS and (words[1] != "bench" or not words[2:] or words[2] in benchmarks)
            if not known_name or (words[1] not in PASSED_ON and flags - _flags(words[1])):
                wrong.append(command)
        elif words[:1] in (["python"], ["accelerate"]) and len(words) > 1:
            name = next((word for word in words[1:] if re.match(r"examples/|benchmarks\.", word)), None)
            if name is None:
                continue
            script = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
            known = script.read_text(encoding="utf-8") if script.exists() else ""
            harness = (ROOT / "benchmarks" / "harness.py").read_text(encoding="utf-8")
            if not known or any(f'"{flag}"' not in known + harness for flag in flags):
                wrong.append(command)
    assert not wrong, wrong


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=_name)
def test_flags_in_prose_exist(page: Path) -> None:
    """A flag that stands alone in backticks, such as `--stem-layers`, is one of some subcommand, or of a script."""
    known = {flag for subcommand in SUBCOMMANDS for flag in _flags(subcommand)}
    scripts = [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    others = {"--model-impl", "--cb-num-blocks", "--continuous-batching"}  # of vLLM, SGLang and `transformers serve`
    named = set(re.findall(r"`(--[a-z][\w-]*\w)(?=[ `=])", page.read_text(encoding="utf-8")))
    wrong = {flag for flag in named - known - others if f'"{flag}"' not in source}
    assert not wrong - {"--fuzz-seconds"}, wrong


def _resolve(module: str, name: str) -> None:
    found: ModuleType = importlib.import_module(module)
    if not hasattr(found, name):
        importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=_name)
def test_python_blocks_parse_and_name_what_hf_efficient_has(page: Path) -> None:
    for language, code in _fenced(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_efficient":
                for alias in node.names:
                    _resolve(node.module or "", alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "hf_efficient":
                        importlib.import_module(alias.name)
            elif (
                isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_efficient"
            ):
                assert hasattr(hf_efficient, node.attr), node.attr


def test_the_figures_numbers_are_found_in_results_and_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    figure = importlib.import_module("benchmarks.overview_figure")
    rows = [*figure.speed_rows(), *figure.quality_rows()]
    assert {row.group for row in rows} == set(figure.GROUPS)
    assert (ROOT / "docs" / "figures" / "overview.png").stat().st_size <= 200_000
