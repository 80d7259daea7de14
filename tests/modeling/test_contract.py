"""What every registered model must do, as a user of transformers expects it: files, dtypes, training.

A new architecture is covered once `ARCHITECTURE_FIELDS` in `conftest.py` has a line for it, a new family once `PARTS`
has. Tests of causal language models only take `model_type`, those of models of token ids `text_model_type`, all others
`any_model_type`. `test_generation.py` holds the same for generation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, RobertaConfig

from hf_efficient.conversion.families.family import tensors_of
from hf_efficient.registry import ArchitectureSpec


def logits(model: PreTrainedModel, ids: Tensor | dict[str, Tensor], **inputs: Any) -> Tensor:
    """Logits of token ids, or the main output for the inputs of any model."""
    with torch.no_grad():
        return model(**({"input_ids": ids} if isinstance(ids, Tensor) else ids), **inputs)[0]


def numbers_from_padding(config: PreTrainedConfig) -> bool:
    """True for RoBERTa, whose first position is pad_token_id + 1."""
    return isinstance(config, RobertaConfig)


def reload(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **options).eval()


def loss_of(model: Any, inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
    """The loss of the model or, if it computes none, the mean square of its output."""
    return model(**inputs)[0].float().square().mean() if labels is None else model(**inputs, labels=labels).loss


def loss_and_gradients(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(model, inputs, labels)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_auto_classes_build_the_registered_classes(
    any_model_type: str, architecture: ArchitectureSpec, tiny_config: Callable, tmp_path: Path
) -> None:
    config = tiny_config(any_model_type)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    fields = loaded.to_diff_dict()
    fields.pop("auto_map", None)  # saving adds it, with the code that it names
    assert fields == config.to_diff_dict()
    for name, cls in architecture.auto_classes.items():
        assert name == "AutoConfig" or type(getattr(transformers, name).from_config(loaded)) is cls


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one-file", "sharded"])
def test_saved_model_loads_bit_equal(
    any_model_type: str, shard_size: str, tiny_model: Callable, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = tiny_model(any_model_type)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(model, inputs), logits(again.eval(), inputs))


def test_loading_through_the_meta_device_leaves_no_tensor_unset(
    any_model_type: str, tiny_model: Callable, tmp_path: Path
) -> None:
    model = tiny_model(any_model_type)
    again = reload(model, tmp_path)
    loaded = dict(again.named_parameters()) | dict(again.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(loaded[name], tensor), name


def test_a_missing_tensor_is_initialised_and_nothing_else(
    any_model_type: str, parts: Any, tiny_model: Callable, tmp_path: Path
) -> None:
    missing = parts.removable
    model = tiny_model(any_model_type)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    for name, tensor in again.state_dict().items():
        if name != missing:
            assert torch.equal(tensor, model.state_dict()[name]), name
    # 1,536 draws: the sample deviation is within 6 % of the configured one.
    assert again.state_dict()[missing].std().item() == pytest.approx(again.config.initializer_range, rel=0.06)


def test_fresh_weights_have_the_configured_deviation(
    any_model_type: str, parts: Any, auto_class: Any, tiny_config: Callable
) -> None:
    model = auto_class.from_config(tiny_config(any_model_type, initializer_range=0.05))
    embedding = model.get_parameter(parts.embedding + ("" if parts.tied is None else ".weight"))
    assert embedding.std().item() == pytest.approx(0.05, rel=0.06 if embedding.numel() > 1500 else 0.1)
    assert model.get_submodule(parts.linear).weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.equal(model.get_submodule(parts.norm).weight, torch.ones(32))


def test_tied_head_survives_saving_and_resizing(
    text_model_type: str, parts: Any, tiny_model: Callable, tmp_path: Path
) -> None:
    model = tiny_model(text_model_type, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert parts.tied not in load_file(tmp_path / "model.safetensors")
    again = type(model).from_pretrained(tmp_path)
    assert again.get_parameter(parts.tied) is again.get_submodule(parts.embedding).weight
    again.resize_token_embeddings(110)
    assert again.get_parameter(parts.tied) is again.get_submodule(parts.embedding).weight


@pytest.mark.parametrize("rows", [110, 60])
def test_resizing_the_vocabulary_keeps_the_old_logits(
    text_model_type: str, rows: int, tiny_model: Callable, token_ids: Callable, tmp_path: Path
) -> None:
    model, ids = tiny_model(text_model_type), token_ids(2, 9, 60)
    kept = min(rows, 97)
    before = logits(model, ids)[..., :kept]
    model.resize_token_embeddings(rows)
    assert model.config.vocab_size == rows
    torch.testing.assert_close(logits(model, ids)[..., :kept], before, rtol=0, atol=1e-6)
    new_ids = torch.tensor([[5, rows - 1]])
    again = reload(model, tmp_path)
    assert torch.equal(logits(model, new_ids), logits(again, new_ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_load_runs_near_float32(
    any_model_type: str, dtype: torch.dtype, tiny_model: Callable, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = tiny_model(any_model_type)
    half = reload(model, tmp_path, dtype=dtype)
    wide = tensors_of(model).float32
    assert {p.dtype for name, p in half.named_parameters() if name not in wide} == {dtype}
    assert {b.dtype for name, b in half.named_buffers() if name.endswith("inv_freq")} <= {torch.float32}
    halved = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    expected, found = logits(model, inputs), logits(half, halved)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() <= (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()


@pytest.mark.parametrize("how", ["method", "configuration"])
def test_gradient_checkpointing_changes_no_gradient(
    any_model_type: str, how: str, tiny_model: Callable, inputs: dict[str, Tensor], labels: Tensor | None
) -> None:
    model = tiny_model(any_model_type).train()
    loss, gradients = loss_and_gradients(model, inputs, labels)
    if how == "method":
        model.gradient_checkpointing_enable()
        checkpointed = model
    else:
        checkpointed = tiny_model(any_model_type, gradient_checkpointing=True).train()
    assert checkpointed.is_gradient_checkpointing
    again_loss, again = loss_and_gradients(checkpointed, inputs, labels)
    assert torch.equal(loss, again_loss)
    assert again.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_compiled_training_step_equals_eager(
    any_model_type: str, tiny_model: Callable, inputs: dict[str, Tensor], labels: Tensor | None
) -> None:
    """One graph without a break, forward and backward; the code generator itself is PyTorch's to test."""
    model = tiny_model(any_model_type).train()
    loss, gradients = loss_and_gradients(model, inputs, labels)
    model.zero_grad()
    torch._dynamo.reset()  # what other tests have compiled counts against the limit of this one
    compiled_loss = loss_of(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs, labels)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="torch 2.11 cannot export stock models for any length either"
)
def test_exported_program_equals_eager(text_model_type: str, tiny_model: Callable, token_ids: Callable) -> None:
    model, ids = tiny_model(text_model_type), token_ids(2, 9)
    # Monarch attention is exported for one length: PyTorch 2.13 cannot reason about a symbolic number of blocks.
    fixed = getattr(model.config, "monarch", None) is not None
    length = None if fixed else torch.export.Dim("length", min=2, max=32)
    with torch.no_grad():
        options: dict[str, Any] = {"use_cache": False} if model.can_generate() else {}
        shapes = {"input_ids": {1: length}, **dict.fromkeys(options)}
        program = torch.export.export(model, (), {"input_ids": ids, **options}, dynamic_shapes=shapes)
        longer = token_ids(2, 9 if fixed else 13)
        found = program.module()(input_ids=longer, **options).logits
    torch.testing.assert_close(found, logits(model, longer, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_do_not_see_each_other(
    model_type: str, attention: str, tiny_model: Callable, token_ids: Callable
) -> None:
    model = tiny_model(model_type)
    model.set_attn_implementation(attention)
    first, second = token_ids(1, 14)[:, :6], token_ids(1, 14)[:, 6:]
    positions = torch.cat((torch.arange(6), torch.arange(8)))[None]
    packed = logits(model, torch.cat((first, second), 1), position_ids=positions, use_cache=False)
    apart = torch.cat((logits(model, first), logits(model, second)), 1)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_changes_no_logit(
    text_model_type: str, attention: str, tiny_model: Callable, token_ids: Callable
) -> None:
    model, ids = tiny_model(text_model_type), token_ids(1, 7)
    model.set_attn_implementation(attention)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    mask = (padded != 0).long()
    first = model.config.pad_token_id + 1 if numbers_from_padding(model.config) else 0
    positions = (mask.cumsum(-1) - 1 + first).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[:, 4:], logits(model, ids), rtol=1e-5, atol=1e-5)


def test_hidden_states_and_attentions_have_their_shapes(
    any_model_type: str, parts: Any, tiny_model: Callable, inputs: dict[str, Tensor]
) -> None:
    model = tiny_model(any_model_type)
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True} if parts.attentions else {}
    output = model(**inputs, output_hidden_states=True, **asked)
    length = {"input_ids": 9, "pixel_values": 17, "hidden_states": 24}[model.main_input_name]
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, length, 32)] * 4
    assert [tuple(a.shape) for a in output.get("attentions") or ()] == [(2, 4, length, length)] * (3 * len(asked))
    if parts.head is not None:
        torch.testing.assert_close(model.get_submodule(parts.head)(output.hidden_states[-1]), output.logits)


def test_tuple_output_equals_the_dictionary(
    any_model_type: str, tiny_model: Callable, inputs: dict[str, Tensor], labels: Tensor | None
) -> None:
    model = tiny_model(any_model_type)
    given = inputs if labels is None else {**inputs, "labels": labels}
    output = model(**given)
    *losses, found = model(**given, return_dict=False)[: 1 if labels is None else 2]
    cache = model(**given, return_dict=False)[len(losses) + 1 :]
    assert all(torch.equal(loss, output.loss) for loss in losses) and torch.equal(found, output[len(losses)])
    assert [each.get_seq_length() for each in cache] == [9] * model.can_generate()


def test_logits_to_keep_selects_positions(model_type: str, tiny_model: Callable, token_ids: Callable) -> None:
    model, ids = tiny_model(model_type), token_ids(2, 9)
    whole = logits(model, ids)
    for kept, expected in ((0, whole), (2, whole[:, -2:]), (torch.tensor([1, 4]), whole[:, [1, 4]])):
        torch.testing.assert_close(logits(model, ids, logits_to_keep=kept), expected, rtol=0, atol=1e-6)


def test_layers_on_disk_give_the_same_logits(
    any_model_type: str, parts: Any, tiny_model: Callable, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model(any_model_type)
    device_map = dict.fromkeys(parts.whole, "cpu") | dict.fromkeys(parts.offloaded, "disk")
    offloaded = reload(model, tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    assert next(offloaded.get_submodule(parts.offloaded[0]).parameters()).is_meta
    assert torch.equal(logits(offloaded, inputs), logits(model, inputs))


def test_lora_adapter_acts_and_survives_saving(
    any_model_type: str,
    parts: Any,
    tiny_model: Callable,
    inputs: dict[str, Tensor],
    labels: Tensor | None,
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    plain = logits(tiny_model(any_model_type), inputs)
    model = tiny_model(any_model_type)
    task = "CAUSAL_LM" if model.can_generate() else None
    settings = peft.LoraConfig(r=4, target_modules=list(parts.lora), task_type=task, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    changed = logits(adapted, inputs)
    assert (changed - plain).abs().max() > 1e-3
    loss_of(adapted, inputs, labels).backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in adapted.named_parameters())

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(any_model_type), tmp_path).eval()
    assert torch.equal(logits(again, inputs), changed)
    attached = tiny_model(any_model_type)
    attached.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(attached.eval(), inputs), changed)
    torch.testing.assert_close(logits(again.merge_and_unload(), inputs), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [[[-1, 5]], [[5, 97]]], ids=["negative", "beyond-the-vocabulary"])
def test_ids_outside_the_vocabulary_are_named(model_type: str, bad: list[list[int]], tiny_model: Callable) -> None:
    from hf_efficient.errors import TokenIdError

    with pytest.raises(TokenIdError, match=r"token id (-1 at position \[0, 0\]|97 at position \[0, 1\]).*0\.\.96"):
        tiny_model(model_type)(input_ids=torch.tensor(bad))


def test_weights_of_another_attention_are_refused(model_type: str, tiny_model: Callable, tmp_path: Path) -> None:
    """Biases that are left out would change the model silently."""
    from hf_efficient.errors import HFEError

    tiny_model(model_type, attention_bias=True).save_pretrained(tmp_path)
    with pytest.raises(HFEError, match=r"does not have 9 tensors.*k_proj\.bias.*hf-efficient convert"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attention_bias=False)


def test_the_source_may_be_named_as_in_transformers(
    any_model_type: str, parts: Any, tiny_model: Callable, tmp_path: Path
) -> None:
    model = tiny_model(any_model_type)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(pretrained_model_name_or_path=tmp_path)
    for name in (parts.linear, parts.norm):
        assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight)
    fresh = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(fresh.get_submodule(parts.norm).weight, model.get_submodule(parts.norm).weight)
