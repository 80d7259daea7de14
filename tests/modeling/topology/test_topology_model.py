"""The models and the attention implementation: configuration, traps of transformers, errors, training, files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.medverse.modeling_medverse import MedVerseConfig
from hf_efficient.modeling.multiverse.modeling_multiverse import MultiverseConfig, MultiverseForCausalLM
from hf_efficient.modeling.topology.attention.topology_interface import TOPOLOGY_ATTENTION
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask, TopologyQueries, dense_mask
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS
from hf_efficient.modeling.topology.grammar.topology import Topology

OURS = ["hfe_multiverse", "hfe_medverse", "hfe_decoder"]
IDS = {tag: 20 + i for i, tag in enumerate(CONTROL_TOKENS["multiverse"])}


def inputs(branching: tuple[Topology, Tensor], **changes: Any) -> dict[str, Any]:
    """What a collator gives for one row, a branching text."""
    topology, ids = branching
    batch = Topology.stack([topology])
    return {"input_ids": ids, "use_cache": False, **batch._asdict(), **changes}


@torch.no_grad()
def run(model: Any, arguments: dict[str, Any]) -> Tensor:
    return model(**arguments).logits


def stock_llama() -> Any:
    torch.manual_seed(1)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


# Configuration


def test_what_the_field_leaves_out_has_its_default() -> None:
    expected = {
        "grammar": "medverse",
        "mode": "dag",
        "token_ids": {},
        "trained": False,
        "separator": "\n",
        "version": 1,
    }
    assert MedVerseConfig().topology == expected and MedVerseConfig().active_patches == ["medverse"]
    config = MultiverseConfig(topology={"token_ids": IDS, "trained": True})
    assert config.topology == {**expected, "grammar": "multiverse", "token_ids": IDS, "trained": True}
    assert MultiverseConfig(**config.to_dict()).topology == config.topology
    assert EfficientDecoderConfig().topology is None and EfficientDecoderConfig().active_patches == []
    assert EfficientDecoderConfig(topology={"grammar": "multiverse"}).active_patches == ["multiverse"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topology": {"colour": 1}}, "unknown keys.*'colour'"),
        ({"topology": {"grammar": "medverse"}}, r"'grammar'\]='medverse' must be one of \['multiverse'\]"),
        ({"topology": {"mode": "tree"}}, "'tree' must be one of.*'dag', 'layers', 'flat'"),
        ({"topology": {"version": 2}}, "'version'"),
        ({"topology": {"trained": "yes"}}, "'trained'"),
        ({"topology": {"separator": "and"}}, "'and' must be white space"),
        ({"topology": {"token_ids": {"<Path>": 5}}}, "12 control tokens; it differs in"),
        ({"topology": {"token_ids": {**IDS, "<Path>": 97}}}, "<Path>'.*97 must be an id below vocab_size=97"),
        ({"topology": {"token_ids": {**IDS, "<Path>": -1}}}, "-1 must be an id"),
        ({"topology": {"token_ids": {**IDS, "<Path>": "5"}}}, "'5' must be an id"),
        ({"topology": {"token_ids": {**IDS, "<Path>": 20}}}, "gives two tags one id"),
        ({"sliding_window": 8}, "sliding_attention.*full_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises((StrictDataclassError, ValueError), match=message):
        MultiverseConfig(vocab_size=97, **fields)


def test_a_window_and_dynamic_frequencies_are_refused_only_with_a_topology() -> None:
    assert EfficientDecoderConfig(sliding_window=8).topology is None
    with pytest.raises(Exception, match="sliding_attention"):
        EfficientDecoderConfig(sliding_window=8, topology={"grammar": "multiverse"})
    # A window that no layer uses is none.
    MultiverseConfig(sliding_window=8, layer_types=["full_attention"] * 32)


def test_the_default_attention_is_topology_attention(tiny_config: Callable, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("hfe_multiverse"))
    assert model.config._attn_implementation == TOPOLOGY_ATTENTION
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == TOPOLOGY_ATTENTION
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert other.config._attn_implementation == "sdpa"
    plain = AutoModelForCausalLM.from_config(tiny_config("hfe_decoder"))
    assert plain.config._attn_implementation == "hfe_decode"
    both = AutoModelForCausalLM.from_config(tiny_config("hfe_decoder", topology={"grammar": "medverse"}))
    assert both.config._attn_implementation == TOPOLOGY_ATTENTION


# Traps


@pytest.mark.parametrize("attention", [TOPOLOGY_ATTENTION, "sdpa", "eager", "hfe_decode"])
@pytest.mark.parametrize("ours", OURS)
def test_jumps_in_positions_are_not_taken_for_packed_sequences(
    ours: str, attention: str, tiny_model: Callable, branching: tuple[Topology, Tensor]
) -> None:
    """Without cache and mask transformers reads them so; stock attention shows it, and that it changes the logits."""
    model = tiny_model(ours)
    model.set_attn_implementation("sdpa")
    topology = branching[0]
    mask = {"full_attention": dense_mask(topology.to_mask())}
    positions = torch.from_numpy(topology.position_ids)[None]
    expected = model(branching[1], position_ids=positions, attention_mask=mask, use_cache=False).logits
    trapped = model(branching[1], position_ids=positions, use_cache=False).logits
    assert (trapped - expected).abs().max() > 0.1
    model.set_attn_implementation(attention)
    found = run(model, inputs(branching))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # And the same with a cache, where nothing is a trap.
    assert (run(model, inputs(branching, use_cache=True)) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_stock_model_does_not_fall_into_the_trap_either(branching: tuple[Topology, Tensor]) -> None:
    model, (topology, ids) = stock_llama(), branching
    positions = torch.from_numpy(topology.position_ids)[None]
    expected = run(
        model, {"input_ids": ids, "position_ids": positions, "attention_mask": dense_mask(topology.to_mask())}
    )
    model.set_attn_implementation("hfe_topology")
    for use_cache in (False, True):
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "topology": topology.to_mask(),
            "use_cache": use_cache,
        }
        torch.testing.assert_close(run(model, arguments), expected, rtol=1e-5, atol=1e-5)


def test_eager_attention_gets_no_boolean_mask(tiny_model: Callable, branching: tuple[Topology, Tensor]) -> None:
    """It would be added to the scores, and be wrong in silence."""
    model, seen = tiny_model("hfe_multiverse"), []
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    run(model, inputs(branching))
    assert len(seen) == 3 and all(mask.dtype == torch.float32 and mask.min() < -1e30 for mask in seen)
    assert seen[0] is seen[1] is seen[2]  # made once a call


def test_padding_is_honoured_without_a_topology(branching: tuple[Topology, Tensor]) -> None:
    """An attention implementation without a registered mask function would get no mask."""
    ids = branching[1][:, :9]
    for model in (stock_llama(), MultiverseForCausalLM(MultiverseConfig(**_small())).eval()):
        model.set_attn_implementation("hfe_topology")
        padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
        mask = (torch.arange(13) >= 4).long()[None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = run(model, {"input_ids": padded, "attention_mask": mask, "position_ids": positions})
        torch.testing.assert_close(found[:, 4:], run(model, {"input_ids": ids}), rtol=1e-5, atol=1e-5)


def test_plain_text_is_the_plain_decoder(tiny_model: Callable, token_ids: Callable) -> None:
    model, ids = tiny_model("hfe_multiverse"), token_ids(2, 9)
    plain = run(model, {"input_ids": ids})
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    tokens = model.generate(ids, **settings)
    model.set_attn_implementation("sdpa")
    assert torch.equal(run(model, {"input_ids": ids}), plain) and torch.equal(model.generate(ids, **settings), tokens)


def test_a_padding_mask_with_a_topology_makes_holes(tiny_model: Callable, branching: tuple[Topology, Tensor]) -> None:
    """The collator's own padding says so already; a mask that hides more is not ignored."""
    model = tiny_model("hfe_multiverse")
    mask = torch.ones_like(branching[1])
    assert torch.equal(run(model, inputs(branching, attention_mask=mask)), run(model, inputs(branching)))
    mask[0, 2] = 0
    holed = inputs(branching)
    holed["segment_ids"][0, 2] = -1
    found, expected = run(model, inputs(branching, attention_mask=mask)), run(model, holed)
    assert torch.equal(found, expected) and not torch.equal(found, run(model, inputs(branching)))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_visibility": None}, "both segment_ids and segment_visibility"),
        (
            {"topology": TopologyMask(torch.zeros(1, 23, dtype=torch.int32), torch.ones(1, 1, 1).long())},
            "both segment_ids",
        ),
        ({"position_ids": None}, "without position_ids"),
        ({"segment_ids": torch.zeros(1, 22, dtype=torch.int32)}, r"shape \[1, 22\].*shape \[1, 23\]"),
        ({"segment_ids": torch.zeros(2, 23, dtype=torch.int32)}, r"shape \[2, 23\].*shape \[1, 23\]"),
        ({"segment_ids": torch.zeros(1, 23)}, "segment_ids.*int32"),
        ({"segment_ids": torch.zeros(1, 23, dtype=torch.long)}, "segment_ids.*int32"),
        (
            {"segment_ids": torch.full((1, 23), 7, dtype=torch.int32)},
            "contains segment 7, and segment_visibility has 7",
        ),
        ({"segment_visibility": torch.zeros(1, 7, 1)}, "segment_visibility.*int64"),
        ({"segment_visibility": torch.zeros(1, 7, dtype=torch.long)}, r"\[B, N, W\]"),
        ({"segment_visibility": torch.zeros(2, 7, 1, dtype=torch.long)}, "segment_visibility"),
        ({"attention_mask": torch.ones(1, 1, 23, 23, dtype=torch.bool)}, "attention mask.*with a topology"),
        ({"attention_mask": torch.ones(1, 22, dtype=torch.long)}, "attention mask.*with a topology"),
        ({"output_attentions": True}, "output_attentions.*eager"),
    ],
)
def test_a_topology_that_does_not_fit_the_call_is_named(
    changes: dict[str, Any], message: str, tiny_model: Callable, branching: tuple[Topology, Tensor]
) -> None:
    with pytest.raises(HFEError, match=message):
        run(tiny_model("hfe_multiverse"), inputs(branching, **changes))


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_what_is_not_yet_a_mask_is_refused(kind: str, tiny_model: Callable, branching: tuple[Topology, Tensor]) -> None:
    topology, ids = branching
    model = tiny_model("hfe_multiverse") if kind == "ours" else stock_llama()
    model.set_attn_implementation(TOPOLOGY_ATTENTION)
    for given in (topology, Topology.stack([topology])):
        with pytest.raises(UsageError, match=f"as topology, got {type(given).__name__};.*to_mask"):
            model(ids, position_ids=Topology.stack([topology]).position_ids, topology=given, use_cache=False)


def test_other_attentions_and_dropout_are_refused(tiny_model: Callable, branching: tuple[Topology, Tensor]) -> None:
    model = tiny_model("hfe_multiverse", attention_dropout=0.1).train()
    with pytest.raises(HFEError, match="attention dropout is 0.1"):
        model(**inputs(branching))
    model.eval()
    assert run(model, inputs(branching)).isfinite().all()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(HFEError, match="'flash_attention_2' cannot compute.*'hfe_topology', 'sdpa'"):
        model(**inputs(branching))


def test_a_whole_text_does_not_follow_a_cache(tiny_model: Callable, branching: tuple[Topology, Tensor]) -> None:
    model, (_, ids) = tiny_model("hfe_multiverse"), branching
    cache = model(ids[:, :4]).past_key_values
    with pytest.raises(HFEError, match="has 23 tokens, with 23 queries and 27 keys"):
        model(**inputs(branching, past_key_values=cache, use_cache=True))
    with pytest.raises(HFEError, match="inference"):
        cache_position = torch.arange(4, 8, dtype=torch.int32)[None]
        queries = TopologyQueries(
            cache_position,
            torch.tensor([8], dtype=torch.int32),
            torch.zeros(1, 8, dtype=torch.int32),
            torch.ones(1, 4, 1, dtype=torch.long),
        )
        model(ids[:, :4], position_ids=cache_position.long(), topology=queries, past_key_values=cache)


def test_a_stock_model_with_a_window_is_refused(branching: tuple[Topology, Tensor]) -> None:
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = MistralForCausalLM(MistralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, sliding_window=6))
    model.set_attn_implementation("hfe_topology")
    topology, ids = branching
    with pytest.raises(HFEError, match="MistralAttention.*sliding_window=6"):
        model.eval()(ids, position_ids=torch.from_numpy(topology.position_ids)[None], topology=topology.to_mask())


def test_positions_beyond_the_model_give_a_warning(
    tiny_model: Callable, branching: tuple[Topology, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = inputs(branching)
    arguments["position_ids"] = arguments["position_ids"] + 60
    logger = logging.getLogger("hf_efficient")
    logger.addHandler(caplog.handler)
    try:
        run(tiny_model("hfe_multiverse"), arguments)
    finally:
        logger.removeHandler(caplog.handler)
    assert "beyond max_position_embeddings=64" in caplog.text


def test_an_error_says_where(toy: Callable) -> None:
    with pytest.raises(TopologyError, match="^row 2, token 1 </Path>: no path is open; open it with <Path>$"):
        toy("multiverse").parse("a</Path>", row=2)
    assert isinstance(TopologyError("x"), ValueError) and str(TopologyError("x", "y")) == "x; y"


# Training


@pytest.mark.parametrize("ours", OURS)
def test_a_training_step_is_that_of_the_dense_mask(
    ours: str, tiny_model: Callable, branching: tuple[Topology, Tensor]
) -> None:
    """Checkpointed or not, compiled or not."""

    def step(attention: str, checkpointed: bool = False, compiled: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        model = tiny_model(ours).train()
        model.set_attn_implementation(attention)
        if checkpointed:
            model.gradient_checkpointing_enable()
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        arguments = inputs(branching, labels=branching[1])
        if checkpointed:
            arguments.pop("use_cache")  # it is switched off, which is when transformers looks for packed sequences
        loss = call(**arguments).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, gradients = step("sdpa")
    assert len(gradients) > 20
    torch._dynamo.reset()  # what other tests have compiled counts against the limit of this one
    # Compiled without a topology they are all in the model contract.
    for options in ({}, {"checkpointed": True}, *([{"compiled": True}] if ours == "hfe_multiverse" else [])):
        found_loss, found = step(TOPOLOGY_ATTENTION, **options)
        torch.testing.assert_close(found_loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=f"{name} {options}")


def test_flex_attention_computes_the_same(branching: tuple[Topology, Tensor], tiny_model: Callable) -> None:
    model = tiny_model("hfe_multiverse", head_dim=16)
    expected = run(model, inputs(branching))
    model.set_attn_implementation("flex_attention")
    torch._dynamo.reset()
    torch.testing.assert_close(run(model, inputs(branching)), expected, rtol=1e-4, atol=1e-4)


# Files and composition


@pytest.mark.parametrize("ours", ["hfe_multiverse", "hfe_medverse"])
def test_a_saved_model_computes_the_same_under_a_topology(
    ours: str, tiny_model: Callable, branching: tuple[Topology, Tensor], tmp_path: Path
) -> None:
    model = tiny_model(ours)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.topology == model.config.topology
    assert torch.equal(run(again, inputs(branching)), run(model, inputs(branching)))


def test_topology_composes_with_the_other_patches(tiny_model: Callable, branching: tuple[Topology, Tensor]) -> None:
    """The order of siblings does not matter to tables and bounded norms either."""
    patches = {"stem_layers": [1], "bhyt_layers": [0, 2], "bhyt_second_site": "exact"}
    model = tiny_model("hfe_decoder", topology={"grammar": "multiverse"}, **patches)
    assert sorted(model.config.active_patches) == ["bhyt", "multiverse", "stem"]
    one = Topology.from_spec([(4, []), (3, [0]), (5, [0])])
    other = Topology.from_spec([(4, []), (5, [0]), (3, [0])])
    ids = branching[1][:, :12]
    order = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10, 11, 4, 5, 6])
    found = run(model, inputs((other, ids[:, order])))
    torch.testing.assert_close(found, run(model, inputs((one, ids)))[:, order], rtol=1e-5, atol=1e-5)


def test_one_topology_serves_a_whole_batch(tiny_model: Callable, branching: tuple[Topology, Tensor]) -> None:
    model, topology = tiny_model("hfe_multiverse"), branching[0]
    batch, ids = Topology.stack([topology]), torch.cat((branching[1], branching[1].flip(1)))
    found = run(model, {"input_ids": ids, "position_ids": batch.position_ids, "topology": batch.to_mask()})
    rows = [run(model, inputs((topology, ids[row : row + 1]))) for row in range(2)]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-5, atol=1e-5)


def _small() -> dict[str, Any]:
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return {**shape, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
