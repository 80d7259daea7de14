"""Transient overrides: which rows they replace, in forward calls and in every mode of `generate`, and what remains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_efficient import stem_edit_plan, stem_edit_rows, stem_override
from hf_efficient.editing.stem_edit_plan import StemEditPlan
from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder import graph_capture
from hf_efficient.modeling.decoder.decode_step import DecodeStep
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM
from hf_efficient.modeling.stem import modeling_stem

PROMPT = "the capital of spain is"
# Ids of the tokenizer's words.
SPAIN, GERMANY = 8, 9


@pytest.fixture(params=[[1, 2], [0, 1, 2]], ids=["layer-0-dense", "all-layers"])
def stem(request: pytest.FixtureRequest, tiny_stem: Callable) -> PreTrainedModel:
    model = tiny_stem(stem_layers=request.param)
    with torch.no_grad():  # rows that weigh as much as the embedding, so that an edit changes what is generated
        for layer in request.param:
            model.model.layers[layer].mlp.stem_embed.weight *= 5
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


@torch.no_grad()
def share_embeddings(model: PreTrainedModel, source: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Let the tokens of two entities differ in their table rows alone."""
    embedding = model.get_input_embeddings().weight
    for s, t in zip(source, target, strict=True):
        embedding[s] = embedding[t]


@torch.no_grad()
def expected_logits(model: PreTrainedModel, ids: Tensor, rows: dict[tuple[int, int, int], Tensor]) -> Tensor:
    """The definition: the table's output at (layer, row, column) is exchanged, by hooks."""
    handles = []
    for layer in model.config.stem_layers:
        mine = {(r, c): row for (of, r, c), row in rows.items() if of == layer}

        def exchange(module: Any, args: Any, output: Tensor, mine: dict = mine) -> Tensor:
            output = output.clone()
            for place, row in mine.items():
                output[place] = row
            return output

        handles.append(model.model.layers[layer].mlp.stem_embed.register_forward_hook(exchange))
    try:
        return model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()


def mean_rows(model: PreTrainedModel, tokens: tuple[int, ...]) -> dict[int, Tensor]:
    return {
        i: model.model.layers[i].mlp.stem_embed.weight.detach()[list(tokens)].mean(0) for i in model.config.stem_layers
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("other", ["germany", "isle of man"])
def test_override_of_all_layers_is_the_target_prompt(
    stem: PreTrainedModel, tokenizer: Any, ids_of: Callable, other: str, dtype: torch.dtype
) -> None:
    """Identity enters by the embedding and the tables alone; with equal embeddings the logits agree bit for bit."""
    source = {"germany": "spain", "isle of man": "united and republic"}[other]
    stem = stem.to(dtype)
    share_embeddings(stem, ids_of(source), ids_of(other))
    prompt = f"the capital of {source} is"
    ids, wanted = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, f"the capital of {other} is"))
    expected, before = logits(stem, wanted), logits(stem, ids)
    assert not torch.equal(before, expected)
    plan = stem_edit_plan(tokenizer, prompt, source, other)
    for model in (stem, stem.model):  # with and without a head
        with stem_override(model, plan):
            assert torch.equal(logits(stem, ids), expected)
    assert torch.equal(logits(stem, ids), before)


@pytest.mark.parametrize(
    ("source", "target", "mode"),
    [
        ("spain", "germany", "one_to_one"),
        ("united states of america", "czech republic", "left_pad"),
        ("united states of america", "czech republic", "right_pad"),
        ("united states of america", "isle of man", "copy"),
        ("czech republic", "isle of man", "subset"),
        ("spain", "isle of man", "average"),
        ("isle of man", "spain", "average"),
    ],
)
def test_each_mode_exchanges_just_its_rows(
    stem: PreTrainedModel, tokenizer: Any, source: str, target: str, mode: str
) -> None:
    prompt = f"the capital of {source} is"
    keep = [0, 2] if mode == "subset" else None
    plan = stem_edit_plan(tokenizer, prompt, source, target, mode, keep=keep)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    rows = {
        (layer, 0, position): row
        for position, tokens in zip(plan.positions, plan.replacements, strict=True)
        for layer, row in mean_rows(stem, tokens).items()
    }
    with stem_override(stem, plan):
        found = logits(stem, ids)
    torch.testing.assert_close(found, expected_logits(stem, ids, rows), rtol=0, atol=1e-5)
    assert (found - logits(stem, ids)).abs().max() > 1e-3


def test_every_layer_gets_the_override_and_nothing_else_changes(
    stem: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel is given: rows differ at the source position alone; ids and tables stay."""
    seen: list[Tensor] = []
    fused = modeling_stem.stem_gate

    def recording(gate: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        seen.append(F.embedding(slots, rows))
        return fused(gate, rows, slots)

    monkeypatch.setattr(modeling_stem, "stem_gate", recording)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    kept_ids, tables = ids.clone(), {name: p.clone() for name, p in stem.named_parameters()}
    logits(stem, ids)
    plain, seen[:] = list(seen), []
    with stem_override(stem, stem_edit_plan(tokenizer, PROMPT, "spain", "germany")):
        logits(stem, ids)
    assert len(seen) == len(plain) == len(stem.config.stem_layers)
    for before, after, layer in zip(plain, seen, stem.config.stem_layers, strict=True):
        differs = (before != after).any(-1)
        assert differs.tolist() == [[word == "spain" for word in ["<s>", *PROMPT.split()]]]
        assert torch.equal(after[0, 4], stem.model.layers[layer].mlp.stem_embed.weight[GERMANY])
    assert torch.equal(ids, kept_ids)
    assert all(torch.equal(p, tables[name]) for name, p in stem.named_parameters())


def test_only_the_named_layers_act(stem: PreTrainedModel, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    row = mean_rows(stem, (GERMANY,))[2]
    with stem_override(stem, stem_edit_plan(tokenizer, PROMPT, "spain", "germany", layers=[2])):
        found = logits(stem, ids)
    torch.testing.assert_close(found, expected_logits(stem, ids, {(2, 0, 4): row}), rtol=0, atol=1e-5)


def test_rows_of_a_batch_are_edited_each_by_its_plan_and_padding_shifts_it(
    stem: PreTrainedModel, tokenizer: Any
) -> None:
    prompts = ["spain is", "the capital of isle of man is", "the capital of spain is"]
    plans = [
        stem_edit_plan(tokenizer, prompts[0], "spain", "germany"),
        stem_edit_plan(tokenizer, prompts[2], "spain", "czech republic"),
    ]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    alone = []
    for prompt, plan in zip([prompts[0], prompts[2]], plans, strict=True):
        with stem_override(stem, plan):
            alone.append(stem.generate(**tokenizer(prompt, return_tensors="pt"), **settings))
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    plain = stem.generate(**batch, **settings)
    with stem_override(stem, plans, row=[0, 2]):
        together = stem.generate(**batch, **settings)
    for row, one in zip([0, 2], alone, strict=True):
        assert torch.equal(together.sequences[row, -5:], one.sequences[0, -5:])
        for found, expected in zip(together.logits, one.logits, strict=True):
            torch.testing.assert_close(found[row], expected[0], rtol=0, atol=1e-5)
        assert (together.logits[0][row] - plain.logits[0][row]).abs().max() > 1e-3
    assert all(torch.equal(found[1], before[1]) for found, before in zip(together.logits, plain.logits, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_positions", [True, False])
def test_logits_under_padding(stem: PreTrainedModel, tokenizer: Any, side: str, with_positions: bool) -> None:
    plan = stem_edit_plan(tokenizer, "spain is", "spain", "germany")
    batch = tokenizer(["spain is", PROMPT], return_tensors="pt", padding=True, padding_side=side)
    inputs = {"attention_mask": batch.attention_mask}
    if with_positions:
        inputs["position_ids"] = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    column = 1 + int(side == "left") * 3
    assert batch.input_ids[0, column] == SPAIN
    others = batch.input_ids.clone()
    others[0, column] = GERMANY
    with stem_override(stem, plan):
        found = logits(stem, batch.input_ids, **inputs)
    assert torch.equal(found, logits(stem, batch.input_ids, stem_input_ids=others, **inputs))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["cache", "no-cache", "static", "beams", "several-beams", "chunks", "prompt-lookup"],
)
def test_generation_edits_the_prompt_and_not_what_follows(
    stem: PreTrainedModel, tokenizer: Any, settings: dict[str, Any]
) -> None:
    """As if the tables were given other ids for the prompt; generated tokens look up their own rows."""
    one_prompt = "prompt_lookup_num_tokens" in settings
    prompts = [PROMPT] if one_prompt else ["the isle of man", PROMPT]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    row = len(prompts) - 1
    others = batch.input_ids.clone()
    others[row, 4] = GERMANY
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "disable_compile": True} | settings
    plain = stem.generate(**batch, **settings)
    # Other ids for the tables do not come in pieces; a prompt in pieces gives what the whole one does.
    whole = {name: value for name, value in settings.items() if name != "prefill_chunk_size"}
    expected = stem.generate(**batch, stem_input_ids=others, **whole)
    with stem_override(stem, stem_edit_plan(tokenizer, PROMPT, "spain", "germany"), row=row):
        found = stem.generate(**batch, **settings)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_own_steps_after_an_overridden_prompt(
    stem: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our decoding loop, whose step is captured on a GPU: overrides do not reach the step, persistent edits do."""
    batch = tokenizer(["the isle of man", PROMPT], return_tensors="pt", padding=True)
    plan = stem_edit_plan(tokenizer, PROMPT, "spain", "czech republic")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def tokens() -> list[Tensor]:
        found = [stem.generate(**batch, **settings)]
        with stem_override(stem, plan, row=1):
            found.append(stem.generate(**batch, **settings))
        edit = stem_edit_rows(stem, {int(found[0][0, -6]): GERMANY})
        found.append(stem.generate(**batch, **settings))
        edit.revert()
        return [*found, stem.generate(**batch, **settings)]

    expected = tokens()
    monkeypatch.setattr(graph_capture, "can_capture_on", lambda device: True)
    steps = []
    run = DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda *args: steps.append(1) or run(*args))
    for found, wanted in zip(tokens(), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(steps) == 4 * 5
    assert not any(torch.equal(expected[0], changed) for changed in expected[1:3])
    assert torch.equal(expected[0], expected[3])


def test_sampled_copies_of_a_prompt_are_edited_alike(stem: PreTrainedModel, tokenizer: Any) -> None:
    batch = tokenizer([PROMPT, PROMPT], return_tensors="pt")
    settings = {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": 2, "output_logits": True}
    with stem_override(stem, stem_edit_plan(tokenizer, PROMPT, "spain", "germany"), row=1):
        out = stem.generate(**batch, **settings, return_dict_in_generate=True).logits[0]
    assert torch.equal(out[0], out[1]) and torch.equal(out[2], out[3]) and not torch.equal(out[1], out[2])


def test_contexts_nest_and_the_inner_one_wins(stem: PreTrainedModel, tokenizer: Any, ids_of: Callable) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    outer, inner = (stem_edit_plan(tokenizer, PROMPT, "spain", target) for target in ("germany", "czech"))
    above = stem_edit_plan(tokenizer, PROMPT, "spain", "czech", layers=[2])
    elsewhere = stem_edit_plan(tokenizer, PROMPT, "capital", "republic")
    germany, czech = mean_rows(stem, ids_of("germany")), mean_rows(stem, ids_of("czech"))
    layers = stem.config.stem_layers
    mixed = expected_logits(stem, ids, {(i, 0, 4): (czech if i == 2 else germany)[i] for i in layers})
    republic = {(i, 0, 2): row for i, row in mean_rows(stem, ids_of("republic")).items()}
    both = expected_logits(stem, ids, {(i, 0, 4): germany[i] for i in layers} | republic)
    with stem_override(stem, inner):
        only_inner = logits(stem, ids)
    with stem_override(stem, outer):
        first = logits(stem, ids)
        assert not torch.equal(first, only_inner)
        with stem_override(stem, inner):
            assert torch.equal(logits(stem, ids), only_inner)
        with stem_override(stem, above):
            torch.testing.assert_close(logits(stem, ids), mixed, rtol=0, atol=1e-5)
        with stem_override(stem, elsewhere):
            torch.testing.assert_close(logits(stem, ids), both, rtol=0, atol=1e-5)
        assert torch.equal(logits(stem, ids), first)


def test_nothing_remains_after_an_exception(stem: PreTrainedModel, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    before = logits(stem, ids)
    plan = stem_edit_plan(tokenizer, PROMPT, "spain", "germany")
    with pytest.raises(KeyError), stem_override(stem, plan):
        raise KeyError
    with pytest.raises(HFEError), stem_override(stem, plan):
        logits(stem, ids.flip(1))
    assert torch.equal(logits(stem, ids), before)
    assert stem.model.row_provider is None


def test_prompts_without_the_entity_are_refused_by_position_and_unchanged_by_row(
    stem: PreTrainedModel, tokenizer: Any
) -> None:
    plan = stem_edit_plan(tokenizer, PROMPT, "spain", "germany")
    other = tokenizer("the capital of isle is", return_tensors="pt").input_ids
    message = "row 0 has token 16 at position 4.*'spain' by 'germany' expects 8"
    with pytest.raises(HFEError, match=message), stem_override(stem, plan):
        logits(stem, other)
    batch = tokenizer([PROMPT, "the capital of isle is"], return_tensors="pt").input_ids
    before = logits(stem, batch)
    with stem_override(stem, plan):
        after = logits(stem, batch)
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
    assert torch.equal(after[0, :4], before[0, :4]), "positions before the entity cannot know of it"


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({"layers": (1, 7)}, None, r"layers=\[1, 7\] must be different ones of the STEM layers \[(0, )?1, 2\]"),
        ({"layers": ()}, None, r"layers=\[\] must be"),
        ({"replacements": ((97,),)}, None, "token 97 is outside 0..96"),
        ({}, [0, 1], r"row=\[0, 1\] does not name a row for each of 1 plans"),
        ({}, -1, "row=-1 does not name a row"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    stem: PreTrainedModel, changes: dict[str, Any], row: Any, message: str
) -> None:
    fields = {"positions": (4,), "source_ids": (8,), "replacements": ((9,),), "mode": "one_to_one", "layers": None}
    plan = StemEditPlan(**fields | {"source": "spain", "target": "germany", "target_ids": (9,)} | changes)
    with pytest.raises(HFEError, match=message), stem_override(stem, plan, row):
        pass


def test_a_row_that_the_batch_lacks_is_refused(stem: PreTrainedModel, tokenizer: Any) -> None:
    plan = stem_edit_plan(tokenizer, PROMPT, "spain", "germany")
    batch = tokenizer([PROMPT, PROMPT], return_tensors="pt")
    with pytest.raises(HFEError, match="names row 2, the batch has 2"), stem_override(stem, plan, row=2):
        stem(**batch)
    with pytest.raises(HFEError, match="names row 2, the batch has"), stem_override(stem, plan, row=2):
        stem.generate(**batch, num_beams=2, max_new_tokens=2)


def test_an_override_without_a_matching_call_warns(
    stem: PreTrainedModel, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plan = stem_edit_plan(tokenizer, PROMPT, "spain", "germany")
    with caplog.at_level(logging.WARNING, "hf_efficient"), stem_override(stem, plan):
        logits(stem, tokenizer("the", return_tensors="pt").input_ids)
    assert "no call contained positions [4] of row 0, so 'spain' was not replaced" in caplog.text


def test_a_model_without_tables_is_refused(tokenizer: Any) -> None:
    shape = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    plan = stem_edit_plan(tokenizer, PROMPT, "spain", "germany")
    for model, message in (
        (EfficientDecoderForCausalLM(EfficientDecoderConfig(**shape, num_hidden_layers=1)), "no STEM layers"),
        (LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1)), "LlamaForCausalLM is not a STEM model"),
    ):
        with pytest.raises(HFEError, match=message):
            stem_edit_rows(model, {3: 4})
        with pytest.raises(HFEError, match=message), stem_override(model, plan):
            pass


def test_compiled_prompts_are_refused(stem: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled graph would keep the override, or miss it."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plan = stem_edit_plan(tokenizer, PROMPT, "spain", "germany")
    with pytest.raises(HFEError, match="works in eager calls only"), stem_override(stem, plan):
        stem.model.prepare_token_inputs(ids, None, None, None, {})


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_reach_the_replacing_rows(tiny_stem: Callable, tokenizer: Any, sparse: bool) -> None:
    """The target's row learns from the edited position, the source's does not; as if the ids were the target's."""
    model = tiny_stem(stem_sparse_grad=sparse)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    others = ids.clone()
    others[0, 4] = GERMANY
    found = []
    for override in (True, False):
        model.zero_grad()
        if override:
            with stem_override(model, stem_edit_plan(tokenizer, PROMPT, "spain", "germany")):
                model(input_ids=ids, labels=ids).loss.backward()
        else:
            model(input_ids=ids, labels=ids, stem_input_ids=others).loss.backward()
        gradient = model.model.layers[1].mlp.stem_embed.weight.grad
        assert gradient.is_sparse == sparse
        found.append(gradient.to_dense() if sparse else gradient)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert found[0][SPAIN].abs().max() == 0 and found[0][GERMANY].abs().max() > 0


def test_adapters_around_the_table_apply_to_the_replacing_rows(tiny_stem: Callable, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_stem()
    config = peft.LoraConfig(r=4, target_modules=["stem_embed"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    others = ids.clone()
    others[0, 4] = GERMANY
    expected, plain = logits(adapted, ids, stem_input_ids=others), logits(adapted, ids)
    with stem_override(adapted, stem_edit_plan(tokenizer, PROMPT, "spain", "germany")):
        torch.testing.assert_close(logits(adapted, ids), expected, rtol=0, atol=1e-6)
    assert not torch.equal(expected, plain)
