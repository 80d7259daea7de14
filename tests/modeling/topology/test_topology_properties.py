"""What a model computes under a topology, in float64: P1 to P5, for stock models and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

import hf_efficient  # noqa: F401  registers the attention implementation
from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM
from hf_efficient.modeling.topology.attention.topology_mask import (
    TopologyMask,
    TopologyQueries,
    additive_mask,
    dense_mask,
)
from hf_efficient.modeling.topology.grammar.topology import Topology

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
}
# Eager attention takes its softmax in float32, stock and ours.
TOLERANCE = {"hfe_topology": 1e-12, "sdpa": 1e-12, "eager": 2e-5}
SPEC = [(6, []), (4, [0]), (7, [0]), (3, [0]), (5, [1, 2, 3]), (2, [4]), (3, [4]), (2, [5, 6])]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["stock", "ours"])
def model(request: pytest.FixtureRequest, family: str) -> Any:
    """A tiny model of each family, transformers' own and the same weights in our decoder."""
    torch.manual_seed(5)
    stock = FAMILIES[family]().eval().double()
    if request.param == "stock":
        return stock
    ours = EfficientDecoderForCausalLM(decoder_config(stock.config)).eval().double()
    ours.load_state_dict(stock.state_dict())
    return ours


def tokens(length: int, seed: int = 3) -> Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, topology: Topology, attention: str = "hfe_topology") -> Tensor:
    """Logits [S, V] of one row; a stock model gets its mask as its attention wants it."""
    model.set_attn_implementation(attention)
    mask = topology.to_mask()
    inputs: dict[str, Any] = {"topology": mask}
    if not isinstance(model, EfficientDecoderForCausalLM):
        inputs = {
            "hfe_topology": {"topology": mask.with_blocks(), "attention_mask": torch.ones_like(ids)},
            "sdpa": {"attention_mask": dense_mask(mask)},
            "eager": {"attention_mask": additive_mask(mask, torch.float64)},
        }[attention]
    positions = torch.from_numpy(topology.position_ids)[None]
    return model(ids, position_ids=positions, use_cache=False, **inputs).logits[0]


@torch.no_grad()
def causal_logits(model: Any, ids: Tensor) -> Tensor:
    model.set_attn_implementation("sdpa")
    return model(ids, use_cache=False).logits[0]


def close(found: Tensor, expected: Tensor, attention: str = "hfe_topology") -> None:
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= TOLERANCE[attention] * scale


@pytest.mark.parametrize("attention", TOLERANCE)
def test_a_chain_of_segments_is_the_plain_model(model: Any, attention: str) -> None:
    """P1."""
    chain, ids = Topology.from_spec([(5, []), (4, [0]), (6, [1])]), tokens(15)
    close(logits(model, ids, chain, attention), causal_logits(model, ids), attention)


@pytest.mark.parametrize("attention", TOLERANCE)
def test_the_order_of_siblings_in_the_row_does_not_matter(model: Any, attention: str) -> None:
    """P2."""
    topology, ids = Topology.from_spec(SPEC), tokens(32)
    # The second and third path change places, and so do the two branches after the join.
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    renumbered = {old: new for new, old in enumerate(order)}
    other = Topology.from_spec([(SPEC[old][0], [renumbered[p] for p in SPEC[old][1]]) for old in order])
    place = torch.cat([torch.from_numpy((topology.segment_ids == old).nonzero()[0]) for old in order])
    assert place.tolist() != list(range(32))
    assert torch.from_numpy(topology.position_ids)[place].tolist() == other.position_ids.tolist()
    found = logits(model, ids[:, place], other, attention)
    close(found, logits(model, ids, topology, attention)[place], attention)


@pytest.mark.parametrize("attention", TOLERANCE)
def test_a_path_is_the_plain_continuation_of_its_trunk(model: Any, attention: str) -> None:
    """P3: for each of three paths, and for a branch after a join of one path."""
    topology, ids = Topology.from_spec(SPEC), tokens(32)
    found = logits(model, ids, topology, attention)
    for path in (1, 2, 3):
        chain = torch.from_numpy(((topology.segment_ids == 0) | (topology.segment_ids == path)).nonzero()[0])
        close(found[chain], causal_logits(model, ids[:, chain]), attention)
    lonely, ids = Topology.from_spec([(4, []), (5, [0]), (3, [1]), (4, [2]), (4, [2])]), tokens(20)
    chain = torch.tensor([*range(12), *range(16, 20)])
    close(logits(model, ids, lonely, attention)[chain], causal_logits(model, ids[:, chain]), attention)


def test_the_implementations_agree(model: Any) -> None:
    topology, ids = Topology.from_spec(SPEC), tokens(32)
    expected = logits(model, ids, topology, "sdpa")
    assert (expected - causal_logits(model, ids)).abs().max() > 0.1
    for attention in TOLERANCE:
        close(logits(model, ids, topology, attention), expected, attention)


@torch.no_grad()
def test_tokens_decoded_in_parallel_over_one_cache_equal_one_pass(model: Any) -> None:
    """P4: cache slots are in the order of decoding, nothing is copied or computed twice, and the join is exact."""
    topology, ids = Topology.from_spec(SPEC), tokens(32)
    expected = logits(model, ids, topology)
    model.set_attn_implementation("hfe_topology")
    by_segment = [(topology.segment_ids == s).nonzero()[0].tolist() for s in range(topology.n_segments)]
    calls = [by_segment[0]]
    for together in ([1, 2, 3], [4], [5, 6], [7]):
        queues = [list(by_segment[s]) for s in together]
        while any(queues):  # a token of each live branch; the short ones end first
            calls.append([queue.pop(0) for queue in queues if queue])
    assert sorted(i for call in calls for i in call) == list(range(32)) and max(map(len, calls[1:])) == 3

    bitmaps, positions = topology.bitmaps(), torch.from_numpy(topology.position_ids)
    cache, filled, found = DynamicCache(config=model.config), 0, torch.empty_like(expected)
    kv_segment_ids = torch.full((1, 40), -1, dtype=torch.int32)
    for call in calls:
        segments = torch.from_numpy(topology.segment_ids[call])
        kv_segment_ids[0, filled : filled + len(call)] = segments
        cache_position = torch.arange(filled, filled + len(call), dtype=torch.int32)[None]
        filled += len(call)
        queries = TopologyQueries(
            cache_position, torch.tensor([filled], dtype=torch.int32), kv_segment_ids, bitmaps[segments.long()][None]
        )
        inputs: dict[str, Any] = {"topology": queries, "position_ids": positions[call][None]}
        if not isinstance(model, EfficientDecoderForCausalLM):
            inputs["attention_mask"] = torch.ones(1, filled, dtype=torch.long)
        found[call] = model(ids[:, call], past_key_values=cache, use_cache=True, **inputs).logits[0]
    close(found, expected)


def test_a_later_sibling_changes_nothing_before_it(model: Any) -> None:
    """P5."""
    with_sibling = Topology.from_spec([(5, []), (4, [0]), (3, [0]), (6, [0])])
    without = Topology.from_spec([(5, []), (4, [0]), (3, [0])])
    ids = tokens(18)
    close(logits(model, ids, with_sibling)[:12], logits(model, ids[:, :12], without))
    assert torch.equal(with_sibling.dense_mask()[:12, :12], without.dense_mask())


def test_rows_of_a_batch_are_what_each_is_alone(model: Any) -> None:
    """Different topologies, padded on either side."""
    rows = [Topology.from_spec(SPEC), Topology.from_spec([(3, []), (4, [0]), (2, [0])]), Topology.from_spec([(7, [])])]
    ids = [tokens(len(row), seed) for seed, row in enumerate(rows)]
    alone = [logits(model, each, row) for each, row in zip(ids, rows, strict=True)]
    model.set_attn_implementation("hfe_topology")
    for side in ("left", "right"):
        batch = Topology.stack(rows, side=side)
        padded = torch.zeros(3, 32, dtype=torch.long)
        real = batch.segment_ids >= 0
        padded[real] = torch.cat([each[0] for each in ids])
        with torch.no_grad():
            inputs = {
                "topology": TopologyMask(batch.segment_ids, batch.segment_visibility),
                "position_ids": batch.position_ids,
            }
            if not isinstance(model, EfficientDecoderForCausalLM):
                inputs["attention_mask"] = torch.ones_like(padded)
            found = model(padded, use_cache=False, **inputs).logits
        for row, expected in enumerate(alone):
            close(found[row, real[row]], expected)


def test_packed_rows_are_what_each_is_alone(model: Any) -> None:
    rows = [Topology.from_spec(SPEC), Topology.from_spec([(3, []), (4, [0]), (2, [0])])]
    ids = [tokens(len(row), seed) for seed, row in enumerate(rows)]
    alone = torch.cat([logits(model, each, row) for each, row in zip(ids, rows, strict=True)])
    close(logits(model, torch.cat(ids, 1), Topology.pack(rows)), alone)


def test_gradients_are_those_of_the_dense_mask(model: Any) -> None:
    topology, ids = Topology.from_spec(SPEC), tokens(32)
    found = {}
    for attention in ("hfe_topology", "sdpa"):
        model.zero_grad()
        with torch.enable_grad():
            logits.__wrapped__(model, ids, topology, attention).pow(2).mean().backward()
        found[attention] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, gradient in found["sdpa"].items():
        difference = (found["hfe_topology"][name] - gradient).norm()
        assert difference <= 1e-12 * gradient.norm().clamp(min=1e-3), name
