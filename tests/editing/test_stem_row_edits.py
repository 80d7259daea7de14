"""Persistent edits: they apply wherever a token occurs, and are reverted bit for bit or refuse to be reverted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_efficient import stem_edit_rows, stem_inject, stem_load_edit, stem_override
from hf_efficient.editing.stem_edit_plan import StemEditPlan
from hf_efficient.editing.stem_row_edits import EditConflictError
from hf_efficient.errors import HFEError

S, T, OTHER = 11, 12, 13


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def stem(request: pytest.FixtureRequest, tiny_stem: Callable) -> PreTrainedModel:
    return tiny_stem().to(request.param)


def tables(model: PreTrainedModel) -> dict[int, Tensor]:
    return {i: model.model.layers[i].mlp.stem_embed.weight.detach() for i in model.config.stem_layers}


def copies(model: PreTrainedModel) -> dict[int, Tensor]:
    return {i: table.clone() for i, table in tables(model).items()}


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def only_differ_at(model: PreTrainedModel, before: dict[int, Tensor], tokens: list[int], layers: list[int]) -> bool:
    for layer, table in tables(model).items():
        differs = (table != before[layer]).any(1).nonzero().flatten().tolist()
        if differs != (sorted(tokens) if layer in layers else []):
            return False
    return True


def test_an_edit_gives_the_target_wherever_the_source_occurs(stem: PreTrainedModel, token_ids: Callable) -> None:
    ids = token_ids(2, 9)
    ids[0, 2] = ids[1, 5] = S
    others = torch.where(ids == S, T, ids)
    before, plain, expected = copies(stem), logits(stem, ids), logits(stem, ids, stem_input_ids=others)
    edit = stem_edit_rows(stem, {S: T})
    assert torch.equal(logits(stem, ids), expected) and not torch.equal(expected, plain)
    assert only_differ_at(stem, before, [S], [1, 2])
    elsewhere = torch.where(ids == S, OTHER, ids)
    edited_elsewhere = logits(stem, elsewhere)
    edit.revert()
    assert all(torch.equal(tables(stem)[i], table) for i, table in before.items())
    assert torch.equal(logits(stem, ids), plain) and torch.equal(logits(stem, elsewhere), edited_elsewhere)


def test_an_edit_acts_on_generated_tokens_too(stem: PreTrainedModel, token_ids: Callable) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = token_ids(1, 5)
    generated = int(stem.generate(ids, **settings)[0, 5])

    def by_hand(ids: Tensor) -> Tensor:
        for _ in range(8):
            token_inputs = torch.where(ids == generated, T, ids)
            ids = torch.cat((ids, logits(stem, ids, stem_input_ids=token_inputs)[:, -1:].argmax(-1)), 1)
        return ids

    expected = by_hand(ids)
    stem_edit_rows(stem, {generated: T})
    assert torch.equal(stem.generate(ids, **settings), expected)


def test_means_given_rows_layers_and_scale(stem: PreTrainedModel) -> None:
    before = copies(stem)
    dtype = before[1].dtype
    row = torch.randn(48)
    stem_edit_rows(stem, {S: [T, OTHER], T: row, 7: torch.stack((row, 2 * row))})
    for number, (layer, table) in enumerate(tables(stem).items(), start=1):
        mean = before[layer][[T, OTHER]].double().mean(0).to(dtype)
        assert torch.equal(table[S], mean), "the target's row as it was before the edit"
        assert torch.equal(table[T], row.to(dtype)) and torch.equal(table[7], (number * row).to(dtype))
    half = copies(stem)
    stem_edit_rows(stem, {OTHER: 20}, layers=[2], scale=0.25)
    assert only_differ_at(stem, half, [OTHER], [2])
    expected = 0.75 * half[2][OTHER].double() + 0.25 * half[2][20].double()
    torch.testing.assert_close(
        tables(stem)[2][OTHER], expected.to(dtype), rtol=1e-2 if dtype.itemsize < 4 else 1e-6, atol=1e-6
    )


def test_two_tokens_exchange_their_rows(stem: PreTrainedModel) -> None:
    before = copies(stem)
    stem_edit_rows(stem, {S: T, T: S})
    for layer, table in tables(stem).items():
        assert torch.equal(table[S], before[layer][T]) and torch.equal(table[T], before[layer][S])


@pytest.mark.parametrize("ids", [S, [S, T]])
def test_injection_adds_and_is_taken_back(stem: PreTrainedModel, ids: Any) -> None:
    before = copies(stem)
    tokens = [ids] if isinstance(ids, int) else ids
    deltas = torch.randn(2, len(tokens), 48)
    for given in (deltas[0, 0], deltas[0], deltas):
        edit = stem_inject(stem, ids, given)
        assert only_differ_at(stem, before, tokens, [1, 2])
        added = given.expand(2, len(tokens), 48)
        for delta, (layer, table) in zip(added, tables(stem).items(), strict=True):
            expected = (before[layer][tokens].double() + delta.double()).to(table.dtype)
            assert torch.equal(table[tokens], expected)
        edit.revert()
        assert all(torch.equal(tables(stem)[i], table) for i, table in before.items())


def test_an_edit_in_a_file_is_reverted_and_applied_by_another_process(
    stem: PreTrainedModel, token_ids: Callable, tmp_path: Path
) -> None:
    before = copies(stem)
    with torch.no_grad():  # bits that arithmetic would not keep
        tables(stem)[1][S, :2] = torch.tensor([float("nan"), -0.0])
    odd = tables(stem)[1][S].clone()
    edit = stem_edit_rows(stem, {S: T, 5: OTHER}, layers=[1])
    after = copies(stem)
    edit.save(tmp_path / "edit.safetensors")
    stem.save_pretrained(tmp_path / "edited")

    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    loaded = stem_load_edit(edited, tmp_path / "edit.safetensors")
    assert (loaded.ids, loaded.layers, loaded.table_rows) == ([S, 5], [1], 97)
    loaded.revert()
    assert torch.equal(tables(edited)[1][S].view(torch.uint8), odd.view(torch.uint8))
    assert torch.equal(tables(edited)[1][5], before[1][5])
    loaded.apply()
    assert all(torch.equal(tables(edited)[i], table) for i, table in after.items())
    with pytest.raises(EditConflictError, match=r"layer 1 has other rows at tokens \[11, 5\]"):
        loaded.apply()


def test_revert_notices_training_later_edits_and_itself(stem: PreTrainedModel, token_ids: Callable) -> None:
    first = stem_edit_rows(stem, {S: T, 20: 21})
    second = stem_edit_rows(stem, {S: OTHER})
    with pytest.raises(RuntimeError, match=r"layer 1 has other rows at tokens \[11\] than expected.*later edits"):
        first.revert()
    second.revert()
    first.revert()
    with pytest.raises(EditConflictError, match="other rows"):
        first.revert()
    third = stem_edit_rows(stem, {20: T})
    optimizer = torch.optim.SGD(stem.parameters(), lr=1.0)
    stem(input_ids=torch.tensor([[20, 30, 31]]), labels=torch.tensor([[20, 30, 31]])).loss.backward()
    optimizer.step()
    trained = copies(stem)
    with pytest.raises(EditConflictError, match=r"tokens \[20\]"):
        third.revert()
    assert all(torch.equal(tables(stem)[i], table) for i, table in trained.items()), "a refused revert changes nothing"


@pytest.mark.parametrize(
    "change", [lambda m: m.resize_token_embeddings(100), lambda m: m.half()], ids=["size", "dtype"]
)
def test_revert_notices_tables_that_were_resized_or_cast(stem: PreTrainedModel, change: Callable) -> None:
    edit = stem_edit_rows(stem, {S: T})
    change(stem)
    with pytest.raises(EditConflictError, match=r"the table of layer 1 is \[(97|100), 48\].*for the edit \[97, 48\]"):
        edit.revert()


def test_copies_of_changed_rows_are_forgotten(stem: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    refreshed = []
    monkeypatch.setattr(stem.model, "refresh_rows", lambda ids: refreshed.append(ids.tolist()))
    edit = stem_edit_rows(stem, {S: T, 20: 21})
    edit.revert()
    assert refreshed == [[S, 20], [S, 20]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: stem_edit_rows(m, {97: T}), r"token 97 is outside 0\.\.96"),
        (lambda m: stem_edit_rows(m, {S: -1}), r"token -1 is outside"),
        (lambda m: stem_edit_rows(m, {S: [T, 200]}), r"token 200 is outside"),
        (lambda m: stem_edit_rows(m, {"Spain": T}), "token 'Spain' is not an int"),
        (lambda m: stem_edit_rows(m, {True: T}), "token True is not an int"),
        (lambda m: stem_edit_rows(m, {S: None}), "token None is not an int"),
        (lambda m: stem_edit_rows(m, {}), "no token is named"),
        (lambda m: stem_edit_rows(m, {S: []}), "no token is named"),
        (lambda m: stem_edit_rows(m, {S: torch.zeros(47)}), r"row for token 11 is torch.float32 of shape \[47\]"),
        (lambda m: stem_edit_rows(m, {S: torch.zeros(48).long()}), "is torch.int64 of shape"),
        (
            lambda m: stem_edit_rows(m, {S: T}, layers=[0]),
            r"layers=\[0\] must be different ones of the STEM layers \[1, 2\]",
        ),
        (lambda m: stem_inject(m, [S, S], torch.zeros(48)), r"tokens \[11, 11\] must be different"),
        (lambda m: stem_inject(m, [S, T], torch.zeros(3, 48)), r"shape \[3, 48\].*\[\[48\], \[2, 48\], \[2, 2, 48\]\]"),
        (lambda m: stem_load_edit(m, "absent.safetensors"), "cannot read the edit absent.safetensors"),
    ],
)
def test_an_edit_that_cannot_be_is_refused(stem: PreTrainedModel, call: Callable, message: str) -> None:
    before = copies(stem)
    with pytest.raises(HFEError, match=message):
        call(stem)
    assert all(torch.equal(tables(stem)[i], table) for i, table in before.items())


def test_a_foreign_safetensors_file_is_refused(stem: PreTrainedModel, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(HFEError, match="model.safetensors is a safetensors file, but not a STEM edit"):
        stem_load_edit(stem, tmp_path / "model.safetensors")


def test_tables_of_another_kind_are_refused(stem: PreTrainedModel) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(stem.model.layers[2].mlp.stem_embed, "weight", Double())
    with pytest.raises(HFEError, match="the table of layer 2 is not an ordinary tensor"):
        stem_edit_rows(stem, {S: T})


def test_the_table_under_an_adapter_is_edited(tiny_stem: Callable) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_stem()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["stem_embed"]))
    table = adapted.get_base_model().model.layers[1].mlp.stem_embed.base_layer.weight
    before = table.detach().clone()
    edit = stem_edit_rows(adapted, {S: T})
    assert torch.equal(table[S], before[T])
    edit.revert()
    assert torch.equal(table, before)


def test_a_table_that_an_adapter_replaces_is_not_edited(tiny_stem: Callable) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_stem()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["stem_embed"]))
    with pytest.raises(HFEError, match="the table of layer 1 is replaced by 1 of an adapter"):
        stem_edit_rows(adapted, {S: T})
    merged = adapted.merge_and_unload()
    stem_edit_rows(merged, {S: T})
    assert torch.equal(tables(merged)[1][S], tables(merged)[1][T])


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_tables_on_the_host_are_edited_in_memory_and_not_in_their_files(
    tiny_stem: Callable, token_ids: Callable, tmp_path: Path, placement: str
) -> None:
    model = tiny_stem()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, stem_offload=placement)
    ids = token_ids(1, 9)
    ids[0, 4] = S
    plan = StemEditPlan((4,), (S,), ((T, OTHER),), "average", None, "source", "target", (T, OTHER))
    with stem_override(model, plan), stem_override(loaded, plan):
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    edit, _ = stem_edit_rows(loaded, {S: T}), stem_edit_rows(model, {S: T})
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert file.read_bytes() == content
    edit.revert()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(fresh, ids))


def test_a_model_with_the_code_of_its_own_folder_is_edited(
    tiny_stem: Callable, token_ids: Callable, tmp_path: Path, repository_root: Path
) -> None:
    import subprocess
    import sys

    from hf_efficient.hub.export import export

    model = tiny_stem()
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model")
    assert not [f.name for f in (tmp_path / "model").glob("*.py") if "edit" in f.name or "override" in f.name]
    ids = token_ids(1, 9)
    ids[0, 4] = S
    script = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
folder, expected = sys.argv[1:]
# Loaded before the package is imported, which would register its own class.
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
from hf_efficient import stem_edit_plan, stem_edit_rows, stem_override
from hf_efficient.modeling.stem.modeling_stem import StemForCausalLM
assert not isinstance(model, StemForCausalLM)
found = torch.load(expected)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
prompt = " ".join(f"w{i}" for i in found["ids"][0].tolist())
plan = stem_edit_plan(PreTrainedTokenizerFast(tokenizer_object=words), prompt, "w11", "w12 w13")
with torch.no_grad():
    with stem_override(model, plan):
        assert torch.equal(model(found["ids"]).logits, found["override"])
    edit = stem_edit_rows(model, {11: 12})
    assert torch.equal(model(found["ids"]).logits, found["edit"])
    edit.revert()
    assert torch.equal(model(found["ids"]).logits, found["plain"])
settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 2}
with stem_override(model, plan):
    assert torch.equal(model.generate(found["ids"], **settings), found["beams"])
model.train()
with stem_override(model, plan):
    model(found["ids"], labels=found["ids"]).loss.backward()
assert torch.equal(model.model.layers[1].mlp.stem_embed.weight.grad, found["gradient"])
print("edited")
"""
    plan = StemEditPlan((4,), (S,), ((T, OTHER),), "average", None, "w11", "w12 w13", (T, OTHER))
    expected = {"ids": ids, "plain": logits(model, ids)}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    with stem_override(model, plan):
        expected["override"] = logits(model, ids)
        expected["beams"] = model.generate(ids, **settings)
        model.train()(ids, labels=ids).loss.backward()
    expected["gradient"] = model.eval().model.layers[1].mlp.stem_embed.weight.grad
    stem_edit_rows(model, {S: T})
    torch.save(expected | {"edit": logits(model, ids)}, tmp_path / "expected.pt")
    command = [sys.executable, "-c", script, tmp_path / "model", tmp_path / "expected.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.strip() == "edited", done.stderr


def test_an_edit_without_its_metadata_is_refused(stem: PreTrainedModel, tmp_path: Path) -> None:
    stem_edit_rows(stem, {S: T}).save(tmp_path / "edit.safetensors")
    with safe_open(tmp_path / "edit.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for lacking in ("layers", "table_rows"):
        save_file(tensors, tmp_path / "lacking.safetensors", {k: v for k, v in metadata.items() if k != lacking})
        with pytest.raises(HFEError, match=f"cannot read the edit .*{lacking}"):
            stem_load_edit(stem, tmp_path / "lacking.safetensors")
