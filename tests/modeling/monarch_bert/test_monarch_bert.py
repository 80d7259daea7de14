"""The registered BERT computes, bit for bit, what the stock classes compute, and takes what they take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from hf_efficient.modeling.monarch_bert.modeling_monarch_bert import (
    MonarchBertConfig,
    MonarchBertForMaskedLM,
)

SHAPE: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 2},
}
HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


def stock_and_ours(head: str, attention: str = "sdpa", **fields: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock BERT with random weights, and ours with the same tensors under the same names."""
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModel{head.removeprefix('Model')}")
    stock = auto.from_config(BertConfig(**SHAPE, **fields), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = auto.from_config(MonarchBertConfig(**SHAPE, **fields), attn_implementation=attention).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def outputs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, token_type_ids=(ids % 2))
    return [each for each in found.to_tuple() if isinstance(each, Tensor)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS)
def test_outputs_are_those_of_stock_bert(head: str, attention: str, token_ids: Callable) -> None:
    stock, ours = stock_and_ours(head, attention)
    assert type(ours).__name__ == f"MonarchBert{head}"
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, 7:] = 0
    for found, expected in zip(outputs(ours, ids, mask), outputs(stock, ids, mask), strict=True):
        assert torch.equal(found, expected)


def test_an_untied_head_is_followed(token_ids: Callable) -> None:
    stock, ours = stock_and_ours("ForMaskedLM", tie_word_embeddings=False)
    ids = token_ids(2, 11)
    (found,), (expected,) = (outputs(model, ids, torch.ones_like(ids)) for model in (ours, stock))
    assert torch.equal(found, expected)


def test_padding_on_the_right_changes_nothing(token_ids: Callable) -> None:
    _, ours = stock_and_ours("ForMaskedLM")
    ids = token_ids(1, 9)
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), 1)
    with torch.no_grad():
        found = ours(input_ids=padded, attention_mask=(padded != 0).long()).logits[:, :9]
        torch.testing.assert_close(found, ours(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["LORA", "IA3", "ADALORA"])
def test_a_method_without_targets_trains_what_it_trains_of_stock_bert(method: str, token_ids: Callable) -> None:
    stock, ours = stock_and_ours("ForMaskedLM")
    settings = {"LORA": peft.LoraConfig(), "IA3": peft.IA3Config(), "ADALORA": peft.AdaLoraConfig(total_step=10)}
    adapted = [peft.get_peft_model(model, copy.deepcopy(settings[method])) for model in (stock, ours)]
    expected, found = ({n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in adapted)
    assert found == expected
    ids = token_ids(2, 9)
    adapted[1](input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size=32 must be a multiple of num_attention_heads=5"),
        ({"is_decoder": True}, "is_decoder and add_cross_attention must be False"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        MonarchBertForMaskedLM(MonarchBertConfig(**{**SHAPE, **fields}))


@pytest.mark.parametrize("head", HEADS)
def test_a_field_that_is_set_while_loading_is_checked_too(head: str, tmp_path: Path) -> None:
    _, ours = stock_and_ours(head)
    ours.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="is_decoder and add_cross_attention must be False"):
        type(ours).from_pretrained(tmp_path, is_decoder=True)
    assert type(type(ours).from_pretrained(tmp_path)) is type(ours)
