"""An exported checkpoint loads without the package, with the same results as with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import CONFIG_NAME as CONFIG

from example_inputs import example_inputs
from hf_efficient.errors import HFEError
from hf_efficient.hub import flatten as flatten_module
from hf_efficient.hub.export import export, export_code
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST
from hf_efficient.registry import ARCHITECTURES, architecture_of

Runner = Callable[..., dict[str, Any]]
PROMPT = "word1 word5 word9"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_expected(folder: Path, target: Path) -> None:
    """Output and tokens of the package's own classes for the checkpoint in `folder`."""
    spec = architecture_of(AutoConfig.from_pretrained(folder).model_type)
    assert spec is not None
    model = getattr(transformers, spec.main_auto_class).from_pretrained(folder).eval()
    assert type(model).__module__.startswith("hf_efficient.")
    inputs = example_inputs(model.config)
    if "input_ids" in inputs:
        inputs = {"input_ids": AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids}
    with torch.no_grad():
        expected = {"result": model(**inputs)[0]}
        if model.can_generate():
            expected["tokens"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    save_file({**{f"inputs.{name}": tensor for name, tensor in inputs.items()}, **expected}, target)


# Functions for the scripts, each of which runs in a new process.
HELPERS = """
import json, os, sys
import torch
import transformers
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

def load(folder, **kwargs):
    config = json.loads(Path(folder, "config.json").read_text())
    saved = config["architectures"][0]
    auto = next(name for name, value in config["auto_map"].items() if value.rpartition(".")[2] == saved)
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **kwargs).eval()

def sibling(model, name):
    return sys.modules[type(model).__module__.rpartition(".")[0] + "." + name]

def namespace(folder):
    return "hfe_" + json.loads(Path(folder, "code_manifest.json").read_text())["source_hash"][:16]
"""


def test_loads_without_the_package_bit_for_bit(
    checkpoints: dict[str, Path], run_python: Runner, tmp_path: Path
) -> None:
    """Each architecture, without hf_efficient and without Triton: output, tokens, text, and all again after a save."""
    for model_type, folder in checkpoints.items():
        write_expected(folder, tmp_path / f"{model_type}.safetensors")
    script = (
        HELPERS
        + """
result = {}
for folder in map(Path, sys.argv[2:]):
    expected = load_file(Path(sys.argv[1], folder.name + ".safetensors"))
    inputs = {name.removeprefix("inputs."): x for name, x in expected.items() if name.startswith("inputs.")}
    model = load(folder)
    found = model(**inputs)[0]
    generated = {}
    if "tokens" in expected:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        text = write("word1 word5 word9", max_new_tokens=8, do_sample=False)
        generated = {"tokens": torch.equal(tokens, expected["tokens"]), "text": text[0]["generated_text"]}
    again = Path(sys.argv[1], "again-" + folder.name)
    model.save_pretrained(again)
    reloaded = load(again)
    result[folder.name] = {
        "module": type(model).__module__,
        "one configuration class": type(model.config) is type(model).config_class,
        "output": torch.equal(found, expected["result"]),
        **generated,
        "reloaded output": torch.equal(reloaded(**inputs)[0], expected["result"]),
        "reloaded from": type(reloaded).__module__,
    }
result["package"] = sys.modules["hf_efficient"] is None and not any(m.startswith("hf_efficient.") for m in sys.modules)
print(json.dumps(result))
"""
    )
    result = run_python(script, tmp_path, *checkpoints.values(), absent=("triton",))
    assert result["package"]
    for model_type in checkpoints:
        found = result[model_type]
        assert found["module"].startswith("transformers_modules."), found
        assert found["one configuration class"]
        assert found["output"] and found["reloaded output"], found
        if architecture_of(model_type).main_auto_class == "AutoModelForCausalLM":  # type: ignore[union-attr]
            assert found["tokens"] and found["text"].startswith(PROMPT) and len(found["text"].split()) > 3
        assert found["reloaded from"] != found["module"]


@pytest.fixture
def other_release(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Export as a release would whose kernels compute the reference and Triton paths differently: scaled by two."""

    def write(folder: Path) -> None:
        original = flatten_module._source_text

        def changed(module: str) -> str:
            text = original(module)
            if module.endswith("stem_gate.api"):
                # The public function under another name, and a new one that doubles it.
                text = text.replace("def stem_gate(", "def half_of_it(", 1)
                text += "\n\ndef stem_gate(gate, table, ids, *, backend=None):\n"
                text += "    return 2 * half_of_it(gate, table, ids, backend=backend)\n"
            return text

        with monkeypatch.context() as patch:
            patch.setattr(flatten_module, "_source_text", changed)
            export(folder)

    return write


def test_two_releases_live_in_one_process(
    checkpoint: Path, tmp_path: Path, run_python: Runner, other_release: Callable[[Path], None]
) -> None:
    """Checkpoints of two releases, in folders of the same name, keep their own code, ops and gradients, on Triton too.

    A third folder has the code of the first once more: each copy has ops of its own, since an op that is registered
    twice takes the first copy's down with it.
    """
    other, copy = tmp_path / "elsewhere" / checkpoint.name, tmp_path / "copy"
    shutil.copytree(checkpoint, other)
    shutil.copytree(checkpoint, copy)
    other_release(other)
    script = (
        HELPERS
        + """
def answer(model, ids):
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    return logits.detach(), next(p.grad.clone() for n, p in model.named_parameters() if "stem_embed" in n)

def reference_answer(model, ids):
    os.environ["HFE_BACKEND"] = "reference"
    try:
        return answer(model, ids)
    finally:
        os.environ["HFE_BACKEND"] = "triton"

folders = [Path(p) for p in sys.argv[1:]]
ids = torch.tensor([[3, 8, 3, 20, 5]])
models = [load(folder) for folder in folders]
expected = [reference_answer(model, ids) for model in models]
# Twice over, so that each runs after all the others have registered their ops.
answers = [answer(model, ids) for _ in range(2) for model in models]
error = max(
    float((found - wanted).norm() / wanted.norm())
    for pair, wanted_pair in zip(answers, expected * 2)
    for found, wanted in zip(pair, wanted_pair)
)
ops = [name for name in torch._C._dispatch_get_all_op_names() if name.endswith("::stem_gate")]
print(json.dumps({
    "sources": [namespace(f) for f in folders],
    "namespaces": [sibling(m, "hfe_kernels_namespace").NS for m in models],
    "ops": sorted(name.split("::")[0] for name in ops),
    "error": error,
    "releases differ": not torch.allclose(expected[0][0], expected[1][0], rtol=1e-2),
    "copies agree": torch.equal(expected[0][0], expected[2][0]),
    "classes": len({type(m) for m in models}),
}))
"""
    )
    result = run_python(script, checkpoint, other, copy, HFE_BACKEND="triton", TRITON_INTERPRET="1")
    first, second, third = result["sources"]
    assert first == third != second
    assert all(own.startswith(source) for own, source in zip(result["namespaces"], result["sources"], strict=True))
    assert len(set(result["namespaces"])) == 3 and result["ops"] == sorted(result["namespaces"])
    assert result["classes"] == 3
    assert result["releases differ"] and result["copies agree"]
    assert result["error"] < 1e-5


def test_exporting_again_changes_nothing(checkpoint: Path) -> None:
    before = contents(checkpoint)
    times = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    export(checkpoint)
    assert contents(checkpoint) == before
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == times


def test_the_code_of_an_earlier_export_does_not_stay(
    checkpoint: Path, other_release: Callable[[Path], None], tmp_path: Path
) -> None:
    """A file that the new release no longer has is removed; files outside the code that a manifest names are not."""
    before = contents(checkpoint)
    other_release(checkpoint)
    (checkpoint / "hfe_gone.py").write_text("")
    (checkpoint / "mine.py").write_text("")
    (tmp_path / "outside.py").write_text("")
    manifest = json.loads((checkpoint / CODE_MANIFEST).read_text())
    manifest["files"] |= {"hfe_gone.py": "", "../outside.py": "", "config.json": ""}
    (checkpoint / CODE_MANIFEST).write_text(json.dumps(manifest))
    export(checkpoint)
    assert contents(checkpoint) == {**before, "mine.py": b""}
    assert (tmp_path / "outside.py").exists()


def test_code_travels_from_a_wheel_as_from_a_checkout(
    checkpoint: Path, repository_root: Path, run_python: Runner, tmp_path: Path
) -> None:
    """In a wheel, kernels, modeling and conversion are inside the package: the exported bytes are the same."""
    wheel = tmp_path / "wheel" / "hf_efficient"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository_root / "hf_efficient", wheel, ignore=ignored)
    for storey in ("kernels", "modeling", "conversion"):
        shutil.copytree(repository_root / storey, wheel / storey, ignore=ignored)
    copy = tmp_path / "from_wheel"
    copy.mkdir()
    for name in (CONFIG, "model.safetensors"):
        shutil.copy(checkpoint / name, copy / name)
    script = """
import json
sys.path.insert(0, sys.argv[1])
from hf_efficient.hub import export
export.export(sys.argv[2])
print(json.dumps({"file": export.__file__}))
"""
    result = run_python(script, wheel.parent, copy, package=True)
    assert Path(result["file"]).is_relative_to(wheel)
    written = contents(copy)
    assert CODE_MANIFEST in written
    assert written.items() <= contents(checkpoint).items()


def test_a_stock_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    with pytest.raises(HFEError, match=r"'llama'.*hfe_stem.*hf-efficient convert"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]


def test_code_of_another_architecture_is_refused(checkpoint: Path) -> None:
    before = contents(checkpoint)
    decoder = architecture_of("hfe_decoder")
    assert decoder in ARCHITECTURES
    with pytest.raises(HFEError, match=r"model_type 'hfe_stem'.*'hfe_decoder'"):
        export_code(checkpoint, decoder)
    assert contents(checkpoint) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "has no config.json"), ("{", "cannot be read as JSON"), ("[]", "holds a list, not an object")],
)
def test_a_broken_configuration_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / CONFIG).write_text(text)
    with pytest.raises(HFEError, match=words):
        export(tmp_path)


@pytest.mark.gpu
def test_generates_from_a_graph_without_the_package(
    checkpoints: dict[str, Path], run_python: Runner, tmp_path: Path
) -> None:
    """Two copies of one release in a process, each with its own operators, attention and captured steps."""
    prompt = torch.tensor([[0, 5, 9, 13], [7, 8, 9, 10]])
    options = {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), "max_new_tokens": 20, "do_sample": False}
    generating = {
        model_type: folder
        for model_type, folder in checkpoints.items()
        if architecture_of(model_type).main_auto_class == "AutoModelForCausalLM"  # type: ignore[union-attr]
    }
    for model_type, folder in generating.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        save_file({"tokens": model.generate(prompt, **options)}, tmp_path / f"{model_type}.safetensors")
    script = (
        HELPERS
        + """
prompt = torch.tensor([[0, 5, 9, 13], [7, 8, 9, 10]], device="cuda")
mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device="cuda")
result, models = {}, []
for folder in map(Path, sys.argv[2:]):
    models.append(load(folder, dtype=torch.float32).to("cuda"))
    tokens = models[-1].generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False)
    expected = load_file(Path(sys.argv[1], folder.name + ".safetensors"))["tokens"]
    result[folder.name] = {
        "tokens": torch.equal(tokens.cpu(), expected),
        "captured": len(models[-1].captured_steps()),
        "attention": models[-1].config._attn_implementation,
    }
print(json.dumps(result))
"""
    )
    result = run_python(script, tmp_path, *generating.values())
    assert all(found["tokens"] and found["captured"] == 1 for found in result.values()), result
    assert len({found["attention"] for found in result.values()}) == len(generating), "each copy has its own name"
