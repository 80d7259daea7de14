"""A converted folder loads at once, computes what the source computes, and its report accounts for every tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hf_efficient import convert_checkpoint
from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.measuring import evaluation
from hf_efficient.conversion.report import ConversionReport, _ranges
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import UsageError

StockFolder = Callable[..., Path]
QUIET: dict[str, Any] = {"evaluate": False, "progress": False}


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


def test_unpatched_logits_equal_the_source(
    stock_name: str, stock_folder: StockFolder, tmp_path: Path, ids: torch.Tensor
) -> None:
    stock = stock_folder(stock_name)
    report = convert(stock, tmp_path / "out", **QUIET)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.model_type == report.model_type == "hfe_decoder"
    with torch.no_grad():
        assert (loaded.eval()(ids).logits - logits(stock, ids)).abs().max() <= 1e-5
    assert report.before == report.after
    source = AutoModelForCausalLM.from_pretrained(stock)
    assert report.after.parameters == source.num_parameters()


@pytest.mark.real_model
def test_the_real_model_keeps_its_logits_and_tokens(smollm_gguf: Path, tmp_path: Path) -> None:
    report = convert(smollm_gguf, tmp_path / "out", **QUIET)
    assert report.after.parameters == 134_515_008 and report.source["license"] == "apache-2.0"
    stock = AutoModelForCausalLM.from_pretrained(smollm_gguf.parent, gguf_file=smollm_gguf.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(converted(**inputs).logits, stock.eval()(**inputs).logits)
    answer = converted.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_shards_hold_the_same_as_one_file(stock_folder: StockFolder, tmp_path: Path) -> None:
    stock = stock_folder("qwen2")
    convert(stock, tmp_path / "one", **QUIET)
    convert(stock_folder("qwen2", max_shard_size="20KB"), tmp_path / "many", max_shard_size="30KB", **QUIET)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and sorted(p.name for p in (tmp_path / "many").glob("*.safetensors")) == shards
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "many" / shard).items()}
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    for shard in shards:
        assert (
            sum(t.nbytes for t in load_file(tmp_path / "many" / shard).values()) <= 30_000
            or len(load_file(tmp_path / "many" / shard)) == 1
        )


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_dtype_of_the_result(
    source_dtype: torch.dtype, asked: str, stock_folder: StockFolder, tables: Any, tmp_path: Path, ids: torch.Tensor
) -> None:
    stock = stock_folder("llama", source_dtype)
    report = convert(stock, tmp_path / "out", [tables], dtype=asked, **QUIET)
    expected = source_dtype if asked == "auto" else getattr(torch, asked)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    assert report.dtype == str(expected).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == expected
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors[name], load_file(stock / "model.safetensors")[name].to(expected))


def test_auto_keeps_the_dtype_of_every_tensor(stock_folder: StockFolder, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    stock.mkdir()
    original = load_file(stock_folder("llama", torch.bfloat16) / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in original.items()}
    # An odd number of two-byte elements must not push a later tensor to an odd address.
    save_file(mixed, stock / "model.safetensors", metadata={"format": "pt"})
    (stock / "config.json").write_text((stock_folder("llama", torch.bfloat16) / "config.json").read_text())
    convert(stock, tmp_path / "out", **QUIET)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert all(converted[name].dtype == tensor.dtype for name, tensor in mixed.items())
    assert all(torch.equal(converted[name], tensor) for name, tensor in mixed.items())


def test_one_patch_gives_its_own_architecture(
    stock_folder: StockFolder, tables: Any, tmp_path: Path, ids: torch.Tensor
) -> None:
    report = convert(stock_folder(), tmp_path / "out", [tables], **QUIET)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (report.model_type, type(model).__name__) == ("hfe_stem", "StemForCausalLM")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.stem_layers == [1, 2]
    table = torch.randn(97, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.model.layers[1].mlp.stem_embed.weight, table)
    assert report.tensors["copied"] == 28 and list(report.tensors["computed"]) == [
        f"model.layers.{i}.mlp.stem_embed.weight" for i in (1, 2)
    ]
    assert report.tensors["dropped"] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2)]
    grown = 2 * (97 * 48 - 32 * 48)
    assert report.after.parameters - report.before.parameters == grown
    assert report.after.bytes - report.before.bytes == 4 * grown
    assert report.before.flops_per_token - report.after.flops_per_token == 2 * 2 * 32 * 48
    assert report.patches[0]["choices"]["stem_layers"] == [1, 2]
    assert any("grows" in warning for warning in report.warnings)


def test_flops_are_two_for_each_weight_of_a_linear_layer(stock_folder: StockFolder, tmp_path: Path) -> None:
    report = convert(stock_folder("llama-tied"), tmp_path / "out", dry_run=True, progress=False)
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48
    assert report.before.flops_per_token == 2 * (3 * layer + 97 * 32)


def test_a_patched_checkpoint_is_a_source(
    stock_folder: StockFolder, tables: Any, tmp_path: Path, ids: torch.Tensor
) -> None:
    convert(stock_folder(), tmp_path / "stem", [tables], **QUIET)
    report = convert(tmp_path / "stem", tmp_path / "decoder", **QUIET)
    assert (report.source["model_type"], report.model_type) == ("hfe_stem", "hfe_decoder")
    assert torch.equal(logits(tmp_path / "stem", ids), logits(tmp_path / "decoder", ids))


def test_tied_head_stored_twice_is_stored_once(stock_folder: StockFolder, tmp_path: Path, ids: torch.Tensor) -> None:
    stock, twice = stock_folder("llama-tied"), tmp_path / "twice"
    twice.mkdir()
    tensors = load_file(stock / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    (twice / "config.json").write_text((stock / "config.json").read_text())
    report = convert(twice, tmp_path / "out", **QUIET)
    assert set(report.tensors["left_out"]) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a mapping)
    assert torch.equal(logits(tmp_path / "out", ids), logits(stock, ids))


def test_companion_files_are_copied_byte_for_byte(stock_folder: StockFolder, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    stock.mkdir()
    for path in stock_folder().iterdir():
        (stock / path.name).write_bytes(path.read_bytes())
    contents = {
        "tokenizer.json": "{ }",
        "tokenizer_config.json": '{"model_max_length": 64,  "add_bos_token": false}',
        "chat_template.jinja": "{{ hello }}",
        "additional_chat_templates/tool.jinja": "{{ tool }}",
        "generation_config.json": '{"eos_token_id": [2, 5]}',
        "LICENSE": "do as you like",
    }
    for name, text in contents.items():
        (stock / name).parent.mkdir(exist_ok=True)
        (stock / name).write_text(text)
    (stock / "pytorch_model.bin").write_text("pickle")
    (stock / "modeling_own.py").write_text("code")
    convert(stock, tmp_path / "out", **QUIET)
    assert {name: (tmp_path / "out" / name).read_text() for name in contents} == contents
    assert not {"pytorch_model.bin", "modeling_own.py"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_tokenizer_code_is_not_carried_over(stock_folder: StockFolder, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    stock.mkdir()
    for path in stock_folder().iterdir():
        (stock / path.name).write_bytes(path.read_bytes())
    (stock / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["own.T", null]}, "x": 1, "legacy": true}'
    )
    report = convert(stock, tmp_path / "out", **QUIET)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"legacy": True}
    assert any("code of its own" in warning for warning in report.warnings)


def test_generation_settings_follow_the_model_without_a_file(stock_folder: StockFolder, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    stock.mkdir()
    for name in ("config.json", "model.safetensors"):
        (stock / name).write_bytes((stock_folder() / name).read_bytes())
    convert(stock, tmp_path / "out", **QUIET)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)


def test_dry_run_plans_the_same_and_writes_nothing(stock_folder: StockFolder, tables: Any, tmp_path: Path) -> None:
    planned = convert(stock_folder(), tmp_path / "out", [tables], dry_run=True, progress=False)
    assert list(tmp_path.iterdir()) == []
    done = convert(stock_folder(), tmp_path / "out", [tables], **QUIET)
    for name in ("source", "model_type", "tensors", "before", "after", "dtype", "estimate", "versions"):
        assert getattr(planned, name) == getattr(done, name)
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert weights == planned.estimate["disk_bytes"]
    assert planned.dry_run and "nothing was written" in planned.table() and not done.dry_run


def test_the_same_conversion_gives_the_same_bytes(
    stock_folder: StockFolder, tables: Any, tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]]
) -> None:
    for name in ("a", "b"):
        convert(stock_folder(), tmp_path / name, [tables], **QUIET)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")


def test_report_survives_json_and_names_no_place(stock_folder: StockFolder, tables: Any, tmp_path: Path) -> None:
    report = convert(stock_folder(), tmp_path / "out", [tables], base_model="maker/small", license="mit", **QUIET)
    text = (tmp_path / "out" / "conversion_report.json").read_text()
    assert ConversionReport.from_dict(json.loads(text)) == report
    assert (report.source["base_model"], report.source["license"]) == ("maker/small", "mit")
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".json", ".md", ".py"):
            assert str(tmp_path) not in path.read_text() and str(stock_folder().parent) not in path.read_text()
    table = report.table()
    assert "28 copied, 2 computed, 2 dropped, 0 left out" in table and "stem chose       layers [1, 2]" in table


def test_callers_random_state_is_untouched(stock_folder: StockFolder, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    convert(stock_folder(), tmp_path / "out", **QUIET)
    assert torch.equal(torch.rand(2), expected)


@pytest.fixture
def talking_stock(stock_folder: StockFolder, tmp_path: Path) -> Path:
    """A tiny checkpoint with a tokenizer of words, and `text.txt` of random words beside it."""
    stock = Path(shutil.copytree(stock_folder(), tmp_path / "stock"))
    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(stock)
    documents = [" ".join(f"w{i}" for i in torch.randint(97, (300,)).tolist()) for _ in range(20)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    return stock


def test_calibrated_and_measured(talking_stock: Path, tmp_path: Path) -> None:
    report = convert(
        talking_stock, tmp_path / "out", [Stem(layers=[1])], calibration=tmp_path / "text.txt", progress=False
    )
    assert report.calibration is not None and report.evaluation is not None
    assert report.calibration["calibration_text"].startswith("text.txt")
    assert report.evaluation["text"].startswith("text.txt")
    delta = report.evaluation["nll"]["mean"] - report.evaluation["reference_nll"]["mean"]
    assert report.evaluation["delta_nll"]["mean"] == pytest.approx(delta) and delta != 0
    buckets = report.evaluation["by_count"].values()
    assert sum(bucket["share_of_tokens"] * bucket["delta_nll"] for bucket in buckets) == pytest.approx(delta)
    assert report.patches[0]["measured"]["layers"]
    for row in ("calibrated on", "measured on", "Δ nll", "KL from the source", "top-1 agreement"):
        assert f"\n{row}" in report.table()
    assert str(tmp_path) not in json.dumps(report.to_dict())

    # The result is a source in its turn, its own code notwithstanding.
    again = convert(tmp_path / "out", tmp_path / "again", calibration=tmp_path / "text.txt", progress=False)
    assert again.evaluation is not None and again.evaluation["nll"] == report.evaluation["nll"]


@pytest.mark.parametrize(
    ("patch", "known"),
    [
        (lambda: Stem(max_layers=2), "2 layers"),
        (lambda: Stem(layers="greedy"), "1 layer"),
        (lambda: Stem(max_layers=2, max_delta=1e-9), "1 to 2 layers; sizes are those of 2"),
        (lambda: Bhyt(second_site="affine"), "2 to 3 layers, 0 and 1 among them; sizes are those of 2"),
    ],
)
def test_a_dry_run_tells_what_is_to_be_measured_and_does_not_measure_it(
    patch: Callable[[], Any], known: str, talking_stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_checkpoint, "prepare_calibration", lambda *_, **__: pytest.fail("text was read"))
    report = convert(talking_stock, tmp_path / "out", [patch()], dry_run=True, progress=False)
    assert f"chosen by measurement during conversion, {known}\n" in report.table()
    (told,) = report.patches
    assert list(told["to_measure"].values()) == [known] and not told["to_measure"].keys() & told["choices"].keys()
    assert report.calibration is None and not list(tmp_path.glob("out*"))


def test_a_dry_run_that_measures_chooses_as_the_conversion_does(talking_stock: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": tmp_path / "text.txt", "progress": False}
    plain = convert(talking_stock, tmp_path / "out", [Stem()], dry_run=True, **options)
    measured = convert(talking_stock, tmp_path / "out", [Stem()], dry_run=True, measure=True, **options)
    done = convert(talking_stock, tmp_path / "out", [Stem()], evaluate=False, **options)
    assert measured.patches[0]["choices"] == done.patches[0]["choices"]
    assert measured.patches[0]["measured"]["single_layer_delta_nll"]
    assert plain.after == measured.after == done.after and plain.estimate == done.estimate
    assert not any("to_measure" in told.patches[0] for told in (measured, done))


def test_growth_of_a_twentieth_is_no_warning(stock_folder: StockFolder, tmp_path: Path) -> None:
    report = convert(stock_folder("llama", torch.bfloat16), tmp_path / "out", [Bhyt()], dry_run=True, progress=False)
    assert 1.01 < report.after.bytes / report.before.bytes < 1.05 and not report.warnings
    (warning,) = convert(stock_folder(), tmp_path / "out", [Stem(layers=[1])], dry_run=True, progress=False).warnings
    assert "the model grows from" in warning


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        ([], "[]"),
        ([3], "[3]"),
        ([3, 4], "[3, 4]"),
        (list(range(30)), "[0-29]"),
        ([0, 1, 2, 5, 7, 8], "[0-2, 5, 7, 8]"),
        (list(range(0, 60, 2)), "[0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, …, 58] (30 in all)"),
    ],
)
def test_layer_lists_stay_short_in_the_table(layers: list[int], shown: str) -> None:
    assert _ranges(layers) == shown


def test_the_rounds_of_a_greedy_choice_are_reported(talking_stock: Path, tmp_path: Path) -> None:
    patch = Stem(layers="greedy", max_layers=2)
    report = convert(talking_stock, tmp_path / "out", [patch], calibration=tmp_path / "text.txt", progress=False)
    stored = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    rounds = stored["patches"][0]["measured"]["greedy_rounds"]
    assert stored["patches"][0]["choices"]["stem_layers"] == sorted(r["layer"] for r in rounds)
    assert all(r["candidates"][str(r["layer"])] == r["delta_nll"] for r in rounds)
    (line,) = (line for line in report.table().splitlines() if line.startswith("added, Δ nll of all "))
    assert line.endswith(", ".join(f"{r['layer']} {r['delta_nll']:+.3f}" for r in rounds))


def test_unpatched_measures_as_the_source(talking_stock: Path, tmp_path: Path) -> None:
    report = convert(talking_stock, tmp_path / "out", calibration=tmp_path / "text.txt", progress=False)
    assert report.evaluation is not None
    assert report.evaluation["by_count"] is None  # nothing was calibrated
    assert report.evaluation["delta_nll"]["mean"] == 0 and report.evaluation["top1_agreement"]["mean"] == 1


def test_nothing_measured_is_measured_again(
    talking_stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the last files were written: choice, tables and losses of the first run are taken over."""
    options = {"calibration": tmp_path / "text.txt", "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(convert_checkpoint, "export_code", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(talking_stock, tmp_path / "out", [Stem(max_layers=1)], **options)
    for module, name in ((convert_checkpoint, "prepare_calibration"), (evaluation, "compare_predictions")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured again"))
    resumed = convert(talking_stock, tmp_path / "out", [Stem(max_layers=1)], resume=True, **options)
    monkeypatch.undo()
    quiet = convert(talking_stock, tmp_path / "quiet", [Stem(max_layers=1)], **options)
    for part in ("patches", "calibration", "evaluation", "tensors", "source"):
        assert getattr(resumed, part) == getattr(quiet, part)
    assert resumed.patches[0]["measured"]["single_layer_delta_nll"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"max_shard_size": "big"}, "max_shard_size='big' is not a size"),
        ({"max_shard_size": 0}, "max_shard_size=0 is not a size"),
        ({"max_shard_size": "5XB"}, "max_shard_size='5XB'"),
        ({"device": "abacus"}, "device='abacus' cannot be used here"),
        ({"calibration_tokens": 0}, "calibration_tokens=0 must be at least 1"),
        ({"base_model": "/home/me/model"}, "is not a Hub id"),
        ({"patches": "stem"}, "must be a list of patches"),
        ({"patches": [Stem]}, "is not a patch"),
        ({"patches": [Stem(), Stem()]}, "name one patch twice"),
    ],
)
def test_wrong_options_are_found_before_the_source_is_read(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as error:
        convert(tmp_path / "no such source", tmp_path / "out", **options, progress=False)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
