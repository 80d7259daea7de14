"""A checkpoint's own `generate`: three ways to call it, with and without the package, offline, from a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_efficient.hub.export import export
from hf_efficient.hub.verify import verify
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST
from hf_efficient.modeling.topology.grammar.control_tokens import MULTIVERSE

PROMPT = "Q<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
SHAPE = {
    **{"vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in MULTIVERSE])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A Multiverse checkpoint marked as trained, with a tokenizer that has the control tokens."""
    folder = tmp_path_factory.mktemp("custom-generate") / "multiverse"
    tokenizer = byte_tokenizer()
    token_ids = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in MULTIVERSE}
    make_checkpoint(folder, "hfe_multiverse", topology={"token_ids": token_ids, "trained": True}, **SHAPE)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(trained: Path) -> Path:
    """The same weights as a stock Llama, without code."""
    folder = trained.with_name("stock")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-6))
    model.load_state_dict(load_file(trained / "model.safetensors"))
    model.save_pretrained(folder)
    return folder


SCRIPT = """
import json, shutil, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
trained, stock, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(trained, trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt").input_ids
settings = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}

def text(found):
    return tokenizer.decode(found[0], skip_special_tokens=False)

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

# `generate` of the folder's own class, with the prompt as a positional and as a keyword argument.
own = load(trained)
result = {
    "position": text(own.generate(ids, **settings)),
    "name": text(own.generate(input_ids=ids, tokenizer=tokenizer, **settings)),
    "all by position": text(own.generate(ids, None, None, None, **settings)),
    "plain": text(own.generate(ids, parallel=False, **settings)),
}
# By a stock model, for one call.
model = load(stock)
shared = {"custom_generate": trained, "trust_remote_code": True, "tokenizer": tokenizer}
result["stock"] = text(model.generate(ids, **shared, **settings))
result["stock name"] = text(model.generate(input_ids=ids, **shared, **settings))
result["stock plain"] = text(model.generate(ids, **settings))
# Loaded with a stock checkpoint that has the folder.
both = Path("both")
shutil.copytree(stock, both)
shutil.copytree(Path(trained, "custom_generate"), both / "custom_generate")
model = load(both)
result["beside"] = text(model.generate(ids, tokenizer=tokenizer, **settings))
result["beside plain"] = text(model.generate(ids, parallel=False, **settings))
package = "hf_efficient.modeling.topology.generation.generation_topology"
result["package"] = sys.modules.get(package) is not None
print(json.dumps(result))
"""


@pytest.mark.parametrize("package", [False, True])
def test_three_ways_to_call_it_give_one_text(
    trained: Path, stock: Path, run_python: Callable[..., dict[str, Any]], package: bool
) -> None:
    found = run_python(SCRIPT, trained, stock, PROMPT, package=package)
    assert found.pop("package") is package
    text = found["position"]
    assert text.startswith(PROMPT + "\n<Path>\n1:") and text.count("</Path>\n") == 2 and "<Conclusion>\n" in text
    parallel = {name: found[name] for name in ("name", "all by position", "stock", "stock name", "beside")}
    assert parallel == dict.fromkeys(parallel, text)
    assert found["plain"] == found["stock plain"] == found["beside plain"] != text


def test_the_package_itself_gives_the_same_text(trained: Path) -> None:
    """Without `tokenizer=`, it loads the tokenizer in the checkpoint's folder."""
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    settings = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, **settings)
    assert "<Path>\n1:" in tokenizer.decode(found[0])
    assert torch.equal(found, model.generate(ids, tokenizer=tokenizer, **settings))


def test_its_files_belong_to_the_manifest_and_are_verified(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    files = json.loads((folder / CODE_MANIFEST).read_text())["files"]
    assert {f"custom_generate/{path.name}" for path in (folder / "custom_generate").iterdir()} <= set(files)
    assert "custom_generate/generate.py" in files
    assert verify(folder).ok, verify(folder).table()

    (folder / "custom_generate" / "extra.py").write_text("print('hello')")
    report = verify(folder)
    assert not report.ok and "custom_generate/extra.py: is code, not part" in str(report.findings[0])
    (folder / "custom_generate" / "extra.py").unlink()

    target = folder / "custom_generate" / "generate.py"
    target.write_text(target.read_text().replace("model, inputs", "model, [inputs]", 1))
    report = verify(folder)
    assert report.code == "altered" and "custom_generate/generate.py: line" in str(report.findings[0])

    target.unlink()
    assert "custom_generate/generate.py: is missing" in str(verify(folder).findings[0])


def test_export_again_restores_it_and_removes_what_was_there(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    stale = folder / "custom_generate" / "hfe_of_an_earlier_release.py"
    stale.write_text("")
    manifest = json.loads((folder / CODE_MANIFEST).read_text())
    manifest["files"]["custom_generate/hfe_of_an_earlier_release.py"] = ""
    manifest["files"]["../outside.py"] = manifest["files"]["custom_generate/../../outside.py"] = ""
    (folder / CODE_MANIFEST).write_text(json.dumps(manifest))
    (folder / "custom_generate" / "generate.py").unlink()
    outside = tmp_path / "outside.py"
    outside.write_text("")
    export(folder)
    assert not stale.exists() and outside.exists()
    assert verify(folder).ok


def test_other_architectures_have_none(checkpoints: dict[str, Path]) -> None:
    found = {model_type for model_type, folder in checkpoints.items() if (folder / "custom_generate").exists()}
    assert found == {"hfe_multiverse", "hfe_medverse"}
