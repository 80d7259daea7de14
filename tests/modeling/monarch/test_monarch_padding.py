"""The output for a sequence does not depend on its padding, nor on the other rows of its batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch import monarch_interface
from hf_efficient.modeling.monarch.monarch_interface import monarch_attention_forward, monarch_mask
from hf_efficient.modeling.monarch.monarch_layers import enable_monarch
from hf_efficient.modeling.monarch.monarch_mask import pack_mask, unpack_mask
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec

# Lengths that are no multiples of a block of 4; with two blocks as the shortest, 3 and 7 use softmax attention.
LENGTHS = (41, 30, 9, 7, 3)


def batch_of(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [5, 41] of sequences of `LENGTHS`, padded on a side, or with masked tokens scattered among them."""
    tokens = max(LENGTHS)
    batch, mask = (
        torch.zeros(len(LENGTHS), tokens, dtype=torch.long),
        torch.zeros(len(LENGTHS), tokens, dtype=torch.long),
    )
    for row, length in enumerate(LENGTHS):
        start = tokens - length if side == "left" else 0
        batch[row, start : start + length] = ids[row, :length]
        mask[row, start : start + length] = 1
    batch[mask == 0] = torch.randint(3, 90, batch.shape)[mask == 0]  # what padding holds must not matter
    return batch, mask


def hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **inputs)[0]


@pytest.mark.parametrize("pad", ["post", "pre"])
def test_a_padded_batch_equals_its_sequences_alone(padded: tuple[str, str], pad: str, stock_model: Callable) -> None:
    name, side = padded
    model = stock_model(name)
    enable_monarch(model, MonarchSpec(block_size=4, pad=pad, num_iters=2 if side == "left" else 1))
    ids = torch.randint(3, 90, (len(LENGTHS), max(LENGTHS)))
    batch, mask = batch_of(ids, side)
    # Rotary positions (ESM, ModernBERT) matter by their differences only; some models count them by the padding token.
    if name in ("roberta", "xlm-roberta", "esm"):
        batch[mask == 0] = 1
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name in ("bert", "electra") else {}
    together = hidden(model, batch, mask, **positions)
    for row, length in enumerate(LENGTHS):
        alone = hidden(model, ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long))[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, rtol=1e-5, atol=1e-5)


def layer(spec: MonarchSpec) -> torch.nn.Module:
    """An attention module with these settings, as `enable_monarch` leaves it."""
    module = torch.nn.Module()
    module.config = type("Config", (), {"is_encoder_decoder": False})()
    module.is_causal, module.monarch, module.efficient = False, spec, True
    return module


def attend(qkv: Tensor, keep: Tensor | None, spec: MonarchSpec) -> Tensor:
    """Output [B, N, H, D] of the attention function for queries, keys and values [3, B, H, N, D]."""
    mask = None if keep is None else pack_mask(keep, spec)
    return monarch_attention_forward(layer(spec), *qkv, mask)[0]


@pytest.mark.parametrize("pad", ["post", "pre"])
@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("pad_queries", ["zero", "mean"])
def test_masked_tokens_anywhere_in_a_row_are_as_if_absent(pad: str, num_iters: int, pad_queries: str) -> None:
    spec = MonarchSpec(block_size=4, pad=pad, num_iters=num_iters, pad_queries=pad_queries)
    qkv = torch.randn(3, 6, 2, 29, 8, dtype=torch.float64)
    keep = torch.rand(6, 29) < torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])[:, None]
    assert keep.sum(1).min() < spec.least_tokens < keep.sum(1).max()
    found = attend(qkv, keep, spec)
    for row in range(6):
        alone = attend(qkv[:, row : row + 1][..., keep[row], :], None, spec)
        torch.testing.assert_close(found[row][keep[row]], alone[0], rtol=1e-9, atol=1e-9)


def test_a_row_is_long_enough_by_its_own_valid_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MonarchSpec(block_size=4, min_length=20)
    qkv = torch.randn(3, 3, 2, 40, 8)
    keep = torch.arange(40) < torch.tensor([40, 20, 19])[:, None]
    found = attend(qkv, keep, spec)
    softmax = torch.nn.functional.scaled_dot_product_attention(*qkv, keep[:, None, None]).transpose(1, 2)
    same = [torch.allclose(found[row][keep[row]], softmax[row][keep[row]], atol=1e-5) for row in range(3)]
    assert same == [False, False, True]


def test_a_sequence_that_is_too_short_is_exact_also_when_every_row_is(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MonarchSpec(block_size=4, min_length=20)
    monkeypatch.setattr(monarch_interface, "monarch_attention", None)  # it must not be called
    qkv = torch.randn(3, 2, 2, 40, 8)
    for keep in (torch.arange(40) < torch.tensor([19, 5])[:, None], None):
        tokens = 40 if keep is not None else 19
        found = attend(qkv[..., :tokens, :], keep, spec)
        mask = None if keep is None else keep[:, None, None]
        expected = torch.nn.functional.scaled_dot_product_attention(*qkv[..., :tokens, :], mask).transpose(1, 2)
        valid = torch.ones(2, tokens, dtype=torch.bool) if keep is None else keep
        torch.testing.assert_close(found[valid], expected[valid])


@pytest.mark.parametrize("lengths", [(29, 0), (5, 0), (0, 0)])
def test_a_row_without_valid_tokens_is_zero(lengths: tuple[int, int]) -> None:
    spec = MonarchSpec(block_size=4)
    qkv = torch.randn(3, 2, 2, 29, 8, requires_grad=True)
    keep = torch.arange(29) < torch.tensor(lengths)[:, None]
    found = attend(qkv, keep, spec)
    assert found.isfinite().all() and (found[torch.tensor(lengths) == 0] == 0).all()
    found.sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


@pytest.mark.parametrize("pad", ["post", "pre"])
def test_gradients_of_a_padded_batch_are_those_of_its_sequences(pad: str) -> None:
    spec = MonarchSpec(block_size=4, pad=pad)
    qkv = torch.randn(3, 3, 2, 29, 8, dtype=torch.float64, requires_grad=True)
    keep = (torch.arange(29) >= torch.tensor([0, 10, 25])[:, None]) & (torch.arange(29) < 28)
    weights = torch.randn(3, 29, 2, 8, dtype=torch.float64)
    (attend(qkv, keep, spec) * weights)[keep].sum().backward()
    together = qkv.grad.clone()
    qkv.grad = None
    for row in range(3):
        alone = attend(qkv[:, row : row + 1][..., keep[row], :], None, spec)
        (alone[0] * weights[row][keep[row]]).sum().backward()
    torch.testing.assert_close(together, qkv.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pad", ["post", "pre"])
def test_a_traced_mask_gives_the_same_output(pad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is traced or captured nothing may be read back, and one kind of mask serves all."""
    spec = MonarchSpec(block_size=4, pad=pad)
    qkv = torch.randn(3, 4, 2, 29, 8)
    for lengths in ((29, 29, 29, 29), (29, 8, 20, 8), (5, 29, 0, 11), (2, 3, 4, 5)):
        for shift in (0, 29):
            keep = torch.arange(29) < torch.tensor(lengths)[:, None]
            keep = keep.flip(1) if shift else keep
            expected = attend(qkv, keep, spec)
            with monkeypatch.context() as patch:
                patch.setattr("hf_efficient.modeling.monarch.monarch_mask.is_tracing", lambda tensor: True)
                traced = pack_mask(keep, spec)
            assert traced.shape == (4, 1, 4, 29)
            found = monarch_attention_forward(layer(spec), *qkv, traced)[0]
            torch.testing.assert_close(found[keep], expected[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [((29, 29), None), ((29, 8), (2, 29)), ((29, 7), (2, 1, 2, 29)), ((7, 7), (2, 1, 1, 29))],
)
def test_a_mask_has_no_more_than_the_layers_need(lengths: tuple[int, int], shape: tuple[int, ...] | None) -> None:
    keep = torch.arange(29) < torch.tensor(lengths)[:, None]
    mask = pack_mask(keep, MonarchSpec(block_size=4))
    assert (None if mask is None else tuple(mask.shape)) == shape
    assert mask is None or torch.equal(unpack_mask(mask).keep, keep)
    assert pack_mask(keep.flip(1), MonarchSpec(block_size=4, pad="pre")) is None or mask.shape == shape


def prepared(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """Hidden states for a mask of rank 4, which transformers hands to the layers as it is."""
    torch.manual_seed(0)
    return hidden(model, torch.randint(3, 90, (2, 29)), mask)


@pytest.mark.parametrize("queries", [1, 29])
@pytest.mark.parametrize("kind", ["bool", "float", "expanded"])
def test_a_prepared_mask_that_is_the_same_for_every_query_is_one_of_tokens(
    kind: str, queries: int, stock_model: Callable
) -> None:
    model = stock_model("bert")
    enable_monarch(model, MonarchSpec(block_size=4))
    keep = torch.arange(29) < torch.tensor([29, 18])[:, None]
    mask = keep[:, None, None].expand(-1, 1, queries, -1)
    mask = mask if kind == "expanded" else mask.clone()
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found, expected = prepared(model, mask), prepared(model, keep.long())
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 1, 29, 29).tril().bool(), r"attention mask \[2, 1, 29, 29\] whose rows differ"),
        (torch.ones(2, 4, 29, 29).bool(), r"attention mask \[2, 4, 29, 29\]; Monarch attention takes one per row"),
        (torch.randn(2, 1, 1, 29), "attention mask with a bias"),
    ],
)
def test_another_prepared_mask_is_refused(mask: Tensor, words: str, stock_model: Callable) -> None:
    with pytest.raises(ValueError, match=words):
        prepared(stock_model("bert", "monarch"), mask)


def test_a_mask_of_rank_three_is_refused(stock_model: Callable) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 29, 29\]"):
        prepared(stock_model("bert", "monarch"), torch.ones(2, 29, 29, dtype=torch.long))


def test_more_keys_than_queries_are_refused() -> None:
    spec = MonarchSpec(block_size=4)
    q, k = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 24, 8)
    with pytest.raises(HFEError, match="20 queries and 24 keys"):
        monarch_attention_forward(layer(spec), q, k, k, None)


def test_a_mask_for_cross_attention_says_softmax(stock_model: Callable) -> None:
    config = stock_model("bart").config
    from transformers.masking_utils import bidirectional_mask_function

    keep = torch.arange(40) < torch.tensor([40, 30])[:, None]
    mask = monarch_mask(
        2, 9, 40, mask_function=bidirectional_mask_function, attention_mask=keep, config=config,
        allow_is_bidirectional_skip=True,
    )  # fmt: skip
    assert unpack_mask(mask).softmax and torch.equal(unpack_mask(mask).keep, keep)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_computes_what_the_model_computes(backend: str, stock_model: Callable) -> None:
    torch._dynamo.reset()
    ids = torch.randint(3, 90, (len(LENGTHS), max(LENGTHS)))
    for name in ("bert", "vit") if backend == "aot_eager" else ("bert",):
        for layers in (None, [1]):
            model = stock_model(name)
            if layers is None:
                model.set_attn_implementation("monarch")
            else:
                enable_monarch(model, MonarchSpec(block_size=4), layers=layers)
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            with torch.no_grad():
                if name == "vit":
                    pixels = torch.randn(2, 3, 24, 24)
                    torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0], rtol=1e-4, atol=1e-4)
                    continue
                for side in ("right", "left"):
                    batch, mask = batch_of(ids, side)
                    found, expected = compiled(batch, attention_mask=mask)[0], hidden(model, batch, mask)
                    valid = mask.bool()
                    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-4)
            if backend == "inductor":
                return
