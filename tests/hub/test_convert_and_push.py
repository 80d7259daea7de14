"""`convert(push_to_hub=…)`: access is checked before the work; after a failed upload the finished folder stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

_CONVERT = """
import json, sys
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError

def attempt(source, output, repo_id, **options):
    try:
        convert(source, output, evaluate=False, progress=False, push_to_hub=repo_id, **options)
        return "done"
    except HFEError as error:
        return [error.exit_code, str(error)]

source, output = sys.argv[1:]
# The source is absent: errors of the repository come before it is read.
refused = {
    "no owner": attempt("absent", "x", "model"),
    "no id": attempt("absent", "x", "a/b/c"),
    "of others": attempt("absent", "x", "somebody/model"),
    "public": attempt("absent", "x", "tester/public"),
    "wrong token": attempt("absent", "x", "tester/model", token="wrong-token"),
    "dry run": attempt("absent", "x", "somebody/model", dry_run=True),
    "failed upload": attempt(source, output, "tester/full"),
    "again": attempt(source, output, "tester/full", overwrite=True),
}
print(json.dumps(refused | {"right": attempt(source, "second", "tester/model")}))
"""


def test_a_conversion_is_uploaded_or_says_how(
    hub: Any, run_python: Callable[..., Any], tmp_path: Path, tiny_llama: Path
) -> None:
    hub.create("tester/public", private=False)
    hub.refuses_large_files.add("tester/full")
    output = tmp_path / "converted"
    found = run_python(_CONVERT, tiny_llama, output, package=True, **hub.environment)
    assert found["no owner"][0] == found["no id"][0] == 2
    assert "OWNER/NAME" in found["no owner"][1] and "is not a repository id" in found["no id"][1]
    assert "may not write to somebody/model: it is of tester" in found["of others"][1] == found["dry run"][1]
    assert "is public, and a private upload was asked for" in found["public"][1]
    assert "refused access to tester/model (status 401)" in found["wrong token"][1]
    for name in ("failed upload", "again"):
        assert found[name][1].endswith(f"hf-efficient push {output} tester/full"), found[name]
        assert "is complete, but was not uploaded" in found[name][1]
    AutoModelForCausalLM.from_pretrained(output)
    assert found["right"] == "done" and hub.private["tester/model"] is True
    assert {path.name for path in (tmp_path / "second").iterdir()} <= hub.files("tester/model").keys()
