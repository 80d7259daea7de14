"""Small Wan checkpoints of every layout: converted bit for bit, inspected, exported again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from hf_efficient import convert, evaluate, export_layout, inspect, verify
from hf_efficient.cli.main import run
from hf_efficient.conversion.families.family import expected_tensors
from hf_efficient.conversion.monarch.patch import Monarch
from hf_efficient.conversion.reading import hub_files
from hf_efficient.conversion.wan.tensor_names import PREFIX, diffusers_name
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.loading import load_for_generation
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from wan_checkpoints import DIFFUSERS, DIM, FFN, LAYERS, ORIGINAL, WEIGHTS, in_diffusers, table, tensors, write

LATENTS = torch.randn(2, 4, 3, 8, 12, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 512, 32, generator=torch.Generator().manual_seed(2))


def source_of(layout: str, folder: Path, **options: Any) -> Path:
    """Write the random checkpoint in a layout, and return what a user names."""
    weights = tensors(**options)
    if layout == "diffusers":
        return write(folder, in_diffusers(weights), DIFFUSERS)
    if layout == "pipeline":
        write(folder / "transformer", in_diffusers(weights), DIFFUSERS, shards=3)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
        (folder / "LICENSE.txt").write_text("A licence.")
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        return folder
    if layout == "original":
        return write(folder, weights, ORIGINAL)
    if layout == "sharded":
        return write(folder, weights, ORIGINAL, shards=2)
    if layout == "prefixed":
        return write(folder, {PREFIX + name: tensor for name, tensor in weights.items()}, ORIGINAL)
    assert layout == "training"
    folder.mkdir()
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"generator": tensors(9), "generator_ema": wrapped, "step": 3}, folder / "self_forcing_dmd.pt")
    return folder / "self_forcing_dmd.pt"


LAYOUTS = ["diffusers", "pipeline", "original", "sharded", "prefixed", "training"]


def flow(model: Any) -> Tensor:
    with torch.no_grad():
        return model(LATENTS, torch.tensor([700.0, 20.0]), TEXT).sample


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint with softmax attention; made once, so it must not be changed."""
    folder = tmp_path_factory.mktemp("video")
    convert(source_of("diffusers", folder / "source"), folder / "out", progress=False)
    return folder / "out"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_converted_bit_for_bit(layout: str, tmp_path: Path) -> None:
    report = convert(source_of(layout, tmp_path / "source"), tmp_path / "out", progress=False)
    assert report.model_type == "hfe_monarch_wan" and report.before == report.after
    assert report.tensors == {"copied": 69, "computed": {}, "dropped": [], "left_out": {}}
    stored, expected = load_file(tmp_path / "out" / "model.safetensors"), tensors()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and type(model).__name__ == "MonarchWanModel"
    assert model.config.variant == ("causal" if layout == "training" else "bidirectional")
    assert (model.config.hidden_size, model.config.text_dim, model.config.num_hidden_layers) == (DIM, 32, LAYERS)
    assert model.config.monarch is None and model.config.source_model_type == "wan"


def test_the_table_of_names_has_every_tensor_of_the_published_model() -> None:
    """The configuration's defaults are Wan2.1-T2V-1.3B."""
    shapes = expected_tensors(MonarchWanConfig(architectures=["MonarchWanModel"]))
    rows = table(30)
    assert len(shapes) == 825 and {ours for ours, _, _ in rows} == shapes.keys()
    assert {ours: diffusers_name(ours) for ours in shapes} == {ours: theirs for ours, theirs, _ in rows}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_418_996_800
    with pytest.raises(KeyError):
        diffusers_name("blocks.0.norm2.weight")


def test_names_and_shapes_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers, of the test dependencies, is not installed")
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960).state_dict()
    ours = expected_tensors(MonarchWanConfig(architectures=["MonarchWanModel"]))
    assert {diffusers_name(name): shape for name, shape in ours.items()} == {
        n: tuple(t.shape) for n, t in theirs.items()
    }


def test_the_converted_model_computes_what_diffusers_does(tmp_path: Path, converted: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers, of the test dependencies, is not installed")
    stock = diffusers.WanTransformer3DModel.from_pretrained(source_of("diffusers", tmp_path / "source")).eval()
    torch.testing.assert_close(flow(AutoModel.from_pretrained(converted)), flow(stock), rtol=0, atol=1e-5)
    # And back: a folder of the export is loaded by diffusers itself, sharded too.
    export_layout(converted, tmp_path / "again", "diffusers", max_shard_size="200KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(flow(again), flow(stock))


def test_the_card_and_licence_of_a_pipeline_are_used(tmp_path: Path) -> None:
    report = convert(source_of("pipeline", tmp_path / "source"), tmp_path / "out", [Monarch()], progress=False)
    assert report.source["license"] == "apache-2.0"
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "A licence."
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"generation_config.json", "tokenizer_config.json", "model_index.json"} & names


def test_files_beside_a_training_file_are_not_copied(tmp_path: Path) -> None:
    source = source_of("training", tmp_path / "source")
    (source.parent / "LICENSE").write_text("Of something else.")
    (source.parent / "README.md").write_text("---\nlicense: mit\n---\n")
    report = convert(source, tmp_path / "out", progress=False)
    assert report.source["license"] is None and not (tmp_path / "out" / "LICENSE").exists()


@pytest.mark.parametrize(
    ("content", "warnings"),
    [
        ({"generator_ema": 1, "generator": 2}, []),
        ({"generator_ema": {}, "generator": 1}, ["has no generator_ema; the weights are those of generator"]),
        ({"generator": 1, "critic": 2}, ["has no generator_ema; the weights are those of generator"]),
        ({"model": 1}, ["has no generator_ema; the weights are those of model"]),
        (1, []),
    ],
    ids=["average", "empty average", "generator", "model", "weights alone"],
)
def test_a_training_file_gives_the_moving_average_first(content: Any, warnings: list[str], tmp_path: Path) -> None:
    chosen = tensors(1)
    weights = {1: chosen, 2: tensors(2)}
    if isinstance(content, int):
        content = weights[content]
    else:
        content = {key: weights[value] if isinstance(value, int) else value for key, value in content.items()}
    torch.save(content, tmp_path / "weights.pt")
    report = convert(tmp_path / "weights.pt", tmp_path / "out", progress=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], chosen[name]) for name in chosen)
    assert [warning for warning in report.warnings if "weights" in warning] == [f"weights.pt {w}" for w in warnings]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"model.{name}",
        lambda name: f"_orig_mod.model.{name}",
        lambda name: f"module.model.{name}",
        lambda name: "_fsdp_wrapped_module.model." + name.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
        lambda name: name.replace("self_attn", "_checkpoint_wrapped_module._fsdp_wrapped_module.self_attn"),
    ],
)
def test_names_lose_the_prefixes_of_wrappers(wrap: Callable[[str], str], tmp_path: Path) -> None:
    weights = {wrap(name): tensor for name, tensor in tensors().items()}
    torch.save({"generator_ema": weights}, tmp_path / "weights.pt")
    assert sum(inspect(str(tmp_path / "weights.pt")).parameters.values()) == sum(t.numel() for t in weights.values())


def test_a_causal_class_keeps_its_window(tmp_path: Path) -> None:
    fields = {**ORIGINAL, "_class_name": "CausalWanModel", "local_attn_size": 9, "sink_size": 3}
    convert(write(tmp_path / "source", tensors(), fields), tmp_path / "out", progress=False)
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert (config.variant, config.local_attn_size, config.sink_size) == ("causal", 9, 3)


def test_tensors_keep_their_dtypes(tmp_path: Path) -> None:
    """`auto` changes none; a half precision keeps float32 where the model computes in it."""
    mixed = {
        name: tensor.to(torch.float32 if "time_embedding" in name else torch.bfloat16)
        for name, tensor in tensors().items()
    }
    source = write(tmp_path / "source", in_diffusers(mixed), DIFFUSERS)
    convert(source, tmp_path / "auto", progress=False)
    stored = load_file(tmp_path / "auto" / "model.safetensors")
    assert all(stored[name].dtype == mixed[name].dtype and torch.equal(stored[name], mixed[name]) for name in mixed)
    convert(source_of("original", tmp_path / "float32"), tmp_path / "half", dtype="bfloat16", progress=False)
    half = load_file(tmp_path / "half" / "model.safetensors")
    wide = {name for name, tensor in half.items() if tensor.dtype == torch.float32}
    assert {"blocks.0.modulation", "blocks.1.self_attn.norm_q.weight", "time_projection.1.bias"} <= wide
    assert not {"blocks.0.self_attn.q.weight", "patch_embedding.weight"} & wide
    AutoModel.from_pretrained(tmp_path / "half", dtype="bfloat16")


def test_monarch_is_a_setting_for_untrained_weights_by_default(tmp_path: Path) -> None:
    source = source_of("diffusers", tmp_path / "source")
    report = convert(source, tmp_path / "out", [Monarch()], progress=False)
    monarch = {"f_tied": 1, "h_reduce": 2, "w_reduce": 1, "row_axes": "fh", "num_iters": 1, "layers": None}
    assert report.patches[0]["choices"] == {"monarch": monarch}
    assert report.evaluation is None and "predicts no tokens of a text" in report.warnings[-1]
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.monarch == monarch
    convert(source, tmp_path / "tuned", [Monarch(h_reduce=4, layers="0")], progress=False)
    tuned = AutoModel.from_pretrained(tmp_path / "tuned")
    assert tuned.config.monarch == {**monarch, "h_reduce": 4, "layers": [0]}
    convert(source, tmp_path / "none", progress=False)
    softmax = flow(AutoModel.from_pretrained(tmp_path / "none"))
    # Tiles of one row are softmax attention; those of two rows are not.
    torch.testing.assert_close(flow(tuned), softmax, rtol=0, atol=1e-4)
    assert (flow(model) - softmax).abs().max() > 1e-4


def test_a_converted_checkpoint_is_a_source_again(converted: Path, tmp_path: Path) -> None:
    convert(converted, tmp_path / "out", [Monarch()], progress=False)
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert config.monarch is not None and config.source_model_type == "wan"
    with pytest.raises(UsageError, match="the source has Monarch attention already"):
        convert(tmp_path / "out", tmp_path / "twice", [Monarch()], progress=False)
    convert(tmp_path / "out", tmp_path / "same", progress=False)
    assert AutoModel.from_pretrained(tmp_path / "same").config.monarch == config.monarch


def test_a_dry_run_plans_without_reading_weights(tmp_path: Path) -> None:
    source = source_of("pipeline", tmp_path / "source")
    report = convert(source, tmp_path / "out", [Monarch()], dry_run=True)
    assert report.dry_run and not (tmp_path / "out").exists()
    size = sum(tensor.nbytes for tensor in tensors().values())
    assert size < report.estimate["disk_bytes"] < size + 20_000
    assert report.before.bytes == size and report.before.parameters == size // 4
    assert "monarch chose" in report.table()


@pytest.mark.parametrize("layout", ["pipeline", "original", "training"])
def test_inspect_describes_a_source(layout: str, tmp_path: Path) -> None:
    found = inspect(str(source_of(layout, tmp_path / "source")))
    assert found.model_type == "wan" and found.patches == [] and found.can_convert_to == ["monarch"]
    kind = "causal, chunks of 3 frames" if layout == "training" else "bidirectional"
    assert found.description["attention"] == f"1 heads of 128, {kind}"
    assert found.description["shape"] == f"2 blocks, hidden {DIM}, feed-forward {FFN}"
    assert found.parameters["feed-forward"] == LAYERS * (2 * DIM * FFN + DIM + FFN)
    assert sum(found.parameters.values()) == sum(tensor.numel() for tensor in tensors().values())


def test_the_card_says_what_monarch_is_good_for(tmp_path: Path) -> None:
    source = source_of("diffusers", tmp_path / "source")
    convert(source, tmp_path / "out", [Monarch()], base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "base_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "pipeline_tag: text-to-video",
        "`h_reduce` 1 is only for fine-tuned weights",
        "predicts no tokens of a text",
        "model.sample_chunks(noise, text)",
        "enable_monarch_wan(pipeline, h_reduce=2)",
        "eprint = {2602.12271}",
    ):
        assert words in card, words
    assert "tokenizer" not in card.partition("## What was measured")[0] and "block size" not in card


@pytest.mark.parametrize("layout", ["diffusers", "training"])
def test_the_code_of_the_card_gives_latents(layout: str, tmp_path: Path) -> None:
    """On the CPU, at the size of the small model, with fewer steps."""
    convert(source_of(layout, tmp_path / "source"), tmp_path / "out", [Monarch()], progress=False)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[2].partition("```")[0]
    for old, new in (("(1, 16, 21, 60, 104", "(1, 4, 6, 8, 12"), ("timesteps=50", "timesteps=2"), ('"cuda"', '"cpu"')):
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {"model": AutoModel.from_pretrained(tmp_path / "out"), "text": TEXT[:1]}
    exec(code, names | {"negative": TEXT[1:]}, names)
    latents = names["latents"]
    assert latents.shape == (1, 4, 6, 8, 12) and latents.isfinite().all() and latents.std() > 0.1


def test_a_video_model_is_neither_evaluated_nor_asked_for_text(converted: Path) -> None:
    with pytest.raises(HFEError, match="cannot be measured on text: a video model predicts no tokens"):
        evaluate(converted)
    options = {"dtype": "auto", "device": "cpu", "revision": None, "token": None, "trust_remote_code": False}
    with pytest.raises(HFEError, match="one of the video transformers .hfe_monarch_wan., which do not generate text"):
        load_for_generation(str(converted), **options)


@pytest.mark.parametrize(
    ("layout", "fields", "names"),
    [
        ("diffusers", DIFFUSERS, {theirs for _, theirs, _ in table()}),
        ("original", ORIGINAL, {ours for ours, _, _ in table()}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_gives_back_the_source(
    layout: str, fields: dict[str, Any], names: set[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    source = source_of(layout, tmp_path / "source", dtype=dtype)
    convert(source, tmp_path / "ours", [Monarch()], progress=False)
    assert export_layout(tmp_path / "ours", tmp_path / "out", layout) == tmp_path / "out"
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert after.keys() == before.keys() == names
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == dtype for name in before)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    unstored = {"_diffusers_version", "pos_embed_seq_len"}
    assert {k: v for k, v in written.items() if k not in unstored} == {
        k: v for k, v in fields.items() if k not in unstored
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", WEIGHTS}


def test_export_of_the_published_shape_has_the_published_config() -> None:
    """The original config.json stores neither the patch nor the channels of the text."""
    from hf_efficient.conversion.wan.layouts import layout_of

    fields = layout_of("original", MonarchWanConfig()).fields
    assert fields == {
        **{"_class_name": "WanModel", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16},
        **{"model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512},
    }


def test_a_causal_model_is_exported_to_its_own_class_only(tmp_path: Path) -> None:
    convert(source_of("training", tmp_path / "source"), tmp_path / "ours", progress=False)
    with pytest.raises(HFEError, match="lets all frames attend to each other; write the layout original"):
        export_layout(tmp_path / "ours", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
    export_layout(tmp_path / "ours", tmp_path / "out", "original")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "CausalWanModel"
    convert(tmp_path / "out", tmp_path / "again", progress=False)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "ours" / "model.safetensors"
    ).read_bytes()
    assert AutoModel.from_pretrained(tmp_path / "again").config.variant == "causal"


def test_one_public_layout_becomes_the_other(tmp_path: Path) -> None:
    export_layout(source_of("original", tmp_path / "source"), tmp_path / "out", "diffusers")
    found, expected = load_file(tmp_path / "out" / WEIGHTS), in_diffusers(tensors())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_command_line_exports_a_layout(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def command(*arguments: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            run(["export", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out + captured.err

    assert command(converted, tmp_path / "out", "--to", "diffusers") == (
        0,
        f"{tmp_path / 'out'} has the 2 files of the layout diffusers: config.json, {WEIGHTS}\n",
    )
    for arguments, words in [
        ((converted, tmp_path / "out", "--to", "diffusers"), "exists and is not empty"),
        ((converted, tmp_path / "new", "--to", "onnx"), "the layout 'onnx' is not known; choose one of diffusers"),
        ((converted, "--to", "original"), "--to original needs a folder to write"),
        ((converted, tmp_path / "new"), "is for --to only"),
        ((converted, tmp_path / "new", "--to", "original", "--max-shard-size", "big"), "'big' is not a size"),
    ]:
        status, output = command(*arguments)
        assert status == 2 and words in output, output
    assert not (tmp_path / "new").exists()
    status, output = command(converted, tmp_path / "out", "--to", "original", "--overwrite", "--json")
    assert status == 0 and json.loads(output)["files"] == ["config.json", WEIGHTS]


def test_a_model_without_other_layouts_says_so(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(HFEError, match="the causal decoders have no layout diffusers"):
        export_layout(stock_folder(), tmp_path / "out", "diffusers")


def test_options_of_sequences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="block_size=8 is no option of a hfe_monarch_wan model"):
        convert(source_of("original", tmp_path / "source"), tmp_path / "out", [Monarch(block_size=8)], progress=False)


def snapshot_with_links(folder: Path, source: Path) -> Path:
    """A snapshot in the Hub's cache, whose files are links to blobs, with the files of `source`."""
    snapshot, blobs = folder / "models--maker--wan" / "snapshots" / "0123abc", folder / "models--maker--wan" / "blobs"
    blobs.mkdir(parents=True)
    for index, path in enumerate(path for path in sorted(source.rglob("*")) if path.is_file()):
        blob = blobs / f"{index:040x}"
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_pipeline_in_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = snapshot_with_links(tmp_path / "hub", source_of("pipeline", tmp_path / "source"))
    report = convert(snapshot, tmp_path / "out", progress=False)
    assert report.source["base_model"] == "maker/wan" and report.source["revision"] == "0123abc"
    assert verify(tmp_path / "out").ok


def test_only_the_transformer_of_a_hub_pipeline_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = source_of("pipeline", tmp_path / "remote")
    write(remote / "vae", {"decoder.weight": torch.zeros(2)}, {"_class_name": "AutoencoderKLWan"})
    (remote / "models_t5.pth").write_bytes(b"pickle")
    snapshot = tmp_path / "models--maker--wan" / "snapshots" / "0123abc"

    def fetch(repo_id: str, patterns: list[str], revision: str | None, token: str | None) -> Path:
        for path in remote.rglob("*"):
            name = path.relative_to(remote)
            if path.is_file() and any(fnmatch(name.as_posix(), pattern) for pattern in patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, snapshot / name)
        return snapshot

    monkeypatch.setattr(hub_files, "_snapshot", fetch)
    monkeypatch.chdir(tmp_path)
    report = convert("maker/wan", tmp_path / "out", progress=False)
    assert report.source["base_model"] == "maker/wan"
    fetched = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.*") if path.suffix != ".json"}
    assert fetched == {
        *("README.md", "LICENSE.txt"),
        *(f"transformer/diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
    }
