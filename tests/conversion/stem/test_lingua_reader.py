"""Checkpoints that the STEM authors' training code writes: imported, they give the logits of the model that wrote them.

The model below is written from the formulas: interleaved rotary pairs, w1 for the gate, w2 down, w3 up, and tables that
stand beside the layers and are cut into columns on disk.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hf_efficient.conversion.stem.lingua_reader import feed_forward_width
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.inspection import inspect

VOCABULARY = 61
MODEL: dict[str, Any] = {
    **{"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": None, "ffn_dim_multiplier": 1.5},
    **{"multiple_of": 16, "norm_eps": 3e-5, "rope_theta": 5e3, "rope_scaling": None, "max_seqlen": 64},
    **{"vocab_size": VOCABULARY, "weight_tying": False, "sliding_window": None},
}
STEM = {**MODEL, "stem_layers": [1, 3], "stem_embedding_dim": 128}
QUIET: dict[str, Any] = {"progress": False, "evaluate": False}


class Reference:
    """The network that the section `model` of params.json describes, with random weights."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.model = model
        dim, head = model["dim"], model["head_dim"] or model["dim"] // model["n_heads"]
        heads, kv_heads = model["n_heads"], model["n_kv_heads"]
        width = feed_forward_width(dim, model["ffn_dim_multiplier"], model["multiple_of"])
        self.stem_layers = sorted(model.get("stem_layers") or [])

        def linear(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns) / columns**0.5

        self.p = {"tok_embeddings.weight": linear(VOCABULARY, dim), "norm.weight": 1 + linear(1, dim)[0]}
        if not model["weight_tying"]:
            self.p["output.weight"] = linear(VOCABULARY, dim)
        for i in range(model["n_layers"]):
            shapes = {
                **{"attention.wq": (heads * head, dim), "attention.wk": (kv_heads * head, dim)},
                **{"attention.wv": (kv_heads * head, dim), "attention.wo": (dim, heads * head)},
                **{"feed_forward.w1": (width, dim), "feed_forward.w2": (dim, width)},
                **({} if i in self.stem_layers else {"feed_forward.w3": (width, dim)}),
            }
            for name, shape in shapes.items():
                self.p[f"layers.{i}.{name}.weight"] = linear(*shape)
            for name in ("attention_norm", "ffn_norm"):
                self.p[f"layers.{i}.{name}.weight"] = 1 + linear(1, dim)[0]
        self.tables = [torch.randn(VOCABULARY, width) for _ in self.stem_layers]
        self.heads, self.kv_heads, self.head = heads, kv_heads, head

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model["norm_eps"]) * self.p[f"{name}.weight"]

    def turn(self, x: Tensor) -> Tensor:
        """Rotate neighbouring channels (2i, 2i + 1) of x [B, H, S, head] by position * theta^(-2i / head)."""
        frequency = self.model["rope_theta"] ** (-torch.arange(0, self.head, 2) / self.head)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones(x.shape[2], self.head // 2), torch.arange(x.shape[2])[:, None] * frequency
        )
        return torch.view_as_real(turned).flatten(-2)

    def attend(self, x: Tensor, layer: str) -> Tensor:
        q, k, v = (
            (x @ self.p[f"{layer}.attention.{name}.weight"].T).unflatten(-1, (heads, self.head)).transpose(1, 2)
            for name, heads in (("wq", self.heads), ("wk", self.kv_heads), ("wv", self.kv_heads))
        )
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (self.turn(k), v))
        scores = self.turn(q) @ k.mT / self.head**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(-2) @ self.p[f"{layer}.attention.wo.weight"].T

    def __call__(self, ids: Tensor) -> Tensor:
        h = self.p["tok_embeddings.weight"][ids]
        for i in range(self.model["n_layers"]):
            layer = f"layers.{i}"
            h = h + self.attend(self.norm(h, f"{layer}.attention_norm"), layer)
            x = self.norm(h, f"{layer}.ffn_norm")
            if i in self.stem_layers:
                up = self.tables[self.stem_layers.index(i)][ids]
            else:
                up = x @ self.p[f"{layer}.feed_forward.w3.weight"].T
            h = (
                h
                + (functional.silu(x @ self.p[f"{layer}.feed_forward.w1.weight"].T) * up)
                @ self.p[f"{layer}.feed_forward.w2.weight"].T
            )
        head = "tok_embeddings.weight" if self.model["weight_tying"] else "output.weight"
        return self.norm(h, "norm") @ self.p[head].T

    def save(self, folder: Path, shards: int = 2, name: str = "stem_model_mp{}.pt") -> Path:
        """Write one training step as the training code lays it out."""
        state = dict(self.p)
        if self.model["weight_tying"]:
            state["output.tied_module.weight"] = state["tok_embeddings.weight"]
        (folder / "consolidated").mkdir(parents=True)
        torch.save({"model": state, "optim": {"step": 3}}, folder / "consolidated" / "consolidated.pth")
        params = {"name": "a run", "model": self.model, "distributed": {"model_dtype": "bf16"}}
        for place in (folder, folder / "consolidated"):
            (place / "params.json").write_text(json.dumps(params))
        if self.stem_layers:
            (folder / "stem_shards").mkdir()
        for rank in range(shards if self.stem_layers else 0):
            part = {
                f"stem_embeddings.{j}.weight": table.chunk(shards, dim=1)[rank].clone()
                for j, table in enumerate(self.tables)
            }
            torch.save(part, folder / "stem_shards" / name.format(rank))
        return folder


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, 23))


def same_logits(reference: Reference, output: Path, ids: Tensor) -> bool:
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = model(ids).logits, reference(ids)
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("changes", "shards"),
    [
        ({}, 2),
        ({}, 12),  # of which mp10 and mp11 come after mp9, not after mp1
        ({"weight_tying": True}, 1),
        ({"n_kv_heads": 4, "head_dim": 12, "rope_theta": 5e5}, 4),
        ({"stem_layers": [3, 1], "ffn_dim_multiplier": None, "stem_embedding_dim": 96}, 2),
    ],
    ids=["plain", "twelve-shards", "tied", "heads", "unordered-layers"],
)
def test_logits_are_those_of_the_model_that_wrote_it(
    changes: dict[str, Any], shards: int, tmp_path: Path, ids: Tensor
) -> None:
    model = {**STEM, **changes}
    width = feed_forward_width(model["dim"], model["ffn_dim_multiplier"], model["multiple_of"])
    reference = Reference({**model, "multiple_of": 12 if shards == 12 else 16, "stem_embedding_dim": width})
    report = convert(reference.save(tmp_path / "step", shards), tmp_path / "out", **QUIET)
    assert report.model_type == "hfe_stem"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["stem_layers"] == [1, 3]
    assert same_logits(reference, tmp_path / "out", ids)


def test_columns_in_another_order_give_other_logits(tmp_path: Path, ids: Tensor) -> None:
    """Shows that the comparison above notices two exchanged shards."""
    reference = Reference(STEM)
    step = reference.save(tmp_path / "step", 2)
    one, two = (step / "stem_shards" / f"stem_model_mp{rank}.pt" for rank in (0, 1))
    spare = one.rename(tmp_path / "spare")
    two.rename(one)
    spare.rename(two)
    convert(step, tmp_path / "out", **QUIET)
    assert not same_logits(reference, tmp_path / "out", ids)


@pytest.mark.parametrize("default", [False, True])
def test_layers_that_are_not_named_are_all_but_the_first(default: bool, tmp_path: Path, ids: Tensor) -> None:
    reference = Reference({**STEM, "stem_layers": [1, 2, 3]})
    step = reference.save(tmp_path / "step")
    for place in (step, step / "consolidated"):
        params = json.loads((place / "params.json").read_text())
        params["model"]["stem_layers"] = None
        if default:
            del params["model"]["stem_layers"]
        (place / "params.json").write_text(json.dumps(params))
    convert(step, tmp_path / "out", **QUIET)
    assert same_logits(reference, tmp_path / "out", ids)


def test_a_dense_checkpoint_becomes_a_plain_decoder_and_may_be_patched(tmp_path: Path, ids: Tensor) -> None:
    reference = Reference(MODEL)
    report = convert(reference.save(tmp_path / "step"), tmp_path / "out", **QUIET)
    assert report.model_type == "hfe_decoder"
    assert same_logits(reference, tmp_path / "out", ids)


@pytest.mark.parametrize("place", ["consolidated", "flat"])
def test_the_consolidated_folder_may_be_named_or_hold_everything(place: str, tmp_path: Path, ids: Tensor) -> None:
    reference = Reference(STEM)
    step = reference.save(tmp_path / "step", name="stem_mp{}.pt")
    named = step / "consolidated"
    if place == "flat":
        shutil.move(step / "stem_shards", named / "stem_shards")
    assert inspect(str(named)).patch_fields == {"STEM layers": [1, 3]}
    convert(named, tmp_path / "out", **QUIET)
    assert same_logits(reference, tmp_path / "out", ids)


def test_wrapped_names_and_a_bare_state_are_understood(tmp_path: Path, ids: Tensor) -> None:
    reference = Reference(STEM)
    step = reference.save(tmp_path / "step")
    backbone = step / "consolidated" / "consolidated.pth"
    state = torch.load(backbone)["model"]
    torch.save({f"lm_transformer._orig_mod.{name}": tensor for name, tensor in state.items()}, backbone)
    convert(step, tmp_path / "out", **QUIET)
    assert same_logits(reference, tmp_path / "out", ids)


def test_a_stem_checkpoint_of_others_is_not_patched_again(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="STEM checkpoint already"):
        convert(Reference(STEM).save(tmp_path / "step"), tmp_path / "out", [Stem(layers=[2])], **QUIET)


def test_the_tokenizer_is_named_beside_the_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    """It comes into the result, with its special tokens; the text that measures the result is read with it."""
    step = Reference(STEM).save(tmp_path / "step")
    with pytest.raises(HFEError, match=r"step has no tokenizer that can be loaded.*pass a folder or Hub id"):
        convert(step, tmp_path / "out", progress=False)
    report = convert(step, tmp_path / "out", tokenizer=tiny_llama, **QUIET)
    assert report.options["tokenizer"] == tiny_llama.name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    with pytest.raises(UsageError, match="neither a folder nor a Hub id"):
        convert(step, tmp_path / "other", tokenizer="no/such/folder", **QUIET)


def test_without_a_tokenizer_the_result_has_none_and_says_so(tmp_path: Path) -> None:
    report = convert(Reference(STEM).save(tmp_path / "step"), tmp_path / "out", **QUIET)
    assert any("no tokenizer" in warning for warning in report.warnings)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("eos_token_id") is None


def _edit_model(**fields: Any) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        params = json.loads((step / "params.json").read_text())
        params["model"].update(fields)
        (step / "params.json").write_text(json.dumps(params))

    return damage


def _rewrite(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        torch.save(change(torch.load(step / name)), step / name)

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda step: (shutil.rmtree if (step / name).is_dir() else Path.unlink)(step / name)


class Anything:
    """An object that only a full unpickler would build."""


SHARD = "stem_shards/stem_model_mp{}.pt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("params.json"), r"step has no params\.json"),
        (lambda step: (step / "params.json").write_text('{"dim": 32}'), "no section `model`"),
        (_edit_model(dim=None), "dim=None"),
        (_edit_model(n_heads=None), "neither n_heads nor head_dim"),
        (_edit_model(stem_layers=[1, 2, 3]), r"3 STEM layers \(\[1, 2, 3\]\), the files have 2 tables"),
        (_edit_model(stem_layers="1,3"), "stem_layers='1,3', not a list of layers"),
        (_edit_model(multiple_of=40), "128 columns in 3 shard.* feed-forward of 160"),
        (_edit_model(dim=64), "columns in 3 shard"),
        (_edit_model(rope_scaling={"factor": 2.0}), r"rope_scaling to \{'factor': 2\.0\}"),
        (_edit_model(sliding_window=8), "sliding_window to 8"),
        (_remove(SHARD.format(1)), r"lacks stem_model_mp1\.pt.*2 file"),
        (_remove(SHARD.format(2)), r"columns in 2 shard\(s\)"),
        (_remove("stem_shards"), "2 STEM layers.*have 0 tables"),
        (
            _rewrite(SHARD.format(2), lambda part: {name: table[:-1] for name, table in part.items()}),
            r"61 rows in stem_model_mp0\.pt and 60 in stem_model_mp2\.pt",
        ),
        (_rewrite(SHARD.format(1), lambda part: dict(list(part.items())[:1])), r"stem_model_mp1\.pt has the tables"),
        (
            _rewrite(SHARD.format(0), lambda part: {"moments": next(iter(part.values()))}),
            "'moments', which is not a table",
        ),
        (_rewrite("consolidated/consolidated.pth", lambda state: {"optim": {}}), r"no tok_embeddings\.weight"),
        (_rewrite("consolidated/consolidated.pth", lambda state: [state]), "has a list"),
        (_remove("consolidated"), r"no consolidated\.pth"),
        (lambda step: (step / SHARD.format(0)).write_bytes(b"PK\3\4 torn"), r"stem_model_mp0\.pt cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    step = Reference({**STEM, "multiple_of": 128}).save(tmp_path / "step", 3)
    damage(step)
    with pytest.raises(HFEError, match=message) as error:
        convert(step, tmp_path / "out", **QUIET)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_pickle_with_more_than_tensors_is_not_opened(tmp_path: Path) -> None:
    step = Reference(STEM).save(tmp_path / "step")
    torch.save({"model": Anything()}, step / "consolidated" / "consolidated.pth")
    with pytest.raises(HFEError, match=r"consolidated\.pth is damaged or has more than tensors.*arbitrary code"):
        convert(step, tmp_path / "out", **QUIET)


def test_a_distributed_checkpoint_must_be_consolidated_by_its_owner(tmp_path: Path) -> None:
    """Its index is a plain pickle."""
    step = Reference(STEM).save(tmp_path / "step")
    shutil.rmtree(step / "consolidated")
    (step / "__0_0.distcp").write_bytes(b"")
    (step / ".metadata").write_bytes(pickle.dumps(Anything))
    with pytest.raises(HFEError, match="format_utils dcp_to_torch"):
        convert(step, tmp_path / "out", **QUIET)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    step = Reference(STEM).save(tmp_path / "step")
    path = step / SHARD.format(1)
    part = torch.load(path)
    part["stem_embeddings.1.weight"][3, 4] = torch.nan
    torch.save(part, path)
    with pytest.raises(HFEError, match=r"model\.layers\.3\.mlp\.stem_embed\.weight .*NaN"):
        convert(step, tmp_path / "out", **QUIET)


def test_the_width_of_a_feed_forward_follows_linguas_rule() -> None:
    """Llama-3.2-1B and MobileLLM-350M."""
    assert feed_forward_width(2048, 1.5, 256) == 8192
    assert feed_forward_width(960, None, 256) == 2560


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({3: torch.ones(2)}), "holds tensor 3"),
        (lambda state: state.update({"norm.weight": torch.ones(32).to_sparse()}), "norm.weight .* of layout"),
        (lambda state: state.update({"norm.weight": torch.empty(32, device="meta")}), "norm.weight .* on meta"),
        (lambda state: state.update({"norm.weight": torch.ones(1).expand(1 << 40)}), "not contiguous"),
        (lambda state: state.update({"module.norm.weight": torch.ones(32)}), "tensor norm.weight twice"),
        (
            lambda state: state.update({"tok_embeddings.weight": torch.ones(())}),
            "tok_embeddings.weight .* is not a matrix",
        ),
    ],
)
def test_invalid_tensors_are_refused(change: Callable[[dict[Any, Any]], Any], message: str, tmp_path: Path) -> None:
    step = Reference(MODEL).save(tmp_path / "step", 0)
    path = next(step.rglob("consolidated.pth"))
    content = torch.load(path)
    change(content.get("model", content))
    torch.save(content, path)
    with pytest.raises(HFEError, match=message):
        inspect(str(step))


@pytest.mark.parametrize(
    ("name", "value"),
    [("multiple_of", 0.5), ("n_heads", "4"), ("dim", 1 << 70), ("ffn_dim_multiplier", []), ("rope_theta", "a\nb")],
)
def test_values_of_params_that_are_no_numbers(name: str, value: Any, tmp_path: Path) -> None:
    step = Reference(MODEL).save(tmp_path / "step", 0)
    params = json.loads((step / "params.json").read_text())
    params["model"][name] = value
    (step / "params.json").write_text(json.dumps(params))
    with pytest.raises(HFEError, match=rf"params.json has {name}=") as error:
        inspect(str(step))
    assert "\n" not in str(error.value)
