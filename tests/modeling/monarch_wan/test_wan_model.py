"""The Wan transformer as a transformers model: loading, dtypes, training, compiling, adapters, attention choices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanConfig, MonarchWanModel

MODELS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "monarch": {"monarch": {"h_reduce": 2}},
    "causal": {"variant": "causal"},
    "causal-monarch": {"variant": "causal", "monarch": {"w_reduce": 2}},
}
every_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)


def gradients(model: MonarchWanModel, call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(*call).sample.square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_model
@torch.no_grad()
def test_saved_model_loads_with_the_same_flow(fields: dict, wan: Callable, call: Callable, tmp_path: Path) -> None:
    model, given = wan(**fields), call(3)
    model.save_pretrained(tmp_path)
    again = MonarchWanModel.from_pretrained(tmp_path)
    assert again.config.monarch == model.config.monarch and again.config.variant == model.config.variant
    assert torch.equal(again(*given).sample, model(*given).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_keeps_norms_modulation_and_timestep_in_float32(
    dtype: torch.dtype, wan: Callable, call: Callable, tmp_path: Path
) -> None:
    model, given = wan(monarch={"h_reduce": 2}), call(3)
    model.save_pretrained(tmp_path)
    half = MonarchWanModel.from_pretrained(tmp_path, dtype=dtype)
    kept = {"time_embedding", "time_projection", "modulation", "norm_q", "norm_k", "norm3"}
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if kept & set(name.split(".")) else dtype), name
    expected = model(*given).sample
    for each in (half, model.to(dtype)):  # `to` casts these too; the computation stays in float32
        found = each(*given).sample
        assert found.dtype == dtype
        assert (found.float() - expected).norm() <= (0.02 if dtype == torch.bfloat16 else 0.003) * expected.norm()


@torch.no_grad()
def test_timestep_is_embedded_in_float32_under_autocast(wan: Callable, call: Callable) -> None:
    model, given = wan(), call(3)
    expected = model.embed_timestep(given.timestep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.embed_timestep(given.timestep)
        flow = model(*given).sample
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))
    expected_flow = model(*given).sample
    assert (flow.float() - expected_flow).norm() <= 0.02 * expected_flow.norm()


@torch.no_grad()
def test_initial_weights_are_those_of_the_original() -> None:
    sizes = {"hidden_size": 240, "intermediate_size": 320, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = MonarchWanModel(MonarchWanConfig(**sizes, text_dim=256, text_len=4))
    weights = model.state_dict()
    for name in ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"):
        assert weights[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    for name, fans in {
        "time_projection.1": (240, 1440),
        "blocks.0.self_attn.q": (240, 240),
        "blocks.0.cross_attn.o": (240, 240),
        "blocks.0.ffn.0": (240, 320),
        "patch_embedding": (64, 240),
    }.items():
        bound = (6 / sum(fans)) ** 0.5
        weight = weights[f"{name}.weight"]
        assert 0.98 * bound < weight.abs().max() <= bound and weight.std().item() == pytest.approx(
            bound / 3**0.5, rel=0.03
        )
    assert weights["blocks.0.modulation"].std().item() == pytest.approx(240**-0.5, rel=0.05)
    assert not weights["head.head.weight"].any()
    assert not any(tensor.any() for name, tensor in weights.items() if name.endswith("bias"))
    assert all((t == 1).all() for name, t in weights.items() if "norm" in name and name.endswith("weight"))


@torch.no_grad()
def test_missing_weights_alone_are_initialised(wan: Callable, tmp_path: Path) -> None:
    model = wan()
    weights = model.state_dict()
    kept = {name: tensor for name, tensor in weights.items() if "blocks.1.self_attn.q" not in name}
    again, report = MonarchWanModel.from_pretrained(
        None, config=model.config, state_dict=kept, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"blocks.1.self_attn.q.weight", "blocks.1.self_attn.q.bias"}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in kept.items())
    assert not again.blocks[1].self_attn.q.bias.any()


@every_model
def test_gradient_checkpointing_changes_no_gradient(fields: dict, wan: Callable, call: Callable) -> None:
    model, given = wan(**fields).train(), call(3)
    loss, expected = gradients(model, given)
    assert expected.keys() == dict(model.named_parameters()).keys()
    model.gradient_checkpointing_enable()
    again_loss, found = gradients(model, given)
    assert torch.equal(loss, again_loss) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@every_model
@pytest.mark.slow
def test_the_whole_model_compiles_to_one_graph(fields: dict, wan: Callable, call: Callable) -> None:
    """Forward and backward; the code generator itself is PyTorch's to test."""
    model, given = wan(num_hidden_layers=1, **fields).train(), call(3)
    loss, expected = gradients(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    model.zero_grad()
    found = compiled(*given).sample.square().mean()
    found.backward()
    torch.testing.assert_close(found.detach(), loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", [None, {"h_reduce": 2}], ids=["softmax", "monarch"])
@pytest.mark.slow
@torch.no_grad()
def test_cached_chunks_compile_to_one_graph(spec: dict | None, wan: Callable, call: Callable) -> None:
    """With a window, so that frames leave the cache in the second chunk."""
    model, whole = wan(variant="causal", num_hidden_layers=1, local_attn_size=3, monarch=spec), call(6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    caches = [model.new_cache(2, 6, 8, 12) for _ in range(2)]
    for start in (0, 3, 3):
        part = whole.frames(start, start + 3)
        found, expected = (
            run(*part, cache=cache, start_frame=start).sample
            for run, cache in zip((compiled, model), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for compiled_states, states in zip(caches[0].memory(), caches[1].memory(), strict=True):
        torch.testing.assert_close(compiled_states, states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", [{}, {"variant": "causal"}], ids=["bidirectional", "causal"])
@torch.no_grad()
def test_attention_implementations_agree(attention: str, fields: dict, wan: Callable, call: Callable) -> None:
    model, given = wan(**fields), call(6)
    expected = model(*given).sample
    model.set_attn_implementation(attention)
    assert model.blocks[0].self_attn.config._attn_implementation == attention
    torch.testing.assert_close(model(*given).sample, expected, rtol=1e-5, atol=1e-5)


def test_the_attention_of_encoders_is_refused(wan: Callable) -> None:
    message = "attn_implementation='monarch' is for encoders, not for hfe_monarch_wan; set the configuration's field"
    with pytest.raises(HFEError, match=message):
        wan().set_attn_implementation("monarch")
    with pytest.raises(HFEError, match=message):
        MonarchWanModel._from_config(wan().config, attn_implementation="monarch")


@pytest.mark.parametrize("variant", ["bidirectional", "causal"])
@pytest.mark.parametrize(
    "spec",
    [{"h_reduce": 4}, {"h_reduce": 4, "num_iters": 3}, {"w_reduce": 6}, {"row_axes": "h", "h_reduce": 4}],
    ids=["one-row", "three-iterations", "one-column", "row-axis-h"],
)
@torch.no_grad()
def test_tiles_of_one_row_or_column_are_softmax_attention(
    spec: dict, variant: str, wan: Callable, call: Callable
) -> None:
    given = call(6)
    expected = wan(variant=variant)(*given).sample
    torch.testing.assert_close(wan(variant=variant, monarch=spec)(*given).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_monarch_attention_acts_in_the_chosen_layers_and_can_be_switched_off(wan: Callable, call: Callable) -> None:
    given = call(3)
    softmax, first, both = (
        wan(monarch=spec)(*given, output_hidden_states=True)
        for spec in (None, {"h_reduce": 1, "layers": [0]}, {"h_reduce": 1})
    )
    assert (first.hidden_states[1] - softmax.hidden_states[1]).abs().max() > 1e-3
    assert torch.equal(first.hidden_states[1], both.hidden_states[1])
    assert not torch.equal(first.hidden_states[2], both.hidden_states[2])
    model = wan(monarch={"h_reduce": 1})
    for block in model.blocks:
        block.self_attn.efficient = False
    assert torch.equal(model(*given).sample, softmax.sample)


@every_model
@torch.no_grad()
def test_a_batch_is_its_videos_one_by_one(fields: dict, wan: Callable, call: Callable) -> None:
    """Classifier-free guidance computes both texts in one batch."""
    model, given = wan(**fields), call(3)
    alone = torch.cat([model(*(x[row : row + 1] for x in given)).sample for row in range(2)])
    torch.testing.assert_close(model(*given).sample, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_timestep_of_each_frame_acts_on_that_frame(wan: Callable, call: Callable) -> None:
    model, given = wan(), call(3)
    uniform = given._replace(timestep=given.timestep[:, 0])
    repeated = given._replace(timestep=given.timestep[:, :1].expand(2, 3))
    torch.testing.assert_close(model(*repeated).sample, model(*uniform).sample, rtol=1e-5, atol=1e-5)
    assert (model(*given).sample - model(*uniform).sample).abs().max() > 0.01


def test_hidden_states_and_tuples_have_their_shapes(wan: Callable, call: Callable) -> None:
    model, given = wan(), call(3)
    output = model(*given, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 72, 48)] * 3
    (sample,) = model(*given, return_dict=False)
    assert torch.equal(sample, output.sample) and sample.shape == given.hidden_states.shape


@torch.no_grad()
def test_blocks_on_disk_give_the_same_flow(wan: Callable, call: Callable, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, whole = wan(variant="causal", monarch={"h_reduce": 2}), call(6)
    model.save_pretrained(tmp_path / "model")
    names = dict.fromkeys((name for name, _ in model.named_children() if name != "blocks"), "cpu")
    offloaded = MonarchWanModel.from_pretrained(
        tmp_path / "model",
        device_map=names | {"blocks.0": "cpu", "blocks.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert offloaded.blocks[1].ffn[0].weight.is_meta
    assert torch.equal(offloaded(*whole).sample, model(*whole).sample)
    caches = [each.new_cache(2, 6, 8, 12) for each in (model, offloaded)]
    for start in (0, 3):
        flows = [
            each(*whole.frames(start, start + 3), cache=cache, start_frame=start).sample
            for each, cache in zip((model, offloaded), caches, strict=True)
        ]
        assert torch.equal(*flows)


def test_lora_adapts_the_projections_of_the_self_attention(wan: Callable, call: Callable, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, given = wan(monarch={"h_reduce": 2}), call(3)
    plain = model(*given).sample.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False)).eval()
    targets = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    prefix = "base_model.model.blocks"
    assert targets == {f"{prefix}.{layer}.self_attn.{x}" for layer in (0, 1) for x in "qkvo"}
    changed = adapted(*given).sample
    assert (changed - plain).abs().max() > 1e-3
    changed.square().mean().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in adapted.named_parameters())
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(wan(monarch={"h_reduce": 2}), tmp_path).eval()
    assert torch.equal(again(*given).sample, changed)
    torch.testing.assert_close(again.merge_and_unload()(*given).sample, changed, rtol=1e-4, atol=1e-4)
