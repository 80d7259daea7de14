"""Checkpoints that were exported here generate the stock model's tokens under every installed transformers release.

The running release is always tested. ``HFE_TEST_TRANSFORMERS`` names others, separated like the entries of ``PATH``:
Python executables of environments, or folders to be put first on the path (``pip install --target FOLDER
transformers==5.20.*``). None of them needs this package, and it cannot be imported there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.conversion.topology.patch import Multiverse
from hf_efficient.convert_checkpoint import convert
from hf_efficient.environment import TESTED_TRANSFORMERS

OTHERS = [named for named in os.environ.get("HFE_TEST_TRANSFORMERS", "").split(os.pathsep) if named]
# When the attention of layer 0 adds nothing, its up-projection depends on the token alone, and a table can hold it.
PATCHES: dict[str, Callable[[], list[Any]]] = {
    "decoder": lambda: [],
    "stem": lambda: [Stem(layers=[0])],
    "bhyt": lambda: [Bhyt()],
    "multiverse": lambda: [Multiverse()],
    "composed": lambda: [Stem(layers=[0]), Bhyt(), Multiverse()],
}
TABLE = "model.layers.0.mlp.stem_embed.weight"


def write_source(folder: Path) -> None:
    """A stock Llama whose best logit leads by a wide margin, with a byte-level tokenizer."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": len(alphabet), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False},
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter)) if "norm" in name else parameter.mul_(6)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder)


def fill_table(source: Path, folder: Path) -> None:
    """Write into the STEM table the rows for which layer 0 computes the same as the source's."""
    layer = LlamaForCausalLM.from_pretrained(source).model
    with torch.no_grad():
        rows = layer.layers[0].mlp.up_proj(layer.layers[0].post_attention_layernorm(layer.embed_tokens.weight))
    tensors = load_file(folder / "model.safetensors")
    tensors[TABLE] = torch.cat((rows, tensors[TABLE][len(rows) :]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source and the checkpoints converted from it, by name."""
    root = tmp_path_factory.mktemp("every-release")
    write_source(root / "source")
    for name, patches in PATCHES.items():
        convert(root / "source", root / name, patches(), evaluate=False, progress=False)
        if name in ("stem", "composed"):
            fill_table(root / "source", root / name)
    return {name: root / name for name in ("source", *PATCHES)}


SCRIPT = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
SETTINGS = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))
mask = torch.ones_like(ids)
mask[1, :5] = 0

def run(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    def new(**options):
        return model.generate(ids, attention_mask=mask, **SETTINGS, **options)[:, 12:].tolist()
    found = {
        "cache": new(),
        "no cache": new(use_cache=False),
        "static cache": new(cache_implementation="static", disable_compile=True),
        "beams": new(num_beams=3),
        "beams without cache": new(num_beams=3, use_cache=False),
        "prompt lookup": model.generate(ids[:1], **SETTINGS, prompt_lookup_num_tokens=3)[:, 12:].tolist(),
    }
    half = {**SETTINGS, "max_new_tokens": 20, "return_dict_in_generate": True}
    first = model.generate(ids[:1], **half)
    cache = getattr(first, "cache" if "cache" in first.keys() else "past_key_values")
    rest = model.generate(first.sequences, past_key_values=cache, **half)
    found["continued"] = rest.sequences[:, 12:].tolist()
    model.eval()
    with torch.no_grad():
        packed = torch.cat((torch.arange(7), torch.arange(5)))[None].expand(2, -1)
        found["packed"] = model(ids, position_ids=packed, use_cache=False).logits[..., :259]
    model.train()
    model.gradient_checkpointing_enable()
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    found["loss"] = loss.item()
    found["gradient"] = model.model.layers[1].self_attn.v_proj.weight.grad
    return found

stock, others = run(sys.argv[1]), sys.argv[2:]
result = {"transformers": transformers.__version__, "package": "hf_efficient.registry" in sys.modules, "found": {}}
for folder in others:
    ours = run(folder)
    for name in ("packed", "gradient"):
        ours[name] = ((ours[name] - stock[name]).norm() / stock[name].norm()).item()
    result["found"][folder] = ours
result["stock"] = {k: v for k, v in stock.items() if k not in ("packed", "gradient")}
print(json.dumps(result))
"""


@pytest.mark.parametrize("release", ["running", *OTHERS])
def test_every_release_generates_the_stock_models_tokens(
    release: str, folders: dict[str, Path], run_python: Callable[..., dict[str, Any]]
) -> None:
    if release == "running":
        found = run_python(SCRIPT, *folders.values())
    elif Path(release).is_dir():
        found = run_python(SCRIPT, *folders.values(), first=release)
    else:
        found = run_python(SCRIPT, *folders.values(), python=release)
    assert not found["package"]
    if release == "running":
        assert found["transformers"] == transformers.__version__
    stock = found["stock"]
    assert stock["no cache"] == stock["cache"] and len(set(stock["cache"][0])) > 10  # not one token repeated
    for name in PATCHES:
        ours = found["found"][str(folders[name])]
        for mode in ("cache", "no cache", "static cache"):
            assert ours[mode] == stock["cache"], (found["transformers"], name, mode)
        for mode in ("prompt lookup", "continued"):
            assert ours[mode] == stock["cache"][:1], (found["transformers"], name, mode)
        # BHyT is its source to below the rounding of bfloat16, the others to that of fp32.
        bound = 2**-8 if name in ("bhyt", "composed") else 1e-4
        assert ours["packed"] < bound, (found["transformers"], name, ours["packed"])
        assert ours["beams"] == ours["beams without cache"], (found["transformers"], name)
        if name in ("multiverse", "composed"):
            continue  # probabilities are shared with the control tokens
        assert ours["beams"] == stock["beams"], (found["transformers"], name)
        assert ours["loss"] == pytest.approx(stock["loss"], rel=bound), (found["transformers"], name)
        assert ours["gradient"] < bound, (found["transformers"], name, ours["gradient"])


UNTESTED = """
import json, logging, sys, transformers
from transformers import AutoModelForCausalLM
told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("hf_efficient").addHandler(handler)
transformers.__version__ = sys.argv[1]
error = ""
try:
    for folder in sys.argv[2:]:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ValueError as raised:
    error = str(raised)
print(json.dumps({"told": told, "error": error}))
"""


@pytest.mark.parametrize("version", ["5.16.0", "5.99.0"])
def test_a_checkpoint_s_own_code_tells_of_a_release_outside_of_the_tested_ones(
    version: str, checkpoints: dict[str, Path], run_python: Callable[..., dict[str, Any]]
) -> None:
    """Too old is an error; too new a warning, one for two checkpoints, each of which has code of its own."""
    oldest, newest = TESTED_TRANSFORMERS
    found = run_python(UNTESTED, version, checkpoints["hfe_stem"], checkpoints["hfe_decoder"])
    if version == "5.16.0":
        assert found == {
            "told": [],
            "error": f"transformers 5.16.0 is installed, and this code needs {oldest} or newer; "
            f"pip install 'transformers>={oldest}'",
        }
    else:
        assert found["error"] == "" and len(found["told"]) == 1
        assert f"5.99.0 is newer than what this code was tested with, {oldest} to {newest}" in found["told"][0]
