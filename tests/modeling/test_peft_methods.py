"""PEFT's methods without `target_modules` adapt our models as they adapt stock Llama."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_efficient
from hf_efficient.modeling.base.peft_targets import register_peft_targets

# What a method's configuration needs to be made at all, or for sizes as small as these.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 16},
}
# Methods of later PEFT releases come in by themselves; this one needs a package of its own.
METHODS = sorted(
    kind.value
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
    if "llama" in (getattr(tuner, "target_module_mapping", None) or {}) and kind.value != "ADAMSS"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def adapt(model: PreTrainedModel, method: str, **settings: Any) -> peft.PeftModel:
    kind = next(kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value == method)
    settings = SETTINGS.get(method, {}) | settings
    return peft.get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings))


def trained(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def step(model: torch.nn.Module, ids: Tensor) -> None:
    """One training step, large enough to change every logit."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    model.eval()


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def stock() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def stock_names(stock: PreTrainedModel, method: str) -> dict[str, tuple[int, ...]]:
    return trained(adapt(copy.deepcopy(stock), method))


def test_the_methods_that_users_take_are_among_those_tested() -> None:
    assert {"LORA", "ADALORA", "VERA", "LOHA", "LOKR", "OFT", "LN_TUNING"} <= set(METHODS)


@pytest.mark.parametrize("method", ["IA3", *METHODS])
def test_a_method_without_targets_trains_what_it_trains_of_stock_llama(
    method: str, stock: LlamaForCausalLM, tiny_model: Callable, token_ids: Callable
) -> None:
    model = adapt(tiny_model("hfe_decoder", **SHAPE, head_dim=8, qk_norm=False), method)
    assert trained(model) == stock_names(stock, method)
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if method == "POLY" else {}
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9), **tasks).loss.backward()


def test_an_architecture_may_name_the_targets_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import constants

    for name in ("LORA", "IA3"):
        mapping = f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING"
        monkeypatch.setattr(constants, mapping, dict(getattr(constants, mapping)))
    register_peft_targets("hfe_other", "llama", {"LORA": ["in_proj"]})
    assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["hfe_other"] == ["in_proj"]
    ia3 = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert ia3["hfe_other"] == ia3["llama"]


@pytest.mark.parametrize("method", ["LORA", "IA3", "ADALORA", "LN_TUNING", "OSF"])
def test_every_architecture_takes_the_method(
    method: str, model_type: str, stock: LlamaForCausalLM, tiny_model: Callable, token_ids: Callable
) -> None:
    """The same modules as of stock Llama, less those that a patch replaces."""
    model = adapt(tiny_model(model_type, **SHAPE, head_dim=8), method)
    expected = stock_names(stock, method)
    found = {name: shape for name, shape in trained(model).items() if not name.endswith((".lam", ".affine"))}
    assert found.keys() <= expected.keys()
    replaced = {name for name in expected if ".up_proj" in name} if model_type == "hfe_stem" else set()
    assert expected.keys() - found.keys() <= replaced
    assert replaced or found == expected
    ids = token_ids(2, 9)
    before = logits(model, ids)
    step(model, ids)
    assert not torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_an_adapter_without_targets_is_trained_saved_loaded_and_merged(
    method: str, model_type: str, tiny_model: Callable, token_ids: Callable, tmp_path: Path
) -> None:
    ids = token_ids(2, 9)
    base = tiny_model(model_type)
    base.save_pretrained(tmp_path / "base")
    plain = logits(base, ids)
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), method)
    step(model, ids)
    adapted = logits(model, ids)
    assert (adapted - plain).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), ids), adapted)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(auto, ids), adapted)
    attached = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    attached.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(attached.eval(), ids), adapted)

    merged = auto.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), adapted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again, ids), logits(merged, ids))


def test_all_linear_takes_every_linear_layer_but_the_head(model_type: str, tiny_model: Callable) -> None:
    model = tiny_model(model_type)
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear} - {"lm_head"}
    adapted = adapt(model, "LORA", target_modules="all-linear")
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained(adapted)} == linear


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_virtual_tokens_train_or_say_what_is_lacking(
    method: str, model_type: str, tiny_model: Callable, token_ids: Callable
) -> None:
    """Virtual tokens stand at the input as embeddings, and a STEM layer has no row for them."""
    model = adapt(tiny_model(model_type), method, num_virtual_tokens=4).train()
    ids = token_ids(2, 9)
    if model_type == "hfe_stem" and method != "PREFIX_TUNING":
        with pytest.raises(hf_efficient.HFEError, match="inputs_embeds"):
            model(input_ids=ids, labels=ids)
        return
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


ORDERS = {
    "peft-later": "import hf_efficient",
    "without-the-package": "import sys; sys.modules['hf_efficient'] = None",
}


@pytest.mark.parametrize("order", ORDERS)
def test_targets_are_found_when_peft_comes_after_the_model_and_by_exported_code(
    order: str, tiny_model: Callable, tmp_path: Path
) -> None:
    tiny_model("hfe_stem").save_pretrained(tmp_path)
    hf_efficient.export(tmp_path)
    script = f"""
{ORDERS[order]}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
from peft import LoraConfig, get_peft_model
print(sum("lora_" in name for name, _ in get_peft_model(model, LoraConfig()).named_parameters()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.split()[-1:] == ["12"], run.stderr
