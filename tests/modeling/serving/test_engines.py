"""vLLM's and SGLang's way of running a transformers model, emulated: what they replace, how they load, how they call.

Both build the base model with its parameters on the meta device, put their own modules in place of linear layers, norms
whose class ends in RMSNorm, and vocabulary tables, load tensors by their names in the checkpoint, and then call the
model with the tokens of many sequences in one row. `tests/engines` runs vLLM itself.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_efficient.errors import HFEError
from hf_efficient.modeling.stem.stem_table import StemTable

# Styles of linear layers that both engines have had under these names. A norm's is read as `replicate`.
LINEAR_STYLES = {"colwise", "rowwise", "colwise_rep", "rowwise_rep", "replicate"}
OTHER_STYLES = {"embedding_rowwise", "replicated_with_grad_allreduce"}
PATCHES: dict[str, dict[str, Any]] = {
    "composed": {
        "stem_layers": [0, 2],
        "bhyt_layers": [0, 2],
        "bhyt_seq_len": 16,
        "topology": {"grammar": "multiverse"},
    },
    "window": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "carried": {"carry_residual": True, "stem_layers": [1]},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "stem_layers": [1]},
}


class Ranks:
    """Tensor-parallel ranks as threads: each gives a tensor and gets those of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.given[rank] = tensor
        self.barrier.wait()
        everything = list(self.given)
        self.barrier.wait()
        return everything


@dataclass
class Batch:
    """Tokens of a call: how many of each sequence. Attention keeps the keys and values of each sequence."""

    lengths: dict[str, int]


@dataclass
class EngineAttention:
    """An engine's attention of one layer."""

    window: int | None
    memory: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scaling: float) -> Tensor:
        outputs, start = [], 0
        for name, length in batch.lengths.items():
            new = [x[:, :, start : start + length] for x in (k, v)]
            past = self.memory.get(name)
            keys, values = new if past is None else (torch.cat(pair, 2) for pair in zip(past, new, strict=True))
            self.memory[name] = [keys, values]
            kv_indices = torch.arange(keys.shape[2])
            query_indices = kv_indices[-length:, None]
            visible = kv_indices <= query_indices
            if self.window is not None:
                visible = visible & (kv_indices > query_indices - self.window)
            groups = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
            part = q[:, :, start : start + length]
            outputs.append(
                nn.functional.scaled_dot_product_attention(part, keys, values, attn_mask=visible, scale=scaling)
            )
            start += length
        return torch.cat(outputs, 2).transpose(1, 2)


def engine_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    assert attention_mask is None, "an engine's attention has its own causal mask"
    attention = kwargs["attention_instances"][module.layer_idx]
    return attention(query, key, value, kwargs["forward_batch"], scaling), None


ALL_ATTENTION_FUNCTIONS.register("test_engine", engine_attention_forward)


class EngineLinear(nn.Module):
    """An engine's linear layer: it has a rank's part of the weight, and no `in_features`."""

    def __init__(self, linear: nn.Linear, style: str, rank: int, ranks: Ranks) -> None:
        super().__init__()
        self.style, self.rank, self.ranks = style, rank, ranks
        out, width = linear.out_features, linear.in_features
        shape = (out // ranks.size if "colwise" in style else out, width // ranks.size if "rowwise" in style else width)
        self.weight = nn.Parameter(torch.empty(shape))
        bias = None if linear.bias is None else nn.Parameter(torch.empty(shape[0]))
        self.register_parameter("bias", bias)

    def load(self, name: str, tensor: Tensor) -> None:
        if "colwise" in self.style:
            tensor = tensor.chunk(self.ranks.size, 0)[self.rank]
        elif "rowwise" in self.style and name == "weight":
            tensor = tensor.chunk(self.ranks.size, 1)[self.rank]
        getattr(self, name).data.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "rowwise_rep":
            x = x.chunk(self.ranks.size, -1)[self.rank]
        if "rowwise" in self.style:
            total = sum(self.ranks.exchange(self.rank, nn.functional.linear(x, self.weight)))
            return total if self.bias is None else total + self.bias
        out = nn.functional.linear(x, self.weight, self.bias)
        return torch.cat(self.ranks.exchange(self.rank, out), -1) if self.style == "colwise_rep" else out


class EngineNorm(nn.Module):
    """An engine's RMSNorm, with the width and epsilon of the one it replaces."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps = norm.variance_epsilon
        self.weight = nn.Parameter(torch.empty(norm.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class EngineEmbedding(nn.Embedding):
    """A vocabulary table of an engine."""


class PlacedElsewhere(nn.Identity):
    """What an engine leaves where another pipeline stage has the module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made within have parameters without data; their buffers are made as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Engine:
    """A stage and rank of an engine with a whole model's weights.

    Args:
        whole: the causal language model to serve.
        rank, ranks: tensor-parallel rank.
        layers: those of this pipeline stage; None for all.
        rebase_tables: put a class of the engine under every vocabulary table, as vLLM does.
    """

    def __init__(
        self,
        whole: PreTrainedModel,
        rank: int = 0,
        ranks: Ranks | None = None,
        layers: range | None = None,
        rebase_tables: bool = False,
    ) -> None:
        self.rank, self.ranks = rank, ranks or Ranks(1)
        config = type(whole.config).from_dict(whole.config.to_dict())
        config._attn_implementation = "test_engine"
        with parameters_on_meta():
            self.model = AutoModel.from_config(config, dtype=torch.float32)
        self.absent: list[str] = []
        count = config.num_hidden_layers
        self.layers = range(count) if layers is None else layers
        plan = list(self.model._pp_plan)
        assert plan == ["embed_tokens", "layers", "norm"]
        for index in set(range(count)) - set(self.layers):
            self.leave_out(f"layers.{index}")
        if self.layers.start > 0:
            self.leave_out("embed_tokens")
        if self.layers.stop < count:
            self.leave_out("norm")
        self.replace(rebase_tables)
        self.attention = {
            i: EngineAttention(config.sliding_window if config.layer_types[i] == "sliding_attention" else None)
            for i in self.layers
        }
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        self.load(whole)
        self.model.eval()

    def leave_out(self, name: str) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, PlacedElsewhere())
        self.absent.append(f"{name}.")

    def replace(self, rebase_tables: bool) -> None:
        plan = self.model.tp_plan
        assert set(plan.values()) <= LINEAR_STYLES | OTHER_STYLES
        for name, module in list(self.model.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, nn.Linear):
                style = next((style for pattern, style in plan.items() if re.match(pattern, name)), "replicate")
                assert style in LINEAR_STYLES
                new: nn.Module = EngineLinear(module, style, self.rank, self.ranks)
            elif type(module).__name__.endswith("RMSNorm"):
                new = EngineNorm(module)
            elif type(module) is nn.Embedding:
                new = EngineEmbedding(module.num_embeddings, module.embedding_dim)
            elif isinstance(module, StemTable) and rebase_tables:
                module.__class__ = type("StemTable", (StemTable, EngineEmbedding), {})
                continue
            else:
                continue
            setattr(self.model.get_submodule(parent), child, new)

    def load(self, whole: PreTrainedModel) -> None:
        """By the names of the checkpoint: each has a place, and nothing is left without."""
        places = dict(self.model.state_dict(keep_vars=True))
        for full_name, tensor in whole.state_dict().items():
            name = full_name.removeprefix("model.")
            if name.startswith(("lm_head.", *self.absent)):
                continue
            place = places.pop(name)
            module = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, EngineLinear):
                module.load(name.rpartition(".")[2], tensor)
            else:
                place.data.copy_(tensor)
        assert not places

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor, ids: Tensor | None, embeds: Tensor | None = None) -> Tensor:
        return self.model(
            input_ids=None if ids is None else ids[None],
            inputs_embeds=None if embeds is None else embeds[None],
            use_cache=False,
            position_ids=positions[None],
            return_dict=False,
            forward_batch=batch,
            attention_instances=self.attention,
        )[0][0]


# Sequences that come together: a prompt in two parts, another beside it, then single tokens of both.
CALLS: list[dict[str, int]] = [{"a": 5}, {"a": 3, "b": 4}, {"a": 1, "b": 1}, {"b": 1, "a": 1}]


def serve(
    stages: list[Engine], head: Tensor, ids: dict[str, Tensor], calls: list[dict[str, int]] = CALLS
) -> dict[str, Tensor]:
    """Logits of each sequence [S, V], computed in several calls."""
    done = dict.fromkeys(ids, 0)
    logits: dict[str, list[Tensor]] = {name: [] for name in ids}
    for lengths in calls:
        spans = {name: torch.arange(done[name], done[name] + n) for name, n in lengths.items()}
        tokens, positions = torch.cat([ids[name][span] for name, span in spans.items()]), torch.cat([*spans.values()])
        hidden = stages[0](Batch(lengths), positions, tokens)
        for stage in stages[1:]:
            hidden = stage(Batch(lengths), positions, None, hidden)
        for (name, n), part in zip(lengths.items(), (hidden @ head.T).split(list(lengths.values())), strict=True):
            logits[name].append(part)
            done[name] += n
    return {name: torch.cat(parts) for name, parts in logits.items()}


def expected(whole: PreTrainedModel, ids: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: whole(input_ids=tokens[None]).logits[0] for name, tokens in ids.items()}


@pytest.fixture(params=["hfe_decoder", "hfe_stem", "hfe_bhyt", "hfe_multiverse", "hfe_medverse", *PATCHES])
def whole(request: pytest.FixtureRequest, tiny_model: Callable) -> PreTrainedModel:
    """The tiny model of every architecture and of some combinations, its branch variances up to date."""
    fields = PATCHES.get(request.param, {})
    model = tiny_model("hfe_decoder" if fields else request.param, **fields)
    return model.eval()


@pytest.fixture
def ids(token_ids: Callable) -> dict[str, Tensor]:
    """Two sequences as long as `CALLS` takes them."""
    rows = token_ids(2, 10)
    return {"a": rows[0], "b": rows[1, :6]}


@pytest.mark.parametrize("rebase_tables", [False, True], ids=["sglang", "vllm"])
def test_an_engine_computes_what_the_model_does(whole: PreTrainedModel, ids: dict, rebase_tables: bool) -> None:
    served = serve([Engine(whole, rebase_tables=rebase_tables)], whole.lm_head.weight, ids)
    for name, logits in expected(whole, ids).items():
        torch.testing.assert_close(served[name], logits, rtol=1e-4, atol=1e-4)


def test_two_tensor_parallel_ranks_compute_what_the_model_does(whole: PreTrainedModel, ids: dict) -> None:
    ranks = Ranks(2)
    engines = [Engine(whole, rank, ranks) for rank in range(2)]
    results: dict[int, dict[str, Tensor]] = {}
    threads = [
        threading.Thread(target=lambda r=r: results.update({r: serve([engines[r]], whole.lm_head.weight, ids)}))
        for r in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, logits in expected(whole, ids).items():
        for rank in range(2):
            torch.testing.assert_close(results[rank][name], logits, rtol=1e-4, atol=1e-4)


def stages_of(whole: PreTrainedModel, first: int) -> list[Engine]:
    return [Engine(whole, layers=range(first)), Engine(whole, layers=range(first, whole.config.num_hidden_layers))]


def test_pipeline_stages_compute_what_the_model_does(whole: PreTrainedModel, ids: dict) -> None:
    """And where STEM would have to look ids up that the second stage is not given, it says so."""
    stages = stages_of(whole, 2)
    if 2 not in (getattr(whole.config, "stem_layers", None) or []):
        served = serve(stages, whole.lm_head.weight, ids)
        for name, logits in expected(whole, ids).items():
            torch.testing.assert_close(served[name], logits, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(HFEError, match=r"this pipeline stage did not receive the token ids that its STEM layers \[2\]"):
        serve(stages, whole.lm_head.weight, ids)


def test_a_stage_with_the_embedding_never_guesses_ids(tiny_model: Callable, ids: dict) -> None:
    """Hidden states of an earlier stage are not rows of the embedding, whatever `stem_inputs_embeds` says."""
    whole = tiny_model("hfe_stem", stem_inputs_embeds="match")
    stages = stages_of(whole, 1)
    stages[1].model.embed_tokens = nn.Embedding.from_pretrained(whole.model.embed_tokens.weight.detach())
    with pytest.raises(HFEError, match="this pipeline stage did not receive the token ids"):
        serve(stages, whole.lm_head.weight, ids)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_is_told_that_it_places_the_tables(tiny_config: Callable, engine: str) -> None:
    ALL_ATTENTION_FUNCTIONS.register(engine, engine_attention_forward)
    config = tiny_config("hfe_stem", stem_offload="disk")
    config._attn_implementation = engine
    with pytest.raises(HFEError, match=f"stem_offload='disk', and {engine} loads and places the tables itself"):
        AutoModel.from_config(config)


def test_branch_variance_of_split_weights_stays_as_stored(tiny_model: Callable) -> None:
    """A rank sees a part of v_proj and o_proj only, so what the checkpoint says holds."""
    whole = tiny_model("hfe_bhyt").eval()
    engine = Engine(whole, 0, Ranks(2))
    stored = whole.model.layers[0].post_attention_layernorm.branch
    assert torch.equal(engine.model.layers[0].post_attention_layernorm.branch, stored)
    assert engine.model.refresh_branch_variance() == [0]


def test_plan_of_the_whole_model_gathers_the_head(whole: PreTrainedModel) -> None:
    assert whole.tp_plan["lm_head"] == "colwise_rep"
