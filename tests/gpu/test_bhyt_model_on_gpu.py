"""A small BHyT model on a GPU: the Triton backend is taken, and agrees with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient.kernels.bhyt_norm.api import bhyt_norm
from hf_efficient.kernels.dispatch import explain
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytForCausalLM
from tiny_shapes import SMALL, SPECIAL_TOKENS

pytestmark = pytest.mark.gpu

# Largest difference, as a share of the norm: the layers in between round in the model's dtype.
LOGITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SITES: dict[str, dict[str, Any]] = {
    "exact": {"bhyt_second_site": "exact", "bhyt_final": "bhyt"},
    "approx": {"bhyt_second_site": "approx", "bhyt_exact_layers": [0]},
    "affine": {"bhyt_second_site": "affine", "bhyt_output_scale": True},
    "carried": {"bhyt_second_site": "approx", "carry_residual": True},
}
by_site = pytest.mark.parametrize("site", SITES)


def _model(site: str, dtype: torch.dtype) -> BhytForCausalLM:
    torch.manual_seed(0)
    config = BhytConfig(**SMALL, **SPECIAL_TOKENS, initializer_range=0.3, bhyt_seq_len=40, **SITES[site])
    return BhytForCausalLM(config).to("cuda", dtype).eval()


def _ids() -> Tensor:
    return torch.randint(3, 211, (3, 40), device="cuda", generator=torch.Generator("cuda").manual_seed(1))


def _distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def test_triton_is_the_backend_on_this_device() -> None:
    assert explain("bhyt_norm", "cuda").startswith("triton: ")


@by_site
@pytest.mark.parametrize("dtype", LOGITS, ids=["float32", "bfloat16"])
def test_logits_and_gradients_equal_those_of_the_reference(
    site: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = _model(site, dtype).train(), _ids()
    found = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("HFE_BACKEND", backend)
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        found[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[backend]["logits"] = output.logits.detach()
    assert any(name.endswith("input_layernorm.lam") for name in found["triton"])
    for name, expected in found["reference"].items():
        bound = LOGITS[dtype] if name == "logits" else GRADIENTS[dtype]
        # A lambda's gradient is one number, the sum of all there is, and cancels.
        bound *= 20 if name.endswith(".lam") else 1
        assert _distance(found["triton"][name], expected) <= bound, name


@by_site
def test_a_captured_step_gives_the_tokens_of_transformers_loop(site: str) -> None:
    model, ids = _model(site, torch.float32), _ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    captured = model.generate(ids, **options)
    assert model.captured_steps()
    looped = model.generate(ids, disable_compile=True, **options)
    assert captured.shape[1] > ids.shape[1]
    assert torch.equal(captured, looped)


def test_a_captured_step_sees_a_refreshed_branch_variance() -> None:
    model, ids = _model("approx", torch.float32), _ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    model.generate(ids, **options)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(30)
    after = model.generate(ids, **options)
    assert torch.equal(after, model.generate(ids, disable_compile=True, **options))


@by_site
def test_the_model_compiles_into_one_graph(site: str) -> None:
    model, ids = _model(site, torch.float32), _ids()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        assert _distance(compiled(input_ids=ids, use_cache=False).logits, expected) <= LOGITS[torch.float32]


def test_a_training_step_under_autocast_keeps_the_stream_in_float32() -> None:
    model, ids = _model("approx", torch.float32).train(), _ids()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    output.loss.backward()
    assert all(states.dtype is torch.float32 for states in output.hidden_states[:-1])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_values_do_not_become_silent_zeros(dtype: torch.dtype) -> None:
    """A square of 300 is more than float16 holds."""
    x = torch.ones(2, 2000, device="cuda", dtype=dtype)
    x[0, 0] = 300
    weight, bound = torch.ones(2000, device="cuda", dtype=dtype), torch.ones(1, device="cuda", dtype=dtype)
    normed, _, v = bhyt_norm(x, weight, bound, 1e-6)
    expected, _, exact = bhyt_norm(x.double(), weight.double(), bound.double(), 1e-6, backend="reference")
    assert _distance(v, exact) < 1e-5
    assert _distance(normed, expected) < 5e-3 and normed.ne(0).all()


def test_a_broken_row_stays_alone() -> None:
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    weight, bound = torch.ones(512, device="cuda", dtype=torch.bfloat16), x.new_ones(1)
    broken = x.clone()
    broken[1, 3], broken[3, 7] = float("nan"), float("inf")
    found, expected = (bhyt_norm(rows, weight, bound, 1e-6)[0] for rows in (broken, x))
    assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])
    assert found[1].isnan().all() and found[3, 7].isnan()


def test_more_elements_than_32_bits_count() -> None:
    rows, width = 140_000, 16384
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(width, device="cuda").bfloat16()
    weight, bound = torch.ones(width, device="cuda", dtype=torch.bfloat16), x.new_ones(1)
    normed, _, v = bhyt_norm(x, weight, bound, 1e-6)
    expected, _, last = bhyt_norm(x[-1:].clone(), weight, bound, 1e-6)
    assert torch.equal(normed[-1:], expected) and torch.equal(v[-1:], last)
    assert not normed[: rows // 2].any() and not normed[rows // 2 : -1].any()
