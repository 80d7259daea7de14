"""`carry_residual`: each residual add is deferred into the next norm; results, hooks and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_efficient.modeling.decoder.decoder_layer import DecoderLayer

KINDS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "stem": {"stem_layers": [1]},
    "bhyt": {"bhyt_layers": [0, 2], "bhyt_seq_len": 16, "bhyt_final": "bhyt"},
    "stem-bhyt": {"stem_layers": [0], "bhyt_layers": [0, 1, 2], "bhyt_second_site": "exact"},
}


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tiny_model: Callable) -> tuple[Any, Any]:
    """A model, and the same one that carries."""
    fields = KINDS[request.param]
    plain, carrying = (tiny_model("hfe_decoder", **fields, carry_residual=carry) for carry in (False, True))
    carrying.load_state_dict(plain.state_dict())
    return plain, carrying


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer handed its last addition on."""
    calls: list[bool] = []
    forward = DecoderLayer.forward

    def watch(self: DecoderLayer, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        calls.append(isinstance(output, tuple))
        return output

    monkeypatch.setattr(DecoderLayer, "forward", watch)
    return calls


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_and_generated_tokens_are_the_same(
    pair: tuple[Any, Any], token_ids: Callable, carried: list[bool]
) -> None:
    plain, carrying = pair
    ids = token_ids(2, 9)
    expected = plain(input_ids=ids).logits
    assert not any(carried)
    torch.testing.assert_close(carrying(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    assert carried[-3:] == [True] * 3
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        options |= {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(carrying.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
def test_gradients_are_the_same(
    pair: tuple[Any, Any], checkpointing: bool | None, token_ids: Callable, carried: list[bool]
) -> None:
    plain, carrying = (model.train() for model in pair)
    ids = token_ids(2, 9)
    expected = gradients(plain, ids)
    whole = gradients(carrying, ids)
    if checkpointing is not None:
        carrying.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        carrying.enable_input_require_grads()
        before = whole
        whole = gradients(carrying, ids)
        assert all(torch.equal(whole[name], before[name]) for name in before)
    assert carried[-1]
    assert whole.keys() == expected.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_recorded_hidden_states_are_whole(pair: tuple[Any, Any], token_ids: Callable, carried: list[bool]) -> None:
    plain, carrying = pair
    ids = token_ids(2, 9)
    expected = plain(input_ids=ids, output_hidden_states=True).hidden_states
    found = carrying(input_ids=ids, output_hidden_states=True).hidden_states
    assert not any(carried) and len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    carrying.config.output_hidden_states = True
    assert torch.equal(carrying(input_ids=ids).hidden_states[2], expected[2])
    assert not any(carried)
    carrying.config.output_hidden_states = False  # the hooks that recorded them stay, and stay quiet
    carrying(input_ids=ids)
    assert carried[-1]


def test_generate_returns_whole_hidden_states(pair: tuple[Any, Any], token_ids: Callable) -> None:
    plain, carrying = pair
    options = {"max_new_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True}
    expected, found = (model.generate(token_ids(1, 5), **options).hidden_states for model in (plain, carrying))
    for step, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, other, strict=True))


def test_a_hook_or_wrapper_sees_the_whole_stream(
    pair: tuple[Any, Any], token_ids: Callable, carried: list[bool]
) -> None:
    plain, carrying = pair
    ids = token_ids(2, 9)
    expected = plain(input_ids=ids, output_hidden_states=True).hidden_states[2]
    seen: list[Tensor] = []
    layer = carrying.model.layers[1]
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    carrying(input_ids=ids)
    assert not any(carried) and torch.equal(seen[0], expected)
    handle.remove()
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    carrying(input_ids=ids)
    assert not any(carried)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    carrying(input_ids=ids)
    assert not any(carried)
    handle.remove()
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)  # as Accelerate does
    carrying(input_ids=ids)
    assert not any(carried)
    del layer.forward
    carrying(input_ids=ids)
    assert carried[-1]


def test_one_graph_when_compiled(token_ids: Callable, tiny_model: Callable) -> None:
    model = tiny_model("hfe_decoder", **KINDS["bhyt"], carry_residual=True).train()
    ids = token_ids(2, 9)
    expected = gradients(model, ids)
    torch._dynamo.reset()  # what other tests have compiled counts against the limit of this one
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-6)
