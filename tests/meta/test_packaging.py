"""Every way of getting the package gives the same package: checkout, wheel, sdist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/api.py"))
USE = (
    "import hf_efficient, torch; from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM;"
    "m = StemForCausalLM(StemConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,"
    " num_attention_heads=2)); print(m(torch.arange(4)[None]).logits.shape); print(hf_efficient.__file__)"
)


def _run(code: str, cwd: Path, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist, built without fetching a build environment."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run([*command, "--wheel", "--sdist"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def _package_files(names: list[str]) -> set[str]:
    return {n for n in names if n.endswith(".py")}


def test_wheel_and_sdist_hold_every_module_but_the_kernel_records(distributions: dict[str, Path]) -> None:
    """Records and their contract serve tests and benchmarks, which are run from a checkout."""
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "hf_efficient").rglob("*.py")}
    for storey in ("kernels", "modeling", "conversion"):
        expected |= {"hf_efficient/" + str(p.relative_to(ROOT)) for p in (ROOT / storey).rglob("*.py")}
    records = {n for n in expected if n.startswith("hf_efficient/kernels/") and Path(n).name == "record.py"}
    assert len(records) == len(OPERATIONS)
    expected -= records | {"hf_efficient/kernels/contract.py"}
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        assert _package_files(wheel.namelist()) == expected
    with tarfile.open(distributions["sdist"]) as sdist:
        inside = {name.split("/", 1)[1] for name in _package_files(sdist.getnames())}
    assert {n if n.startswith("hf_efficient/") else f"hf_efficient/{n}" for n in inside} == expected


def test_wheel_and_sdist_hold_the_built_in_text_and_its_licence(distributions: dict[str, Path]) -> None:
    folder = ROOT / "conversion" / "measuring" / "sample"
    expected = {f"conversion/measuring/sample/{path.name}": path.read_bytes() for path in folder.iterdir()}
    assert {"LICENSE.txt", "python_documentation.jsonl.gz"} <= {path.name for path in folder.iterdir()}
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        assert {name: wheel.read(f"hf_efficient/{name}") for name in expected} == expected
    with tarfile.open(distributions["sdist"]) as sdist:
        root = sdist.getnames()[0].split("/", 1)[0]
        for name, content in expected.items():
            member = sdist.extractfile(f"{root}/{name}")
            assert member is not None and member.read() == content


def test_wheel_works_from_another_folder(distributions: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        wheel.extractall(tmp_path / "site")
        assert not [name for name in wheel.namelist() if re.search(r"/kernels/(.*/record|contract)\.py$", name)]
    site = str(tmp_path / "site")
    out = _run(USE, tmp_path, path=site)
    assert "torch.Size([1, 4, 32])" in out
    assert site in out

    found = json.loads(_run("from hf_efficient.cli.main import run; run(['env', '--json'])", tmp_path, path=site))
    assert list(found["kernels"]) == OPERATIONS


def test_only_records_import_the_records_and_their_contract() -> None:
    """What else imports them would not work from a wheel, and an export would carry them."""
    shipped = [
        p for storey in ("hf_efficient", "kernels", "modeling", "conversion") for p in (ROOT / storey).rglob("*.py")
    ]
    importing = {
        p
        for p in shipped
        if re.search(r"hf_efficient\.kernels\.(\w+\.record|contract)\b", p.read_text(encoding="utf-8"))
    }
    assert importing == {ROOT / "kernels" / name / "record.py" for name in OPERATIONS}


def test_bare_checkout_works_without_installation(tmp_path: Path) -> None:
    """Only files that git tracks or would track, in a fresh folder: what a clone holds."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if name.endswith((".py", ".toml")) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    out = _run(USE, tmp_path)
    assert str(tmp_path) in out


def test_our_folders_shadow_nobody_from_the_repository_root() -> None:
    """transformers probes for a package named `kernels`; ours must be invisible to it, and never be imported twice."""
    code = (
        "import transformers, hf_efficient, sys; transformers.LlamaForCausalLM;"
        f"root = {str(ROOT)!r};"
        "bad = [n for n in ('kernels', 'modeling', 'conversion')"
        " if str(getattr(sys.modules.get(n), '__file__', None) or '').startswith(root)];"
        "print('bad', bad)"
    )
    assert "bad []" in _run(code, ROOT)
