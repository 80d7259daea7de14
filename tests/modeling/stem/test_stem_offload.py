"""Tables in host memory and in files: what can be shown without a GPU. The streams are tested in tests/gpu."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficient.errors import HFEError
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM, StemModel
from hf_efficient.modeling.stem.row_cache import HALF_LIFE, FrequencyPolicy, RowCache
from hf_efficient.modeling.stem.stem_table import StemTable, single_device

IDS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> StemForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return StemForCausalLM(StemConfig(**sizes, **heads, stem_layers=[1, 3], stem_init_std=0.5)).eval()


@pytest.fixture(scope="module")
def folder(model: StemForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(path, max_shard_size="30KB")
    return path


@pytest.mark.parametrize("placement", ["cpu", "disk"])
@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
def test_offloaded_tables_give_the_same_logits(model, folder, placement, device_map) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, stem_offload=placement, device_map=device_map)
    assert not hasattr(loaded, "hf_device_map")  # no hooks that copy whole tables
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    out = loaded.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(out, model.generate(IDS, max_new_tokens=5, do_sample=False))


def test_the_base_model_maps_the_tables_of_a_full_checkpoint(model, folder) -> None:
    base = StemModel.from_pretrained(folder, stem_offload="disk")
    assert torch.equal(base(input_ids=IDS).last_hidden_state, model.model(input_ids=IDS).last_hidden_state)


def test_a_checkpoint_in_one_file_is_mapped_too(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = StemForCausalLM.from_pretrained(tmp_path, stem_offload="disk")
    table = loaded.model.layers[1].mlp.stem_embed
    assert table.file == tmp_path / "model.safetensors"
    assert not table.weight.requires_grad
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_mapped_tables_cannot_be_saved_over_their_own_files(folder, tmp_path) -> None:
    loaded = StemForCausalLM.from_pretrained(folder, stem_offload="disk")
    with pytest.raises(HFEError, match="another folder"):
        loaded.save_pretrained(folder)
    loaded.save_pretrained(tmp_path / "copy")
    again = StemForCausalLM.from_pretrained(tmp_path / "copy", stem_offload="none")
    assert torch.equal(again(input_ids=IDS).logits, loaded(input_ids=IDS).logits)


def test_a_mapped_model_says_what_its_checkpoint_lacks(model, tmp_path) -> None:
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "3.mlp.stem" not in k})
    with pytest.raises(HFEError, match=r"lacks model\.layers\.3\.mlp\.stem_embed\.weight"):
        StemForCausalLM.from_pretrained(tmp_path, stem_offload="disk")


def test_tables_that_were_never_mapped_are_an_error(model) -> None:
    fresh = StemForCausalLM(StemConfig(**{**model.config.to_diff_dict(), "stem_offload": "disk"}))
    with pytest.raises(HFEError, match="from_pretrained"):
        fresh(input_ids=IDS)


def test_a_table_of_another_size_is_refused(folder) -> None:
    with pytest.raises(HFEError, match=r"shape \(61, 48\).*\(61, 64\)"):
        table = StemTable(61, 64, placement="disk")
        index = next(
            f for f in sorted(folder.glob("*.safetensors")) if _contains(f, "model.layers.1.mlp.stem_embed.weight")
        )
        table.map_from(index, "model.layers.1.mlp.stem_embed.weight")


def _contains(file: Path, name: str) -> bool:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return name in set(tensors.keys())


def test_casting_reaches_tables_in_memory_and_not_those_in_files(folder) -> None:
    kept = StemForCausalLM.from_pretrained(folder, stem_offload="cpu").to(torch.bfloat16)
    mapped = StemForCausalLM.from_pretrained(folder, stem_offload="disk").to(torch.bfloat16)
    assert kept.model.layers[1].mlp.stem_embed.weight.dtype == torch.bfloat16
    assert mapped.model.layers[1].mlp.stem_embed.weight.dtype == torch.float32
    assert mapped(input_ids=IDS).logits.dtype == torch.bfloat16


def test_moving_the_model_leaves_offloaded_tables_on_the_host() -> None:
    table = StemTable(5, 4, placement="cpu")
    weight = table.weight
    table.to("meta", torch.float32)  # stands for another device
    assert table.weight.is_meta
    table = StemTable(5, 4, placement="cpu")
    weight, requires_grad = table.weight, table.weight.requires_grad
    table.float()
    assert table.weight is weight
    table.half()
    assert table.weight.dtype == torch.float16 and table.weight.requires_grad == requires_grad


def test_an_offloaded_model_is_copied_and_pickled(folder) -> None:
    loaded = StemForCausalLM.from_pretrained(folder, stem_offload="cpu")
    assert torch.equal(copy.deepcopy(loaded)(input_ids=IDS).logits, loaded(input_ids=IDS).logits)


@pytest.mark.parametrize(("given", "device"), [(None, None), ("cpu", "cpu"), (0, "cuda:0"), ({"": "1"}, "cuda:1")])
def test_a_device_map_of_one_device_is_that_device(given, device) -> None:
    assert single_device(given) == (None if device is None else torch.device(device))


def test_a_device_map_of_several_devices_is_refused(folder) -> None:
    with pytest.raises(HFEError, match="one device"):
        StemForCausalLM.from_pretrained(folder, stem_offload="cpu", device_map={"model": 0, "lm_head": "cpu"})


@pytest.mark.parametrize("field", [{"stem_offload": "gpu"}, {"stem_cache_rows": -1}, {"stem_prefetch_layers": -1}])
def test_placement_fields_are_checked(field, folder) -> None:
    with pytest.raises(Exception, match=next(iter(field))):
        StemConfig(**field)
    with pytest.raises(Exception, match=next(iter(field))):
        StemForCausalLM.from_pretrained(folder, **field)


# Which rows are cached


def _feed(policy: FrequencyPolicy, ids: list[int]):
    distinct, counts = torch.tensor(ids).unique(return_counts=True)
    admission = policy.admit(distinct, counts)
    policy.commit(admission)
    return admission


def test_the_most_frequent_tokens_are_held() -> None:
    policy = FrequencyPolicy(20, 3)
    _feed(policy, [1, 1, 1, 2, 2, 3, 4])
    assert sorted(policy.held.tolist()) == [1, 2, 3]  # 3 before 4: of equal counts the lower id
    admission = _feed(policy, [4, 4, 9])
    assert (admission.ids.tolist(), admission.evicted.tolist()) == ([4], [3])
    assert sorted(policy.held.tolist()) == [1, 2, 4]
    assert policy.hits(torch.tensor([1, 3, 4, 9])).tolist() == [True, False, True, False]


def test_old_counts_fade() -> None:
    policy = FrequencyPolicy(20, 1)
    _feed(policy, [7] * 100)
    _feed(policy, [8] * 90)
    assert policy.held.tolist() == [7]
    policy._counts *= 0.5 ** (2 * HALF_LIFE / HALF_LIFE)  # two half lives of other tokens
    _feed(policy, [8] * 30)
    assert policy.held.tolist() == [8]


def test_newcomers_are_not_found_before_they_are_there() -> None:
    policy = FrequencyPolicy(20, 2)
    admission = policy.admit(torch.tensor([3, 5]), torch.tensor([1, 1]))
    assert not policy.hits(torch.tensor([3, 5])).any()
    policy.commit(admission)
    assert policy.hits(torch.tensor([3, 5])).all()


def test_a_random_stream_never_finds_a_wrong_row() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(50, 4, generator=generator) for _ in range(2)]
    cache = RowCache(tables, 7, torch.device("cpu"))
    for round_ in range(200):
        ids = (torch.randint(0, 50, (9,), generator=generator) ** 2 // 50).unique()
        if round_ % 17 == 5:  # rows change and are dropped
            changed = ids[:2]
            tables[0][changed] += 1
            cache.policy.drop(changed)
            cache.forget(changed)
        counts = torch.randint(1, 5, ids.shape, generator=generator)
        admission = cache.policy.admit(ids, counts)
        cache.forget(admission.evicted)
        for place, table in enumerate(tables):
            slots = cache.slot_of[ids].long()
            held = slots >= 0
            assert torch.equal(cache.rows[place][slots[held]], table[ids[held]])
            if round_ % 13 == 7:  # the call breaks off
                break
            cache.fill(place, table[ids], admission)
        else:
            cache.publish(admission)
            cache.policy.commit(admission)
        assert torch.equal(cache.policy._slot_of, cache.slot_of.long())


# Training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sparse_gradients_equal_the_dense_ones(model, checkpointing) -> None:
    gradients = []
    for sparse in (False, True):
        trained = StemForCausalLM(StemConfig(**{**model.config.to_diff_dict(), "stem_sparse_grad": sparse})).train()
        trained.load_state_dict(model.state_dict())
        if checkpointing:
            trained.gradient_checkpointing_enable()
        for _ in range(2):  # accumulated
            trained(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters()})
    dense, sparse = gradients
    for name, gradient in sparse.items():
        assert gradient.is_sparse == name.endswith("stem_embed.weight")
        assert torch.equal(gradient.to_dense(), dense[name]), name
    rows = sparse["model.layers.1.mlp.stem_embed.weight"].coalesce().indices()[0]
    assert rows.tolist() == IDS.unique().tolist()
