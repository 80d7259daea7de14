"""`generate()` at the pace of the device: the step of greedy search and sampling replayed from a CUDA graph.

transformers' own loop prepares inputs, calls the model and waits for the device once a token. This one keeps all it
needs on the device, asks now and then whether every row has ended, and drops what it computed past that point. It
serves the calls that it can serve exactly and hands the others back: beams, assisted and prompt-lookup decoding, a
model on the CPU or spread over devices, adapters, hooks, another attention implementation, a cache of another kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_efficient.environment import check_data, triton_interpreted
from hf_efficient.errors import HFEError
from hf_efficient.kernels.decode_attention.api import MAX_HEAD_DIM
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.cache_compat import cache_argument, cache_of_arguments, rename_cache
from hf_efficient.modeling.decoder.configuration_decoder import length_dependent_rope
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION
from hf_efficient.modeling.decoder.decode_step import (
    RETURNED_CACHE_STEPS,
    DecodeCache,
    DecodeStep,
    round_capacity,
    step_pool,
    step_signature,
)

# Tokens between two looks at whether all rows have ended, and at whether a callback changed the model meanwhile.
# Looking takes the host a millisecond or two, and tokens past the end are computed in vain.
STOP_CHECK_INTERVAL = 8
# What may come with a prompt without changing what a step computes.
_STEP_ARGUMENTS = {
    "attention_mask",
    "cache",
    "cache_position",
    "inputs_embeds",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}


class CapturedGeneration:
    """Mixin before `GenerationMixin`, whose `_sample` serves greedy search and sampling."""

    # Of the model that this is mixed into.
    config: Any
    device: Any
    prepare_inputs_for_generation: Any
    set_attn_implementation: Any

    # Arguments of `generate` that belong to the prompt alone, for patches to add to.
    prompt_arguments: frozenset[str] = frozenset()
    # Attention implementations that compute what `hfe_decode` does, for patches to add to.
    captured_attention: frozenset[str] = frozenset({DECODE_ATTENTION})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a cache may come under its name of any release."""
        return super().generate(*args, **rename_cache(kwargs))

    def captured_steps(self) -> list[dict[str, Any]]:
        """What `generate` keeps for its next calls: rows, columns and bytes of each captured step and its cache.

        At most 4, and at most a quarter of the device's memory; `free_captured_steps` lets go of them.
        """
        return step_pool(self).report()

    def free_captured_steps(self) -> None:
        """Free the memory that `captured_steps` tells of."""
        step_pool(self).clear()

    def capture_obstacle(
        self, input_ids: Tensor, generation_config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
    ) -> str:
        """Why a call of `generate` takes transformers' loop, or an empty text when it is served from a graph."""
        config = self.config
        cache = cache_of_arguments(model_kwargs)
        mask = model_kwargs.get("attention_mask")
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)
        tested = {
            "the model is not on a CUDA device where Triton runs": not _may_capture(self.device),
            "the configuration disables compilation": bool(generation_config.disable_compile),
            f"the attention implementation is {config._attn_implementation}": config._attn_implementation
            not in self.captured_attention,
            "heads are wider than the kernel takes": config.head_dim > MAX_HEAD_DIM,
            "the rotary frequencies depend on the length": length_dependent_rope(config.rope_parameters) is not None,
            "HFE_CHECK asks for checks that wait for the device": check_data(),
            # As prefix and prompt tuning do.
            "something else prepares the inputs": prepare is not type(self).prepare_inputs_for_generation,
            "the attention mask has no row for each sequence": mask is not None and getattr(mask, "ndim", 0) != 2,
            "other processes generate in step": synced_gpus,
            "the cache is switched off": not model_kwargs.get("use_cache"),
            "attentions or hidden states are asked for": bool(
                generation_config.output_attentions or generation_config.output_hidden_states
            ),
            "the call serves another model's generation": bool(generation_config.is_assistant),
            "there is nothing to generate": input_ids.shape[1] >= generation_config.max_length,
            "gradients or autocast are on": torch.is_grad_enabled() or torch.is_autocast_enabled(input_ids.device.type),
            f"the cache is a {type(cache).__name__} of the caller's": not _can_use(cache),
        }
        found = next((reason for reason, holds in tested.items() if holds), "")
        unknown = sorted(set(model_kwargs) - _STEP_ARGUMENTS - self.prompt_arguments)
        if not found and unknown and any(model_kwargs[name] is not None for name in unknown):
            found = f"the call has the argument {unknown[0]}"
        return found

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        obstacle = self.capture_obstacle(input_ids, generation_config, synced_gpus, model_kwargs)
        signature = None if obstacle else step_signature(self)
        if not obstacle and signature is None:
            obstacle = "a module has a hook, an adapter, a wrapper or a weight of another kind, or is in training mode"
        device = input_ids.device
        if not obstacle and logits_processor and device != self.device:
            obstacle = f"logits are to be processed on {device}, where the prompt is"
        turn = None
        if signature is not None and not obstacle:
            try:
                # Ids on another device stay there in transformers; here they are the step's own.
                turn = GraphDecodeLoop(self, input_ids.to(self.device), generation_config, model_kwargs, signature)
            except torch.OutOfMemoryError:
                obstacle = f"a cache for max_length={generation_config.max_length} tokens does not fit into memory"
        if turn is None:
            get_logger().info("generate takes the loop of transformers: %s", obstacle)
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        with torch.cuda.device_of(turn.ids):  # streams and events are those of the current device
            result = turn.generate(logits_processor, stopping_criteria, streamer)
        return result.to(device) if isinstance(result, Tensor) else result

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; an attention of ours gives way to `sdpa` or flash attention, which take its cache."""
        own = self.config._attn_implementation
        if own not in self.captured_attention:
            return super().init_continuous_batching(*args, **kwargs)
        self.set_attn_implementation("sdpa")
        try:
            manager = super().init_continuous_batching(*args, **kwargs)
        except BaseException:
            self.set_attn_implementation(own)
            raise
        # What the manager sets again when it stops.
        manager._original_attn_impl = own
        return manager


def _may_capture(device: torch.device) -> bool:
    """True on CUDA with Triton; and under Triton's interpreter, where steps are called, not captured."""
    if device.type != "cuda" and not (device.type == "cpu" and triton_interpreted()):
        return False
    return select_backend("decode_attention", None, device) == "triton"


def _can_use(cache: Cache | None) -> bool:
    """True for a cache that `generate` made for this call, which is exchanged, and for a caller's plain static one."""
    if cache is None or not getattr(cache, "_is_user_defined", False):
        return cache is None or type(cache) in (DynamicCache, StaticCache) and not cache.offloading
    return (
        isinstance(cache, StaticCache)
        and not cache.offloading
        and all(type(layer) is StaticLayer for layer in cache.layers)
    )


class GraphDecodeLoop:
    """One call of `generate`: its cache, its step, and the tokens so far."""

    length: int  # columns of the cache that the prompt fills, with what was there before
    step: DecodeStep

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        signature: tuple,
    ) -> None:
        self.model = model
        self.config = generation_config
        self.signature: tuple | None = signature
        self.prompt_length = input_ids.shape[1]
        self.most_tokens = generation_config.max_length
        self.ids = input_ids.new_zeros(input_ids.shape[0], self.most_tokens, dtype=torch.long)
        self.ids[:, : self.prompt_length] = input_ids

        mask = model_kwargs.get("attention_mask")
        # [B, columns so far], false at padding; None when there is none
        self.columns = None if mask is None or bool(mask.all()) else mask.to(model.device, torch.bool)
        given = cache_of_arguments(model_kwargs)
        is_callers = getattr(given, "_is_user_defined", False)
        self.keeps_cache = is_callers or bool(generation_config.return_dict_in_generate)
        self._pooled: DecodeStep | None = None
        self.cache: Any = given if is_callers else self._own_cache(model_kwargs.get("inputs_embeds"))
        self.model_kwargs = {**model_kwargs, **cache_argument(self.cache)}
        if is_callers and isinstance(given, DecodeCache):
            self._make_room(
                given, max(x.shape[1] for x in (input_ids, mask, model_kwargs.get("inputs_embeds")) if x is not None)
            )

    def _own_cache(self, embeds: Tensor | None) -> DecodeCache:
        """A cache for this call, from the pool where one fits; its step comes with it."""
        model, rows = self.model, self.ids.shape[0]
        # Embeddings take the place of the prompt's ids, as many as they are. The last token is never fed.
        prompt = self.prompt_length if embeds is None else embeds.shape[1]
        capacity = round_capacity(prompt + self.most_tokens - self.prompt_length - 1)
        pool = step_pool(model)
        found = pool.take(rows, capacity, self.columns is not None, self.signature)
        if found is not None:
            cache, self._pooled = found
            cache.reset()  # masked columns are multiplied by zero, which a stale infinity would survive
            return cache
        try:
            return DecodeCache(model.config, rows, capacity, model.dtype, model.device)
        except torch.OutOfMemoryError:
            pool.clear()
            return DecodeCache(model.config, rows, capacity, model.dtype, model.device)

    def _make_room(self, cache: DecodeCache, tokens: int) -> None:
        """Let a cache of an earlier turn hold this one too; `tokens` counts the prompt, and perhaps what was before."""
        columns = int(cache.get_seq_length()) + tokens + self.most_tokens - self.prompt_length
        if columns > cache.capacity:
            cache.grow(round_capacity(columns))

    def _find_step(self) -> DecodeStep:
        """The step of this turn's cache: one that fits it already, or a new one."""
        step = self._pooled or RETURNED_CACHE_STEPS.get(self.cache)
        padded = self.columns is not None
        if step is None or not step.fits(self.cache) or (padded and not step.padded):
            step = DecodeStep(self.cache, set(self.model.config.layer_types), padded)
        return step

    # The loop

    def generate(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, streamer: Any) -> Any:
        """Sequences [B, length], or transformers' output class where the call asks for it."""
        ids, config = self.ids, self.config
        logits = self._prefill()
        foreign = _needs_every_token(processors, criteria)
        every_token = streamer is not None or foreign or self._is_full(self.most_tokens - 1)
        lookout = AsyncStopCheck(ids, streamer, every_token)
        unfinished = ids.new_ones(ids.shape[0])
        ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = config._pad_token_tensor.to(ids.device) if ends_rows else None
        scores_kept: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None
        logits_kept: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_logits else None

        length = self.prompt_length
        while True:
            raw = logits.to(copy=True, dtype=torch.float32)
            seen = ids[:, :length]
            scores = processors(seen.contiguous() if foreign else seen, raw)
            if scores_kept is not None:
                scores_kept.append(scores)
            if logits_kept is not None:
                logits_kept.append(raw)
            if config.do_sample:
                token = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                token = scores.argmax(dim=-1)
            if ends_rows:
                token = token * unfinished + pad * (1 - unfinished)
            lookout.count(unfinished)
            ids[:, length] = token
            length += 1
            seen = ids[:, :length].contiguous() if foreign else ids[:, :length]
            unfinished = unfinished & ~criteria(seen, None if scores_kept is None else tuple(scores_kept))
            lookout.mark(unfinished, token)
            if length >= self.most_tokens:
                break
            if self._is_full(length):
                if lookout.sees_the_end():
                    break
                raise HFEError(
                    f"the static cache is full: it has {self.step.capacity} columns, all filled at length {length}",
                    f"give it max_cache_len={self.length + self.most_tokens - self.prompt_length} or fewer new tokens",
                )
            # The device has its next step before the host asks about the last one.
            logits = self._advance(token, look_over=length % STOP_CHECK_INTERVAL == 0)
            if lookout.sees_the_end():
                break
        return self._finish(lookout.finish(), scores_kept, logits_kept)

    def _prefill(self) -> Tensor:
        """Logits [B, vocabulary] after the prompt; the step stands ready behind it."""
        outputs: CausalLMOutputWithPast = self.model._prefill(
            self.ids[:, : self.prompt_length].clone(), self.config, self.model_kwargs, is_first_iteration=True
        )
        self.length = int(self.cache.get_seq_length())
        self.step = self._find_step()
        self.step.reset(self.length, self._next_positions(), self.columns)
        return outputs.logits[:, -1]

    def _is_full(self, length: int) -> bool:
        """True when the cache has no column for the last of `length` tokens: a static one of the caller's."""
        return self.length + length - self.prompt_length > self.step.capacity

    def _next_positions(self) -> Tensor:
        """Position of each row's next token [B]."""
        rows = self.ids.shape[0]
        given = self.model_kwargs.get("position_ids")
        if given is not None:
            return (given[:, -1] + 1).expand(rows)
        return self.ids.new_full((rows,), self.length) if self.columns is None else self.columns.sum(1)

    def _advance(self, token: Tensor, look_over: bool) -> Tensor:
        """Logits [B, vocabulary] after one more token of each row [B]."""
        step = self.step
        step.tokens.copy_(token[:, None])
        if look_over:  # a callback may have changed the model meanwhile
            self.signature = step_signature(self.model)
        if self.signature is None or not step.tokens.is_cuda:
            return step.run(self.model, self.cache)
        if step.signature != self.signature:
            step.capture(self.model, self.cache, self.signature)
        return step.replay()

    def _finish(self, steps: int, scores: list[Tensor] | None, logits: list[Tensor] | None) -> Any:
        """What `generate` returns after `steps` tokens; those computed beyond are forgotten."""
        sequences = self.ids[:, : self.prompt_length + steps].clone()
        if self.keeps_cache:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.length + steps - 1)  # the last token has not been fed
            RETURNED_CACHE_STEPS[self.cache] = self.step
        elif self.step.signature is not None:
            step_pool(self.model).put(self.cache, self.step)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if scores is None else tuple(scores[:steps]),
            logits=None if logits is None else tuple(logits[:steps]),
            **cache_argument(self.cache),
        )


def _needs_every_token(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> bool:
    """True when a callback may count its calls or read a clock, so that it must not run past the end."""
    return any(
        not type(callback).__module__.startswith("transformers.") or isinstance(callback, MaxTimeCriteria)
        for callback in (*processors, *criteria)
    )


class AsyncStopCheck:
    """Sees from afar that all rows have ended, and hands tokens to a streamer, while the device works on.

    Args:
        ids: tells device and rows.
        streamer: gets each token [B]; or None.
        every_token: look after every token; otherwise now and then, one look late.
    """

    def __init__(self, ids: Tensor, streamer: Any, every_token: bool) -> None:
        self.streamer = streamer
        self.every_token = every_token
        self._steps = ids.new_zeros(())
        self._marks: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._tokens = 0

    @property
    def is_due(self) -> bool:
        """True after a token whose mark was set."""
        return self.every_token or self._tokens % STOP_CHECK_INTERVAL == 0

    def count(self, unfinished: Tensor) -> None:
        """Count a step if any row was unfinished before it; `unfinished` [B] is 1 or 0."""
        self._steps += unfinished.max()

    def mark(self, unfinished: Tensor, token: Tensor) -> None:
        """Send the state after a token, `unfinished` and `token` [B], to the host."""
        self._tokens += 1
        if not self.is_due:
            return
        state = torch.cat((unfinished.max()[None], token))
        if not state.is_cuda:
            self._marks.append((state, None))
            return
        event = torch.cuda.Event()
        host = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
        host.copy_(state, non_blocking=True)
        event.record()
        self._marks.append((host, event))

    def sees_the_end(self) -> bool:
        """True when the state that has arrived says that every row had ended."""
        if len(self._marks) < (1 if self.every_token else 2):
            return False
        return self._read(*self._marks.pop(0))

    def _read(self, state: Tensor, event: torch.cuda.Event | None) -> bool:
        if event is not None:
            event.synchronize()
        if self.streamer is not None:
            self.streamer.put(state[1:].clone().cpu())
        return not bool(state[0])

    def finish(self) -> int:
        """Tokens until every row had ended; ends the streamer."""
        if self.streamer is not None:
            for mark in self._marks:
                self._read(*mark)
            self.streamer.end()
        return int(self._steps)
