"""`generate()` with CUDA graphs: each decoding step of greedy search and sampling is one graph replay.

transformers' loop prepares inputs, calls the model and synchronises with the device for every token. The loop here
keeps ids, scores and stopping state on the device, checks every few tokens whether all sequences have finished, and
discards the tokens computed after that point. It is used for the calls for which it gives the same tokens; the others
fall back to transformers' loop: beam search, assisted and prompt-lookup decoding, a model on the CPU or spread over
devices, adapters, hooks, another attention implementation, another kind of cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.cache_compat import cache_argument, cache_of_arguments, rename_cache
from hf_efficient.modeling.decoder.cache_contract import CapturableCache, StateSnapshot, round_capacity
from hf_efficient.modeling.decoder.decode_cache import DecodeCache, as_capturable, require_capturable
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION
from hf_efficient.modeling.decoder.decode_step import RETURNED_CACHE_STEPS, DecodeStep, PooledStep
from hf_efficient.modeling.decoder.graph_capture import (
    SIGNATURE_CHECK_INTERVAL,
    capture_obstacle,
    step_pool,
    step_signature,
)
from hf_efficient.modeling.decoder.stop_check import AsyncStopCheck

# Arguments of the prompt's forward that do not change what a later decoding step computes.
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
    """Mixin to list before `GenerationMixin`: greedy search and sampling run as replays of captured steps.

    A captured step is one decoding step, all kernels of a forward of one token per sequence, in a CUDA graph.
    """

    # Attributes of the model that this is mixed into.
    config: Any
    device: Any
    cache_class: Any
    prepare_inputs_for_generation: Any
    set_attn_implementation: Any

    # Arguments that a patch (a change of the architecture) adds to forward and that only the prompt's forward reads.
    # With any other additional argument `generate` uses transformers' loop.
    prompt_arguments: frozenset[str] = frozenset()
    # Attention implementations that compute what `hfe_decode` does; patches add to them.
    captured_attention: frozenset[str] = frozenset({DECODE_ATTENTION})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the cache may be passed as `past_key_values` or as `cache` with every supported release.

        Raises:
            HFEError: two different caches were passed, or a static cache is full before all sequences have finished.
        """
        return super().generate(*args, **rename_cache(kwargs))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """As in transformers, but False for a model with a cache class of its own, whose forward creates that cache."""
        return cls.cache_class is DecodeCache and super()._supports_default_dynamic_cache()

    def captured_steps(self) -> list[dict[str, Any]]:
        """Return shapes and bytes of each captured step that is kept for the next calls of `generate`.

        Those of parallel generation too, but not the steps of caches that `generate` returned or the caller passed:
        these are freed with the cache. The reported steps belong to at most 4 caches, and steps and caches hold at most
        a quarter of the device's memory; `free_captured_steps` frees them.
        """
        return step_pool(self).report()

    def free_captured_steps(self) -> None:
        """Free the captured steps that `captured_steps` reports, and their caches."""
        step_pool(self).clear()

    def generation_obstacle(
        self, input_ids: Tensor, generation_config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
    ) -> str:
        """Return why a call of `generate` must fall back to transformers' loop; an empty string if it need not.

        Modules and weights are checked by `step_signature`, not here.

        Args:
            input_ids: int64 [B, S], the prompts.
            generation_config: the configuration of the call, as `generate` resolved it.
            synced_gpus: whether all processes must run the same number of steps, as in transformers.
            model_kwargs: arguments of the prompt's forward.
        """
        cache = cache_of_arguments(model_kwargs)
        mask = model_kwargs.get("attention_mask")
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)
        tested = {
            "the configuration disables compilation": bool(generation_config.disable_compile),
            # As prefix and prompt tuning do.
            "something else prepares the inputs": prepare is not type(self).prepare_inputs_for_generation,
            "the attention mask is not of shape [B, length]": mask is not None and getattr(mask, "ndim", 0) != 2,
            "synced_gpus is set": synced_gpus,
            "the cache is switched off": not model_kwargs.get("use_cache"),
            "attentions or hidden states are requested": bool(
                generation_config.output_attentions or generation_config.output_hidden_states
            ),
            "the call is that of an assistant model": bool(generation_config.is_assistant),
            "there is nothing to generate": input_ids.shape[1] >= generation_config.max_length,
            f"the caller passed a {type(cache).__name__}": not _can_use(cache, self.cache_class),
        }
        obstacle = capture_obstacle(self, self.captured_attention)
        obstacle = obstacle or next((reason for reason, holds in tested.items() if holds), "")
        unknown = sorted(set(model_kwargs) - _STEP_ARGUMENTS - self.prompt_arguments)
        if not obstacle and unknown and any(model_kwargs[name] is not None for name in unknown):
            obstacle = f"the call has the argument {unknown[0]}"
        return obstacle

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
        """As in transformers, called by `generate` for greedy search and sampling.

        By `GraphDecodeLoop` if there is no obstacle, else by transformers' loop, with the reason as an info message.

        Raises:
            HFEError: the user's static cache is full before all sequences have finished.
        """
        obstacle = self.generation_obstacle(input_ids, generation_config, synced_gpus, model_kwargs)
        signature = None if obstacle else step_signature(self)
        if not obstacle and signature is None:
            obstacle = "a module has a hook, an adapter, a wrapper or a weight of another type, or is in training mode"
        device = input_ids.device
        if not obstacle and logits_processor and device != self.device:
            obstacle = f"logits are to be processed on {device}, where the prompt is"
        loop = None
        if signature is not None and not obstacle:
            try:
                # The step reads ids on the model's device; transformers leaves them on the device of the prompt.
                loop = GraphDecodeLoop(self, input_ids.to(self.device), generation_config, model_kwargs, signature)
            except torch.OutOfMemoryError:
                obstacle = f"a cache for max_length={generation_config.max_length} tokens does not fit into memory"
        if loop is None:
            get_logger().info("generate falls back to the loop of transformers: %s", obstacle)
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        with torch.cuda.device_of(loop.ids):  # streams and events are those of the current device
            result = loop.generate(logits_processor, stopping_criteria, streamer)
        return result.to(device) if isinstance(result, Tensor) else result

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but with `sdpa` in place of our attention, which does not support its paged cache.

        transformers may replace `sdpa` by flash attention. The manager sets our attention again when it stops.
        """
        own = self.config._attn_implementation
        if own not in self.captured_attention:
            return super().init_continuous_batching(*args, **kwargs)
        self.set_attn_implementation("sdpa")
        try:
            manager = super().init_continuous_batching(*args, **kwargs)
        except BaseException:
            self.set_attn_implementation(own)
            raise
        # The implementation that the manager sets when it stops.
        manager._original_attn_impl = own
        return manager


def _can_use(cache: Cache | None, cache_class: type) -> bool:
    """True if `GraphDecodeLoop` can run with this cache argument of `generate`.

    - No cache: True.
    - A cache that `generate` created for this call: True for a `DynamicCache` or `StaticCache` without offloading,
      which `GraphDecodeLoop` replaces by a cache of `cache_class`; False for any other.
    - A user's cache: True for an instance of `cache_class`. If that is `DecodeCache`, also for a `StaticCache` that
      `as_capturable` of `decode_cache.py` supports, but not for another `CapturableCache`.

    Args:
        cache: the cache argument, or None.
        cache_class: the model's `cache_class`.
    """
    if cache is None or not getattr(cache, "_is_user_defined", False):
        return cache is None or type(cache) in (DynamicCache, StaticCache) and not cache.offloading
    if isinstance(cache, CapturableCache) or cache_class is not DecodeCache:
        return isinstance(cache, cache_class)
    return as_capturable(cache) is not None


class GraphDecodeLoop:
    """The decoding loop of one call of `generate`, with its cache, its decoding step and the tokens so far.

    On creation it takes or allocates the cache; `generate` then runs the prompt and the loop. Call `generate` once
    only. A new cache, and a user's `CapturableCache`, has room for `max_length` tokens. A user's `StaticCache` is taken
    as it is: `generate` raises if it is full before all sequences have finished.

    Args:
        model: the causal language model.
        input_ids: int64 [B, S], the prompts, on the model's device.
        generation_config: the configuration of the call, as `generate` resolved it.
        model_kwargs: arguments of the prompt's forward.
        signature: `step_signature` of the model (see `graph_capture.py`): a step captured under it may be replayed.

    Raises:
        torch.OutOfMemoryError: there is no memory for a cache of `max_length` tokens, or to grow the user's to them.
        HFEError: the user's `CapturableCache` would have to grow and has a fixed size.
    """

    length: int  # tokens in the cache after the prompt, with those of earlier calls
    step: DecodeStep  # one decoding step, as a call of the model or a graph replay
    capturable: CapturableCache  # `cache` as decoding steps use it

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        signature: tuple,
    ) -> None:
        self.model = model
        self.generation_config = generation_config
        self.signature: tuple | None = signature
        self.prompt_length = input_ids.shape[1]
        self.max_length = generation_config.max_length
        self.ids = input_ids.new_zeros(input_ids.shape[0], self.max_length, dtype=torch.long)
        self.ids[:, : self.prompt_length] = input_ids

        mask = model_kwargs.get("attention_mask")
        # bool [B, length of the attention mask], False at padding; None without padding.
        self.padding_mask = None if mask is None or bool(mask.all()) else mask.to(model.device, torch.bool)
        passed_cache = cache_of_arguments(model_kwargs)
        embeds = model_kwargs.get("inputs_embeds")
        is_users_cache = getattr(passed_cache, "_is_user_defined", False)
        # The caller gets the cache back, so it does not go to the pool.
        self.keeps_cache = is_users_cache or bool(generation_config.return_dict_in_generate)
        self._pooled_step: DecodeStep | None = None
        self.cache: Any = passed_cache if is_users_cache else self._new_cache(embeds)
        self.model_kwargs = {**model_kwargs, **cache_argument(self.cache)}
        if is_users_cache and isinstance(passed_cache, CapturableCache):
            # Ids, mask or embeddings may include the cached tokens of earlier calls, so this may reserve too much.
            prompt = max(x.shape[1] for x in (input_ids, mask, embeds) if x is not None)
            new_tokens = prompt + self.max_length - self.prompt_length
            passed_cache.ensure_capacity(passed_cache.get_seq_length() + new_tokens)

    def _new_cache(self, embeds: Tensor | None) -> Any:
        """Return an empty cache for this call, from the pool of captured steps if one fits.

        A pooled cache comes with its captured step, which is stored as `self._pooled_step`. If memory for a new cache
        is short, the pool is emptied and the allocation is tried again.

        Args:
            embeds: `inputs_embeds` [B, S, hidden_size] of the prompt, or None.

        Raises:
            torch.OutOfMemoryError: there is no memory for it, even with an empty pool.
        """
        model, batch_size = self.model, self.ids.shape[0]
        # Embeddings replace the prompt's ids and may be more. The last token is never fed to the model.
        prompt = self.prompt_length if embeds is None else embeds.shape[1]
        capacity = round_capacity(prompt + self.max_length - self.prompt_length - 1)
        padded = self.padding_mask is not None
        pool = step_pool(model)
        pooled = pool.take(PooledStep, self.signature, lambda steps: steps.fits(batch_size, capacity, padded))
        if pooled is not None:
            self._pooled_step = pooled.step
            pooled.cache.reset()
            return pooled.cache
        try:
            return model.build_cache(batch_size, capacity)
        except torch.OutOfMemoryError:
            pool.clear()
            return model.build_cache(batch_size, capacity)

    def _find_step(self) -> DecodeStep:
        """Return a decoding step for `self.cache`: one of an earlier call if it fits the cache, or a new one."""
        step = self._pooled_step or RETURNED_CACHE_STEPS.get(self.cache)
        padded = self.padding_mask is not None
        if step is None or not step.fits(self.cache) or (padded and not step.padded):
            step = DecodeStep(self.cache, set(self.model.config.layer_types), padded)
        return step

    def generate(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, streamer: Any) -> Any:
        """Run the prompt and then the loop until all sequences have finished.

        Args:
            processors: logits processors, as in transformers.
            criteria: stopping criteria, as in transformers.
            streamer: its `put` gets each token [B]; or None.

        Returns:
            Sequences, int64 [B, length], prompt and generated tokens; or transformers' `GenerateDecoderOnlyOutput` if
            `return_dict_in_generate` is set.

        Raises:
            HFEError: the user's static cache is full before all sequences have finished.

        Errors of the model, the processors, the criteria and the streamer propagate.
        """
        ids, config = self.ids, self.generation_config
        logits = self._prefill()
        has_callbacks = _needs_every_token(processors, criteria)
        # A step past the end is launched before the host reads that all have finished. A cache that the caller keeps
        # must not contain its token; a recurrent state must be restored for this.
        snapshot = None
        if self.keeps_cache and not self.capturable.can_truncate:
            snapshot = StateSnapshot(self.capturable.state_tensors())
        every_token = (
            streamer is not None or has_callbacks or snapshot is not None or self._is_full(self.max_length - 1)
        )
        stop_check = AsyncStopCheck(ids, streamer, every_token)
        unfinished = ids.new_ones(ids.shape[0])
        has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = config._pad_token_tensor.to(ids.device) if has_eos else None
        all_scores: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None
        all_logits: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_logits else None

        length = self.prompt_length
        while True:
            raw = logits.to(copy=True, dtype=torch.float32)
            tokens = ids[:, :length]
            scores = processors(tokens.contiguous() if has_callbacks else tokens, raw)
            if all_scores is not None:
                all_scores.append(scores)
            if all_logits is not None:
                all_logits.append(raw)
            if config.do_sample:
                token = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                token = scores.argmax(dim=-1)
            if has_eos:
                token = token * unfinished + pad * (1 - unfinished)
            stop_check.count_step(unfinished)
            ids[:, length] = token
            length += 1
            tokens = ids[:, :length].contiguous() if has_callbacks else ids[:, :length]
            unfinished = unfinished & ~criteria(tokens, None if all_scores is None else tuple(all_scores))
            stop_check.send(unfinished, token)
            if length >= self.max_length:
                break
            if self._is_full(length):
                if stop_check.all_finished():
                    break
                raise HFEError(
                    f"the static cache is full: it has {self.step.capacity} slots, all filled at length {length}",
                    f"give it max_cache_len={self.length + self.max_length - self.prompt_length} or fewer new tokens",
                )
            if snapshot is not None:
                snapshot.save()
            # The next step is launched before the host waits for the state after the last one.
            logits = self._advance(token, check_signature=length % SIGNATURE_CHECK_INTERVAL == 0)
            if stop_check.all_finished():
                if snapshot is not None:
                    snapshot.restore()
                break
        return self._finish(stop_check.finish(), all_scores, all_logits)

    def _prefill(self) -> Tensor:
        """Run the model on the prompt, which fills `self.cache`; return the logits [B, V] of its last position.

        Sets `self.capturable`, `self.length` and `self.step`; the step's inputs are set for the first generated token.
        """
        outputs: CausalLMOutputWithPast = self.model._prefill(
            self.ids[:, : self.prompt_length].clone(),
            self.generation_config,
            self.model_kwargs,
            is_first_iteration=True,
        )
        self.capturable = require_capturable(self.cache)
        self.length = int(self.cache.get_seq_length())
        self.step = self._find_step()
        self.step.reset(self.length, self._next_positions(), self.padding_mask)
        return outputs.logits[:, -1]

    def _is_full(self, length: int) -> bool:
        """True if the cache has no slot for the last of `length` tokens, prompt and generated.

        Only a user's `StaticCache` can be full.
        """
        return self.length + length - self.prompt_length > self.step.capacity

    def _next_positions(self) -> Tensor:
        """Return the position id of each sequence's first generated token, int64 [B]."""
        batch_size = self.ids.shape[0]
        position_ids = self.model_kwargs.get("position_ids")
        if position_ids is not None:
            return (position_ids[:, -1] + 1).expand(batch_size)
        if self.padding_mask is None:
            return self.ids.new_full((batch_size,), self.length)
        return self.padding_mask.sum(1)

    def _advance(self, token: Tensor, check_signature: bool) -> Tensor:
        """Run one decoding step with `token`; return logits [B, V], a tensor that the next call may overwrite.

        The step is replayed from its CUDA graph, captured first if there is none for the model's signature. It is a
        call of the model if the model may not be captured (a callback has changed it) or is not on CUDA.

        Args:
            token: int64 [B], the last token of each sequence; not yet in the cache.
            check_signature: compute `self.signature` anew, in case a callback has changed the model.
        """
        step = self.step
        step.tokens.copy_(token[:, None])
        if check_signature:
            self.signature = step_signature(self.model)
        if self.signature is None or not step.tokens.is_cuda:
            return step.run(self.model, self.cache)
        if step.signature != self.signature:
            step.capture(self.model, self.cache, self.signature)
        return step.replay()

    def _finish(self, steps: int, scores: list[Tensor] | None, logits: list[Tensor] | None) -> Any:
        """Return the result of `generate`, and keep the cache and the step for later calls.

        Tokens computed past the end are removed from a cache that the caller keeps; another one goes to the pool if its
        step was captured.

        Args:
            steps: number of generated tokens, without those past the end.
            scores, logits: [B, V] of each token, at least `steps` of them; None if they are not requested.
        """
        sequences = self.ids[:, : self.prompt_length + steps].clone()
        if self.keeps_cache:
            if self.capturable.can_truncate:
                self.capturable.truncate(self.length + steps - 1)  # the last token has not been fed to the model
            RETURNED_CACHE_STEPS[self.cache] = self.step
        elif self.step.signature is not None:
            step_pool(self.model).put(PooledStep(self.cache, self.step))
        if not self.generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if scores is None else tuple(scores[:steps]),
            logits=None if logits is None else tuple(logits[:steps]),
            **cache_argument(self.cache),
        )


def _needs_every_token(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> bool:
    """True if a processor or criterion must not be called past the end.

    A user's own may count its calls, and `MaxTimeCriteria` reads a clock.
    """
    return any(
        not type(callback).__module__.startswith("transformers.") or isinstance(callback, MaxTimeCriteria)
        for callback in (*processors, *criteria)
    )
