"""Batches of structured texts: what is learnt where, and that a text's loss does not depend on how it is laid out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import hf_efficient
from hf_efficient.data.structured_text import to_medverse, to_multiverse
from hf_efficient.data.topology_collator import IGNORED, TopologyDataCollator, mark_topology_trained
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.medverse.modeling_medverse import MedVerseConfig, MedVerseForCausalLM
from hf_efficient.modeling.multiverse.modeling_multiverse import MultiverseConfig, MultiverseForCausalLM
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS, control_token_ids
from hf_efficient.modeling.topology.grammar.topology import Topology

PROMPT = "Q: both?\n"
BLOCK = (
    "<Think>\nso\n<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>\n"
    "<Path>\n1: left\n</Path>\n<Path>\n2: right side\n</Path>\n<Conclusion>\nboth\n</Conclusion>\n"
    "</Parallel>\nend\n</Think>"
)
SAMPLE = {
    "question": "?",
    "steps": [
        {"id": "a", "title": "A", "text": "first"},
        {"id": "b", "title": "B", "text": "second one"},
        {"id": "c", "title": "C", "text": "third", "deps": ["a", "b"]},
    ],
    "conclusion": "done",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the control tokens of both grammars."""
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    whole = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: ",
    )
    fast.add_tokens(sorted({tag for tags in CONTROL_TOKENS.values() for tag in tags}), special_tokens=True)
    return fast


SHAPE: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3},
}


def tiny(tokenizer: Any, grammar: str = "multiverse", **options: Any) -> Any:
    classes = {
        "multiverse": (MultiverseConfig, MultiverseForCausalLM),
        "medverse": (MedVerseConfig, MedVerseForCausalLM),
    }
    config_class, model_class = classes[grammar]
    torch.manual_seed(0)
    config = config_class(**SHAPE, topology={"token_ids": control_token_ids(tokenizer, grammar)})
    return model_class._from_config(config, **options).double().eval()


def learnt_text(batch: dict[str, Tensor], tokenizer: Any, row: int = 0) -> list[str]:
    """The runs of tokens that are learnt."""
    runs: list[list[int]] = [[]]
    for label in batch["labels"][row].tolist():
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


# What is learnt


def test_prompt_headers_and_first_tokens_are_not_learnt(tokenizer: Any) -> None:
    batch = TopologyDataCollator(tokenizer, "multiverse")([{"prompt": PROMPT, "completion": BLOCK}])
    assert learnt_text(batch, tokenizer) == [
        "<Think>\nso\n<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>",
        " left\n</Path>",
        " right side\n</Path>",
        "both\n</Conclusion>\n</Parallel>\nend\n</Think></s>",
    ]
    assert tokenizer.decode(batch["input_ids"][0]) == PROMPT + BLOCK + "</s>"
    kept = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_medverse_headers_are_not_learnt(tokenizer: Any) -> None:
    batch = TopologyDataCollator(tokenizer, "medverse")([{"prompt": PROMPT, "completion": to_medverse(SAMPLE)}])
    found = learnt_text(batch, tokenizer)
    assert found[0].startswith("<Think>\n<Plan>\n<Outline> Transient Step 1") and found[0].endswith("</Plan>")
    assert found[1:] == [
        "first\n</Step>",
        "second one\n</Step>",
        "third\n</Step>",
        "Explanation: done\n</Conclusion>\n</Think></s>",
    ]


def test_forced_tokens_are_learnt_on_request_but_for_first_tokens_of_segments(tokenizer: Any) -> None:
    features = [{"prompt": PROMPT, "completion": BLOCK}]
    found = learnt_text(TopologyDataCollator(tokenizer, "multiverse", mask_forced=False)(features), tokenizer)
    assert found[1:] == [
        "\n1: left\n</Path>\n",
        "\n2: right side\n</Path>\n",
        "\nboth\n</Conclusion>\n</Parallel>\nend\n</Think></s>",
    ]
    reference = TopologyDataCollator(tokenizer, "multiverse", label_mode="reference")(features)
    assert learnt_text(reference, tokenizer) == [BLOCK + "</s>"]


def test_every_learnt_token_follows_its_predecessor_in_the_topology(tokenizer: Any) -> None:
    features = [{"prompt": PROMPT, "completion": text} for text in (BLOCK, to_multiverse(SAMPLE))]
    collator = TopologyDataCollator(tokenizer, "multiverse", mask_forced=False, packing=True, max_length=2000)
    batch = collator(features)
    (learnt,) = (batch["labels"][0] != IGNORED).nonzero(as_tuple=True)
    assert torch.equal(batch["segment_ids"][0, learnt], batch["segment_ids"][0, learnt - 1])
    assert torch.equal(batch["position_ids"][0, learnt], batch["position_ids"][0, learnt - 1] + 1)


def test_given_labels_and_chats(tokenizer: Any) -> None:
    ids = tokenizer(PROMPT + BLOCK).input_ids
    labels = [IGNORED] * len(PROMPT) + ids[len(PROMPT) :]
    collator = TopologyDataCollator(tokenizer, "multiverse")
    given = collator([{"input_ids": torch.tensor(ids), "labels": labels}])
    strings = collator([{"prompt": PROMPT, "completion": BLOCK}])
    assert torch.equal(given["labels"][0], strings["labels"][0, :-1])
    assert learnt_text(collator([{"input_ids": ids}]), tokenizer)[0].startswith("Q: both?")
    chat = collator([{"prompt": [{"role": "user", "content": "Q"}], "completion": "A"}])
    assert tokenizer.decode(chat["input_ids"][0]) == "user: Q\nassistant: A</s>"
    assert learnt_text(chat, tokenizer) == ["A</s>"]


# Shapes


def test_rows_are_padded_on_the_right(tokenizer: Any) -> None:
    features = [{"prompt": "", "completion": text} for text in ("short", BLOCK)]
    batch = TopologyDataCollator(tokenizer, "multiverse", pad_to_multiple_of=64)(features)
    length = len(tokenizer("short").input_ids) + 1
    assert {name: (value.dtype, value.shape[0]) for name, value in batch.items()} == {
        **dict.fromkeys(("input_ids", "labels", "position_ids"), (torch.int64, 2)),
        **{"segment_ids": (torch.int32, 2), "segment_visibility": (torch.int64, 2)},
    }
    assert batch["input_ids"].shape[1] % 64 == 0
    assert (batch["input_ids"][0, length:] == tokenizer.pad_token_id).all()
    assert (batch["labels"][0, length:] == IGNORED).all()
    assert (batch["segment_ids"][0, length:] == -1).all() and (batch["segment_ids"][0, :length] == 0).all()
    ids = tokenizer(BLOCK + "</s>").input_ids
    topology = Topology.from_token_ids(ids, "multiverse", control_token_ids(tokenizer, "multiverse"))
    assert batch["segment_ids"][1, : len(ids)].tolist() == topology.segment_ids.tolist()
    assert batch["position_ids"][1, : len(ids)].tolist() == topology.position_ids.tolist()
    assert torch.equal(batch["segment_visibility"][1], topology.bitmaps())


@pytest.mark.parametrize("grammar", ["multiverse", "medverse"])
def test_long_texts_are_cut_anywhere(grammar: str, tokenizer: Any) -> None:
    text = BLOCK if grammar == "multiverse" else to_medverse(SAMPLE)
    features = [{"prompt": PROMPT, "completion": text}]
    whole = TopologyDataCollator(tokenizer, grammar)(features)
    for length in range(1, whole["input_ids"].shape[1]):
        batch = TopologyDataCollator(tokenizer, grammar, max_length=length)(features)
        for name in ("input_ids", "segment_ids", "position_ids"):
            assert torch.equal(batch[name], whole[name][:, :length])
        segments = batch["segment_visibility"].shape[1]
        assert segments == int(batch["segment_ids"].max()) + 1
        assert torch.equal(batch["segment_visibility"], whole["segment_visibility"][:, :segments])


# Losses


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each learnt token, in the order of the rows."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
    return losses[labels.flatten() != IGNORED]


def test_the_loss_is_that_of_the_paths_on_their_own(tokenizer: Any) -> None:
    """A path alone is trunk and path as plain text in an ordinary causal model."""
    model = tiny(tokenizer)
    batch = TopologyDataCollator(tokenizer, "multiverse")([{"prompt": PROMPT, "completion": BLOCK}])
    ids, segments = batch["input_ids"], batch["segment_ids"]
    with torch.no_grad():
        loss = model(**batch).loss
    alone = []
    for segment in range(3):
        chosen = torch.isin(segments[0], torch.tensor([0, segment]))
        # Not what comes after the join, which sees both paths.
        labels = batch["labels"].masked_fill(segments != segment, IGNORED)
        plain = {"input_ids": ids[:, chosen], "labels": labels[:, chosen]}
        alone.append(token_losses(model, plain))
        assert alone[-1].numel() > 4
    together = token_losses(model, batch)
    joined = batch["labels"].masked_fill(segments != 3, IGNORED)
    join = token_losses(model, {**batch, "labels": joined})
    torch.testing.assert_close(together, torch.cat([*alone, join]), rtol=1e-10, atol=1e-10)
    assert loss.item() == pytest.approx(together.mean().item(), rel=1e-6)  # transformers adds up in single precision


@pytest.mark.parametrize("grammar", ["multiverse", "medverse"])
def test_packed_texts_are_learnt_as_separate_ones(grammar: str, tokenizer: Any) -> None:
    write = to_multiverse if grammar == "multiverse" else to_medverse
    texts = [BLOCK if grammar == "multiverse" else write(SAMPLE), "plain text", write(SAMPLE), "more"]
    features = [{"prompt": PROMPT, "completion": text} for text in texts]
    model = tiny(tokenizer, grammar)
    separate = TopologyDataCollator(tokenizer, grammar)(features)
    packed = TopologyDataCollator(tokenizer, grammar, packing=True, max_length=1500)(features)
    assert len(separate["input_ids"]) == 4 and len(packed["input_ids"]) < 4
    a, b = (token_losses(model, batch).sort().values for batch in (separate, packed))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    # The first token of a packed text must not be predicted from the text before it.
    features = [{"input_ids": tokenizer(text).input_ids} for text in ("one", "two")]
    row = TopologyDataCollator(tokenizer, grammar, packing=True, max_length=64)(features)
    assert row["labels"].tolist() == [[*features[0]["input_ids"], IGNORED, *features[1]["input_ids"][1:]]]


def test_packing_fills_the_first_row_that_has_room(tokenizer: Any) -> None:
    features = [{"input_ids": [5] * length} for length in (6, 7, 4, 3, 12)]
    batch = TopologyDataCollator(tokenizer, "multiverse", packing=True, max_length=10)(features)
    assert batch["input_ids"].shape == (3, 10)
    # 6 and 4, 7 and 3, and what is left of 12.
    assert batch["segment_ids"].tolist() == [[0] * 6 + [1] * 4, [0] * 7 + [1] * 3, [0] * 10]


@pytest.mark.parametrize("grammar", ["multiverse", "medverse"])
def test_a_stock_model_learns_the_same_under_a_dense_mask(grammar: str, tokenizer: Any) -> None:
    ours = tiny(tokenizer, grammar)
    stock = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).double().eval()
    stock.load_state_dict(ours.state_dict())
    text = BLOCK if grammar == "multiverse" else to_medverse(SAMPLE)
    features = [{"prompt": PROMPT, "completion": text}, {"prompt": PROMPT, "completion": "plain"}]
    batch = TopologyDataCollator(tokenizer, grammar)(features)
    dense = TopologyDataCollator(tokenizer, grammar, backend="sdpa")(features)
    size = batch["input_ids"].shape[1]
    assert sorted(dense) == ["attention_mask", "input_ids", "labels", "position_ids"]
    assert dense["attention_mask"].shape == (2, 1, size, size) and dense["attention_mask"].dtype == torch.bool
    expected = token_losses(ours, batch)
    for cache in (False, True):  # without one, jumps of the positions must not be read as packed sequences
        torch.testing.assert_close(token_losses(stock, {**dense, "use_cache": cache}), expected, rtol=1e-9, atol=1e-9)
    loss = stock(**dense).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in stock.parameters())
    wrong = token_losses(stock, {name: dense[name] for name in ("input_ids", "labels")})
    assert (wrong - expected).abs().max() > 1e-3


def test_a_trainer_takes_it(tokenizer: Any, tmp_path: Any) -> None:
    model = tiny(tokenizer).float().train()
    features = [{"prompt": PROMPT, "completion": text} for text in (BLOCK, to_multiverse(SAMPLE))] * 2
    arguments = TrainingArguments(
        **{"output_dir": str(tmp_path), "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        **{"report_to": [], "remove_unused_columns": False, "save_strategy": "no", "use_cpu": True},
        **{"logging_steps": 1, "disable_tqdm": True},
    )
    trainer = Trainer(
        model, arguments, data_collator=TopologyDataCollator(tokenizer, "multiverse"), train_dataset=features
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grammar": "xml"}, "grammar='xml' is unknown"),
        ({"grammar": "multiverse", "mode": "tree"}, "mode='tree' is unknown"),
        ({"grammar": "multiverse", "backend": "eager"}, "backend='eager' is unknown; choose one of topology, sdpa"),
        ({"grammar": "multiverse", "label_mode": "x"}, "label_mode='x' is unknown"),
        ({"grammar": "multiverse", "max_length": 0}, "max_length=0 must be an integer of at least 1"),
        ({"grammar": "multiverse", "max_length": "9"}, "max_length=.9. must be an integer"),
        ({"grammar": "multiverse", "packing": True}, "packing needs the length of a row"),
        ({"grammar": "multiverse", "pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
        ({"grammar": "multiverse", "pad_to_multiple_of": 1.5}, "pad_to_multiple_of=1.5"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=words):
        TopologyDataCollator(tokenizer, **options)


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ({"text": "x"}, "sample 1 has the fields text; give prompt and completion.*remove_unused_columns=False"),
        ({"input_ids": [1, 2], "labels": [1]}, "sample 1 has 2 input_ids and 1 labels"),
        ({"input_ids": []}, "sample 1 is empty"),
        ({"input_ids": [[1, 2]]}, r"input_ids of sample 1 are int64 of shape \[1, 2\]"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids of sample 1 are lists of different lengths"),
        ({"input_ids": [[]]}, r"input_ids of sample 1 are float64 of shape \[1, 0\]"),
        ({"input_ids": [1.5]}, "input_ids of sample 1 are float64"),
        ({"prompt": None, "completion": "x"}, "sample 1 has a prompt that is a NoneType"),
        ({"prompt": "x", "completion": [{"role": "assistant", "content": "x"}]}, "a completion that is a list"),
    ],
)
def test_samples_that_cannot_be_read(feature: dict[str, Any], words: str, tokenizer: Any) -> None:
    with pytest.raises(HFEError, match=words):
        TopologyDataCollator(tokenizer, "multiverse")([{"input_ids": [1]}, feature])


def test_missing_labels_and_a_batch_of_nothing(tokenizer: Any) -> None:
    collator = TopologyDataCollator(tokenizer, "multiverse")
    assert collator([{"input_ids": [5, 6], "labels": None}])["labels"].tolist() == [[5, 6]]
    with pytest.raises(HFEError, match="no samples"):
        collator([])


def test_a_malformed_text_is_an_error_that_names_the_sample(tokenizer: Any) -> None:
    features = [{"prompt": "", "completion": text} for text in ("fine", "a</Path>b")]
    with pytest.raises(TopologyError, match="row 1"):
        TopologyDataCollator(tokenizer, "multiverse")(features)
    assert TopologyDataCollator(tokenizer, "multiverse", strict=False)(features)["segment_ids"].max() == 0
    # An open block is one too, unless the text was cut.
    with pytest.raises(TopologyError, match="collator: strict=False"):
        TopologyDataCollator(tokenizer, "multiverse")([{"prompt": "", "completion": BLOCK[:-60]}])


def test_a_tokenizer_without_the_tokens(tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"<": 0, "P": 1}, merges=[])), unk_token="<"
    )
    with pytest.raises(TopologyError, match="the tokenizer lacks topology tokens: <Think>"):
        TopologyDataCollator(bare, "multiverse")


# The mark


def test_marking_looks_through_wrappers(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny(tokenizer)
    ids = sorted(model.config.topology["token_ids"].values())
    model.generation_config.suppress_tokens = [3, *ids, 319]
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    mark_topology_trained(adapted)
    assert model.config.topology["trained"] is True and model.generation_config.suppress_tokens == [3, 319]
    wrapped = nn.DataParallel(tiny(tokenizer))
    mark_topology_trained(wrapped)
    assert wrapped.module.config.topology["trained"] is True
    assert wrapped.module.generation_config.suppress_tokens is None


def test_a_model_without_topology_cannot_be_marked() -> None:
    with pytest.raises(HFEError, match="LlamaForCausalLM has no topology in its configuration"):
        mark_topology_trained(LlamaForCausalLM(LlamaConfig(**SHAPE)))


def test_public_names() -> None:
    assert hf_efficient.TopologyDataCollator is TopologyDataCollator
    assert hf_efficient.mark_topology_trained is mark_topology_trained
    assert hf_efficient.to_multiverse is to_multiverse and hf_efficient.to_medverse is to_medverse
