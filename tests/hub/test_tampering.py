"""Verification is an allow-list: a tampered file or key is named, and a folder that passes gives equal results."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import CONFIG_NAME as CONFIG
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE_FILE

from hf_efficient.hub.card import write_card
from hf_efficient.hub.verify import verify, verify_upload
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST

Tampering = Callable[[Path], Any]
GENERATION, TOKENIZER, SETTINGS = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
pytestmark = pytest.mark.usefixtures("rendered_once")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def edit(name: str, **changes: Any) -> Tampering:
    """Set keys of a JSON file; a dot in a key, written as two underscores, goes a level down."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        for path, value in changes.items():
            *above, last = path.split("__") if not path.startswith("__") else [path]
            target = values
            for key in above:
                target = target.setdefault(key, {}) if isinstance(target, dict) else target[int(key)]
            target[last] = value
        (folder / name).write_text(json.dumps(values))

    return change


def file(name: str, content: bytes = b"x") -> Tampering:
    """Put a file into the folder."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)

    return change


def append(name: str, text: str) -> Tampering:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def link(name: str, target: str) -> Tampering:
    return lambda folder: (folder / name).symlink_to(folder.parent / target)


def replaced_by_link(name: str) -> Tampering:
    """Move the file out of the folder, and leave a link to it."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def shard(folder: Path) -> dict[str, Any]:
    """Split the weights as save_pretrained does; returns the index."""
    tensors = load_file(folder / SINGLE_FILE)
    names = sorted(tensors)
    parts = {SHARDS[0]: names[:9], SHARDS[1]: names[9:]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    (folder / SINGLE_FILE).unlink()
    weight_map = {key: name for name, part in parts.items() for key in part}
    index = {"metadata": {"total_size": 1, "total_parameters": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def sharded(change: Tampering) -> Tampering:
    return lambda folder: (shard(folder), change(folder))


def stray_shard(folder: Path) -> None:
    shutil.copy(folder / SHARDS[0], folder / "model-00003-of-00003.safetensors")


def single_beside_index(folder: Path) -> None:
    kept = (folder / SINGLE_FILE).read_bytes()
    shard(folder)
    (folder / SINGLE_FILE).write_bytes(kept)


def other_weights(name: str) -> Tampering:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        tensors = {key: torch.randn_like(tensor) for key, tensor in load_file(folder / SINGLE_FILE).items()}
        save_file(tensors, folder / name, {"format": "pt"})

    return change


def header(metadata: dict[str, str]) -> Tampering:
    return lambda folder: save_file(load_file(folder / SINGLE_FILE), folder / SINGLE_FILE, metadata)


def header_entry(folder: Path) -> None:
    data = (folder / SINGLE_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["model.norm.weight"]["file"] = "elsewhere"
    text = json.dumps(entries).encode()
    (folder / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def bind_socket(folder: Path) -> None:
    # A socket's path has at most 108 bytes.
    before = os.getcwd()
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("control")
    os.chdir(before)


def auto_map(**changes: Any) -> Tampering:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        edit(CONFIG, auto_map={**config["auto_map"], **changes})(folder)

    return change


def twice(folder: Path) -> None:
    text = (folder / CONFIG).read_text().lstrip()
    (folder / CONFIG).write_text('{"auto_map": {"AutoModel": "someone/else--module.Class"},' + text[1:])


def pickled(name: str) -> Tampering:
    return file(name, pickle.dumps({"weights": [1.0]}))


REMOTE = {"AutoModelForCausalLM": "someone/else--module.Class"}
TAMPERINGS: dict[str, tuple[Tampering, str]] = {
    # Keys of config.json
    "alias of auto_map": (edit(CONFIG, attribute_map={"zz": "auto_map"}, zz=REMOTE), "config.json: attribute_map"),
    "alias of a field": (edit(CONFIG, attribute_map={"n": "vocab_size"}), "config.json: attribute_map"),
    "weights named elsewhere": (
        lambda f: (other_weights("sub/o.safetensors")(f), edit(CONFIG, transformers_weights="sub/o.safetensors")(f)),
        "config.json: transformers_weights",
    ),
    "other configurations named": (
        lambda f: (edit("config.5.17.0.json", a=1)(f), edit(CONFIG, configuration_files=["config.5.17.0.json"])(f)),
        "config.json: configuration_files",
    ),
    "quantization": (edit(CONFIG, quantization_config={"quant_method": "x"}), "config.json: quantization_config"),
    "auto_map of another repository": (auto_map(AutoModel="evil/repo--m.X"), "auto_map['AutoModel'] is 'evil/repo--m"),
    "auto_map with another file": (auto_map(AutoConfig="configuration_stem.StemConfig"), "is expected"),
    "auto_map with a tokenizer": (auto_map(AutoTokenizer="a.B"), "auto_map['AutoTokenizer'] is 'a.B'"),
    "auto_map with a list": (auto_map(AutoModel=["modeling_stem.StemModel", "a.B"]), "auto_map.AutoModel is ["),
    "no auto_map": (edit(CONFIG, auto_map=None), "config.json: has no auto_map"),
    "auto_map of a part": (edit(CONFIG, text_config={"auto_map": REMOTE}), "config.json: text_config"),
    "a key twice": (twice, "comes twice"),
    "pipelines": (edit(CONFIG, custom_pipelines={"x": {"impl": "a.B"}}), "config.json: custom_pipelines"),
    "kernels of attention": (edit(CONFIG, attn_implementation="evil/kernels"), "config.json: attn_implementation"),
    "kernels, private": (edit(CONFIG, _attn_implementation_internal="e/k"), "_attn_implementation_internal"),
    "layers of their own": (edit(CONFIG, per_layer_config={"0": {"hidden_size": 8}}), "config.json: per_layer_config"),
    "plan of parallelism": (edit(CONFIG, base_model_tp_plan={"layers.*": "x"}), "config.json: base_model_tp_plan"),
    "class of another architecture": (edit(CONFIG, architectures=["LlamaForCausalLM"]), "architectures is"),
    "no class": (edit(CONFIG, architectures=None), "architectures is None"),
    "dtype that is a function": (edit(CONFIG, dtype="load"), "config.json: dtype is 'load'"),
    "older name of dtype": (edit(CONFIG, torch_dtype="float32"), "config.json: torch_dtype"),
    "text for a number": (edit(CONFIG, hidden_size="wide"), "hidden_size is 'wide', which is not a whole number"),
    "true for a number": (edit(CONFIG, vocab_size=True), "vocab_size is True"),
    "number for true": (edit(CONFIG, tie_word_embeddings=1), "tie_word_embeddings is 1"),
    "encoder and decoder": (edit(CONFIG, is_encoder_decoder=True), "is_encoder_decoder is True"),
    "key in the rotary embedding": (edit(CONFIG, rope_parameters__file="x"), "rope_parameters.file"),
    "labels of a wrong type": (edit(CONFIG, id2label={"0": ["a"]}), "id2label.0 is ['a']"),
    "generation settings in it": (edit(CONFIG, temperature=2.0), "config.json: temperature"),
    "another architecture": (edit(CONFIG, model_type="llama"), "names model_type 'llama'"),
    "model_type is a list": (edit(CONFIG, model_type=["hfe_stem"]), "names model_type ['hfe_stem']"),
    "unknown key": (edit(CONFIG, note="hello"), "config.json: note is not a known key"),
    "a million layers": (edit(CONFIG, num_hidden_layers=10**6), "config.json: does not describe"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "config.json: is missing"),
    "not UTF-8": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text(), "utf-16"), "config.json: "),
    "very deep": (lambda f: (f / CONFIG).write_text("[" * 10**5), "config.json: "),
    # Generation settings
    "generation code": (edit(GENERATION, custom_generate="evil/repo"), f"{GENERATION}: custom_generate"),
    "compilation": (edit(GENERATION, compile_config={"backend": "x"}), f"{GENERATION}: compile_config"),
    "type of a setting": (edit(GENERATION, temperature="hot"), f"{GENERATION}: temperature is 'hot'"),
    "a watermark": (edit(GENERATION, watermarking_config={"a": 1}), f"{GENERATION}: watermarking_config"),
    "broken settings": (file(GENERATION, b"{"), f"{GENERATION}: "),
    # Tokenizer
    "code of a tokenizer": (edit(SETTINGS, auto_map={"AutoTokenizer": ["x.X", None]}), f"{SETTINGS}: auto_map"),
    "tokenizers by version": (edit(SETTINGS, fast_tokenizer_files=["tokenizer.5.17.0.json"]), "fast_tokenizer_files"),
    "file of a version": (file("tokenizer.5.17.0.json"), "tokenizer.5.17.0.json: is a file"),
    "vocabulary elsewhere": (edit(SETTINGS, vocab_file="/etc/passwd"), f"{SETTINGS}: vocab_file"),
    "tokenizer file elsewhere": (edit(SETTINGS, tokenizer_file="../t.json"), f"{SETTINGS}: tokenizer_file"),
    "foreign tokenizer class": (edit(SETTINGS, tokenizer_class="MyTokenizer"), "tokenizer_class is 'MyTokenizer'"),
    "key of an added token": (
        edit(SETTINGS, added_tokens_decoder={"0": {"content": "<unk>", "run": "x"}}),
        "added_tokens_decoder.0.run",
    ),
    "key in tokenizer.json": (edit(TOKENIZER, model__file="x"), "tokenizer.json: model.file"),
    "key of a step": (edit(TOKENIZER, pre_tokenizer={"type": "Whitespace", "module": "x"}), "pre_tokenizer.module"),
    "id that is a text": (edit(TOKENIZER, model__vocab__word1="5"), "tokenizer.json: model.vocab"),
    "huge chat template": (file("chat_template.jinja", b" " * (1 << 21)), "chat_template.jinja: has"),
    "chat template that is a program": (file("chat_template.jinja", b"\x7fELF"), "chat_template.jinja: is a program"),
    "processor": (edit("preprocessor_config.json", a=1), "preprocessor_config.json: is a file"),
    "other processor": (edit("processor_config.json", auto_map=REMOTE), "processor_config.json: is a file"),
    # Weights
    "single file beside an index": (single_beside_index, f"{INDEX}: stands beside"),
    "variant of another model": (
        lambda f: save_file(
            {**load_file(f / SINGLE_FILE), "x": torch.ones(1)}, f / "model.fp16.safetensors", {"format": "pt"}
        ),
        "weights of the variant fp16: holds tensor x",
    ),
    "consolidated weights": (other_weights("consolidated.safetensors"), "consolidated.safetensors: is a file"),
    "stray shard": (
        sharded(stray_shard),
        "is not part of the weights",
    ),
    "pickled weights": (pickled("pytorch_model.bin"), "pytorch_model.bin: is a pickle"),
    "TensorFlow weights": (file("tf_model.h5"), "tf_model.h5: is a file"),
    "GGUF beside": (file("model.gguf", b"GGUF"), "model.gguf: is a file"),
    "metadata of a header": (header({"format": "pt", "loader": "x"}), f"{SINGLE_FILE}: __metadata__.loader"),
    "format of a header": (header({"format": "tf"}), f"{SINGLE_FILE}: __metadata__.format is 'tf'"),
    "key of a tensor": (header_entry, f"{SINGLE_FILE}: model.norm.weight.file"),
    "dtype in an index": (sharded(edit(INDEX, metadata__dtype="float16")), f"{INDEX}: metadata.dtype"),
    "key of an index": (sharded(edit(INDEX, url="x")), f"{INDEX}: url"),
    "path in an index": (sharded(edit(INDEX, weight_map__x="../x.safetensors")), f"{INDEX}: points at"),
    "tensor that no file holds": (sharded(edit(INDEX, weight_map__x=SHARDS[0])), f"{INDEX}: names tensor x"),
    # Adapters
    "adapter of another base": (
        edit("adapter_config.json", base_model_name_or_path="evil/base", peft_type="LORA"),
        "adapter_config.json: makes from_pretrained load the base",
    ),
    "adapter": (file("adapter_model.safetensors"), "adapter_model.safetensors: is an adapter"),
    "pickled adapter": (pickled("adapter_model.bin"), "adapter_model.bin: is a pickle"),
    # Code
    "more code": (file("extra.py", b""), "extra.py: is code"),
    "code in a folder": (file("sub/x.py", b""), "sub/x.py: is code"),
    "library": (file("modeling_stem.so", b"\x7fELF"), "modeling_stem.so: is a program (ELF)"),
    "bytecode": (file("__pycache__/modeling_stem.cpython-311.pyc"), "__pycache__/modeling_stem.cpython-311.pyc"),
    "module that shadows": (file("torch/__init__.py", b""), "torch/__init__.py: is code"),
    "generation code in a folder": (file("custom_generate/generate.py", b""), "custom_generate/generate.py: is code"),
    "requirements": (file("custom_generate/requirements.txt"), "custom_generate/requirements.txt: is a file"),
    "changed code": (append("modeling_stem.py", "\nimport os\n"), "modeling_stem.py: line"),
    "missing code": (lambda f: (f / "hfe_errors.py").unlink(), "hfe_errors.py: is missing"),
    "huge code": (append("hfe_errors.py", "#" * (1 << 23)), "hfe_errors.py: has"),
    "changed manifest": (edit(CODE_MANIFEST, files={}), "code_manifest.json: line"),
    "no manifest": (lambda f: (f / CODE_MANIFEST).unlink(), "code_manifest.json: is missing"),
    "key of the report": (edit("conversion_report.json", run="x"), "conversion_report.json: run"),
    "key deep in the report": (edit("conversion_report.json", source={"url": "x"}), "source.url"),
    "source's licence that is code": (file("LICENSE.py", b""), "LICENSE.py: is code"),
    "licence that is a script": (file("LICENSE", b"#!/bin/sh\n"), "LICENSE: is a script"),
    # Other files
    "secret": (file(".env"), ".env: is a file"),
    "notebook": (edit("demo.ipynb", cells=[]), "demo.ipynb: is a file"),
    "script": (file("run", b"#!/bin/sh\n"), "run: is a script"),
    "archive": (lambda f: torch.save([1], f / "weights"), "weights: is an archive (zip)"),
    "pickle of another name": (pickled("training_args.pt"), "training_args.pt: is a pickle"),
    "folder in the place of a record": (file("training_args.bin/x.py"), "training_args.bin/x.py: is code"),
    "other case": (file("Config.json"), "Config.json: is a file"),
    "look-alike": (file("config.j\u0455on"), "is a file"),
    "escape of a terminal": (file("a\x1b[2Jb"), "a\\x1b[2Jb: is a file"),
    "name that is no text": (lambda f: open(os.fsencode(f) + b"/\xff", "w").close(), "\\udcff: is a file"),
    "empty folder": (lambda f: (f / "sub").mkdir(), "sub: is a folder"),
    "link out": (link("notes.txt", "elsewhere.txt"), "notes.txt: is a link to"),
    "link to a folder": (lambda f: (f / "more").symlink_to(f.parent), "more: is a link to"),
    "link inside": (lambda f: (f / "NOTICE").symlink_to("README.md"), "NOTICE: is a link to README.md"),
    "weights by a link": (replaced_by_link(SINGLE_FILE), f"{SINGLE_FILE}: is a link"),
    "configuration by a link": (replaced_by_link(CONFIG), "config.json: is a link"),
    "code by a link": (replaced_by_link("hfe_errors.py"), "hfe_errors.py: is a link"),
    "named pipe": (lambda f: os.mkfifo(f / "pipe.json"), "pipe.json: is a named pipe"),
    "named pipe for the configuration": (
        lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)),
        "config.json: is a named pipe",
    ),
    "named pipe for weights": (
        lambda f: ((f / SINGLE_FILE).unlink(), os.mkfifo(f / SINGLE_FILE)),
        f"{SINGLE_FILE}: is a named pipe",
    ),
    "socket": (bind_socket, "control: is a socket"),
}


def test_there_are_enough_tamperings() -> None:
    assert len(TAMPERINGS) >= 60


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_is_refused_by_name(checkpoint: Path, name: str) -> None:
    change, words = TAMPERINGS[name]
    change(checkpoint)
    report = verify(checkpoint)
    assert not report.ok
    found = "\n".join(map(str, report.findings))
    assert words in found
    assert found.replace("\n", "").isprintable() and report.table().replace("\n", "").isprintable()
    assert json.dumps(report.to_dict()).encode()


@pytest.mark.parametrize("name", ["script", "secret", "more code", "named pipe", "adapter", "pickled weights"])
def test_what_is_not_uploaded_does_not_count_for_an_upload(checkpoint: Path, name: str) -> None:
    whole = verify_upload(checkpoint)[1]
    TAMPERINGS[name][0](checkpoint)
    report, files = verify_upload(checkpoint)
    assert report.ok and files == whole and len(report.not_part) == 1


@pytest.mark.parametrize("name", ["alias of auto_map", "changed code", "code by a link", "named pipe for weights"])
def test_what_is_uploaded_counts_for_an_upload(checkpoint: Path, name: str) -> None:
    TAMPERINGS[name][0](checkpoint)
    assert not verify_upload(checkpoint)[0].ok


def leftovers_of_training(folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        pickled(name)(folder)
    edit("trainer_state.json", global_step=1)(folder)
    file("runs/today/events.out.tfevents.1.host.2.0")(folder)


# Changes that pass, and the number of files that the report lists as not part of the model.
BENIGN: dict[str, tuple[Tampering, int]] = {
    "a card and a licence": (lambda f: (write_card(f), file("LICENSE")(f), file("LICENSES/MIT.txt")(f)), 0),
    "left by training": (leftovers_of_training, 6),
    "a clone": (lambda f: (file(".git/hooks/post-checkout")(f), file(".gitattributes")(f)), 0),
    "a download": (file(".cache/huggingface/download/config.json.metadata"), 0),
    "shards": (shard, 0),
    "a variant": (other_weights("model.fp16.safetensors"), 0),
    "other order of keys": (
        lambda f: (f / CONFIG).write_text(json.dumps(dict(reversed(json.loads((f / CONFIG).read_text()).items())))),
        0,
    ),
    "saved by another transformers": (edit(CONFIG, transformers_version="5.17.0"), 0),
    "a note on the source": (edit(GENERATION, transformers_version="5.17.0", _from_model_config=True), 0),
}

_OBSERVE = """
import hashlib, json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
results = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("word1 word5 word9 word2", return_tensors="pt")["input_ids"]
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    with torch.no_grad():
        logits = hashlib.sha256(model(ids).logits.numpy().tobytes()).hexdigest()
        tokens = model.generate(ids, do_sample=False, max_new_tokens=8)[0].tolist()
    code = hashlib.sha256()
    loaded = {m.__name__.rpartition(".")[2]: m.__file__ for m in list(sys.modules.values())
              if m and m.__name__.startswith(type(model).__module__.rpartition(".")[0] + ".")}
    for name, path in sorted(loaded.items()):
        code.update(name.encode() + open(path, "rb").read())
    results[folder] = [digest.hexdigest(), logits, tokens, ids.tolist(), len(loaded), code.hexdigest()]
assert not any(m.startswith("hf_efficient") and sys.modules[m] for m in sys.modules)
print(json.dumps(results))
"""


def test_what_passes_loads_as_the_original_in_a_process_without_the_package(
    checkpoints: dict[str, Path], tmp_path: Path, run_python: Callable[..., dict[str, Any]]
) -> None:
    """Weights, logits, generated tokens, ids of the tokenizer and executed code are the same, bit for bit."""
    folders = {"original": checkpoints["hfe_stem"]}
    for name, (change, beside) in BENIGN.items():
        folder = folders[name] = Path(shutil.copytree(folders["original"], tmp_path / name.replace(" ", "_")))
        change(folder)
        report = verify(folder)
        assert report.ok, report.table()
        assert len(report.not_part) == beside
    observed = run_python(_OBSERVE, *folders.values())
    original = observed[str(folders["original"])]
    assert original[4] > 5
    for name, folder in folders.items():
        assert observed[str(folder)] == original, name
