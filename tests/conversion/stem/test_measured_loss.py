"""Measured loss: the figures are the model's, the intervals cover, and the comparison is paired."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_efficient.conversion.measuring.evaluation import (
    CausalEvaluator,
    Estimate,
    checkpoint_logits,
    model_logits,
    student_quantile,
)
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.evaluation import evaluate

# Two-sided 95 % points of Student's t, from the tables of Abramowitz and Stegun, 26.10.
STUDENT = {3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("degrees", "value"), STUDENT.items())
def test_quantiles_of_student_are_those_of_the_tables(degrees, value):
    assert student_quantile(degrees) == pytest.approx(value, rel=2e-3)


def test_intervals_cover_the_mean_as_often_as_they_say():
    torch.manual_seed(1)
    samples = torch.randn(4000, 8) + 3
    covered = sum(e.low <= 3 <= e.high for e in map(Estimate.of, samples)) / len(samples)
    assert covered == pytest.approx(0.95, abs=0.012)


def test_one_sequence_has_no_interval():
    assert Estimate.of(torch.tensor([2.0])) == Estimate(2.0, None, None)


def test_nll_is_the_models_own_loss(source, text):
    report = CausalEvaluator().evaluate(text, "text", checkpoint_logits(source.config, source.reader))
    assert report.nll.mean == pytest.approx(source.stock(text, labels=text).loss.item(), abs=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.nll.mean))
    assert (report.tokens, report.sequences, report.sequence_length) == (6 * 31, 6, 32)
    assert report.delta_nll is None


def test_a_model_differs_from_itself_in_nothing(tiny_source, text):
    source = tiny_source()
    report = CausalEvaluator().evaluate(
        text, "text", checkpoint_logits(source.config, source.reader), model_logits(source.stock)
    )
    assert report.delta_nll.mean == pytest.approx(0, abs=1e-6)
    assert report.kl.mean == pytest.approx(0, abs=1e-6)
    assert report.top1_agreement.mean == 1


def test_differences_are_those_of_the_logits(tiny_source, text):
    one, two = tiny_source(), tiny_source()
    report = CausalEvaluator().evaluate(text, "text", model_logits(one.stock), model_logits(two.stock))
    with torch.no_grad():
        p, q = (model.stock(text).logits[:, :-1].double().log_softmax(-1) for model in (two, one))
    assert report.kl.mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert report.top1_agreement.mean == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    nll = [-x.gather(-1, text[:, 1:, None])[..., 0].mean(1) for x in (q, p)]
    assert report.delta_nll.mean == pytest.approx(float((nll[0] - nll[1]).mean()), rel=1e-5)
    paired = Estimate.of(nll[0] - nll[1])
    assert report.delta_nll.high - report.delta_nll.low == pytest.approx(paired.high - paired.low, rel=1e-4)


def test_figures_by_calibration_count_add_up_to_the_whole(tiny_source, text):
    one, two = tiny_source(), tiny_source()
    counts = torch.randint(50, (97,))
    counts[:10] = 0
    report = CausalEvaluator().evaluate(text, "text", model_logits(one.stock), model_logits(two.stock), counts=counts)
    assert list(report.by_count) == ["0", "1-3", "4-31", "32+"]
    assert sum(bucket["share_of_tokens"] for bucket in report.by_count.values()) == pytest.approx(1)
    for figure in ("nll", "reference_nll", "delta_nll", "kl", "top1_agreement"):
        whole = sum(bucket["share_of_tokens"] * bucket[figure] for bucket in report.by_count.values())
        assert whole == pytest.approx(getattr(report, figure).mean, rel=1e-9)


def test_a_position_belongs_to_the_bucket_of_the_token_that_is_read_there(tiny_source, text):
    """Not of the token that is predicted, and positions that predict nothing belong to none."""
    one, two = tiny_source(), tiny_source()
    text[:, -1] = 96
    counts = torch.full((97,), 40)
    counts[96], counts[text[2, 5]] = 0, 3
    report = CausalEvaluator().evaluate(text, "text", model_logits(one.stock), model_logits(two.stock), counts=counts)
    assert set(report.by_count) == {"1-3", "32+"}
    with torch.no_grad():
        p, q = (model.stock(text).logits[:, :-1].double().log_softmax(-1) for model in (two, one))
    kl = (p.exp() * (p - q)).sum(-1)
    rare = text[:, :-1] == text[2, 5]
    assert report.by_count["1-3"]["share_of_tokens"] == pytest.approx(float(rare.double().mean()))
    assert report.by_count["1-3"]["kl"] == pytest.approx(float(kl[rare].mean()), rel=1e-5)
    assert report.by_count["32+"]["kl"] == pytest.approx(float(kl[~rare].mean()), rel=1e-5)


def test_without_a_reference_the_buckets_hold_the_loss_alone(tiny_source, text):
    report = CausalEvaluator().evaluate(text, "text", model_logits(tiny_source().stock), counts=torch.ones(97))
    assert report.by_count == {"1-3": {"share_of_tokens": 1.0, "nll": pytest.approx(report.nll.mean)}}


def test_a_measured_model_keeps_its_mode(tiny_source, text):
    stock = tiny_source().stock.train()
    CausalEvaluator().evaluate(text, "text", model_logits(stock))
    assert stock.training


def test_models_of_different_vocabularies_are_not_compared(tiny_source, text):
    one, two = tiny_source(), tiny_source(vocab_size=101)
    with pytest.raises(HFEError, match="97 tokens, the reference's 101"):
        CausalEvaluator().evaluate(text, "text", model_logits(one.stock), model_logits(two.stock))


@pytest.fixture
def checkpoint(tiny_source, tmp_path):
    """A stock checkpoint folder with a tokenizer of whole words, and a text file."""
    words = [f"w{i}" for i in range(96)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<end>"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tiny_source(eos_token_id=96)
    source.stock.save_pretrained(tmp_path / "stock")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "stock")
    lines = [" ".join(words[int(i)] for i in torch.randint(96, (40,))) for _ in range(200)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path / "stock", tmp_path / "words.jsonl"


def test_a_folder_is_measured_like_the_model_in_it(checkpoint, tiny_source):
    folder, text = checkpoint
    alone = evaluate(folder, text=text, tokens=1024)
    assert alone.text == "words.jsonl, documents 160 to 199"
    assert (alone.sequences, alone.sequence_length) == (2, 512)
    other = tiny_source().stock
    both = evaluate(other, reference=folder, text=text, tokens=1024)
    assert both.reference_nll == alone.nll
    assert both.delta_nll.mean == pytest.approx(both.nll.mean - alone.nll.mean)
    assert json.loads(json.dumps(both.to_dict()))["kl"]["mean"] == both.kl.mean
    labels = ("measured on", "nll of the reference", "nll", "Δ nll", "KL from the reference", "top-1 agreement")
    assert all(line.startswith(label + " ") for line, label in zip(both.table().splitlines(), labels, strict=False))
    assert str(folder) not in both.table()


def test_too_few_tokens_and_a_missing_tokenizer_are_usage_errors(tiny_source):
    with pytest.raises(UsageError, match="tokens=1 must be at least 2"):
        evaluate(tiny_source().stock, tokens=1)
    with pytest.raises(UsageError, match="no tokenizer is known"):
        evaluate(tiny_source().stock)


def test_a_conversion_of_a_random_model_costs_something_and_the_interval_says_how_sure_that_is(tiny_source, text):
    source = tiny_source()
    patched = source.convert(Stem(layers=[1, 2]), source.calibration(text))
    report = CausalEvaluator().evaluate(
        text, "text", checkpoint_logits(patched.config, patched.reader), checkpoint_logits(source.config, source.reader)
    )
    assert report.kl.low > 0
    assert report.delta_nll.low < report.delta_nll.mean < report.delta_nll.high
