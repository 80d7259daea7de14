"""The registered BERT, RoBERTa and ViT: stock without settings, Monarch attention with them, and their tools."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_efficient.modeling.monarch import monarch_encoder
from hf_efficient.modeling.monarch.monarch_layers import attention_layers, enable_monarch
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec
from hf_efficient.registry import ARCHITECTURES

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 2},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
TEXT_SIZES = SIZES | {"vocab_size": 97, "max_position_embeddings": 80}
TEXT_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
# Kind -> (name in class names, fields, settings of Monarch attention, heads).
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "bert": ("Bert", TEXT_SIZES, {"block_size": 4}, TEXT_HEADS),
    "roberta": ("Roberta", TEXT_SIZES, {"block_size": 4, "layers": [0, 2]}, TEXT_HEADS),
    "vit": (
        "ViT",
        SIZES | {"image_size": 24, "patch_size": 4},
        {"block_size": 6, "pad": "pre", "num_iters": 2},
        ("Model", "ForImageClassification"),
    ),
}
ALL_HEADS = [(kind, head) for kind, (*_, heads) in KINDS.items() for head in heads]
REGISTERED = [spec for spec in ARCHITECTURES if spec.prefix in {f"Monarch{name}" for name, *_ in KINDS.values()}]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of model in turn."""
    return request.param


def our_class(kind: str, head: str) -> Any:
    module = import_module(f"hf_efficient.modeling.monarch_{kind}.modeling_monarch_{kind}")
    return getattr(module, f"Monarch{KINDS[kind][0]}{head}")


def fields_of(kind: str, monarch: bool) -> dict[str, Any]:
    return KINDS[kind][1] | ({"monarch": copy.deepcopy(KINDS[kind][2])} if monarch else {})


def make(kind: str, head: str = "Model", *, monarch: bool = True, attention: str | None = None) -> PreTrainedModel:
    """One of our models with random weights, which are the same for all settings."""
    cls = our_class(kind, head)
    torch.manual_seed(0)
    options = {} if attention is None else {"attn_implementation": attention}
    model = cls._from_config(cls.config_class(**fields_of(kind, monarch)), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def stock(kind: str, head: str, attention: str) -> PreTrainedModel:
    """The stock model with the tensors of ours."""
    cls = getattr(transformers, f"{KINDS[kind][0]}{head}")
    model = cls._from_config(cls.config_class(**KINDS[kind][1]), attn_implementation=attention).eval()
    model.load_state_dict(make(kind, head, monarch=False).state_dict())
    return model


def inputs_of(kind: str, *, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    ids, mask = torch.randint(3, 97, (2, 41), generator=generator), torch.ones(2, 41, dtype=torch.long)
    if padded:
        mask[0, 30:] = 0
        ids[mask == 0] = 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in model(**inputs).to_tuple() if isinstance(x, Tensor)]


def valid(kind: str, outputs: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The first output, only at valid tokens if it has one value per token."""
    first = outputs[0]
    mask = inputs.get("attention_mask")
    return first if mask is None or first.shape[:2] != mask.shape else first[mask.bool()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "head"), ALL_HEADS)
def test_without_settings_outputs_are_those_of_the_stock_class(kind: str, head: str, attention: str) -> None:
    inputs = inputs_of(kind)
    found, expected = (
        run(make(kind, head, monarch=False, attention=attention), inputs),
        run(stock(kind, head, attention), inputs),
    )
    assert len(found) == len(expected) > 0
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_without_settings_the_default_attention_is_that_of_the_stock_class(kind: str) -> None:
    model = make(kind, monarch=False)
    assert model.config._attn_implementation == "sdpa" and model.config.active_patches == []
    with pytest.raises(ValueError, match="has monarch=None.*enable_monarch"):
        model.set_attn_implementation("monarch")
    with pytest.raises(ValueError, match="has monarch=None"):
        make(kind, monarch=False, attention="monarch")


@pytest.mark.parametrize(("kind", "head"), ALL_HEADS)
def test_with_settings_the_model_runs_monarch_attention_by_default(kind: str, head: str) -> None:
    model, inputs = make(kind, head), inputs_of(kind)
    assert model.config._attn_implementation == "monarch" and model.config.active_patches == ["monarch"]
    reference = stock(kind, head, "sdpa")
    softmax = run(reference, inputs)
    assert not torch.allclose(valid(kind, run(model, inputs), inputs), valid(kind, softmax, inputs), atol=1e-4)
    # It is what a stock model computes for which the same was turned on.
    enable_monarch(reference, MonarchSpec.from_dict(KINDS[kind][2]))
    assert all(torch.equal(x, y) for x, y in zip(run(model, inputs), run(reference, inputs), strict=True))


def test_the_layers_in_the_settings_run_monarch_attention(kind: str) -> None:
    layers = attention_layers(make(kind, KINDS[kind][3][-1]))
    chosen = KINDS[kind][2].get("layers", [0, 1, 2])
    assert [i for i, layer in enumerate(layers) if layer.monarch is not None] == chosen
    assert all(layer.is_causal is False for layer in layers)


def test_an_attention_that_the_caller_names_runs_and_a_warning_says_so(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head, inputs = KINDS[kind][3][-1], inputs_of(kind)
    model = make(kind, head)
    monarch = run(model, inputs)
    model.save_pretrained(tmp_path)
    for attention in ("sdpa", "eager"):
        monarch_encoder.warn_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_efficient"):
            loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
        words = f"runs softmax attention (attn_implementation='{attention}'), not the Monarch attention"
        assert len([record for record in caplog.records if words in record.message]) == 1
        expected = run(stock(kind, head, attention), inputs)
        assert all(torch.equal(x, y) for x, y in zip(run(loaded, inputs), expected, strict=True))
        loaded.set_attn_implementation("monarch")
        assert all(torch.equal(x, y) for x, y in zip(run(loaded, inputs), monarch, strict=True))


def test_efficient_false_is_the_stock_model_with_one_copy_of_the_weights(kind: str) -> None:
    """The switch of every patched block, which turns a model into its own teacher."""
    model, inputs = make(kind), inputs_of(kind)
    monarch = run(model, inputs)
    blocks = [module for module in model.modules() if hasattr(module, "efficient")]
    assert len(blocks) == 3
    for block in blocks:
        block.efficient = False
    expected = valid(kind, run(stock(kind, "Model", "sdpa"), inputs), inputs)
    torch.testing.assert_close(valid(kind, run(model, inputs), inputs), expected, rtol=1e-5, atol=1e-5)
    for block in blocks:
        block.efficient = True
    assert torch.equal(run(model, inputs)[0], monarch[0])


def test_settings_can_be_given_or_taken_away_while_loading(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, monarch=None)
    assert plain.config._attn_implementation == "sdpa"
    assert all(getattr(layer, "monarch", None) is None for layer in attention_layers(plain))
    changed = type(model).from_pretrained(tmp_path, monarch={"block_size": 5})
    assert {layer.monarch.block_size for layer in attention_layers(changed)} == {5}
    with pytest.raises(Exception, match="unknown keys"):
        type(model).from_pretrained(tmp_path, monarch={"blocks": 5})


def test_a_saved_model_loads_bit_equal_with_its_settings(kind: str, tmp_path: Path) -> None:
    for head in KINDS[kind][3]:
        model, inputs = make(kind, head), inputs_of(kind)
        expected = run(model, inputs)
        model.save_pretrained(tmp_path / head)
        written = json.loads((tmp_path / head / "config.json").read_text())
        assert written["monarch"] == model.config.monarch and "_attn_implementation" not in written
        loaded, info = type(model).from_pretrained(tmp_path / head, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(x, y) for x, y in zip(run(loaded.eval(), inputs), expected, strict=True))


@pytest.mark.parametrize(
    ("monarch", "words"),
    [
        ({"block_size": 1}, "block_size=1 must be an integer of at least 2"),
        ({"block_size": 4.0}, "block_size=4.0 must be an integer"),
        ({"block_size": 4, "num_iters": 0}, "num_iters=0 must be an integer of at least 1"),
        ({"block_size": 4, "pad": "left"}, r"pad='left' must be one of \['post', 'pre'\]"),
        ({"block_size": 4, "pad_queries": "none"}, "pad_queries='none' must be one of"),
        ({"block_size": 4, "min_length": -1}, "min_length=-1 must be an integer of at least 0"),
        ({"block_size": 4, "layers": [3]}, r"layers contains \[3\]; the model has layers 0..2"),
        ({"block_size": 4, "layers": [1, 0]}, "must be a sorted list"),
        ({"block_size": 4, "layers": []}, "must be a sorted list"),
        ({"block_size": 4, "h_reduce": 2}, r"unknown keys \['h_reduce'\]"),
        ({"num_iters": 1}, "no block_size"),
        ({"block_size": 300}, "block_size=300 must be at most"),
        ({"block_size": 4, "min_length": 300}, "min_length=300 must be at most"),
        ([4], "monarch"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(kind: str, monarch: Any, words: str) -> None:
    with pytest.raises(Exception, match=words):
        our_class(kind, "Model").config_class(**(KINDS[kind][1] | {"monarch": monarch}))


@pytest.mark.parametrize("head", ["first", "last"])
def test_checkpointing_changes_no_gradient(kind: str, head: str) -> None:
    heads = KINDS[kind][3]
    model, inputs = make(kind, heads[0 if head == "first" else -1]).train(), inputs_of(kind)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_compiled_model_has_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    for head in KINDS[kind][3][:2]:
        model, inputs = make(kind, head), inputs_of(kind)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found, expected = run(compiled, inputs), run(model, inputs)
        torch.testing.assert_close(valid(kind, found, inputs), valid(kind, expected, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["LORA", "DORA", "IA3"])
def test_adapters_of_queries_keys_and_values_train(kind: str, method: str) -> None:
    head = KINDS[kind][3][-1]
    names = ["q_proj", "k_proj", "v_proj"] if kind == "vit" else ["query", "key", "value"]
    model, inputs = make(kind, head), inputs_of(kind)
    settings = (
        peft.IA3Config(target_modules=names, feedforward_modules=[])
        if method == "IA3"
        else peft.LoraConfig(target_modules=names, use_dora=method == "DORA", r=2)
    )
    before = run(model, inputs)
    adapted = peft.get_peft_model(model, settings)
    torch.testing.assert_close(run(adapted, inputs)[0], before[0], rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**inputs)[0].square().mean().backward()
        optimizer.step()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    merged = adapted.merge_and_unload()
    assert merged.config._attn_implementation == "monarch"
    assert not torch.allclose(run(merged, inputs)[0], before[0], atol=1e-4)


def test_default_targets_of_an_adapter_are_those_of_the_stock_model(kind: str) -> None:
    settings = [peft.LoraConfig(), peft.LoraConfig()]
    if kind == "vit":  # PEFT has none for a stock ViT, and says so
        with pytest.raises(ValueError, match="target_modules"):
            peft.get_peft_model(make(kind), settings[0])
        return
    ours, theirs = (
        peft.get_peft_model(make(kind), settings[0]),
        peft.get_peft_model(stock(kind, "Model", "sdpa"), settings[1]),
    )
    names = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert names[0] == names[1] != []


def test_training_with_dropout_of_weights_is_refused_and_other_dropout_is_not(kind: str) -> None:
    cls = our_class(kind, "Model")
    inputs = inputs_of(kind)
    fields = fields_of(kind, True) | {"attention_probs_dropout_prob": 0.1}
    with pytest.raises(ValueError, match="attention dropout 0.1 in training"):
        cls(cls.config_class(**fields)).train()(**inputs)
    cls(cls.config_class(**fields)).eval()(**inputs)
    cls(cls.config_class(**(fields_of(kind, True) | {"hidden_dropout_prob": 0.1}))).train()(**inputs)


def test_a_copy_of_a_configuration_without_settings_is_no_monarch_model(kind: str) -> None:
    """The copy remembers the attention of the model that it comes from."""
    config = copy.deepcopy(make(kind).config)
    config.monarch = None
    with pytest.raises(ValueError, match="has monarch=None"):
        our_class(kind, "Model")(config)


WITHOUT_PACKAGE = """
import json, sys
sys.modules["hf_efficient"] = None
sys.modules["triton"] = None
import torch, transformers
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
folder, auto = sys.argv[1:3]
load = getattr(transformers, auto).from_pretrained
model = load(folder, trust_remote_code=True).eval()
again = load(sys.argv[3], trust_remote_code=True).eval()
expected = load_file(folder + "/expected.safetensors")
inputs = {name[3:]: x for name, x in expected.items() if name.startswith("in.")}
same = lambda m: torch.equal(m(**inputs)[0], expected["out"])
result = {"same": same(model), "again": same(again), "names": [n for n in ALL_ATTENTION_FUNCTIONS if "monarch" in n]}
model.set_attn_implementation("sdpa")
result["softmax"] = not same(model)
model.set_attn_implementation("monarch")
result["back"] = same(model)
model.save_pretrained(folder + "-saved")
result["saved"] = same(load(folder + "-saved", trust_remote_code=True).eval())
print(json.dumps(result))
"""


@pytest.mark.parametrize("spec", REGISTERED, ids=lambda spec: spec.model_type)
def test_a_saved_model_loads_without_the_package(spec: Any, tmp_path: Path) -> None:
    kind = next(kind for kind, (name, *_) in KINDS.items() if spec.prefix == f"Monarch{name}")
    head = KINDS[kind][3][-1 if kind == "vit" else 1]
    inputs, model = inputs_of(kind), make(kind, head)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    from safetensors.torch import save_file

    save_file(
        {"out": run(model, inputs)[0]} | {f"in.{k}": v for k, v in inputs.items()},
        tmp_path / "one/expected.safetensors",
    )
    # The second folder has changed code: two versions in one process.
    code = tmp_path / "two" / "hfe_kernels_namespace.py"
    code.write_text(code.read_text().replace('NS = "hfe_', 'NS = "hfe_other_'))
    auto = "AutoModelForImageClassification" if kind == "vit" else "AutoModelForMaskedLM"
    env = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(transformers.__path__[0]).parent),
    }
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path / "one"), auto, str(tmp_path / "two")],
        capture_output=True, text=True, cwd=tmp_path, env=env,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    names = found.pop("names")
    assert all(found.values()), found
    assert len(names) >= 2 and "monarch" not in names and all(name.startswith("hfe_") for name in names)


@pytest.mark.parametrize("spec", REGISTERED, ids=lambda spec: spec.model_type)
def test_auto_classes_load_it(spec: Any, tmp_path: Path) -> None:
    kind = next(kind for kind, (name, *_) in KINDS.items() if spec.prefix == f"Monarch{name}")
    model = make(kind)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config._attn_implementation == "monarch"
