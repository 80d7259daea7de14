"""Generation with captured steps gives the tokens of transformers for every option of `generate`.

Without a GPU a few of these run in Triton's interpreter, where a step is called instead of captured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.environment import triton_interpreted
from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENT
from hf_efficient.modeling.decoder.cache_contract import round_capacity
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM
from tiny_shapes import SPECIAL_TOKENS, TINY

SHAPE: dict[str, Any] = (
    TINY | SPECIAL_TOKENS | {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
)
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
}
PROMPT, NEW = 7, 12
gpu = pytest.mark.gpu


def _pair(family: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A stock model and ours with its weights."""
    torch.manual_seed(0)
    stock = FAMILIES[family]()
    for name, parameter in stock.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.2)
    ours = EfficientDecoderForCausalLM(decoder_config(stock.config))
    ours.load_state_dict(stock.state_dict())
    return stock.to(device, dtype).eval(), ours.to(device, dtype).eval()


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, device: torch.device) -> tuple[Any, Any]:
    return _pair(request.param, device)


@pytest.fixture
def llama(device: torch.device) -> tuple[Any, Any]:
    return _pair("llama", device)


def _ids(device: torch.device, rows: int = 2, length: int = PROMPT, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)


def _padded(device: torch.device) -> dict[str, Tensor]:
    ids = _ids(device, 3)
    ids[1, :3] = 0
    ids[2, :5] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _generate(model: Any, inputs: Tensor | dict[str, Any], **options: Any) -> Any:
    """Greedy by default, NEW tokens by default."""
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    torch.manual_seed(5)
    return model.generate(**inputs, **settings)


def _was_captured(model: Any) -> bool:
    return triton_interpreted() or bool(model.captured_steps())


def test_generation_gives_the_tokens_of_the_stock_model(device: torch.device) -> None:
    stock, ours = _pair("qwen3", device)
    assert torch.equal(
        _generate(ours, _ids(device), max_new_tokens=4), _generate(stock, _ids(device), max_new_tokens=4)
    )
    assert _was_captured(ours)


def test_generation_with_left_padding_gives_the_tokens_of_the_stock_model(device: torch.device) -> None:
    stock, ours = _pair("llama", device)
    assert torch.equal(
        _generate(ours, _padded(device), max_new_tokens=4), _generate(stock, _padded(device), max_new_tokens=4)
    )


@gpu
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"do_sample": True, "top_k": 20, "temperature": 0.7}, id="sampling"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="several-samples"),
        pytest.param({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, id="processors"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"max_new_tokens": 1}, id="one-token"),
        pytest.param({"max_new_tokens": 2}, id="two-tokens"),
        pytest.param({"max_new_tokens": 200}, id="many-tokens"),
        pytest.param({"max_time": 100.0}, id="clock"),
        pytest.param({"prefill_chunk_size": 3}, id="chunked-prefill"),
    ],
)
@pytest.mark.parametrize("inputs", ["plain", "padded"])
def test_every_kind_of_generation_agrees_with_stock(
    pair: tuple[Any, Any], options: dict[str, Any], inputs: str, device: torch.device
) -> None:
    stock, ours = pair
    given = _ids(device) if inputs == "plain" else _padded(device)
    reference = {k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    assert torch.equal(_generate(ours, given, **options), _generate(stock, given, **reference))


@gpu
def test_rows_end_one_by_one_and_the_output_stops_with_the_last(pair: tuple[Any, Any], device: torch.device) -> None:
    stock, ours = pair
    free = _generate(stock, _padded(device), max_new_tokens=60)
    for last in (0, 2, 9, 30, 59):
        ends = [int(free[row, PROMPT + max(last - 2 * row, 0)]) for row in range(3)]
        expected = _generate(stock, _padded(device), max_new_tokens=60, eos_token_id=ends)
        found = _generate(ours, _padded(device), max_new_tokens=60, eos_token_id=ends)
        assert torch.equal(found, expected)
    assert _was_captured(ours)


@gpu
def test_one_prompt_decodes_with_an_assistant_and_by_prompt_lookup(pair: tuple[Any, Any], device: torch.device) -> None:
    stock, ours = pair
    prompt = _ids(device, 1).repeat(1, 3)
    expected = _generate(stock, prompt, max_new_tokens=40)
    assert torch.equal(_generate(ours, prompt, max_new_tokens=40, prompt_lookup_num_tokens=3), expected)
    assistant = _pair("llama", device)[1]
    assert torch.equal(_generate(ours, prompt, max_new_tokens=40, assistant_model=assistant), expected)
    assert torch.equal(_generate(stock, prompt, max_new_tokens=40, assistant_model=assistant), expected)


@gpu
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_conversation_goes_on_from_its_cache(pair: tuple[Any, Any], padded: bool, device: torch.device) -> None:
    stock, ours = pair
    inputs = _padded(device) if padded else {"input_ids": _ids(device, 3), "attention_mask": _ids(device, 3) * 0 + 1}
    caches: dict[str, Any] = {"stock": None, "ours": None}
    for turn in range(4):  # the cache outgrows its first capacity
        found = {}
        for name, model in (("stock", stock), ("ours", ours)):
            options: dict[str, Any] = {"return_dict_in_generate": True, "max_new_tokens": 90}
            if caches[name] is not None:
                options["past_key_values"] = caches[name]
            found[name] = _generate(model, inputs, **options)
            caches[name] = found[name].past_key_values
        assert torch.equal(found["ours"].sequences, found["stock"].sequences), turn
        assert int(caches["ours"].get_seq_length()) == caches["stock"].get_seq_length()
        more = _ids(device, 3, 5, seed=turn)
        new = found["ours"].sequences.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat((inputs["attention_mask"], torch.ones(3, new + 5, dtype=torch.long, device=device)), 1)
        inputs = {"input_ids": torch.cat((found["ours"].sequences, more), 1), "attention_mask": mask}


@gpu
@pytest.mark.parametrize("kind", ["dynamic", "static", "copy"])
def test_a_cache_that_the_caller_passes_is_filled_and_stays_the_callers(
    llama: tuple[Any, Any], kind: str, device: torch.device
) -> None:
    stock, ours = llama
    first = _generate(stock, _ids(device), return_dict_in_generate=True)
    if kind == "dynamic":
        cache: Any = DynamicCache(config=ours.config)
    elif kind == "static":
        cache = StaticCache(config=ours.config, max_cache_len=100)
    else:
        cache = copy.deepcopy(_generate(ours, _ids(device), return_dict_in_generate=True).past_key_values)
        cache.reset()
    found = _generate(ours, _ids(device), past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(found.sequences, first.sequences)
    assert found.past_key_values is cache and int(cache.get_seq_length()) == PROMPT + NEW - 1
    # What others generate afterwards must not touch it.
    keys = cache.layers[0].keys.clone()
    _generate(ours, _ids(device, seed=9))
    assert torch.equal(cache.layers[0].keys, keys)


@gpu
def test_a_returned_cache_serves_a_model_that_is_called_by_hand(llama: tuple[Any, Any], device: torch.device) -> None:
    logits = []
    for model in llama:
        cache = _generate(model, _ids(device), return_dict_in_generate=True).past_key_values
        with torch.no_grad():
            model(_ids(device, length=300), past_key_values=cache)  # more than it had room for
            cache.crop(-5)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0], device=device))
            logits.append(model(_ids(device, length=3), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@gpu
def test_a_static_cache_that_is_too_small_is_an_error_once_it_is_full(
    llama: tuple[Any, Any], device: torch.device
) -> None:
    stock, ours = llama
    ids = _ids(device, 1)
    cache = StaticCache(config=ours.config, max_cache_len=PROMPT + 2)
    with pytest.raises(HFEError, match="static cache is full"):
        _generate(ours, ids, past_key_values=cache)
    end = int(_generate(stock, ids)[0, PROMPT + 1])
    expected = _generate(stock, ids, eos_token_id=end)
    cache = StaticCache(config=ours.config, max_cache_len=PROMPT + 2)
    assert torch.equal(_generate(ours, ids, eos_token_id=end, past_key_values=cache), expected)


@gpu
def test_a_prompt_padded_on_the_right_gets_the_tokens_of_the_stock_model(
    llama: tuple[Any, Any], device: torch.device
) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long, device=device)
    mask[1, 4:] = 0
    expected, found = (_generate(m, {"input_ids": _ids(device), "attention_mask": mask}) for m in llama)
    assert torch.equal(found, expected)


@gpu
def test_embeddings_may_be_more_than_the_ids_beside_them(llama: tuple[Any, Any], device: torch.device) -> None:
    embeds = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(2, 300, dtype=torch.long, device=device)
    inputs = {"input_ids": _ids(device), "inputs_embeds": embeds, "attention_mask": mask}
    expected, found = (_generate(model, inputs) for model in llama)
    assert torch.equal(found, expected)


@gpu
def test_a_cache_that_does_not_fit_leaves_the_call_to_transformers(
    llama: tuple[Any, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(llama[1]), "build_cache", no_memory)
    expected, found = (_generate(model, _ids(device)) for model in llama)
    assert torch.equal(found, expected)


@gpu
# Prefix tuning: tests/modeling/test_generation.py, since PEFT and transformers 5.24 have two names for its cache.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("PrefixTuningConfig", marks=pytest.mark.skipif(CACHE_ARGUMENT == "cache", reason="see above")),
        "PromptTuningConfig",
    ],
)
def test_virtual_tokens_act(llama: tuple[Any, Any], kind: str, device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    outputs = []
    for model in llama:
        adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        generator = torch.Generator().manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        outputs.append(adapted.to(device).generate(input_ids=_ids(device), max_new_tokens=NEW, eos_token_id=None))
    assert torch.equal(*outputs)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_model_on_another_device_than_the_current_one_generates() -> None:
    for index in (0, 1):
        device = torch.device("cuda", index)
        stock, ours = _pair("llama", device)
        streams = [_Recorder(), _Recorder()]
        expected, found = (
            _generate(m, _ids(device, 1), streamer=s) for m, s in zip((stock, ours), streams, strict=True)
        )
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.cat([x.flatten() for x in s.tokens]) for s in streams))
        assert _was_captured(ours)


@gpu
def test_scores_and_logits_are_those_of_the_stock_model(llama: tuple[Any, Any], device: torch.device) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.5}
    options |= {"do_sample": True, "top_k": 10}
    expected, found = (_generate(model, _ids(device), **options) for model in llama)
    assert len(found.scores) == len(found.logits) == NEW
    for name in ("scores", "logits"):
        for a, b in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.tokens.append(value)

    def end(self) -> None:
        self.ended += 1


@gpu
def test_a_streamer_gets_every_token_once_and_none_past_the_end(llama: tuple[Any, Any], device: torch.device) -> None:
    ids = _ids(device, 1)
    free = _generate(llama[0], ids)[0, PROMPT:].tolist()
    for end in (None, free[0], free[6], free[-1]):
        streams = []
        for model in llama:
            streamer = _Recorder()
            _generate(model, ids, eos_token_id=end, streamer=streamer)
            assert streamer.ended == 1
            streams.append([token.flatten().tolist() for token in streamer.tokens])
        assert streams[0] == streams[1]


@gpu
def test_callbacks_of_the_user_are_called_once_a_token(llama: tuple[Any, Any], device: torch.device) -> None:
    class Ban(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            Ban.calls += 1
            assert input_ids.shape[1] == PROMPT + (Ban.calls - 1) % 100
            return scores.index_fill(1, input_ids[0, -3:], -torch.inf)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT + 5, device=input_ids.device)

    outputs, calls = [], []
    for model in llama:
        Ban.calls = 0
        options = {
            "logits_processor": LogitsProcessorList([Ban()]),
            "stopping_criteria": StoppingCriteriaList([Stop()]),
        }
        outputs.append(_generate(model, _ids(device), **options))
        calls.append(Ban.calls)
    assert torch.equal(*outputs)
    assert calls == [5, 5]


@gpu
def test_captures_are_few_and_are_used_again(llama: tuple[Any, Any], device: torch.device) -> None:
    stock, ours = llama
    for rows in (1, 2, 3, 4, 5, 6, 2):
        ids = _ids(device, rows)
        assert torch.equal(_generate(ours, ids), _generate(stock, ids))
    report = ours.captured_steps()
    assert [entry["batch"] for entry in report] == [4, 5, 6, 2]
    assert all(entry["capacity"] == round_capacity(PROMPT + NEW) and entry["cache_bytes"] > 0 for entry in report)
    _generate(ours, _ids(device, 2, length=11))
    assert len(ours.captured_steps()) == 4, "a prompt of another length in the same capacity needs no new capture"
    ours.free_captured_steps()
    assert ours.captured_steps() == []


@gpu
def test_weights_that_change_or_move_are_seen(llama: tuple[Any, Any], device: torch.device) -> None:
    stock, ours = llama
    ids = _ids(device)
    _generate(ours, ids)
    with torch.no_grad():
        for model in (stock, ours):
            model.model.layers[0].mlp.up_proj.weight.mul_(-1)  # in place
    assert torch.equal(_generate(ours, ids), _generate(stock, ids))
    for model in (stock, ours):
        weight = model.model.layers[1].mlp.down_proj.weight
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(weight.detach() * -2)  # another tensor
    assert torch.equal(_generate(ours, ids), _generate(stock, ids))
    ours.to("cpu").to(device)
    assert torch.equal(_generate(ours, ids), _generate(stock, ids))
    model = copy.deepcopy(ours).to(torch.float16)
    assert torch.equal(_generate(model, ids), _generate(stock.to(torch.float16), ids))


@gpu
def test_hooks_and_adapters_act(llama: tuple[Any, Any], device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    stock, ours = llama
    ids = _ids(device)
    plain = _generate(ours, ids)
    calls = []
    handle = ours.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(_generate(ours, ids), plain)
    assert len(calls) == NEW
    handle.remove()
    adapted = []
    for model in (stock, ours):
        torch.manual_seed(1)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted.append(peft.get_peft_model(model, settings))
    expected = _generate(adapted[0], ids)
    assert torch.equal(_generate(adapted[1], ids), expected)
    assert not torch.equal(expected, plain)
    with adapted[1].disable_adapter():
        assert torch.equal(_generate(adapted[1], ids), plain)
    assert torch.equal(_generate(adapted[1].merge_and_unload(), ids), expected)
    assert _was_captured(ours)


@gpu
def test_generation_in_inference_mode_shares_its_captures(llama: tuple[Any, Any], device: torch.device) -> None:
    stock, ours = llama
    expected = _generate(stock, _ids(device))
    for guard in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(_generate(ours, _ids(device)), expected)
    assert len(ours.captured_steps()) == 1


@gpu
def test_a_stem_model_generates_what_its_reference_does(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = StemForCausalLM(StemConfig(**SHAPE, stem_layers=[1], stem_init_std=0.5)).to(device).eval()
    found = _generate(model, _padded(device))
    assert _was_captured(model)
    monkeypatch.setenv("HFE_BACKEND", "reference")
    assert torch.equal(found, _generate(model, _padded(device)))


@gpu
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_stock_models_take_the_decode_attention(
    pair: tuple[Any, Any], cache: dict[str, Any], device: torch.device
) -> None:
    stock, _ = pair
    options = {"disable_compile": True, **cache}
    for inputs in (_ids(device), _padded(device)):
        expected = _generate(stock, inputs, **options)
        stock.set_attn_implementation("hfe_decode")
        assert torch.equal(_generate(stock, inputs, **options), expected)
        stock.set_attn_implementation("sdpa")
