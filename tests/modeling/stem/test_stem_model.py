"""STEM: the feed-forward whose up-projection is a table row of the token, and adapters and hooks around the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_efficient.errors import HFEError
from hf_efficient.modeling.stem import modeling_stem
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM, StemMLP


def logits(model: nn.Module, ids: Tensor | None, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.fixture
def stem(tiny_model: Callable) -> PreTrainedModel:
    return tiny_model("hfe_stem")


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the fused kernel."""
    calls: list[int] = []
    fused = modeling_stem.stem_gate

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(modeling_stem, "stem_gate", counting)
    return calls


# The method


def test_table_row_is_an_up_projection_of_the_one_hot_id(tiny_config: Callable) -> None:
    """``silu(x Wg) * (onehot(t) U)`` then Wd, in float64, forward and every gradient."""
    mlp = StemMLP(tiny_config("hfe_stem")).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(97, (2, 9))
    weights = (mlp.gate_proj.weight, mlp.stem_embed.weight, mlp.down_proj.weight)
    found = mlp(x, ids)
    expected = F.silu(x @ weights[0].T) * (F.one_hot(ids, 97).double() @ weights[1]) @ weights[2].T
    assert (found - expected).abs().max() <= 1e-12
    direction = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, (x, *weights), direction),
        torch.autograd.grad(expected, (x, *weights), direction),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-12


def test_relabelling_the_vocabulary_changes_nothing(stem: PreTrainedModel, token_ids: Callable) -> None:
    ids = token_ids(2, 9)
    before = logits(stem, ids)
    new_of_old = torch.randperm(97)
    old_of_new = new_of_old.argsort()
    with torch.no_grad():
        for name, parameter in stem.named_parameters():
            if name.endswith(("embed_tokens.weight", "stem_embed.weight", "lm_head.weight")):
                parameter.copy_(parameter[old_of_new])
    torch.testing.assert_close(logits(stem, new_of_old[ids])[..., new_of_old], before, rtol=0, atol=1e-5)


def test_rows_of_absent_ids_have_no_gradient(stem: PreTrainedModel, token_ids: Callable) -> None:
    ids = token_ids(2, 9)
    stem(input_ids=ids, labels=ids).loss.backward()
    gradient = stem.model.layers[0].mlp.stem_embed.weight.grad
    present = torch.zeros(97, dtype=torch.bool).index_fill_(0, ids.flatten(), True)
    assert (gradient[~present] == 0).all() and (gradient[present].abs().sum(-1) > 0).any()


@pytest.mark.parametrize("std", [None, 0.3])
def test_fresh_tables_have_their_deviation(tiny_config: Callable, std: float | None) -> None:
    config = tiny_config("hfe_stem", initializer_range=0.02, stem_init_std=std)
    table = StemForCausalLM(config).model.layers[0].mlp.stem_embed.weight
    expected = std or math.sqrt(2 / (97 + 48))
    # 4,656 draws: within 5 %.
    assert table.std().item() == pytest.approx(expected, rel=0.05)


def test_parameter_counts_of_the_paper() -> None:
    """The 1B model: 1.498 B dense, 1.4146 B active and 6.668 B in all with five STEM layers (stem.md, 1.3)."""
    shape = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
        patched = StemForCausalLM(StemConfig(**shape))
    assert patched.config.stem_layers == [2, 5, 8, 11, 14]
    total = sum(p.numel() for p in patched.parameters())
    active = sum(p.numel() for n, p in patched.named_parameters() if "stem_embed" not in n) + 5 * 8192
    assert sum(p.numel() for p in dense.parameters()) / 1e9 == pytest.approx(1.498, abs=5e-4)
    assert active / 1e9 == pytest.approx(1.4146, abs=5e-4)
    assert total / 1e9 == pytest.approx(6.668, abs=5e-4)


# Ids


def test_ids_beside_embeddings_equal_plain_ids(stem: PreTrainedModel, token_ids: Callable) -> None:
    ids = token_ids(2, 9)
    embeds = stem.get_input_embeddings()(ids)
    assert torch.equal(logits(stem, None, inputs_embeds=embeds, stem_input_ids=ids), logits(stem, ids))


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_generation_from_embeddings_equals_generation_from_ids(
    stem: PreTrainedModel, token_ids: Callable, settings: dict[str, Any]
) -> None:
    ids = token_ids(2, 7)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True} | settings
    expected = stem.generate(ids, **settings)[:, 7:]
    embeds = stem.get_input_embeddings()(ids)
    assert torch.equal(stem.generate(inputs_embeds=embeds, stem_input_ids=ids, **settings), expected)
    stem.config.stem_inputs_embeds = "match"
    assert torch.equal(stem.generate(inputs_embeds=embeds, **settings), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_other_ids_for_the_tables_act_on_the_prompt_only(
    stem: PreTrainedModel, token_ids: Callable, use_cache: bool
) -> None:
    ids = token_ids(1, 7)
    others = ids.flip(1)
    expected = ids
    for _ in range(4):
        token_inputs = torch.cat((others, expected[:, 7:]), 1)
        step = logits(stem, expected, stem_input_ids=token_inputs)[:, -1:].argmax(-1)
        expected = torch.cat((expected, step), 1)
    found = stem.generate(
        ids, stem_input_ids=others, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=use_cache
    )
    assert torch.equal(found, expected)
    assert not torch.equal(logits(stem, ids, stem_input_ids=others), logits(stem, ids))


def test_embeddings_alone_are_refused_by_default(stem: PreTrainedModel, token_ids: Callable) -> None:
    embeds = stem.get_input_embeddings()(token_ids(2, 9))
    with pytest.raises(HFEError, match=r"\(2, 9, 32\) came without the ids.*stem_input_ids"):
        stem(inputs_embeds=embeds)


def test_ids_of_another_shape_are_refused(stem: PreTrainedModel, token_ids: Callable) -> None:
    with pytest.raises(HFEError, match=r"shape \(2, 8\).*\(2, 9\)"):
        stem(input_ids=token_ids(2, 9), stem_input_ids=token_ids(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matching_finds_the_ids_of_embeddings(stem: PreTrainedModel, token_ids: Callable, dtype: torch.dtype) -> None:
    stem = stem.to(dtype)
    stem.config.stem_inputs_embeds = "match"
    ids = token_ids(2, 9)
    embeds = stem.get_input_embeddings()(ids)
    assert torch.equal(logits(stem, None, inputs_embeds=embeds), logits(stem, ids))


def test_matching_works_in_blocks_and_takes_the_lowest_of_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_efficient.modeling.stem import embedding_match

    monkeypatch.setattr(embedding_match, "_BLOCK_ELEMENTS", 40)
    table = nn.Embedding(50, 4)
    with torch.no_grad():
        table.weight[[7, 30]] = table.weight[20].clone()
        table.weight[3] = 0.0
    ids = torch.tensor([[30, 0, 49], [20, 3, 12]])
    found = embedding_match.match_token_ids(-0.0 + table(ids), table, 50)
    assert found.tolist() == [[7, 0, 49], [7, 3, 12]]
    # Zero of the other sign is equal, the next number is not.
    assert embedding_match.match_token_ids(-torch.zeros(1, 1, 4), table, 50).tolist() == [[3]]
    near = table(ids).detach()
    near[1, 2, 0] = torch.nextafter(near[1, 2, 0], torch.tensor(9.0))
    with pytest.raises(HFEError, match=r"position \[1, 2\].*stem_input_ids"):
        embedding_match.match_token_ids(near, table, 50)


# What may stand around the table


def test_bare_table_takes_the_fused_path(stem: PreTrainedModel, token_ids: Callable, fused_calls: list) -> None:
    logits(stem, token_ids(2, 9))
    assert len(fused_calls) == len(stem.config.stem_layers)


def _forward_hook(mlp: StemMLP) -> None:
    mlp.stem_embed.register_forward_hook(lambda module, args, output: output * 2)


def _forward_pre_hook(mlp: StemMLP) -> None:
    mlp.stem_embed.register_forward_pre_hook(lambda module, args: (args[0] * 0,))


def _wrapped_forward(mlp: StemMLP) -> None:
    plain = mlp.stem_embed.forward
    mlp.stem_embed.forward = lambda ids: plain(ids) * 2


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrisation(mlp: StemMLP) -> None:
    parametrize.register_parametrization(mlp.stem_embed, "weight", _Double())


def _wrapper(mlp: StemMLP) -> None:
    mlp.stem_embed = nn.Sequential(mlp.stem_embed, _Double())


def _activation_hook(mlp: StemMLP) -> None:
    mlp.act_fn.register_forward_hook(lambda module, args, output: output * 2)


class _Scaled(Tensor):
    """Like the weight of a quantizer: a tensor subclass with its own look-up."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        return output.as_subclass(Tensor) * 2 if func is F.embedding else output


def _quantised(mlp: StemMLP) -> None:
    weight = mlp.stem_embed.weight.detach().as_subclass(_Scaled)
    mlp.stem_embed.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [_forward_hook, _forward_pre_hook, _wrapped_forward, _parametrisation, _wrapper, _activation_hook, _quantised],
)
def test_adapters_and_hooks_around_the_table_run(
    stem: PreTrainedModel, token_ids: Callable, fused_calls: list, change: Callable[[StemMLP], None]
) -> None:
    ids = token_ids(2, 9)
    plain = logits(stem, ids)
    fused_calls.clear()
    change(stem.model.layers[0].mlp)
    assert (logits(stem, ids) - plain).abs().max() > 1e-3
    assert len(fused_calls) == 1, "the other STEM layer stays fused"


def test_global_hooks_see_the_table(stem: PreTrainedModel, token_ids: Callable) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        logits(stem, token_ids(1, 5))
    finally:
        handle.remove()
    assert seen.count(modeling_stem.StemTable) == 2


def test_unfused_path_equals_the_fused_one(stem: PreTrainedModel, token_ids: Callable) -> None:
    ids = token_ids(2, 9)
    plain = logits(stem, ids)
    for layer in stem.config.stem_layers:
        stem.model.layers[layer].mlp.stem_embed.register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(logits(stem, ids), plain, rtol=0, atol=1e-6)


def test_lora_on_the_table_acts_and_merges(stem: PreTrainedModel, token_ids: Callable) -> None:
    peft = pytest.importorskip("peft")
    ids = token_ids(2, 9)
    plain = logits(stem, ids)
    adapted = peft.get_peft_model(stem, peft.LoraConfig(r=4, target_modules=["stem_embed"], init_lora_weights=False))
    changed = logits(adapted.eval(), ids)
    assert (changed - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, ids), plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), ids), changed, rtol=1e-4, atol=1e-5)


def test_prompt_tuning_is_refused_and_prefix_tuning_works(tiny_model: Callable, token_ids: Callable) -> None:
    peft = pytest.importorskip("peft")
    ids = token_ids(2, 9)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    prompt = peft.get_peft_model(tiny_model("hfe_stem"), peft.PromptTuningConfig(**settings))
    with pytest.raises(HFEError, match="came without the ids"):
        prompt(input_ids=ids)
    prefix = peft.get_peft_model(tiny_model("hfe_stem"), peft.PrefixTuningConfig(**settings))
    prefix(input_ids=ids, labels=ids).loss.backward()


def test_switch_runs_the_stock_path(tiny_model: Callable, stock_and_ours: Callable, token_ids: Callable) -> None:
    """`efficient = False` on every block is the stock model, from the same copy of the weights."""
    stock, _ = stock_and_ours("llama", attention_bias=False, mlp_bias=False)
    both = tiny_model("hfe_stem", stem_keep_up_proj=True)
    missing, unexpected = both.load_state_dict(stock.state_dict(), strict=False)
    assert all("stem_embed" in name for name in missing) and not unexpected
    ids = token_ids(2, 9)
    patched = logits(both, ids)
    for layer in both.config.stem_layers:
        both.model.layers[layer].mlp.efficient = False
    assert (logits(both, ids) - logits(stock, ids)).abs().max() <= 1e-5
    assert (patched - logits(stock, ids)).abs().max() > 1e-2


def test_switch_without_the_stock_weights_is_refused(stem: PreTrainedModel, token_ids: Callable) -> None:
    stem.model.layers[0].mlp.efficient = False
    with pytest.raises(HFEError, match="needs the stock up-projection.*--stem-keep-up-proj"):
        stem(input_ids=token_ids(1, 5))


# Files and vocabulary


def test_new_rows_of_a_table_are_the_mean_of_the_old(stem: PreTrainedModel) -> None:
    old = stem.model.layers[2].mlp.stem_embed.weight.detach().clone()
    stem.resize_token_embeddings(100)
    table = stem.model.layers[2].mlp.stem_embed
    assert table.weight.shape == (100, 48) and table.num_embeddings == 100
    assert torch.equal(table.weight[:97], old)
    torch.testing.assert_close(table.weight[97:], old.mean(0).expand(3, -1))


def test_resizing_by_foreign_code_is_named(stem: PreTrainedModel, token_ids: Callable) -> None:
    stem.set_input_embeddings(nn.Embedding(120, 32))
    with pytest.raises(HFEError, match="97 rows and the embedding has 120.*resize_token_embeddings"):
        stem(input_ids=token_ids(1, 5))


def test_stock_checkpoint_is_refused(stock_and_ours: Callable, tmp_path: Path) -> None:
    stock, _ = stock_and_ours("llama", attention_bias=False, mlp_bias=False)
    stock.save_pretrained(tmp_path)
    with pytest.raises(HFEError, match=r"lacks 1 STEM tables, model\.layers\.2\.mlp\.stem_embed.*hf-efficient convert"):
        StemForCausalLM.from_pretrained(tmp_path)


def test_checkpoint_without_one_table_is_refused(stem: PreTrainedModel, tmp_path: Path) -> None:
    tensors = {name: t.clone() for name, t in stem.state_dict().items() if "layers.2.mlp.stem_embed" not in name}
    stem.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(HFEError, match=r"lacks 1 STEM tables, model\.layers\.2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_empty_state_dict_asks_for_fresh_weights(tiny_config: Callable) -> None:
    model = StemForCausalLM.from_pretrained(None, config=tiny_config("hfe_stem"), state_dict={})
    assert all(torch.isfinite(p).all() for p in model.parameters())
