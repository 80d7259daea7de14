"""STEM whose tables accelerate keeps elsewhere, in memory or on disk: the same results as with the model whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_efficient.modeling.stem.stem_table import StemTable

LAYERS = ["model.layers.0", "model.layers.1", "model.layers.2"]
REST = dict.fromkeys(["model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"], "cpu")
PLACES = {
    "first table on disk": REST | dict(zip(LAYERS, ("disk", "cpu", "cpu"), strict=True)),
    "second table on disk": REST | dict(zip(LAYERS, ("cpu", "cpu", "disk"), strict=True)),
    "all layers on disk": REST | dict.fromkeys(LAYERS, "disk"),
    "all on disk": {"": "disk"},
    "embedding on disk": REST | dict.fromkeys(LAYERS, "cpu") | {"model.embed_tokens": "disk"},
}


@pytest.fixture(params=["hfe_stem", "hfe_decoder"])
def whole(request: pytest.FixtureRequest, tiny_model: Callable) -> PreTrainedModel:
    """STEM alone, and with sites of BHyT that estimate from the weights."""
    bhyt = {"bhyt_layers": [0, 1], "bhyt_seq_len": 16} if request.param == "hfe_decoder" else {}
    return tiny_model(request.param, stem_layers=[0, 2], **bhyt)


def offloaded(model: PreTrainedModel, folder: Path, **options: object) -> PreTrainedModel:
    model.save_pretrained(folder / "model")
    split = AutoModelForCausalLM.from_pretrained(folder / "model", offload_folder=folder / "off", **options).eval()
    assert any(p.is_meta for p in split.parameters())
    return split


@pytest.mark.parametrize("place", PLACES)
def test_offloaded_layers_give_the_same_logits_and_tokens(
    place: str, whole: PreTrainedModel, token_ids: Callable, tmp_path: Path
) -> None:
    ids, split = token_ids(2, 9), offloaded(whole, tmp_path, device_map=PLACES[place])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(split(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert torch.equal(
        split.generate(ids, max_new_tokens=6, do_sample=False), whole.generate(ids, max_new_tokens=6, do_sample=False)
    )


def test_an_automatic_map_that_runs_out_of_memory_offloads_tables(
    whole: PreTrainedModel, token_ids: Callable, tmp_path: Path
) -> None:
    ids = token_ids(2, 9)
    split = offloaded(whole, tmp_path, device_map="auto", max_memory={"cpu": "90KB"})
    tables = [m for m in split.modules() if isinstance(m, StemTable)]
    assert any(table.weight.is_meta for table in tables) and "disk" in split.hf_device_map.values()
    assert torch.equal(split(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_a_model_that_was_loaded_whole_is_offloaded_later(
    how: str, whole: PreTrainedModel, token_ids: Callable, tmp_path: Path
) -> None:
    ids = token_ids(2, 9)
    expected = whole(input_ids=ids).logits
    if how == "cpu":
        cpu_offload(whole, "cpu")
    else:
        disk_offload(whole, tmp_path, "cpu")
    assert all(p.is_meta for p in whole.parameters())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(whole(input_ids=ids).logits, expected)


def test_an_offloaded_model_is_saved_whole(whole: PreTrainedModel, token_ids: Callable, tmp_path: Path) -> None:
    ids, split = token_ids(2, 9), offloaded(whole, tmp_path, device_map=PLACES["all layers on disk"])
    split.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_sparse_tables_and_ids_beside_embeddings(token_ids: Callable, tiny_model: Callable, tmp_path: Path) -> None:
    ids, whole = token_ids(2, 9), tiny_model("hfe_stem", stem_sparse_grad=True, stem_inputs_embeds="match")
    split = offloaded(whole, tmp_path, device_map=PLACES["all layers on disk"] | {"model.embed_tokens": "disk"})
    expected = whole(input_ids=ids).logits
    embeds: Tensor = whole.get_input_embeddings()(ids).detach()
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds}, {"inputs_embeds": embeds, "stem_input_ids": ids}):
        assert torch.equal(split(**inputs).logits, expected)


def test_a_table_in_memory_is_trained_beside_one_on_disk(
    whole: PreTrainedModel, token_ids: Callable, tmp_path: Path
) -> None:
    """Layers above the offloaded one, as with stock models: autograd needs no weight of those below the trained."""
    ids, split = token_ids(2, 9), offloaded(whole, tmp_path, device_map=PLACES["first table on disk"])
    gradients = []
    for model in (whole, split):
        model.requires_grad_(False)
        table = model.model.layers[2].mlp.stem_embed
        table.weight.requires_grad_(True)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(table.weight.grad)
    torch.testing.assert_close(*gradients)
