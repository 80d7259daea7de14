"""`attn_implementation="monarch"` in stock models: which layers run it, and that it is exact where it must be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.modeling.monarch import monarch_interface
from hf_efficient.modeling.monarch.default_spec import default_spec
from hf_efficient.modeling.monarch.monarch_layers import attention_layers, enable_monarch
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of the kernel function."""
    found: list[dict[str, Any]] = []

    def record(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append({"tokens": query.shape[2], "layout": args[2], **kwargs})
        return monarch_attention(query, *args, **kwargs)

    monkeypatch.setattr(monarch_interface, "monarch_attention", record)
    return found


def run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def test_each_encoder_runs_monarch_attention_in_every_layer(
    encoder: str, stock_model: Callable, stock_inputs: Callable, calls: list[dict[str, Any]]
) -> None:
    model, inputs = stock_model(encoder), stock_inputs(encoder)
    softmax = run(model, inputs)
    model.set_attn_implementation("monarch")
    found = run(model, inputs)
    # ModernBERT has two layers with full attention, two with a window.
    assert len(calls) == (2 if encoder == "modernbert" else 3)
    spec = default_spec(model.config)
    assert all(call["layout"] == spec.layout and call["key_mask"] is None for call in calls)
    assert spec.block_size == (6 if "pixel_values" in inputs else 8) and spec.num_iters == 1
    assert spec.pad == "pre" and spec.pad_queries == ("zero" if "pixel_values" in inputs else "mean")
    assert found.isfinite().all() and not torch.allclose(found, softmax, atol=1e-4)


def test_blocks_as_long_as_the_sequence_give_softmax_attention(
    encoder: str, stock_model: Callable, stock_inputs: Callable, calls: list[dict[str, Any]]
) -> None:
    model, inputs = stock_model(encoder), stock_inputs(encoder)
    expected = run(model, inputs)
    model.set_attn_implementation("monarch")
    run(model, inputs)
    tokens = calls[0]["tokens"]
    calls.clear()
    enable_monarch(model, MonarchSpec(block_size=tokens, min_length=0))
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (2 if encoder == "modernbert" else 3)  # it was no softmax attention


def test_the_encoder_of_a_pair_runs_monarch_attention_and_its_decoder_sdpa(
    pair: str,
    stock_model: Callable,
    stock_inputs: Callable,
    calls: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monarch_interface.warn_once.cache_clear()
    model, inputs = stock_model(pair), stock_inputs(pair)
    softmax = run(model, inputs)
    states = run(model.get_encoder(), {k: v for k, v in inputs.items() if not k.startswith("decoder")})
    model.set_attn_implementation("monarch")
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        found = run(model, inputs)
        run(model, inputs)
    assert len(calls) == 2 * 2  # two calls of a model with two layers
    assert [r.message for r in caplog.records if "the decoder" in r.message] != []
    assert len([r.message for r in caplog.records if "the decoder" in r.message]) == 1
    assert not torch.equal(found, softmax)
    # With the hidden states of the same encoder, the decoder computes what it computes with sdpa, bit for bit.
    decoder_ids = inputs["decoder_input_ids"]
    given = {"encoder_outputs": (states,), "decoder_input_ids": decoder_ids}
    with torch.no_grad():
        monarch = model(**given)[0]
        model.set_attn_implementation("sdpa")
        assert torch.equal(monarch, model(**given)[0])


def test_a_pair_generates_with_monarch_attention_in_its_encoder(stock_inputs: Callable) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(**sizes, encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=99)
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    ids = stock_inputs("bart")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    enable_monarch(model, MonarchSpec(block_size=4))
    together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=2)
    alone = model.generate(input_ids=ids[:1, :30], max_new_tokens=5, do_sample=False, num_beams=2)
    assert torch.equal(together[0, : alone.shape[1]], alone[0])


def test_a_causal_model_is_refused_with_its_name(
    causal_model: str, stock_model: Callable, stock_inputs: Callable
) -> None:
    model = stock_model(causal_model, "monarch")
    with pytest.raises(ValueError, match="supports bidirectional self-attention only") as error:
        run(model, stock_inputs(causal_model))
    assert type(model.config).__name__ in str(error.value) and "encoder" in str(error.value)
    if causal_model != "clip-text":  # whose attention modules say False, and get is_causal=True in each call
        with pytest.raises(ValueError, match="bidirectional self-attention only"):
            enable_monarch(model, MonarchSpec(block_size=4))


def test_a_causal_layer_is_refused_if_no_mask_was_made(stock_model: Callable) -> None:
    layer = stock_model("llama", "monarch").layers[0].self_attn
    states = torch.randn(1, 20, 32)
    with pytest.raises(ValueError, match="LlamaAttention is causal"):
        layer(states, position_embeddings=(torch.ones(1, 20, 8), torch.zeros(1, 20, 8)), attention_mask=None)


def test_a_decoder_whose_attention_is_not_causal_runs_monarch_attention(
    stock_model: Callable, stock_inputs: Callable, calls: list[dict[str, Any]]
) -> None:
    """As embedding models do that make a decoder bidirectional; its keys have fewer heads, in groups."""
    model, inputs = stock_model("llama", num_key_value_heads=2, is_causal=False), stock_inputs("llama")
    for layer in model.layers:
        layer.self_attn.is_causal = False
    expected = run(model, inputs)
    enable_monarch(model, MonarchSpec(block_size=41, min_length=0))
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3


def test_in_a_model_of_two_parts_the_encoder_of_images_can_be_named(calls: list[dict[str, Any]]) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = sizes | {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 24, "patch_size": 4}, projection_dim=16)
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "pixel_values": torch.randn(1, 3, 24, 24)}
    model = CLIPModel._from_config(config, attn_implementation={"vision_config": "monarch"}).eval()
    run(model, inputs)
    assert len(calls) == 2
    model.set_attn_implementation("monarch")
    with pytest.raises(ValueError, match="'vision_config': 'monarch'"):
        run(model, inputs)


@pytest.mark.parametrize(("name", "words"), [("t5", "passes position_bias"), ("beit-bias", "attention mask")])
def test_a_position_bias_is_refused(name: str, words: str, stock_model: Callable, stock_inputs: Callable) -> None:
    with pytest.raises(ValueError, match=words):
        run(stock_model(name, "monarch"), stock_inputs(name))


def test_a_model_without_the_attention_interface_is_refused(stock_model: Callable) -> None:
    model = stock_model("mpnet", "eager")
    with pytest.raises(ValueError, match="MPNetModel computes attention without transformers' attention interface"):
        enable_monarch(model, MonarchSpec(block_size=4))


def test_only_the_chosen_layers_run_monarch_attention(
    stock_model: Callable, stock_inputs: Callable, calls: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model = stock_model("vit")
    with caplog.at_level(logging.INFO, "hf_efficient"):
        enable_monarch(model, MonarchSpec(block_size=6, pad="pre", num_iters=2), layers=[0, 2])
    assert [layer.monarch is not None for layer in attention_layers(model)] == [True, False, True]
    assert "layers with Monarch attention [0, 2], with softmax attention [1]" in caplog.text
    run(model, stock_inputs("vit"))
    assert [call["num_iters"] for call in calls] == [2, 2]
    assert model.config.monarch["layers"] == [0, 2]


def test_a_layer_that_is_not_efficient_runs_softmax_attention(
    stock_model: Callable, stock_inputs: Callable, calls: list[dict[str, Any]]
) -> None:
    model, inputs = stock_model("bert"), stock_inputs("bert")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 30:] = 0
    expected = run(model, inputs)
    enable_monarch(model, MonarchSpec(block_size=4))
    for layer in attention_layers(model):
        layer.efficient = False
    found = run(model, inputs)
    assert calls == []
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_settings_survive_saving_and_loading(
    stock_model: Callable, stock_inputs: Callable, tmp_path: Any, calls: list[dict[str, Any]]
) -> None:
    for name, layers in (("bert", [1]), ("vit", [1])):
        model, inputs = stock_model(name), stock_inputs(name)
        enable_monarch(model, MonarchSpec(block_size=4), layers=layers)
        expected = run(model, inputs)
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name, attn_implementation="monarch").eval()
        assert loaded.config.monarch == model.config.monarch
        if name == "vit":  # its layers do not know their numbers
            with pytest.raises(ValueError, match=r"monarch.layers=\[1\] names layers, and ViTAttention does not know"):
                run(loaded, inputs)
            enable_monarch(loaded)
        calls.clear()
        assert torch.equal(run(loaded, inputs), expected)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"layers": [3]}, r"contains \[3\]; the model has layers 0..2"), ({"layers": [2, 1]}, "sorted list")],
)
def test_a_wrong_layer_is_named(fields: dict[str, Any], words: str, stock_model: Callable) -> None:
    with pytest.raises(ValueError, match=words):
        enable_monarch(stock_model("bert"), MonarchSpec(block_size=4), **fields)


def test_a_layer_with_a_window_cannot_be_chosen(stock_model: Callable) -> None:
    model = stock_model("modernbert")
    windows = [i for i, layer in enumerate(attention_layers(model)) if layer.sliding_window is not None]
    with pytest.raises(ValueError, match="have a sliding window"):
        enable_monarch(model, MonarchSpec(block_size=4), layers=windows[:1])


def test_layers_with_a_window_compute_what_they_compute_with_sdpa(
    stock_model: Callable, stock_inputs: Callable
) -> None:
    model, inputs = stock_model("modernbert"), stock_inputs("modernbert")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 25:] = 0
    expected = run(model, inputs)
    model.set_attn_implementation("monarch")
    for layer in attention_layers(model):
        if layer.sliding_window is None:
            layer.efficient = False
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(run(model, inputs)[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_training_with_dropout_of_weights_is_refused(stock_model: Callable, stock_inputs: Callable) -> None:
    model = stock_model("bert", "monarch").train()
    with pytest.raises(ValueError, match="attention dropout 0.1 in training.*attention_probs_dropout_prob=0.0"):
        model(**stock_inputs("bert"))
    stock_model("bert", "monarch", attention_probs_dropout_prob=0.0).train()(**stock_inputs("bert"))[0].sum().backward()


def test_attention_weights_as_output_are_refused(stock_model: Callable, stock_inputs: Callable) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        stock_model("bert", "monarch")(**stock_inputs("bert"), output_attentions=True)


def test_a_configuration_without_sizes_has_no_default(stock_model: Callable) -> None:
    with pytest.raises(ValueError, match="T5Config has neither image_size with patch_size.*enable_monarch"):
        default_spec(stock_model("t5").config)


@pytest.mark.parametrize(
    ("cls", "fields", "block_size"),
    [
        ("BertConfig", {"max_position_embeddings": 512}, 32),
        ("RobertaConfig", {"max_position_embeddings": 514}, 32),
        ("BartConfig", {"max_position_embeddings": 1024}, 32),
        ("WhisperConfig", {"max_source_positions": 1500}, 32),
        ("ModernBertConfig", {"max_position_embeddings": 8192}, 128),
        ("BertConfig", {"max_position_embeddings": 1}, 2),
        ("ViTConfig", {"image_size": 224, "patch_size": 16}, 14),
        ("ViTConfig", {"image_size": [224, 384], "patch_size": [16, 16]}, 24),
        ("VideoMAEConfig", {}, 14),
    ],
)
def test_the_default_block_is_a_row_of_patches_or_near_the_root_of_the_longest_text(
    cls: str, fields: dict[str, Any], block_size: int
) -> None:
    assert default_spec(getattr(transformers, cls)(**fields)).block_size == block_size


def test_the_scale_of_the_module_is_passed_on(
    stock_model: Callable, stock_inputs: Callable, calls: list[dict[str, Any]]
) -> None:
    """ESM scales its queries itself and passes 1."""
    run(stock_model("esm", "monarch"), stock_inputs("esm"))
    assert [call["scale"] for call in calls] == [1.0] * 3


def test_autocast_gives_half_precision_inputs(
    stock_model: Callable, stock_inputs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary embeddings return float32 queries and keys under autocast, and the values have half precision."""
    dtypes = []

    def record(*tensors: Any, **kwargs: Any) -> Tensor:
        dtypes.append([x.dtype for x in tensors[:3]])
        return monarch_attention(*tensors, **kwargs)

    monkeypatch.setattr(monarch_interface, "monarch_attention", record)
    model, inputs = stock_model("esm-rotary", "monarch"), stock_inputs("esm-rotary")
    with torch.autocast("cpu", torch.bfloat16):
        run(model, inputs)
    assert dtypes == [[torch.bfloat16] * 3] * 3


def test_a_module_that_does_not_say_whether_it_is_causal_is_refused(stock_model: Callable) -> None:
    module = nn.Module()
    module.config = stock_model("bert").config
    x = torch.randn(1, 2, 20, 8)
    with pytest.raises(ValueError, match="does not say whether it is causal"):
        monarch_interface.monarch_attention_forward(module, x, x, x, None)
