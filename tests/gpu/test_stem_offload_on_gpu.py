"""Tables in host memory and in files, with the model on a GPU: the same bits as with everything on the GPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_efficient.errors import HFEError
from hf_efficient.hub.export import export
from hf_efficient.modeling.stem import modeling_stem
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM
from hf_efficient.modeling.stem.table_offload import PrefetchedRows, TableFetcher
from tiny_shapes import SMALL, SPECIAL_TOKENS

pytestmark = pytest.mark.gpu

VOCABULARY = 997
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 6, "max_position_embeddings": 2048}
    config = StemConfig(**(SMALL | sizes | SPECIAL_TOKENS), stem_layers=[1, 2, 4], stem_init_std=0.5)
    path = tmp_path_factory.mktemp("stem")
    StemForCausalLM(config).save_pretrained(path)
    return path


def _load(folder: Path, dtype: torch.dtype, **options: Any) -> StemForCausalLM:
    return StemForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cuda", **options)


def _ids(*shape: int, seed: int = 1) -> torch.Tensor:
    # Frequent and rare tokens, as in text.
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (3 + (VOCABULARY - 3) * uniform**3).long().clamp_(max=VOCABULARY - 1).cuda()


def _tables(model: StemForCausalLM) -> list[Any]:
    return [model.model.layers[i].mlp.stem_embed for i in model.config.stem_layers]


PLACEMENTS = {
    "pinned": {"stem_offload": "cpu"},
    "pinned, one table ahead": {"stem_offload": "cpu", "stem_prefetch_layers": 1},
    "pinned, small cache": {"stem_offload": "cpu", "stem_cache_rows": 16},
    "pinned, small cache, one table ahead": {
        "stem_offload": "cpu",
        "stem_cache_rows": 16,
        "stem_prefetch_layers": 1,
    },
    "pinned, cache of the whole vocabulary": {"stem_offload": "cpu", "stem_cache_rows": VOCABULARY},
    "in a file": {"stem_offload": "disk"},
    "in a file, one table ahead": {"stem_offload": "disk", "stem_prefetch_layers": 1},
}


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_tokens_are_those_of_resident_tables(folder, dtype, options) -> None:
    if options["stem_offload"] == "disk" and dtype != torch.float32:
        pytest.skip("a file keeps its dtype; resident tables would be cast")
    resident, offloaded = _load(folder, dtype), _load(folder, dtype, **options)
    assert all(table.weight.device.type == "cpu" for table in _tables(offloaded))
    with torch.no_grad():
        for seed in range(4):  # the cache changes its mind
            for shape in ((2, 300), (1, 1), (3, 7)):
                ids = _ids(*shape, seed=seed)
                assert torch.equal(offloaded(ids).logits, resident(ids).logits)
    prompts = _ids(3, 90)
    for options_of_call in (
        {"do_sample": False},
        {"num_beams": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ):
        ids = prompts[:1] if "prompt_lookup_num_tokens" in options_of_call else prompts
        generate = {"max_new_tokens": 40, "eos_token_id": None, **options_of_call}
        assert torch.equal(offloaded.generate(ids, **generate), resident.generate(ids, **generate))


def test_a_captured_step_fetches_rows_and_reads_the_cache(folder) -> None:
    resident = _load(folder, torch.bfloat16)
    offloaded = _load(folder, torch.bfloat16, stem_offload="cpu", stem_cache_rows=32)
    for seed in range(5):
        ids = _ids(2, 200, seed=seed)
        options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
        assert torch.equal(offloaded.generate(ids, **options), resident.generate(ids, **options))
        assert len(offloaded.captured_steps()) == 1  # it was captured, in the first call, and once
    report = offloaded.model.row_fetches()
    assert report["direct"] and report["cache_rows"] == 32
    assert 0 < report["rows_cached"] < report["rows_requested"]


def test_inference_mode_and_gradient_mode_agree(folder) -> None:
    resident, offloaded = _load(folder, torch.float32), _load(folder, torch.float32, stem_offload="cpu")
    mapped = _load(folder, torch.float32, stem_offload="disk")
    for model in (offloaded, mapped):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    ids = _ids(2, 100)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):  # other kernels with gradients
        with mode():
            expected = resident(ids).logits
            for model in (offloaded, mapped):
                assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("options", [{"stem_cache_rows": 16}, {"stem_prefetch_layers": 1}], ids=["cache", "ring"])
def test_a_slow_copy_stream_changes_nothing(folder, options, monkeypatch) -> None:
    """Each gather starts 3 ms late: a layer that did not wait, or memory given away too early, would show."""
    resident, offloaded = _load(folder, torch.float32), _load(folder, torch.float32, stem_offload="cpu", **options)
    gather = TableFetcher.gather

    def late(self: TableFetcher, *arguments: Any) -> None:
        torch.cuda._sleep(5_000_000)
        gather(self, *arguments)

    with torch.no_grad():
        for seed in range(3):
            ids = _ids(2, 300, seed=seed)
            expected = resident(ids).logits
            monkeypatch.setattr(TableFetcher, "gather", late)
            first = offloaded(ids).logits
            churn = [torch.full((300, 168), float("nan"), device="cuda") for _ in range(20)]
            second = offloaded(ids).logits
            del churn
            assert torch.equal(first, expected) and torch.equal(second, expected)


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_a_slow_model_changes_nothing(folder, placement, monkeypatch) -> None:
    """Each layer uses its rows 3 ms late: buffers that were filled again too early would show."""
    resident = _load(folder, torch.float32)
    offloaded = _load(folder, torch.float32, stem_offload=placement, stem_prefetch_layers=1)
    fetch = PrefetchedRows.fetch

    def late(self: PrefetchedRows, table: Any) -> torch.Tensor:
        rows = fetch(self, table)
        torch.cuda._sleep(5_000_000)
        return rows

    monkeypatch.setattr(PrefetchedRows, "fetch", late)
    with torch.no_grad():
        for seed in range(3):
            ids = _ids(2, 300, seed=seed)
            expected = resident(ids).logits
            outputs = [offloaded(ids).logits for _ in range(3)]
            assert all(torch.equal(output, expected) for output in outputs)


def test_device_memory_is_less_by_the_size_of_the_tables(folder) -> None:
    def held(**options: Any) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = _load(folder, torch.float32, **options)
        found = torch.cuda.memory_allocated() - before
        assert model.device.type == "cuda"
        return found

    tables = 3 * VOCABULARY * 168 * 4
    assert abs(held() - held(stem_offload="cpu") - tables) <= 3 * 512  # rounded up to 512 bytes each
    assert abs(held() - held(stem_offload="disk") - tables) <= 3 * 512


def test_tables_are_pinned_where_they_lie_and_let_go(folder) -> None:
    model = _load(folder, torch.float32, stem_offload="cpu")
    weight = _tables(model)[0].weight
    address = weight.data_ptr()
    assert not weight.is_pinned()
    with torch.no_grad():
        model(_ids(1, 5))
    assert weight.is_pinned() and weight.data_ptr() == address
    model.half()  # other memory, other pages
    with torch.no_grad():
        model(_ids(1, 5))
    assert _tables(model)[0].weight.is_pinned()
    del weight


def test_tables_that_cannot_be_pinned_are_staged(folder, monkeypatch) -> None:
    monkeypatch.setattr("hf_efficient.modeling.stem.table_offload.pin_in_place", lambda weight: False)
    resident, offloaded = _load(folder, torch.bfloat16), _load(folder, torch.bfloat16, stem_offload="cpu")
    # A step that waits for the host is not captured; the loop of transformers rounds as it does for resident tables.
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    ids = _ids(2, 80)
    assert torch.equal(offloaded.generate(ids, **options), resident.generate(ids, **options))
    assert not offloaded.model.row_fetches()["direct"]


@pytest.mark.parametrize("reported", [True, False])
def test_rows_changed_in_place_are_not_taken_from_the_cache(folder, reported) -> None:
    """An optimizer changes rows without calling `refresh_rows`; with the call, other rows stay in the cache."""
    offloaded = _load(folder, torch.float32, stem_offload="cpu", stem_cache_rows=VOCABULARY)
    resident = _load(folder, torch.float32)
    ids = _ids(2, 100)
    with torch.no_grad():
        offloaded(ids)
        for model in (offloaded, resident):
            for table in _tables(model):
                table.weight[ids[0, :5].to(table.weight.device)] += 1.0
            if reported:
                model.refresh_rows(ids[0, :5])
        assert torch.equal(offloaded(ids).logits, resident(ids).logits)
        assert torch.equal(offloaded(ids[:, :9]).logits, resident(ids[:, :9]).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_offloaded_tables_gives_the_resident_gradients(folder, checkpointing) -> None:
    gradients = []
    for options in ({}, {"stem_offload": "cpu"}):
        model = _load(folder, torch.float32, stem_sparse_grad=True, **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = _ids(2, 120)
        for _ in range(2):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    resident, offloaded = gradients
    for name, gradient in offloaded.items():
        assert torch.equal(gradient.to_dense(), resident[name].to_dense()), name


def test_dense_gradients_of_offloaded_tables_are_refused(folder) -> None:
    model = _load(folder, torch.float32, stem_offload="cpu")
    with pytest.raises(HFEError, match="stem_sparse_grad"):
        model(_ids(1, 5))


def test_an_adapter_on_an_offloaded_table_acts(folder) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["stem_embed"], init_lora_weights=False)
    found = []
    for options in ({}, {"stem_offload": "cpu"}):
        torch.manual_seed(1)
        model = get_peft_model(_load(folder, torch.float32, **options), config).cuda()
        with torch.no_grad():
            found.append(model(input_ids=_ids(2, 30)).logits)
    assert torch.equal(*found)


def test_an_exported_folder_offloads_by_itself(folder, tmp_path) -> None:
    path = tmp_path / "exported"
    StemForCausalLM.from_pretrained(folder).save_pretrained(path)
    export(path)
    entry = json.loads((path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    exported = get_class_from_dynamic_module(entry, path)  # Auto classes would prefer the package, which is here too
    assert exported.__module__.startswith("transformers_modules")
    ids = _ids(2, 80)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = exported.from_pretrained(path, device_map="cuda").generate(ids, **options)
    for placement in ("cpu", "disk"):
        offloaded = exported.from_pretrained(path, stem_offload=placement, device_map="cuda")
        assert _tables(offloaded)[0].weight.device.type == "cpu"
        assert torch.equal(offloaded.generate(ids, **options), expected)


def test_a_deleted_model_leaves_no_fetcher(folder) -> None:
    model = _load(folder, torch.float32, stem_offload="cpu")
    with torch.no_grad():
        model(_ids(1, 100))
    before = len(modeling_stem._FETCHERS)
    del model
    gc.collect()
    assert len(modeling_stem._FETCHERS) < before
