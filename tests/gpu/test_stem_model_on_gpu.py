"""A small STEM model on a GPU: the Triton backend is taken, and agrees with the reference."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.kernels.dispatch import explain
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM
from tiny_shapes import SMALL, SPECIAL_TOKENS

pytestmark = pytest.mark.gpu

# Largest difference of logits, as a share of their norm: the layers in between round in the model's dtype.
LOGITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _model(dtype: torch.dtype) -> StemForCausalLM:
    torch.manual_seed(0)
    config = StemConfig(**SMALL, **SPECIAL_TOKENS, stem_layers=[1, 2], stem_init_std=0.5)
    return StemForCausalLM(config).to("cuda", dtype).eval()


def _ids() -> torch.Tensor:
    return torch.randint(3, 211, (3, 40), device="cuda", generator=torch.Generator("cuda").manual_seed(1))


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def test_triton_is_the_backend_on_this_device() -> None:
    assert explain("stem_gate", "cuda").startswith("triton: ")


@pytest.mark.parametrize("dtype", LOGITS, ids=["float32", "bfloat16"])
def test_logits_and_gradients_equal_those_of_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _model(dtype).train(), _ids()
    found = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("HFE_BACKEND", backend)
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        found[backend] = {name: p.grad.clone() for name, p in model.named_parameters()}
        found[backend]["logits"] = output.logits.detach()
    for name, expected in found["reference"].items():
        bound = LOGITS[dtype] if name == "logits" else GRADIENTS[dtype]
        assert _distance(found["triton"][name], expected) <= bound, name


def test_generation_with_a_static_cache_gives_the_tokens_of_a_growing_one() -> None:
    model, ids = _model(torch.float32), _ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    growing = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", **options)
    assert growing.shape[1] > ids.shape[1]
    assert torch.equal(growing, static)


def test_the_model_compiles_into_one_graph() -> None:
    model, ids = _model(torch.float32), _ids()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        assert _distance(compiled(input_ids=ids, use_cache=False).logits, expected) <= LOGITS[torch.float32]


def test_a_training_step_under_autocast_keeps_the_table_in_float32() -> None:
    model, ids = _model(torch.float32).train(), _ids()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grad = model.model.layers[1].mlp.stem_embed.weight.grad
    assert grad.dtype is torch.float32
    # The last position of a sequence predicts nothing.
    assert grad[ids[:, :-1].unique()].ne(0).any(dim=1).all()
