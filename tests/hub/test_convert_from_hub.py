"""A Hub repository as a source: only the files needed are downloaded, at the given revision, and errors are clear."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}

_CONVERT = """
import json, sys
from pathlib import Path
from huggingface_hub.constants import HF_HUB_CACHE
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError
results = []
for arguments in json.loads(sys.argv[1]):
    try:
        report = convert(evaluate=False, progress=False, **arguments)
        results.append(report.source)
    except HFEError as error:
        results.append([error.exit_code, str(error)])
fetched = sorted({path.name for path in Path(HF_HUB_CACHE).glob("models--*/snapshots/*/*")})
print(json.dumps({"results": results, "fetched": fetched}))
"""


@pytest.fixture
def stock_files(tmp_path: Path) -> Callable[[int, str], dict[str, bytes]]:
    """Files of a tiny stock checkpoint, by seed and shard size."""

    def make(seed: int, max_shard_size: str = "5GB") -> dict[str, bytes]:
        torch.manual_seed(seed)
        folder = tmp_path / f"stock{seed}{max_shard_size}"
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder, max_shard_size=max_shard_size)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return make


def test_a_repository_is_converted(
    hub: Any, run_python: Callable[..., Any], tmp_path: Path, stock_files: Callable[..., dict[str, bytes]]
) -> None:
    card = b"---\nlicense: apache-2.0\nbase_model: maker/parent\n---\n# Small\n"
    other = {"consolidated.safetensors": b"twice", "pytorch_model.bin": b"pickle", "README.md": card}
    hub.create("maker/small", private=False)
    first = hub.commit("maker/small", "main", {**stock_files(0, "20KB"), **other})
    second = hub.commit("maker/small", "main", {**stock_files(1), **other})
    hub.create("maker/pickled", private=False)
    hub.commit("maker/pickled", "main", {"config.json": stock_files(0)["config.json"], "pytorch_model.bin": b"x"})

    def convert(name: str, source: str = "maker/small", **options: Any) -> dict[str, Any]:
        return {"source": source, "output": str(tmp_path / name), **options}

    jobs = [
        convert("old", revision=first),
        convert("new"),
        convert("wrong-revision", revision="nowhere"),
        convert("absent", source="maker/absent"),
        convert("pickled", source="maker/pickled"),
    ]
    done = run_python(_CONVERT, json.dumps(jobs), package=True, **hub.environment)
    old, new, wrong_revision, absent, pickled = done["results"]
    assert (old["base_model"], old["license"], old["revision"]) == ("maker/small", "apache-2.0", first)
    assert (new["name"], new["revision"]) == ("maker/small", second)
    assert wrong_revision == [1, "the repository maker/small has no revision 'nowhere'; check --revision"]
    assert absent[0] == 1 and "no local folder maker/absent and no Hub repository of that name" in absent[1]
    assert pickled[0] == 1 and "maker/pickled holds its weights as pickle (pytorch_model.bin)" in pickled[1]
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(done["fetched"])
    assert [job["output"] for job in jobs if Path(job["output"]).exists()] == [
        str(tmp_path / n) for n in ("old", "new")
    ]
    for name, seed in (("old", 0), ("new", 1)):
        torch.manual_seed(seed)
        stock = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
        ids = torch.arange(9)[None]
        with torch.no_grad():
            converted = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
            assert (converted(ids).logits - stock(ids).logits).abs().max() <= 1e-5


def test_an_unreachable_hub_is_one_clear_line(run_python: Callable[..., Any], tmp_path: Path) -> None:
    job = {"source": "maker/small", "output": str(tmp_path / "out")}
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for environment in (unreachable, {"HF_HUB_OFFLINE": "1"}):
        done = run_python(_CONVERT, json.dumps([job]), package=True, **environment)
        ((status, message),) = done["results"]
        assert status == 1 and "\n" not in message
        assert "there is no local folder maker/small, the Hub cannot be reached" in message
    assert not (tmp_path / "out").exists()
