"""The patch monarch: options and defaults, BERT, RoBERTa and ViT with it, and the files that come with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertTokenizerFast,
    LlamaConfig,
    RobertaConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from hf_efficient import Monarch, convert, inspect, verify
from hf_efficient.conversion.families.encoder import longest_input
from hf_efficient.conversion.reading.hub_files import download_checkpoint
from hf_efficient.convert_checkpoint import _check_patches
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.monarch_bert.modeling_monarch_bert import MonarchBertConfig
from hf_efficient.modeling.monarch_roberta.modeling_monarch_roberta import MonarchRobertaConfig
from hf_efficient.modeling.monarch_vit.modeling_monarch_vit import MonarchViTConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *".,()", *(f"##{letter}" for letter in LETTERS)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 66, "pad_token_id": 0}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 4, "num_labels": 3}
PROCESSOR = {
    **{"do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    **{"resample": 2, "size": {"height": 32, "width": 32}},
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def make(folder: Path, name: str, config: Any) -> Any:
    """Save a stock model with random weights and its tokenizer or image processor; returns the model."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if name.startswith("ViT"):
        write(folder / "preprocessor_config.json", PROCESSOR)
    else:
        BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return model


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def make_sentence_model(folder: Path, modules: list[dict[str, Any]] = MODULES, **pooling: Any) -> None:
    make(folder, "BertModel", transformers.BertConfig(**TEXT))
    write(folder / "modules.json", modules)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    write(
        folder / "config_sentence_transformers.json", {"__version__": {"pytorch": "2.13"}, "similarity_fn_name": None}
    )
    write(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, **pooling},
    )


def output(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize(
    ("name", "config", "auto"),
    [
        ("RobertaForMaskedLM", RobertaConfig(**TEXT), "AutoModelForMaskedLM"),
        ("XLMRobertaModel", XLMRobertaConfig(**TEXT), "AutoModel"),
        ("ViTForImageClassification", ViTConfig(**IMAGE), "AutoModelForImageClassification"),
        ("ViTModel", ViTConfig(**IMAGE), "AutoModel"),
    ],
)
def test_a_model_is_converted_with_the_patch_and_without(name: str, config: Any, auto: str, tmp_path: Path) -> None:
    """Without it, and with softmax attention, the result computes the source's output bit for bit."""
    stock = make(tmp_path / "source", name, config)
    generator = torch.Generator().manual_seed(1)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if not name.startswith("ViT"):
        inputs = {"input_ids": torch.randint(5, len(WORDS), (2, 24), generator=generator)}
    expected = output(stock, **inputs)
    for patches in ([], [Monarch(block_size=4)]):
        out = tmp_path / f"out{len(patches)}"
        report = convert(tmp_path / "source", out, patches, evaluate=False, progress=False)
        assert report.tensors["computed"] == {} and report.before == report.after
        assert verify(out).ok, verify(out).table()
        assert inspect(str(out)).patches == [patch.name for patch in patches]
        ours = getattr(transformers, auto).from_pretrained(out).eval()
        found = output(ours, **inputs)
        assert torch.equal(found, expected) == (not patches)
        ours.set_attn_implementation("sdpa")
        assert torch.equal(output(ours, **inputs), expected)
        assert ("block_size 4, num_iters 1" in inspect(str(out)).table()) == bool(patches)
        card = (out / "README.md").read_text()
        made_with = "processor = AutoImageProcessor" if name.startswith("ViT") else "tokenizer = AutoTokenizer"
        assert made_with in card and made_with.split()[-1] in card.split("from transformers import")[1].splitlines()[0]
        assert ("arXiv:2505.18698" in card) == ("yaras2025monarchattention" in card) == bool(patches)


def test_a_masked_language_model_is_measured_where_monarch_attention_runs(tmp_path: Path) -> None:
    """Every window has as many tokens as RoBERTa has positions: two fewer than max_position_embeddings here."""
    make(tmp_path / "source", "RobertaForMaskedLM", RobertaConfig(**TEXT | {"pad_token_id": 1}))
    report = convert(tmp_path / "source", tmp_path / "out", [Monarch()], progress=False)
    assert report.evaluation is not None and report.evaluation["kl"]["mean"] > 0
    assert report.patches[0]["measured"]["summary"]["monarch runs"].startswith("from 32 tokens on, in blocks of 8")
    assert longest_input(RobertaConfig(**TEXT | {"pad_token_id": 1})) == 64


def test_a_converted_model_trains_although_the_source_has_attention_dropout(tmp_path: Path) -> None:
    make(tmp_path / "source", "BertForMaskedLM", BertConfig(**TEXT | {"attention_probs_dropout_prob": 0.1}))
    report = convert(tmp_path / "source", tmp_path / "out", [Monarch(block_size=4)], evaluate=False, progress=False)
    assert report.patches[0]["measured"]["summary"]["attention dropout"].startswith("0 instead of 0.1")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").train()
    assert model.config.attention_probs_dropout_prob == 0.0
    ids = torch.randint(5, len(WORDS), (2, 24))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.base_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "block_size", "text"),
    [
        (MonarchBertConfig(max_position_embeddings=512), 32, True),
        (MonarchRobertaConfig(max_position_embeddings=514, pad_token_id=1), 32, True),
        (MonarchRobertaConfig(max_position_embeddings=8194, pad_token_id=1), 128, True),
        (MonarchBertConfig(max_position_embeddings=4096), 64, True),
        (MonarchViTConfig(image_size=224, patch_size=16), 14, False),
        (MonarchViTConfig(image_size=[96, 160], patch_size=16), 10, False),
    ],
)
def test_defaults_follow_from_the_longest_input_or_the_row_of_patches(config: Any, block_size: int, text: bool) -> None:
    patch = Monarch()
    patch.check(config)
    chosen = patch.choose(config, None)["monarch"]
    expected = {"block_size": block_size, "num_iters": 1, "pad": "pre", "layers": None}
    of_text = {"pad_queries": "mean", "min_length": 4 * block_size}
    assert chosen == expected | (of_text if text else {"pad_queries": "zero", "min_length": None})


def test_flops_in_the_report_are_those_of_the_formula() -> None:
    """ViT-B/16: 14 tokens in 15 blocks, 2 * 210 * (3 * 14 + 2 * 15) of 4 * 197^2 for each channel."""
    for num_iters, flops in ((1, 30_240), (2, 30_240 + 2 * 210 * (2 * 14 + 2 * 15))):
        patch = Monarch(num_iters=num_iters)
        patch.choose(MonarchViTConfig(), None)
        share = f"{flops / (4 * 197**2):.1%} of those of softmax attention at 197 tokens"
        assert patch.report()["summary"]["attention FLOPs"] == share


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 1}, "monarch block_size=1 must be a whole number from 2 on"),
        ({"num_iters": 0}, "monarch num_iters=0 must be"),
        ({"min_length": 0}, "monarch min_length=0 must be"),
        ({"pad": "left"}, "monarch pad='left' is unknown; choose one of post, pre"),
        ({"pad_queries": "max"}, "monarch pad_queries='max' is unknown"),
        ({"row_axes": "hf"}, "monarch row_axes='hf' is unknown"),
        ({"layers": "1,1"}, "monarch layers='1,1' must be all, or different"),
        ({"layers": []}, r"monarch layers=\[\] must be all"),
        ({"layers": "-1,2"}, "monarch layers='-1,2' must be"),
        ({"layers": "1,12"}, r"monarch layers \[12\] do not exist; the model has layers 0 to 11"),
        ({"h_reduce": 2}, "monarch h_reduce=2 is no option of a hfe_monarch_bert model; its options are block_size"),
        ({"block_size": 300}, "would never run: it begins at 600 tokens .* the longest input has 512"),
        ({"min_length": 513}, "would never run: it begins at 513 tokens"),
    ],
)
def test_an_option_that_does_not_suit_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Monarch(**options).check(MonarchBertConfig(max_position_embeddings=512))


def test_a_source_that_has_the_patch_is_refused_and_keeps_it_without_one(tmp_path: Path) -> None:
    make(tmp_path / "source", "BertModel", transformers.BertConfig(**TEXT))
    convert(tmp_path / "source", tmp_path / "first", [Monarch(layers=[0, 2])], evaluate=False, progress=False)
    with pytest.raises(UsageError, match="has Monarch attention already"):
        convert(tmp_path / "first", tmp_path / "second", [Monarch()], evaluate=False, progress=False)
    convert(tmp_path / "first", tmp_path / "second", evaluate=False, progress=False)
    assert inspect(str(tmp_path / "second")).patch_fields["Monarch attention"]["layers"] == [0, 2]
    assert "arXiv:2505.18698" in (tmp_path / "second" / "README.md").read_text()


def test_a_decoder_is_refused_before_weights_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    (tiny_llama_copy := tmp_path / "llama").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tiny_llama_copy / name).write_bytes((tiny_llama / name).read_bytes())
    rule = "does not support a llama model: Monarch attention is for bidirectional self-attention.*bert, roberta"
    with pytest.raises(UsageError, match=rule):
        convert(tiny_llama_copy, tmp_path / "out", [Monarch()], progress=False)
    with pytest.raises(UsageError, match=rule):
        _check_patches({"model_type": "llama"}, [Monarch()])
    assert not (tmp_path / "out").exists()


def test_of_a_hub_source_nothing_but_small_files_is_downloaded_before_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    asked = []

    def snapshot(repo_id: str, patterns: list[str], *rest: Any) -> Path:
        asked.extend(patterns)
        return tmp_path

    monkeypatch.setattr("hf_efficient.conversion.reading.hub_files._snapshot", snapshot)
    with pytest.raises(UsageError, match="does not support a llama model"):
        download_checkpoint("a/b", revision=None, token=None, accept=lambda fields: _check_patches(fields, [Monarch()]))
    assert asked and not any("safetensors" in pattern for pattern in asked)


def test_names_of_vit_before_transformers_5_are_read(tmp_path: Path) -> None:
    """A stock ViT is still saved under them; the base model is read from the file of a model with a head too."""
    stock = make(tmp_path / "source", "ViTForImageClassification", ViTConfig(**IMAGE))
    path = tmp_path / "source" / "model.safetensors"
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(path)
    convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    assert "vit.layers.0.attention.q_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")
    pixels = torch.randn(1, 3, 32, 32)
    base = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(base, pixel_values=pixels), output(stock.vit, pixel_values=pixels))
    ours = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    ours.save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    tensors = {name.removeprefix("vit."): t for name, t in load_file(path).items() if name.startswith("vit.")}
    extra = {"embeddings.mask_token": torch.zeros(1, 1, 32)}
    make(tmp_path / "base", "ViTModel", ViTConfig(**IMAGE))
    pooler = {n: t for n, t in load_file(tmp_path / "base" / "model.safetensors").items() if n.startswith("pooler")}
    save_file(tensors | pooler | extra, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report = convert(tmp_path / "base", tmp_path / "out2", evaluate=False, progress=False)
    assert list(report.tensors["left_out"]) == list(extra)


@pytest.mark.parametrize("named", [None, "ViTFeatureExtractor", "ViTImageProcessorFast", "Unknown"])
def test_an_image_processor_is_found_without_the_model_type(named: str | None, tmp_path: Path) -> None:
    make(tmp_path / "source", "ViTForImageClassification", ViTConfig(**IMAGE))
    if named is not None:
        write(tmp_path / "source" / "preprocessor_config.json", PROCESSOR | {"image_processor_type": named})
    report = convert(tmp_path / "source", tmp_path / "out", [Monarch()], progress=False)
    assert "there are no images to measure it on" in report.warnings[-1]
    assert [w for w in report.warnings if "image_processor_type" in w and "has code of its own" in w] == (
        report.warnings[:1] if named == "Unknown" else []
    )
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings.pop("image_processor_type").removesuffix("Fast") == "ViTImageProcessor"
    assert settings == PROCESSOR
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__.startswith("ViTImageProcessor") and processor.size["height"] == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "auto_map is not a known key"),
        ({"image_processor_type": "Mine"}, "image_processor_type is 'Mine', which transformers does not have"),
        ({"size": {"depth": 3}}, "size.depth is not a known key"),
    ],
)
def test_what_no_release_writes_for_images_is_a_finding(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    make(tmp_path / "source", "ViTForImageClassification", ViTConfig(**IMAGE))
    convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    write(tmp_path / "out" / "preprocessor_config.json", PROCESSOR | change)
    assert words in verify(tmp_path / "out").table()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patch_size": 0}, "patch_size=0, not a whole number from 1"),
        ({"image_size": [32]}, r"image_size=\[32\], not a whole number"),
        ({"image_size": 3}, "image_size=3 and patch_size=4: no patch fits"),
        ({"num_channels": -1}, "num_channels=-1"),
    ],
)
def test_sizes_without_a_patch_are_named(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    make(tmp_path / "source", "ViTModel", ViTConfig(**IMAGE))
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    write(tmp_path / "source" / "config.json", config | fields)
    with pytest.raises(HFEError, match=words):
        convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)


def test_padding_tokens_that_leave_no_position_are_named(tmp_path: Path) -> None:
    make(tmp_path / "source", "RobertaModel", RobertaConfig(**TEXT))
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    for pad, words in ((None, "pad_token_id=None"), (65, "pad_token_id=65"), (55, None)):
        write(tmp_path / "source" / "config.json", config | {"pad_token_id": pad, "max_position_embeddings": 40})
        with pytest.raises(HFEError, match=words or "no input has room"):
            convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)


def test_files_of_sentence_transformers_are_carried_over_and_verified(tmp_path: Path) -> None:
    make_sentence_model(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", [Monarch()], evaluate=False, progress=False)
    assert report.warnings == []
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    assert "SentenceTransformer(" in (tmp_path / "out" / "README.md").read_text()
    for changed in ({"type": "my_module.Attack"}, {"kwargs": ["x"]}, {"path": "../elsewhere"}):
        write(tmp_path / "out" / "modules.json", [MODULES[0] | changed])
        assert "modules.json: [0]" in verify(tmp_path / "out").table()


@pytest.mark.parametrize(
    "change",
    [
        {"modules": [*MODULES[:2], MODULES[2] | {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]},
        {"pooling_mode": "attention"},
    ],
)
def test_a_sentence_model_with_an_unknown_part_is_said_not_to_be_carried_over(change: Any, tmp_path: Path) -> None:
    make_sentence_model(tmp_path / "source", **change)
    report = convert(tmp_path / "source", tmp_path / "out", evaluate=False, progress=False)
    assert "the files of sentence-transformers were not copied" in report.warnings[0]
    assert not (tmp_path / "out" / "modules.json").exists() and not (tmp_path / "out" / "1_Pooling").exists()
    assert verify(tmp_path / "out").ok


SENTENCES = ["A short one.", "A text that is long enough for the approximation. " * 20, "Another, which is padded."]
ENCODE = """
import json, sys
if {absent}:
    sys.modules["hf_efficient"] = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({folder!r}, device="cpu", trust_remote_code=True)
print(json.dumps(model.encode({sentences!r}).tolist()))
"""


@pytest.mark.real_model
def test_a_real_sentence_model_keeps_short_texts_and_loads_in_sentence_transformers(
    minilm: Path, tmp_path: Path
) -> None:
    report = convert(minilm, tmp_path / "out", [Monarch()], progress=False)
    assert report.evaluation is not None
    # 512 tokens in blocks of 32; the drift by length and block size is a table in the documentation.
    assert 0.85 < report.evaluation["cosine_min"] <= report.evaluation["cosine"]["mean"] < 0.999
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = batch.attention_mask[..., None]
    embeddings = []
    for folder in (tmp_path / "out", minilm):
        hidden = output(transformers.AutoModel.from_pretrained(folder).eval(), **batch)
        embeddings.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    ours, stock = embeddings
    torch.testing.assert_close(ours[[0, 2]], stock[[0, 2]], rtol=1e-5, atol=1e-6)
    assert 0.85 < float(ours[1] @ stock[1]) < 0.9999

    pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")
    for absent in (False, True):
        script = ENCODE.format(absent=absent, folder=str(tmp_path / "out"), sentences=SENTENCES)
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        torch.testing.assert_close(torch.tensor(json.loads(run.stdout.splitlines()[-1])), ours, rtol=1e-5, atol=1e-6)
