"""However a model is saved, its folder loads anywhere, with the code of the release byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME as CONFIG

from hf_efficient.hub.export import installed_code, render_code
from hf_efficient.hub.verify import verify
from hf_efficient.modeling.base import saved_code
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST, GENERATE, STAGING, SavedCode
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM
from hf_efficient.registry import ARCHITECTURES, architecture_of

Runner = Callable[..., dict[str, Any]]
SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def code_of(folder: Path) -> dict[str, bytes]:
    """Code files and manifest of a folder, and the auto_map of its configuration."""
    files = [*folder.glob("*.py"), *folder.glob("custom_generate/*"), *folder.glob(CODE_MANIFEST)]
    auto_map = json.loads((folder / CONFIG).read_text()).get("auto_map")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files} | {
        "auto_map": json.dumps(auto_map, sort_keys=True).encode()
    }


def train(model: Any, output: Path) -> Path:
    """One step of the Trainer; returns its checkpoint."""
    data = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 2
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=1, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return output / "checkpoint-1"


SAVED_WITHOUT_PACKAGE = """
import json, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

root, *folders = map(Path, sys.argv[1:])
ids = torch.tensor([[1, 4, 7]])
result = {}
for folder in folders:
    variant = "fp16" if folder.name == "variant" else None
    model = AutoModelForCausalLM.from_pretrained(folder, variant=variant, trust_remote_code=True).eval()
    module = sys.modules[type(model).__module__]
    result[folder.name] = [module.__name__.split(".")[0], model(ids).logits.sum().item()]
# Saved again from the copy, in all the same ways.
model.save_pretrained(root / "copy")
model.save_pretrained(root / "copy sharded", max_shard_size="10KB")
AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(root / "copy config")
merged = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).merge_and_unload()
merged.save_pretrained(root / "copy merged")
print(json.dumps(result))
"""


def test_every_way_of_saving_leaves_the_code(checkpoint: Path, run_python: Runner, tmp_path: Path) -> None:
    """Plain, sharded, as a variant, merged, by the Trainer, and again from the saved code: one set of files."""
    exported = code_of(checkpoint)
    assert json.loads(exported["auto_map"])["AutoConfig"] == "modeling_stem.StemConfig"
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    expected = model(torch.tensor([[1, 4, 7]])).logits.sum().item()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoConfig.from_pretrained(checkpoint).save_pretrained(tmp_path / "config")
    trained = train(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "run")
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    assert not list((tmp_path / "elsewhere").iterdir())

    names = ("merged", "variant", "sharded", "plain")
    folders = [tmp_path / name for name in names]
    found = run_python(SAVED_WITHOUT_PACKAGE, tmp_path, *folders, trained)
    for name in names:
        assert found[name] == ["transformers_modules", pytest.approx(expected, rel=1e-5)], name
    copies = [tmp_path / f"copy{kind}" for kind in ("", " sharded", " config", " merged")]
    for folder in (*folders, trained, tmp_path / "config", *copies):
        assert code_of(folder) == exported, folder.name
    for folder in (tmp_path / "merged", tmp_path / "copy merged", tmp_path / "copy sharded", trained):
        assert verify(folder).ok, verify(folder).table()
    assert {"training_args.bin", "optimizer.pt", "trainer_state.json"} <= set(verify(trained).not_part)


def test_a_generate_of_its_own_is_saved_too(checkpoints: dict[str, Path], run_python: Runner, tmp_path: Path) -> None:
    folder = checkpoints["hfe_multiverse"]
    exported = code_of(folder)
    assert GENERATE in exported
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "installed")
    script = """
import json
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
print("{}")
"""
    run_python(script, folder, tmp_path / "copy")
    assert code_of(tmp_path / "installed") == code_of(tmp_path / "copy") == exported


@pytest.mark.parametrize("package", [True, False])
def test_push_to_hub_of_transformers_uploads_a_whole_folder(
    checkpoint: Path, run_python: Runner, hub: Any, package: bool
) -> None:
    """Of the model, of the configuration, and after a load from the Hub, which names the code by the repository."""
    script = """
import json
from transformers import AutoConfig, AutoModelForCausalLM
if sys.modules.get("hf_efficient", 0) is not None:
    import hf_efficient
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.push_to_hub("tester/model", private=True)
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("tester/config", private=True)
again = AutoModelForCausalLM.from_pretrained("tester/model", trust_remote_code=True)
again.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="tester/again")
print(json.dumps({"module": type(again).__module__}))
"""
    found = run_python(script, checkpoint, "again", package=package, **hub.environment)
    assert found["module"].startswith("hf_efficient." if package else "transformers_modules.tester.")
    exported = code_of(checkpoint)
    auto_map = json.loads(exported.pop("auto_map"))
    for repository in ("tester/model", "tester/config", "tester/again"):
        files = hub.files(repository)
        assert exported.items() <= files.items(), repository
        assert json.loads(files[CONFIG])["auto_map"] == auto_map, repository


def test_foreign_files_and_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.py"
    outside.write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling_multiverse.py").symlink_to(outside)
    (folder / CODE_MANIFEST).write_text("[" * 100_000)
    (folder / "hfe_errors.py").write_text("raise SystemExit")
    (tmp_path / "elsewhere").mkdir()
    (folder / "custom_generate").symlink_to(tmp_path / "elsewhere")
    config = architecture_of("hfe_multiverse").config_class(**SHAPE)  # type: ignore[union-attr]
    config.save_pretrained(folder)
    assert outside.read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())
    code = installed_code(type(config))
    assert code is not None
    assert {name: (folder / name).read_text() for name in code.files} == code.files


def test_classes_of_others_are_saved_as_transformers_saves_them(tmp_path: Path) -> None:
    """The base class has no code of its own; a user's own subclass is registered by the user."""

    class MyConfig(StemConfig):
        model_type = "mine"

    for config in (DecoderConfig(**SHAPE), MyConfig(**SHAPE)):
        config.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
        assert "auto_map" not in json.loads((tmp_path / CONFIG).read_text())
    MyConfig.register_for_auto_class()
    assert MyConfig.is_remote_code() and not StemConfig.is_remote_code()
    StemConfig.register_for_auto_class()
    StemForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    assert not StemConfig.is_remote_code() and not StemForCausalLM.is_remote_code()


class Killed(BaseException):
    """Raised where the process would be killed."""


def a_release(version: str, extra: str) -> SavedCode:
    """Code whose files all differ from another version's, with one file that the other lacks."""
    modeling = f"from .hfe_shared import one\nfrom .{extra} import two\n"
    texts = {"modeling_x.py": modeling, "hfe_shared.py": "one = 1\n", f"{extra}.py": "two = 2\n"}
    code = {name: f"# {version}\n{text}" for name, text in texts.items()}
    about = {"package": "hf-efficient", "version": version, "model_type": "hfe_x", "source_hash": "0" * 64}
    about |= {"generate": f"# {version}\nfrom .hfe_shared import one\n", "generation": "hfe_shared.py"}
    return SavedCode.of(code, {**about, "auto_map": {"AutoConfig": "modeling_x.XConfig", "AutoModel": "modeling_x.X"}})


def loaded_code(folder: Path) -> dict[str, str]:
    """The code files that transformers would load by the present config.json."""
    named = json.loads((folder / CONFIG).read_text())["auto_map"]["AutoConfig"]
    entry = folder / f"{named.rpartition('.')[0]}.py"
    return saved_code.reached_files(entry.name, lambda name: (entry.parent / name).read_text())


def test_a_killed_export_leaves_the_old_code_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each operation on the file system: the files that would be loaded are of one release."""
    old, new = a_release("old", "hfe_gone"), a_release("new", "hfe_added")
    of = {
        version: {n: t for n, t in each.files.items() if "/" not in n} for version, each in (("old", old), ("new", new))
    }
    config = {"model_type": "hfe_x"}
    original = tmp_path / "original"
    original.mkdir()
    old.write(original, config)
    assert loaded_code(original) == of["old"]
    seen: list[str] = []
    finished = False
    while not finished:
        folder = Path(shutil.copytree(original, tmp_path / f"killed-{len(seen)}"))
        left = len(seen)

        def step(done: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return done(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(saved_code.os, "replace", step(saved_code.os.replace))
            for method in ("unlink", "rmdir", "mkdir", "write_bytes"):
                patch.setattr(Path, method, step(getattr(Path, method)))
            new.write(folder, config)
            finished = True
        loads = loaded_code(folder)
        seen.append(next(version for version, files in of.items() if files == loads))
        if (folder / GENERATE).exists():
            found = {p.relative_to(folder).as_posix(): p.read_text() for p in (folder / "custom_generate").glob("*.py")}
            assert any(found.items() <= each.files.items() for each in (old, new))
        # Writing again completes the update.
        new.write(folder, config)
        assert loaded_code(folder) == of["new"]
        left_over = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert left_over == {*new.files, CODE_MANIFEST, CONFIG} and not (folder / STAGING).exists()
    first_new = seen.index("new")
    assert 5 < first_new < len(seen) - 10 and set(seen[first_new:]) == {"new"}


def test_the_code_of_an_interrupted_export_loads(checkpoint: Path, run_python: Runner) -> None:
    """From the folder that holds the complete copy during the update."""
    exported = render_code(next(a for a in ARCHITECTURES if a.model_type == "hfe_stem"))
    for name in exported.files:
        target = checkpoint / STAGING / name
        target.parent.mkdir(exist_ok=True)
        (checkpoint / name).rename(target)
    config = json.loads((checkpoint / CONFIG).read_text())
    auto_map = {name: f"{STAGING}/{value}" for name, value in config["auto_map"].items()}
    (checkpoint / CONFIG).write_text(json.dumps({**config, "auto_map": auto_map}))
    script = """
import json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
model.save_pretrained(sys.argv[2])
print(json.dumps({"loaded": list(model(torch.tensor([[1, 2]])).logits.shape)}))
"""
    again = checkpoint.with_name("again")
    assert run_python(script, checkpoint, again)["loaded"] == [1, 2, 97]
    code = {name: data.decode() for name, data in code_of(again).items() if name.endswith(".py")}
    assert code == exported.files


@pytest.mark.parametrize(
    ("fields", "present"),
    [
        ({}, set()),
        ({"stem_layers": [1]}, {"stem"}),
        ({"bhyt_final": "bhyt"}, {"bhyt"}),
        ({"topology": {"grammar": "medverse"}}, {"topology"}),
        ({"bhyt_layers": [0], "stem_layers": [1]}, {"bhyt", "stem"}),
    ],
)
def test_only_the_fields_of_its_patches_stand_in_a_configuration(
    fields: dict[str, Any], present: set[str], tmp_path: Path
) -> None:
    config = EfficientDecoderConfig(**SHAPE, **fields)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert {name.partition("_")[0] for name in written} & {"stem", "bhyt", "topology"} == present
    assert fields.keys() <= written.keys()
    again = AutoConfig.from_pretrained(tmp_path)
    for name in EfficientDecoderConfig(**SHAPE).__dict__:
        if name.startswith(("stem_", "bhyt_", "topology")):
            assert getattr(again, name) == getattr(config, name), name
    # A folder of an earlier release has them all.
    (tmp_path / CONFIG).write_text(
        json.dumps({**written, "stem_offload": "none", "bhyt_kappa": 10.0, "topology": config.topology})
    )
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.to_dict()
