"""Publishing to a stand-in for the Hub, and loading from it without the package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from hf_efficient.errors import HFEError, UsageError
from hf_efficient.hub import repository
from hf_efficient.hub.card import CARD
from hf_efficient.hub.push import push

Runner = Callable[..., dict[str, Any]]

# huggingface_hub reads its endpoint when it is imported, so scripts that use the stand-in are processes of their own.
PUSH = """
import json
from hf_efficient.errors import HFEError
from hf_efficient.hub.push import push
from hf_efficient.hub.verify import verify

def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs).to_dict()
    except HFEError as error:
        return {"error": str(error)}

folder = sys.argv[1]
"""


def test_a_pushed_checkpoint_loads_by_its_id_without_the_package(
    checkpoint: Path, run_python: Runner, hub: Any
) -> None:
    script = (
        PUSH
        + """
result = {"first": attempt(push, folder, "tester/stem"), "again": attempt(push, folder, "tester/stem")}
result["branch"] = attempt(push, folder, "tester/stem", revision="v2", commit_message="second")
result["verified"] = attempt(verify, "tester/stem", revision=result["first"]["commit"])
print(json.dumps(result))
"""
    )
    result = run_python(script, checkpoint, package=True, **hub.environment)
    first = result["first"]
    assert first["private"] is True and hub.private == {"tester/stem": True}
    assert first["url"].endswith("tester/stem") and first["commit"] in first["commit_url"]
    assert first["card"] == result["again"]["card"] == "written"
    local = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert hub.files("tester/stem", first["commit"]) == {".gitattributes": b"", **local}
    assert hub.branches["tester/stem"]["v2"] == result["branch"]["commit"] != hub.branches["tester/stem"]["main"]
    card = ModelCard(local[CARD].decode())
    assert '"tester/stem"' in card.text and card.data.library_name == "transformers"
    verified = result["verified"]
    assert verified["ok"] and verified["commit"] == first["commit"] and verified["tensors"] == 30

    load = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([[1, 4, 7]])
answers = {}
for source, revision in ((sys.argv[1], None), ("tester/stem", sys.argv[2])):
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=True)
    answers[source] = model(ids).logits, tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0])
(local, local_text), (remote, remote_text) = answers.values()
print(json.dumps({"equal": torch.equal(local, remote), "same text": local_text == remote_text, "text": remote_text,
                  "module": type(model).__module__}))
"""
    loaded = run_python(load, checkpoint, first["commit"], **hub.environment)
    assert loaded["equal"] and loaded["same text"] and len(loaded["text"].split()) > 3
    assert first["commit"] in loaded["module"]


def test_an_encoder_is_pushed_verified_and_loaded_by_its_id(
    checkpoints: dict[str, Path], run_python: Runner, hub: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["hfe_monarch_bert"], tmp_path / "encoder")
    script = (
        PUSH
        + """
result = {"push": attempt(push, folder, "tester/encoder"), "verified": attempt(verify, "tester/encoder")}
print(json.dumps(result))
"""
    )
    result = run_python(script, folder, package=True, **hub.environment)
    assert result["verified"]["ok"] and result["push"]["card"] == "written"
    card = ModelCard((folder / CARD).read_text())
    assert card.data.pipeline_tag == "fill-mask" and "AutoModelForMaskedLM" in card.text
    load = """
import json, torch
from transformers import AutoModelForMaskedLM
ids = torch.tensor([[1, 4, 7]])
both = [AutoModelForMaskedLM.from_pretrained(source, trust_remote_code=True).eval()(ids).logits
        for source in (sys.argv[1], "tester/encoder")]
print(json.dumps({"equal": torch.equal(*both)}))
"""
    assert run_python(load, folder, **hub.environment)["equal"]


def test_verification_reads_a_repository_without_its_weights(
    checkpoint: Path, run_python: Runner, hub: Any, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A changed byte and foreign files are named as in a folder; of the weights only the header is downloaded."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    hub.create("tester/stem", private=False)
    sound = hub.commit("tester/stem", "main", files)
    changed = files["modeling_stem.py"].replace(b"efficient = True", b"efficient = None")
    bad = {**files, "modeling_stem.py": changed, "evil/x.py": b"", "pytorch_model.bin": b"\x80\x04", "tool": b"\x7fELF"}
    bad["model.safetensors"] = files["model.safetensors"][:-4]
    hub.commit("tester/stem", "bad", bad)
    script = (
        PUSH
        + """
sizes = []
from hf_efficient.hub import repository
sizes = []
read_range = repository._read_range

def counted(url, start, stop, token):
    sizes.append((url, stop - start))
    return read_range(url, start, stop, token)

repository._read_range = counted
sound = sys.argv[2]
result = {name: attempt(verify, "tester/stem", revision=name) for name in (sound, "bad")}
result["weight bytes"] = sum(size for url, size in sizes if sound in url and url.endswith("model.safetensors"))
result["no revision"] = attempt(verify, "tester/stem", revision="nowhere")
result["no repository"] = attempt(verify, "tester/nothing")
result["forbidden"] = attempt(verify, "tester/stem", token="wrong-token")
print(json.dumps(result))
"""
    )
    result = run_python(script, checkpoint, sound, package=True, **hub.environment)
    assert result[sound]["ok"] and result[sound]["commit"] == sound
    header = int.from_bytes(files["model.safetensors"][:8], "little") + 8
    assert result["weight bytes"] == header + 8
    named = {finding["file"]: finding["problem"] for finding in result["bad"]["findings"]}
    assert sorted(named) == ["evil/x.py", "model.safetensors", "modeling_stem.py", "pytorch_model.bin", "tool"]
    assert "expected" in named["modeling_stem.py"] and "truncated" in named["model.safetensors"]
    assert "has no revision 'nowhere'" in result["no revision"]["error"]
    assert "there is no repository tester/nothing" in result["no repository"]["error"]
    assert "refused access" in result["forbidden"]["error"]


def test_a_push_replaces_what_an_earlier_one_left_or_changes_nothing(
    checkpoint: Path, run_python: Runner, hub: Any
) -> None:
    """Old code and weights would be foreign beside the new ones; other files stay. A refused push changes nothing."""
    hub.create("tester/old", private=True)
    old = {"hfe_old.py": b"", "model-1.safetensors": b"", "model.safetensors.index.json": b"{}", "picture.png": b"p"}
    hub.commit("tester/old", "main", old)
    hub.create("tester/public", private=False)
    hub.refuses_large_files.add("tester/full")
    script = (
        PUSH
        + """
import os
# The failed upload comes first: a large file that is stored already is not sent again.
result = {"failed": attempt(push, folder, "tester/full")}
result["old"] = attempt(push, folder, "tester/old")
result["public"] = attempt(push, folder, "tester/public")
result["allowed"] = attempt(push, folder, "tester/public", private=False)
result["forbidden"] = attempt(push, folder, "tester/new", token="wrong-token")
open(os.path.join(folder, "hfe_errors.py"), "w").close()
result["unverified"] = attempt(push, folder, "tester/new")
print(json.dumps(result))
"""
    )
    result = run_python(script, checkpoint, package=True, **hub.environment)
    assert "the upload to tester/full failed" in result["failed"]["error"] and "\n" not in result["failed"]["error"]
    assert hub.files("tester/full") == {".gitattributes": b""}
    files = hub.files("tester/old")
    assert files is not None and not set(old) - {"picture.png"} & set(files) and files["picture.png"] == b"p"
    assert "is public, and a private upload was asked for" in result["public"]["error"]
    assert result["allowed"]["private"] is False
    assert "refused access to tester/new (status 401)" in result["forbidden"]["error"]
    assert "code altered: hfe_errors.py" in result["unverified"]["error"]
    assert "tester/new" not in hub.commits


# Files of training, editors and the system that a push must not upload.
LEFT_OUT = [
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"),
    *(
        "trainer_state.json",
        "runs/today/events.out.tfevents.1",
        "logs/train.log",
        "wandb/run.json",
        "checkpoint-1/x.bin",
    ),
    *(
        ".env",
        ".netrc",
        ".ssh/id_ed25519",
        "id_rsa",
        "key.pem",
        "token",
        "token.txt",
        "secrets.json",
        "credentials.json",
    ),
    *(
        ".cache/huggingface/token",
        ".DS_Store",
        ".ipynb_checkpoints/x.json",
        "__pycache__/a.pyc",
        "notes.txt",
        "extra.py",
    ),
    *("pytorch_model.bin", "model.fp16.bin", "adapter_model.safetensors", "custom_generate/extra.py", "a.zip"),
    *(".git/config", ".gitignore", ".modeling_stem.py.partial"),
]


def test_only_files_of_the_model_are_uploaded(checkpoint: Path, run_python: Runner, hub: Any, tmp_path: Path) -> None:
    """By name, whatever lies beside them; a link in the place of the card is not followed."""
    secret = tmp_path / "secret"
    secret.write_text("hf_secret")
    local = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for name in LEFT_OUT:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("hf_secret")
    (checkpoint / CARD).symlink_to(secret)
    (checkpoint / "LICENSE").symlink_to(secret)
    script = PUSH + 'print(json.dumps([attempt(push, folder, "tester/stem"), attempt(verify, "tester/stem")]))'
    pushed, verified = run_python(script, checkpoint, package=True, **hub.environment)
    assert "error" not in pushed and verified["ok"], (pushed, verified["findings"])
    files = hub.files("tester/stem")
    assert files is not None and files.keys() == {*local, CARD, ".gitattributes"}
    assert not any(b"hf_secret" in data for data in files.values()) and secret.read_text() == "hf_secret"
    # Files of git and huggingface_hub are not listed.
    silent = {name for name in LEFT_OUT if name.startswith((".git", ".cache/huggingface/"))}
    assert {*LEFT_OUT, "LICENSE"} - silent <= set(pushed["left_out"])


def test_without_a_network_or_a_token_the_error_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HFEError, match="HF_HUB_OFFLINE is set"):
        push(checkpoint, "tester/stem", token="x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HFEError, match="cannot be reached for tester/stem"):
        push(checkpoint, "tester/stem", token="x")
    monkeypatch.setattr(repository, "get_token", lambda: None)
    with pytest.raises(HFEError, match=r"no Hub token; log in"):
        push(checkpoint, "tester/stem")
    assert not (checkpoint / CARD).exists()


def test_wrong_arguments_are_usage_errors(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'not/a/repo' is not a repository id"):
        push(checkpoint, "not/a/repo")
    with pytest.raises(UsageError, match="is not a folder"):
        push(tmp_path / "nothing", "tester/stem")


def test_a_checkpoint_that_fails_verification_is_not_pushed(checkpoint: Path) -> None:
    (checkpoint / "hfe_errors.py").write_text("")
    with pytest.raises(HFEError, match=r"did not pass verification, code altered: hfe_errors\.py"):
        push(checkpoint, "tester/stem", token="x")
    assert not (checkpoint / CARD).exists()
