"""A checkpoint run layer by layer gives the numbers of the whole model and keeps little of it in memory."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_efficient.conversion.measuring.layerwise import LayerwisePass, read_token_rows
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.errors import TokenIdError
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM


def layerwise_logits(config, reader, *batches):
    run = LayerwisePass(config, reader, batches)
    run.run()
    streams = zip(batches, run.logits(*run.batches), strict=True)
    return [torch.cat(list(pieces)).view(*ids.shape, -1) for ids, pieces in streams]


def test_logits_equal_the_stock_models(source, text):
    other = torch.randint(97, (2, 11))
    for ids, found in zip((text, other), layerwise_logits(source.config, source.reader, text, other), strict=True):
        expected = source.stock(ids).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_long_batches_are_cut_into_micro_batches_without_a_trace(tiny_source, monkeypatch):
    source, ids = tiny_source(), torch.randint(97, (5, 20))
    (whole,) = layerwise_logits(source.config, source.reader, ids)
    monkeypatch.setattr("hf_efficient.conversion.measuring.layerwise.MICRO_BATCH_TOKENS", 40)
    monkeypatch.setattr("hf_efficient.conversion.measuring.layerwise.LOGIT_POSITIONS", 7)
    (cut,) = layerwise_logits(source.config, source.reader, ids)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)


def test_a_patched_checkpoint_is_read_at_the_rows_of_the_text_only(tiny_source, text):
    source = tiny_source()
    patched = source.convert(Stem(layers=[1, 3]), source.calibration(text))
    model = EfficientDecoderForCausalLM(copy.deepcopy(patched.config)).eval()
    model.load_state_dict(patched.reader.tensors)
    ids = text[:2, :9]
    (found,) = layerwise_logits(patched.config, patched.reader, ids)
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-5)

    tables = {f"model.layers.{i}.mlp.stem_embed.weight" for i in (1, 3)}
    assert not tables & set(patched.reader.whole)
    assert {patched.reader.rows[name] for name in tables} == {len(ids.unique())}


def test_one_layer_at_a_time_is_in_memory(tiny_source, text):
    source = tiny_source()
    run = LayerwisePass(source.config, source.reader, [text])
    for index, _ in run.layers():
        held = [i for i, layer in enumerate(run.model.layers) if any(not p.is_meta for p in layer.parameters())]
        assert held == [index]


def test_a_pass_leaves_the_callers_configuration_alone(tiny_source, text):
    source = tiny_source()
    before = copy.deepcopy(source.config.__dict__)
    LayerwisePass(source.config, source.reader, [text])
    assert source.config.__dict__ == before


@pytest.mark.parametrize("bad", [97, -1])
def test_an_id_outside_the_vocabulary_is_named(tiny_source, bad):
    source = tiny_source()
    with pytest.raises(TokenIdError, match=rf"token id {bad}.*0\.\.96"):
        LayerwisePass(source.config, source.reader, [torch.tensor([[3, bad, 5]])])


def test_rows_are_read_in_runs_of_consecutive_ids(tiny_source):
    reader = tiny_source().reader
    ids = torch.tensor([0, 1, 2, 40, 95, 96])
    name = "model.embed_tokens.weight"
    assert torch.equal(read_token_rows(reader, name, ids), reader.tensors[name][ids])
    assert reader.rows[name] == len(ids)
    assert read_token_rows(reader, name, ids[:0]).shape == (0, 32)
