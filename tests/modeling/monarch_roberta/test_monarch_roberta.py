"""The registered RoBERTa: its positions, the longest text, and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, RobertaForMaskedLM, pipeline

from hf_efficient.modeling.monarch_roberta.modeling_monarch_roberta import (
    MonarchRobertaConfig,
    MonarchRobertaForMaskedLM,
    MonarchRobertaModel,
)

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"vocab_size": 60, "max_position_embeddings": 66},
}
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"word{i}" for i in range(55))]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>", model_max_length=64
    )


def test_texts_up_to_the_longest_run(token_ids: Any) -> None:
    model = MonarchRobertaModel(MonarchRobertaConfig(**SIZES, monarch={"block_size": 8})).eval()
    with torch.no_grad():
        assert model(token_ids(1, 64, 60)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size=32 must be a multiple of num_attention_heads=5"),
        ({"is_decoder": True}, "is_decoder and add_cross_attention must be False"),
        ({"monarch": {"block_size": 65}}, "block_size=65 must be at most max_position_embeddings-2=64"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        MonarchRobertaConfig(**(SIZES | fields))


def test_a_stock_checkpoint_loads_into_it(token_ids: Any, tmp_path: Path) -> None:
    ids = token_ids(2, 20, 60)
    stock = RobertaForMaskedLM._from_config(RobertaForMaskedLM.config_class(**SIZES)).eval()
    stock.save_pretrained(tmp_path)
    ours = MonarchRobertaForMaskedLM.from_pretrained(tmp_path, config=MonarchRobertaConfig(**SIZES)).eval()
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction"])
def test_pipelines_give_in_a_batch_what_they_give_for_one_text(task: str, tokenizer: PreTrainedTokenizerFast) -> None:
    config = MonarchRobertaConfig(**SIZES, monarch={"block_size": 4})
    torch.manual_seed(0)
    model = (MonarchRobertaForMaskedLM if task == "fill-mask" else MonarchRobertaModel)(config).eval()
    run = pipeline(task, model=model, tokenizer=tokenizer)
    texts = [" ".join([*(f"word{i}" for i in range(n)), "<mask>"]) for n in (30, 13, 5)]
    together = [each for batch in run(texts, batch_size=3) for each in [batch]]
    for text, found in zip(texts, together, strict=True):
        alone = run(text)
        if task == "fill-mask":
            assert [each["token_str"] for each in found] == [each["token_str"] for each in alone]
            assert [each["score"] for each in found] == pytest.approx([each["score"] for each in alone], abs=1e-5)
        else:
            count = len(text.split())
            torch.testing.assert_close(torch.tensor(found)[0, :count], torch.tensor(alone)[0], rtol=1e-5, atol=1e-5)
