"""Conversion to Multiverse and MedVerse: the model is its source until it is trained, and control tokens have rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_efficient
from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.conversion.topology.patch import MedVerse, Multiverse
from hf_efficient.conversion.writing import checkpoint_writer
from hf_efficient.convert_checkpoint import convert
from hf_efficient.data.topology_collator import mark_topology_trained
from hf_efficient.errors import HFEError
from hf_efficient.evaluation import evaluate
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS, MULTIVERSE, control_token_ids

Stock = Callable[..., Path]
QUIET: dict[str, Any] = {"evaluate": False, "progress": False}
CONVERTIBLE = ("llama", "llama-tied", "mistral", "qwen2", "qwen3-tied")
PATCHES = {"multiverse": Multiverse, "medverse": MedVerse}
PLAIN = "the Plan is one Path < 3 > 2, </b> and so on; Conclusion: Überraschung."


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "generation_config.json").read_text())


@torch.no_grad()
def check_equal_logits(converted: Path, stock: Any, ids: Tensor, vocabulary: int) -> None:
    """The same bits in the head's input and in its rows for the stock tokens; the logits then are the stock model's."""
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    ours, theirs = (m(ids, output_hidden_states=True) for m in (model, stock.eval()))
    assert torch.equal(ours.hidden_states[-1], theirs.hidden_states[-1])
    head = model.get_output_embeddings().weight[:vocabulary]
    assert torch.equal(head, stock.get_output_embeddings().weight[:vocabulary])
    expected = theirs.logits[..., :vocabulary]
    if vocabulary == stock.config.vocab_size:
        assert torch.equal(nn.functional.linear(ours.hidden_states[-1], head), expected)
    # A product of another width may be summed in another order.
    torch.testing.assert_close(
        ours.logits[..., :vocabulary], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


# Equal to the source


@pytest.mark.parametrize("grammar", PATCHES)
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_plain_text_has_the_sources_logits(name: str, grammar: str, stock: Stock, tmp_path: Path) -> None:
    report = convert(stock(name), tmp_path / "out", [PATCHES[grammar]()], **QUIET)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (stock(name), tmp_path / "out"))
    ids = before(PLAIN).input_ids
    assert after(PLAIN).input_ids == ids and after.decode(ids) == before.decode(ids)
    assert after.chat_template == before.chat_template
    model = AutoModelForCausalLM.from_pretrained(stock(name))
    check_equal_logits(tmp_path / "out", model, torch.tensor([ids]), len(before))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.model_type == report.model_type == f"hfe_{grammar}"
    token_ids = control_token_ids(after, grammar)
    assert config.topology == {
        **{"grammar": grammar, "mode": "dag", "token_ids": token_ids},
        **{"trained": False, "separator": "\n", "version": 1},
    }
    assert sorted(token_ids.values()) == list(range(len(before), len(before) + 12))
    # Never shrunk, and longer only where the matrix has no room.
    grows = model.config.vocab_size < len(before) + 12
    assert config.vocab_size == (-(-(len(before) + 12) // 64) * 64 if grows else model.config.vocab_size)


@pytest.mark.real_model
def test_the_real_model_stays_what_it_is(smollm_gguf: Path, tmp_path: Path) -> None:
    convert(smollm_gguf, tmp_path / "out", [Multiverse()], **QUIET)
    stock = AutoModelForCausalLM.from_pretrained(smollm_gguf.parent, gguf_file=smollm_gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(tokenizer), stock.config.vocab_size) == (49164, 49152)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    check_equal_logits(tmp_path / "out", stock, inputs["input_ids"], 49152)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.vocab_size == 49216
    rows, ids = model.get_input_embeddings().weight, control_token_ids(tokenizer, "multiverse")
    (path,) = tokenizer.encode("Path", add_special_tokens=False)
    assert torch.equal(rows[ids["<Path>"]], rows[path])
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_nothing_is_lost_by_measure(name: str, stock: Stock, text: Path, tmp_path: Path) -> None:
    report = convert(stock(name), tmp_path / "out", [Multiverse()], calibration=text, progress=False)
    measured = report.evaluation
    assert measured is not None and measured["nll"]["mean"] > 1
    for figure in ("delta_nll", "kl"):
        assert measured[figure]["mean"] == pytest.approx(0, abs=1e-6)
    assert measured["top1_agreement"]["mean"] == 1


def test_a_conversion_is_evaluated_against_its_source(stock: Stock, text: Path, tmp_path: Path) -> None:
    """Afterwards too, though its vocabulary is longer; a model that is longer for another reason is another model."""
    convert(stock(), tmp_path / "out", [Multiverse()], **QUIET)
    for pair in ((tmp_path / "out", stock()), (stock(), tmp_path / "out")):
        measured = evaluate(pair[0], reference=pair[1], text=text, tokens=1024, progress=False)
        assert measured.kl is not None and measured.kl.mean == pytest.approx(0, abs=1e-6)
        assert measured.top1_agreement is not None and measured.top1_agreement.mean == 1
    longer = AutoModelForCausalLM.from_pretrained(stock())
    longer.resize_token_embeddings(longer.config.vocab_size + 64)
    with pytest.raises(HFEError, match="vocabulary has"):
        evaluate(longer, reference=stock(), text=text, tokens=1024, progress=False)


# Rows


@pytest.mark.parametrize("grammar", PATCHES)
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_rows_of_control_tokens_are_means_of_their_names(name: str, grammar: str, stock: Stock, tmp_path: Path) -> None:
    convert(stock(name), tmp_path / "out", [PATCHES[grammar]()], **QUIET)
    before, after = weights(stock(name)), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (stock(name), tmp_path / "out"))
    ids = control_token_ids(new, grammar)
    matrices = [n for n in ("model.embed_tokens.weight", "lm_head.weight") if n in after]
    assert len(matrices) == (1 if "tied" in name else 2)
    for matrix in matrices:
        for tag, token_id in ids.items():
            parts = old(tag[1:-1], add_special_tokens=False).input_ids
            assert (len(parts) > 1) == (tag[1] == "/" or tag not in ("<Path>", "<Plan>", "<Think>", "<Step>"))
            torch.testing.assert_close(after[matrix][token_id], before[matrix][parts].mean(0), rtol=0, atol=1e-7)
            if len(parts) == 1:
                assert torch.equal(after[matrix][token_id], before[matrix][parts[0]])
        rest = [row for row in range(len(before[matrix])) if row not in ids.values()]
        assert torch.equal(after[matrix][rest], before[matrix][rest])
        beyond = after[matrix][max(len(before[matrix]), len(new)) :]
        torch.testing.assert_close(beyond, before[matrix].mean(0).expand_as(beyond), rtol=0, atol=1e-6)
    others = [n for n in before if n not in matrices]
    assert all(torch.equal(before[n], after[n]) for n in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision(dtype: torch.dtype, stock: Stock, tmp_path: Path) -> None:
    convert(stock("llama", dtype), tmp_path / "out", [Multiverse()], **QUIET)
    before, after = weights(stock("llama", dtype)), weights(tmp_path / "out")
    name = "model.embed_tokens.weight"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    parts = tokenizer("/Path", add_special_tokens=False).input_ids
    expected = before[name][parts].float().mean(0).to(dtype)
    assert torch.equal(after[name][control_token_ids(tokenizer, "multiverse")["</Path>"]], expected)
    assert after[name].dtype == dtype and torch.equal(after[name][: len(before[name])], before[name])


# Generation


def sampled(model: Any, rows: int, length: int, **options: Any) -> Tensor:
    prompt = torch.full((rows, 1), 1)
    torch.manual_seed(0)
    return model.generate(prompt, do_sample=True, max_new_tokens=length, eos_token_id=None, **options)[:, 1:]


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_an_untrained_conversion_never_writes_a_control_token(name: str, stock: Stock, tmp_path: Path) -> None:
    """Ten thousand tokens of plain text hold none; without the suppression there would be hundreds."""
    convert(stock(name), tmp_path / "out", [Multiverse()], **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    control = torch.tensor(list(model.config.topology["token_ids"].values()))
    tokens = sampled(model, 250, 40)
    assert tokens.numel() == 10_000
    assert not torch.isin(tokens, control).any()
    if name == "llama":
        assert int(tokens.max()) < AutoModelForCausalLM.from_pretrained(stock(name)).config.vocab_size
    model.generation_config.suppress_tokens = None
    assert torch.isin(sampled(model, 250, 8), control).sum() > 20


def test_nor_does_it_in_the_loop_of_captured_steps(stock: Stock, tmp_path: Path, served_by_the_loop: list[Any]) -> None:
    """The loop that serves CUDA graphs; here its steps are called, with the reference of the attention."""
    convert(stock("llama"), tmp_path / "out", [Multiverse()], **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="hfe_decode").eval()
    control = torch.tensor(list(model.config.topology["token_ids"].values()))
    tokens = sampled(model, 250, 40)
    assert (tokens.numel(), len(served_by_the_loop)) == (10_000, 1)
    assert not torch.isin(tokens, control).any()
    model.generation_config.suppress_tokens = None
    assert torch.isin(sampled(model, 250, 8), control).sum() > 20 and len(served_by_the_loop) == 2


def test_greedy_text_is_the_sources(stock: Stock, tmp_path: Path) -> None:
    convert(stock("llama-tied"), tmp_path / "out", [Multiverse()], **QUIET)
    prompt = torch.randint(3, 250, (4, 9))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
    texts = [
        AutoModelForCausalLM.from_pretrained(folder).eval().generate(prompt, **options)
        for folder in (stock("llama-tied"), tmp_path / "out")
    ]
    assert torch.equal(*texts)


def test_settings_of_the_source_are_kept(stock: Stock, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(stock(), source)
    GenerationConfig(temperature=0.6, do_sample=True, suppress_tokens=[7], eos_token_id=[2, 5]).save_pretrained(source)
    convert(source, tmp_path / "out", [Multiverse()], **QUIET)
    settings = settings_of(tmp_path / "out")
    assert (settings["temperature"], settings["eos_token_id"]) == (0.6, [2, 5])
    size = AutoModelForCausalLM.from_pretrained(source).config.vocab_size
    total = len(weights(tmp_path / "out")["model.embed_tokens.weight"])
    assert settings["suppress_tokens"] == [7, *range(size, total)]


def test_marked_as_trained_a_model_may_write_them(stock: Stock, tmp_path: Path) -> None:
    convert(stock(), tmp_path / "out", [Multiverse()], **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = model.config.topology["token_ids"]
    mark_topology_trained(model)
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert again.config.topology["trained"] is True and again.config.topology["token_ids"] == ids
    # Rows that no token has stay suppressed.
    unused = list(range(max(ids.values()) + 1, model.config.vocab_size))
    assert again.generation_config.suppress_tokens == unused


# Checkpoints that come trained


@pytest.fixture
def trained(stock: Stock, tmp_path: Path) -> Callable[[str], Path]:
    """A stock checkpoint whose tokenizer has the tokens and whose rows somebody has trained."""

    def make(grammar: str) -> Path:
        folder = tmp_path / "trained"
        tokenizer = AutoTokenizer.from_pretrained(stock())
        tokenizer.add_tokens(list(CONTROL_TOKENS[grammar]), special_tokens=True)
        tokenizer.chat_template = "{{ messages[0]['content'] }}<Think>"
        model = AutoModelForCausalLM.from_pretrained(stock())
        model.resize_token_embeddings(-(-len(tokenizer) // 64) * 64)
        model.generation_config.temperature = 0.6
        model.generation_config.do_sample = True
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(("grammar", "mode"), [("multiverse", "dag"), ("medverse", "layers")])
def test_a_trained_checkpoint_is_taken_over(
    grammar: str, mode: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    source = trained(grammar)
    convert(source, tmp_path / "out", [PATCHES[grammar]()], **QUIET)
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.topology["trained"] is True and config.topology["mode"] == mode
    assert config.vocab_size == len(before["model.embed_tokens.weight"])
    assert config.topology["token_ids"] == control_token_ids(AutoTokenizer.from_pretrained(source), grammar)


def test_mode_and_state_may_be_named(trained: Callable[[str], Path], tmp_path: Path) -> None:
    source = trained("medverse")
    convert(source, tmp_path / "out", [MedVerse(mode="flat", trained=False)], **QUIET)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.topology["mode"], config.topology["trained"]) == ("flat", False)
    assert settings_of(tmp_path / "out")["suppress_tokens"] == sorted(config.topology["token_ids"].values())
    assert torch.equal(
        weights(source)["model.embed_tokens.weight"], weights(tmp_path / "out")["model.embed_tokens.weight"]
    )


def test_tokens_that_are_there_keep_their_rows(stock: Stock, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(stock("qwen2"), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<Path>", "</Path>"], special_tokens=True)
    tokenizer.save_pretrained(source)
    convert(source, tmp_path / "out", [Multiverse()], **QUIET)
    before, after = (weights(folder)["lm_head.weight"] for folder in (source, tmp_path / "out"))
    ids = control_token_ids(AutoTokenizer.from_pretrained(tmp_path / "out"), "multiverse")
    kept = [tokenizer.convert_tokens_to_ids(token) for token in ("<Path>", "</Path>")]
    assert [ids["<Path>"], ids["</Path>"]] == kept
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[ids["<Goal>"]], after[ids["<Goal>"]])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.topology["trained"] is False


# With other patches


@pytest.fixture(scope="module")
def stem_only(stock: Stock, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stem") / "out"
    convert(stock("llama"), output, [Stem(layers=[1, 2])], calibration=text, calibration_tokens=1024, **QUIET)
    return output


TABLES = ("model.layers.1.mlp.stem_embed.weight", "model.layers.2.mlp.stem_embed.weight")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_stem_tables_get_rows_for_the_new_tokens(
    order: list[int], stem_only: Path, stock: Stock, text: Path, tmp_path: Path
) -> None:
    both = [Stem(layers=[1, 2]), Multiverse()]
    patches = [both[i] for i in order]
    report = convert(stock(), tmp_path / "out", patches, calibration=text, calibration_tokens=1024, **QUIET)
    assert report.model_type == "hfe_decoder"
    before, after = weights(stem_only), weights(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = control_token_ids(tokenizer, "multiverse")
    for table in TABLES:
        size = len(before[table])
        assert len(after[table]) == len(after["model.embed_tokens.weight"]) > size
        assert torch.equal(after[table][:size], before[table])
        for tag, token_id in ids.items():
            parts = tokenizer(tag[1:-1], add_special_tokens=False).input_ids
            torch.testing.assert_close(after[table][token_id], before[table][parts].mean(0), rtol=0, atol=1e-6)
    # Plain text: what the conversion to STEM alone gives; control tokens: rows that are not zero.
    check_equal_logits(
        tmp_path / "out",
        AutoModelForCausalLM.from_pretrained(stem_only),
        torch.tensor([tokenizer(PLAIN).input_ids]),
        len(before["lm_head.weight"]),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert sorted(model.config.active_patches) == ["multiverse", "stem"]
    with torch.no_grad():
        assert model(torch.tensor([list(ids.values())])).logits.isfinite().all()


def test_a_stem_checkpoint_takes_the_patch(stem_only: Path, stock: Stock, text: Path, tmp_path: Path) -> None:
    patches = [Stem(layers=[1, 2]), Multiverse()]
    convert(stock(), tmp_path / "at once", patches, calibration=text, calibration_tokens=1024, **QUIET)
    report = convert(stem_only, tmp_path / "one by one", [Multiverse()], **QUIET)
    assert report.model_type == "hfe_decoder"
    together, one_by_one = weights(tmp_path / "at once"), weights(tmp_path / "one by one")
    assert together.keys() == one_by_one.keys()
    assert all(torch.equal(together[name], one_by_one[name]) for name in together)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_bhyt_checkpoint_takes_the_patch(name: str, stock: Stock, tmp_path: Path) -> None:
    convert(stock(name), tmp_path / "bhyt", [Bhyt()], **QUIET)
    report = convert(tmp_path / "bhyt", tmp_path / "out", [MedVerse()], **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.model_type == model.config.model_type == "hfe_decoder"
    assert sorted(model.config.active_patches) == ["bhyt", "medverse"]
    tokenizer = AutoTokenizer.from_pretrained(stock(name))
    ids = torch.tensor([tokenizer(PLAIN).input_ids])
    check_equal_logits(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tmp_path / "bhyt"), ids, len(tokenizer))


def test_a_converted_checkpoint_takes_further_patches(stock: Stock, text: Path, tmp_path: Path) -> None:
    convert(stock(), tmp_path / "multiverse", [Multiverse()], **QUIET)
    patches = [Stem(layers=[1]), Bhyt()]
    convert(tmp_path / "multiverse", tmp_path / "out", patches, calibration=text, calibration_tokens=1024, **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sorted(model.config.active_patches) == ["bhyt", "multiverse", "stem"]
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "multiverse")
    assert (
        control_token_ids(AutoTokenizer.from_pretrained(tmp_path / "out"), "multiverse")
        == (model.config.topology["token_ids"])
    )


# Runs


def test_an_interrupted_conversion_ends_in_the_same_bytes(
    stock: Stock, tmp_path: Path, folder_hashes: Callable[[Path], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUIET, "max_shard_size": "20KB"}
    convert(stock("llama"), tmp_path / "whole", [Multiverse()], **options)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_writer, "index_text", lambda shards: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(stock("llama"), tmp_path / "out", [Multiverse()], **options)
    report = convert(stock("llama"), tmp_path / "out", [Multiverse()], resume=True, **options)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "whole")
    assert report.patches[0]["choices"]["topology"]["grammar"] == "multiverse"


def test_a_dry_run_reports_what_it_would_add(stock: Stock, tmp_path: Path) -> None:
    report = convert(stock(), tmp_path / "out", [Multiverse()], dry_run=True, **QUIET)
    assert not list(tmp_path.iterdir())
    size = AutoModelForCausalLM.from_pretrained(stock()).config.vocab_size
    assert f"12 added, ids {size} to {size + 11}; untrained, so suppressed in generation" in report.table()
    assert report.after.parameters > report.before.parameters


def test_report_and_card_tell_what_was_done(stock: Stock, tmp_path: Path) -> None:
    report = convert(stock(), tmp_path / "out", [Multiverse()], **QUIET)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = control_token_ids(tokenizer, "multiverse")
    rows = report.patches[0]["measured"]["token_rows"]
    assert rows == {str(ids[tag]): tokenizer(tag[1:-1], add_special_tokens=False).input_ids for tag in MULTIVERSE}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv:2506.09991" in card and "mark_topology_trained" in card
    assert hf_efficient.Multiverse is Multiverse and hf_efficient.MedVerse is MedVerse
