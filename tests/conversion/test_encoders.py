"""Tiny encoders moved unchanged: converted, loaded, inspected, evaluated, verified; and sources that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from hf_efficient import convert, evaluate, inspect, verify
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.loading import load_for_generation

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *".,()", *(f"##{letter}" for letter in LETTERS)]
SHAPE: dict[str, Any] = {
    **{"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3},
}
CLASSES = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"]
IDS = torch.randint(5, len(WORDS), (2, 11), generator=torch.Generator().manual_seed(1))


def make(folder: Path, name: str = "BertForMaskedLM", **fields: Any) -> Any:
    """Save a stock BERT with random weights and a tokenizer of letters; returns the model."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(BertConfig(**SHAPE, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return model


def output(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids)[0]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename(folder: Path, new_name: Any) -> None:
    """Store the tensors under other names; one whose new name is None is left out."""
    path = folder / "model.safetensors"
    tensors = {new_name(name): tensor for name, tensor in load_file(path).items()}
    tensors.pop(None, None)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_converted_bit_for_bit(name: str, tmp_path: Path) -> None:
    stock = make(tmp_path / "source", name)
    report = convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    assert report.model_type == "hfe_monarch_bert" and report.before == report.after
    auto = getattr(transformers, name.replace("Bert", "Auto", 1).replace("AutoFor", "AutoModelFor"))
    ours = auto.from_pretrained(tmp_path / "out").eval()
    assert type(ours).__name__ == f"Monarch{name}"
    assert torch.equal(output(ours), output(stock))
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "source" / "model.safetensors").keys()
    )
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_masked_language_model_is_measured_on_masked_tokens(tmp_path: Path) -> None:
    make(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", progress=False)
    assert report.evaluation is not None
    assert report.evaluation["kl"]["mean"] == 0 and report.evaluation["top1_agreement"]["mean"] == 1
    assert report.evaluation["objective"] == "masked tokens"
    # 15 % of the positions, and at least one of each sequence.
    share = report.evaluation["tokens"] / (report.evaluation["sequences"] * report.evaluation["sequence_length"])
    assert 0.12 < share < 0.18
    loss = evaluate(tmp_path / "out", reference=tmp_path / "source", tokens=1024)
    assert loss.nll == loss.reference_nll
    in_memory = BertForMaskedLM.from_pretrained(tmp_path / "source")
    again = evaluate(in_memory, reference=tmp_path / "out", tokens=1024)
    assert again.nll.mean == pytest.approx(loss.nll.mean, rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "tokenizer.mask_token_id" in card and "masked tokens" in card


def test_a_model_without_a_head_is_measured_by_its_embeddings(tmp_path: Path) -> None:
    make(tmp_path / "source", "BertModel")
    report = convert(tmp_path / "source", tmp_path / "out", progress=False)
    assert report.evaluation is not None and report.evaluation["objective"] == "embeddings"
    assert report.evaluation["cosine_min"] == pytest.approx(1) and report.evaluation["nll"] is None
    assert "cosine with the source's embedding" in report.table() and "smallest cosine" in report.table()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card and "cosine of the embedding" in card
    again = evaluate(tmp_path / "out", reference=tmp_path / "source", tokens=1024)
    assert again.cosine is not None and again.cosine.mean == pytest.approx(1) and "smallest cosine" in again.table()
    with pytest.raises(HFEError, match="no head that predicts tokens.*--reference"):
        evaluate(tmp_path / "out")


def test_a_classifier_says_that_nothing_is_measured(tmp_path: Path) -> None:
    make(tmp_path / "source", "BertForSequenceClassification")
    report = convert(tmp_path / "source", tmp_path / "out", progress=False)
    assert report.evaluation is None
    assert "no head that predicts tokens" in report.warnings[-1]
    assert "no head that predicts tokens" in (tmp_path / "out" / "README.md").read_text()


def test_fields_that_no_class_declares_are_not_stored_with_the_result(tmp_path: Path) -> None:
    make(tmp_path / "source")
    edit(tmp_path / "source", gradient_checkpointing=False, position_embedding_type="absolute")
    convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()


def test_inspect_describes_an_encoder(tmp_path: Path) -> None:
    make(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    for folder, model_type in (("source", "bert"), ("out", "hfe_monarch_bert")):
        found = inspect(tmp_path / folder)
        assert found.model_type == model_type and found.patches == [] and found.can_convert_to == ["monarch"]
        assert found.description["attention"] == "4 heads of 8, bidirectional"
        assert {**found.model, "num_labels": 3} == {**SHAPE, "tie_word_embeddings": True}
        count = sum(p.numel() for p in BertForMaskedLM(BertConfig(**SHAPE)).parameters())
        assert sum(found.parameters.values()) == count


def test_a_converted_checkpoint_is_a_source_again(tmp_path: Path) -> None:
    stock = make(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "first", evaluate=False, progress=False)
    convert(tmp_path / "first", tmp_path / "second", evaluate=False, progress=False)
    ours = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "second").eval()
    assert torch.equal(output(ours), output(stock))
    assert ours.config.source_model_type == "bert"


def test_names_and_heads_of_early_releases_are_read(tmp_path: Path) -> None:
    """`gamma` and `beta` of layer norms, and the heads of pretraining, which the masked language model leaves out."""
    stock = make(tmp_path / "source")
    rename(
        tmp_path / "source",
        lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"),
    )
    path = tmp_path / "source" / "model.safetensors"
    extra = {"bert.pooler.dense.bias": torch.zeros(32), "cls.seq_relationship.bias": torch.zeros(2)}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    edit(tmp_path / "source", architectures=["BertForPreTraining"])
    report = convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    assert set(report.tensors["left_out"]) == set(extra)
    ours = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(ours), output(stock))


def test_a_base_model_is_read_from_the_file_of_a_model_with_a_head(tmp_path: Path) -> None:
    stock = make(tmp_path / "source", "BertModel")
    rename(tmp_path / "source", lambda name: f"bert.{name}")
    convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    assert torch.equal(output(transformers.AutoModel.from_pretrained(tmp_path / "out").eval()), output(stock))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, "is_decoder=True; an encoder attends to all positions"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"architectures": ["BertLMHeadModel"]}, "names the class BertLMHeadModel in architectures"),
        ({"architectures": None}, "names the class None in architectures"),
        ({"num_attention_heads": 5}, "must be a multiple of num_attention_heads=5"),
        ({"hidden_act": "wave"}, "hidden_act='wave'"),
        ({"num_hidden_layers": 3}, "lacks the tensors bert.encoder.layer.2"),
        ({"vocab_size": 40}, "has shape"),
        ({"embedding_scale": 3.0}, "embedding_scale=3.0, a field that the stock bert does not have"),
    ],
)
def test_a_source_that_cannot_be_taken_over_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    make(tmp_path / "source")
    edit(tmp_path / "source", **changes)
    with pytest.raises(HFEError, match=words):
        convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    assert not (tmp_path / "out").exists()


def test_an_encoder_writes_no_text(tmp_path: Path) -> None:
    make(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    options = {"dtype": "auto", "device": "cpu", "revision": None, "token": None, "trust_remote_code": False}
    with pytest.raises(HFEError, match="bidirectional encoders .hfe_monarch_bert., which do not generate text"):
        load_for_generation(str(tmp_path / "out"), **options)


def test_models_of_two_families_are_not_compared(tmp_path: Path, tiny_llama: Path) -> None:
    make(tmp_path / "source")
    with pytest.raises(HFEError, match="one of the bidirectional encoders, the reference one of the causal decoders"):
        evaluate(tmp_path / "source", reference=tiny_llama)


def test_a_patch_of_another_family_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "source")
    with pytest.raises(UsageError, match="patch stem does not support a bert model"):
        convert(tmp_path / "source", tmp_path / "out", [Stem(layers=[1])], evaluate=False, progress=False)
