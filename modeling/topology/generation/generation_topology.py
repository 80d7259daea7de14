"""Parallel generation: the paths and steps of a text are decoded in parallel branches over one shared cache.

Terms: a branch is a path or step that is decoded in parallel with others; the trunk is the root branch, from which all
others descend. A fork starts the branches of a block (`<Parallel>` … `</Parallel>`, or `<Execution>` … `</Execution>`),
and the join continues their parent when they have ended. Control tokens are the tags of the grammar, each one token of
the vocabulary. Forced tokens are those that generation appends without sampling: headers, separators and joins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
)

from hf_efficient.errors import UsageError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENTS
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.generation.generate_output import BranchInfo, TopologyGenerateOutput, collect_output
from hf_efficient.modeling.topology.generation.limits import Limits, is_integer
from hf_efficient.modeling.topology.generation.parallel_decoding import ParallelDecodeLoop
from hf_efficient.modeling.topology.generation.sampling import ProcessedSampler, Sampler
from hf_efficient.modeling.topology.grammar.control_tokens import (
    check_grammar,
    control_token_ids,
    decode_function,
    is_trained,
)
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText, encode_function

# Arguments of `generate` that parallel generation does not support.
_UNSUPPORTED_ARGUMENTS = (
    *("assistant_model", "assistant_tokenizer", "custom_generate", "inputs_embeds", "negative_prompt_attention_mask"),
    *("negative_prompt_ids", *CACHE_ARGUMENTS, "position_ids", "prefix_allowed_tokens_fn"),
)
# Fields of the generation config -> the values that are supported; None: only the value None.
_REQUIRED_VALUES = {
    "assistant_early_exit": None,
    "cache_implementation": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "guidance_scale": (None, 1, 1.0),
    "is_assistant": (None, False),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "token_healing": (None, False),
    "use_cache": (None, True),
}
# Cache: model -> (folder or repository of its weights, the tokenizer loaded from there).
_TOKENIZERS: WeakKeyDictionary[Any, tuple[str, Any]] = WeakKeyDictionary()
# Arguments that transformers passes to every decoding loop. This one uses `attention_mask` and ignores the others.
_PREPARED_ARGUMENTS = {
    *CACHE_ARGUMENTS,
    "attention_mask",
    "cache_position",
    "logits_to_keep",
    "position_ids",
    "use_cache",
}


@dataclass
class _Options:
    """Options of `parallel_generate` that transformers does not have; see there."""

    tokenizer: Any = None
    grammar: str | None = None
    mode: str | None = None
    separator: str | None = None
    max_branches: int = 32
    max_depth: int = 5
    min_fork_budget: int = 30
    budget: str = "positions"
    branch_max_new_tokens: int | None = None
    constrain: bool = False
    seed: int | None = None
    sampler: Sampler | None = None


def parallel_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    grammar: str | None = None,
    mode: str | None = None,
    separator: str | None = None,
    max_branches: int = 32,
    max_depth: int = 5,
    min_fork_budget: int = 30,
    budget: str = "positions",
    branch_max_new_tokens: int | None = None,
    constrain: bool = False,
    seed: int | None = None,
    sampler: Sampler | None = None,
    **kwargs: Any,
) -> Any:
    """Generate text whose paths or steps are decoded in parallel: each forward pass computes all active branches.

    When the model generates `</Goal>` (MedVerse: `</Plan>`), one branch starts for each outline, with a forced header.
    A step starts when the steps that it depends on are done. When all branches have ended, their parent continues with
    the conclusion, which may attend to all of them. No keys or values are copied or computed twice. Text without blocks
    is decoded as by `generate`.

    Args:
        model: a model of this package, or any causal language model of transformers with full attention and rotary
            positions, with the attention implementation ``hfe_topology``, ``sdpa`` or ``eager``.
        inputs: prompts, int64 [B, P], padded on the left. Blocks in a prompt are computed with their topology, and if a
            prompt ends where branches begin, they start.
        generation_config: as in transformers. `num_return_sequences` repeats the prompts.
        tokenizer: decodes labels and encodes headers; by default the one stored with the model's weights.
        grammar: `multiverse` or `medverse`; by default that of the model's configuration, as for the next two.
        mode: which steps a MedVerse step may attend to: `dag`, those that it depends on and their ancestors; `layers`,
            all steps of earlier layers; `flat`, none.
        separator: white space between two control tokens.
        max_branches: maximum number of active branches of a sequence. Others are queued; with a budget of positions,
            the text does not depend on it.
        max_depth: maximum depth of nested blocks; the paths of deeper ones are decoded sequentially.
        min_fork_budget: with a smaller remaining budget, paths are decoded sequentially.
        budget: unit of `max_new_tokens`: `positions`, rotary positions, of which the longest dependency path of tokens
            needs most; or `tokens`, the tokens of all branches together. A branch is closed early enough to leave room
            for the joins above it.
        branch_max_new_tokens: maximum number of sampled tokens in one branch; None for no limit besides the budget.
        constrain: disallow EOS inside blocks, and control tokens that have no place there (see
            `ForcedText.disallowed_ids`); outside blocks nothing is disallowed.
        seed: seed of sampling; by default drawn from PyTorch's generator. With the same seed a branch samples the same
            tokens whatever other branches run.
        sampler: a `Sampler` that replaces greedy search and sampling; logits processors are then not applied.
        **kwargs: as for `generate`. Logits processors and stopping criteria receive the ids that a branch may attend
            to, and a criterion that is met ends that branch. A streamer receives tokens in the order of the text, a
            `BranchStreamer` as they are generated.

    Returns:
        Prompts and generated tokens in the order of the text, int64 [B, L], padded on the right. With
        ``return_dict_in_generate=True`` a `TopologyGenerateOutput`, which includes log-probabilities with
        ``output_scores=True``. Without it, a warning is logged if text was malformed or forks were rejected.

    Raises:
        UsageError: an option has an invalid value, an argument is not supported (beams, assistants, a given cache, …),
            no grammar is known, there is no tokenizer, or a streamer other than `BranchStreamer` gets several prompts.
        TopologyError: the control tokens of tokenizer and model do not match, or the prompt is padded on the right.
        HFEError: the model's attention cannot generate in parallel, or the attention mask has another shape.
    """
    for name in _UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UsageError(f"parallel generation does not support {name}", "leave it out, or pass parallel=False")
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    if type(constrain) is not bool:
        raise UsageError(f"constrain={constrain!r} is neither True nor False", "pass one of them")
    if seed is not None and not is_integer(seed):
        raise UsageError(f"seed={seed!r} is not an integer", "pass one, or leave it out")
    options = _Options(
        tokenizer=tokenizer,
        grammar=grammar,
        mode=mode,
        separator=separator,
        max_branches=max_branches,
        max_depth=max_depth,
        min_fork_budget=min_fork_budget,
        budget=budget,
        branch_max_new_tokens=branch_max_new_tokens,
        constrain=constrain,
        seed=seed,
        sampler=sampler,
    )
    kwargs["stopping_criteria"] = _with_stop_strings(model, generation_config, kwargs, tokenizer)
    decoding = _DecodingMethod(options, kwargs.get("streamer"), bool(kwargs.pop("synced_gpus", False)))
    # `generate` of our own models would call this function again.
    return GenerationMixin.generate(model, inputs, generation_config, custom_generate=decoding, **kwargs)


def _with_stop_strings(
    model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any], tokenizer: Any
) -> StoppingCriteriaList:
    """Return the call's stopping criteria, with a `StopStringCriteria` added if stop strings are set.

    transformers cannot create that criterion here, since it passes no tokenizer to a custom decoding method.

    Args:
        model: its `generation_config` may set `stop_strings`.
        generation_config: that of the call, or None.
        kwargs: arguments of `generate`. `stop_strings` is removed, or set to None if a configuration sets it.
        tokenizer: a tokenizer of transformers.
    """
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or ())
    configured = [getattr(config, "stop_strings", None) for config in (generation_config, model.generation_config)]
    given = [kwargs.pop("stop_strings", None), *configured]
    stop_strings = next((strings for strings in given if strings is not None), None)
    if stop_strings is not None:
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    if any(strings is not None for strings in configured):
        kwargs["stop_strings"] = None  # otherwise transformers requires a tokenizer
    return criteria


class _DecodingMethod:
    """The argument `custom_generate` of `generate`: transformers calls it with prepared arguments.

    transformers passes it neither the streamer nor the tokenizer, so `parallel_generate` sets them here.

    Args:
        options: options of `parallel_generate`.
        streamer: receives tokens; or None.
        synced_gpus: value of the argument of `generate`; True raises `UsageError` when called.
    """

    def __init__(self, options: _Options, streamer: Any, synced_gpus: bool) -> None:
        self.options = options
        self.streamer = streamer
        self.synced_gpus = synced_gpus

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Run the decoding loop; result and errors as for `parallel_generate`.

        Args:
            model: the causal language model.
            input_ids: prompts, int64 [B, P].
            logits_processor, stopping_criteria: those of the call and of the generation config.
            generation_config: with the arguments of `generate` merged in.
            **model_kwargs: prepared arguments of the model, among them `attention_mask` [B, P].
        """
        options = self.options
        _check_supported(generation_config, self.synced_gpus, model_kwargs)
        grammar, mode, separator, token_ids = _resolve_grammar(model, options)
        eos = generation_config._eos_token_tensor
        eos_ids = () if eos is None else tuple(eos.reshape(-1).tolist())
        forced = ForcedText(grammar, token_ids, encode_function(options.tokenizer), separator)
        limits = Limits(
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            budget=options.budget,
            branch_max_new_tokens=options.branch_max_new_tokens,
            max_branches=options.max_branches,
            max_depth=options.max_depth,
            min_fork_budget=options.min_fork_budget,
            eos_ids=eos_ids,
        )
        loop = ParallelDecodeLoop(
            model,
            input_ids,
            model_kwargs.get("attention_mask"),
            grammar=grammar,
            token_ids=token_ids,
            mode=mode,
            decode=decode_function(options.tokenizer),
            forced=forced,
            limits=limits,
            sampler=_sampler(model, options, logits_processor, generation_config, forced, eos_ids),
            criteria=[c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))],
            keep_logprobs=bool(generation_config.return_dict_in_generate and generation_config.output_scores),
            streamer=self.streamer,
        )
        loop.run()
        pad = generation_config._pad_token_tensor
        output = collect_output(loop, 0 if pad is None else int(pad.reshape(-1)[0]), input_ids.device)
        if generation_config.return_dict_in_generate:
            return output
        warnings = [warning for of_sequence in output.warnings or () for warning in of_sequence]
        if warnings:
            get_logger().warning("%s (return_dict_in_generate=True gives all %d warnings)", warnings[0], len(warnings))
        return output.sequences


def _check_supported(generation_config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """Raise `UsageError` for the first option that parallel generation does not support.

    Args:
        generation_config: its fields must have the values in `_REQUIRED_VALUES`.
        synced_gpus: must be False.
        model_kwargs: arguments of the model; all that are not None must be in `_PREPARED_ARGUMENTS`.
    """
    unsupported = {"synced_gpus": True} if synced_gpus else {}
    for name, allowed in _REQUIRED_VALUES.items():
        value = getattr(generation_config, name, None)
        if value not in (allowed or (None,)):
            unsupported[name] = value
    unsupported.update(
        (name, value) for name, value in model_kwargs.items() if name not in _PREPARED_ARGUMENTS and value is not None
    )
    for name, value in unsupported.items():
        shown = "" if isinstance(value, Tensor) else f"={value!r}"
        raise UsageError(f"parallel generation does not support {name}{shown}", "leave it out, or pass parallel=False")


def _resolve_grammar(model: Any, options: _Options) -> tuple[str, str, str, dict[str, int]]:
    """Return grammar, mode, separator and control token -> id, from the options or else the model's configuration.

    Raises:
        UsageError: no grammar is known, or grammar, mode or separator is invalid.
        TopologyError: the tokenizer lacks control tokens, or its ids differ from the model's or exceed the embedding.
    """
    configured = getattr(model.config, "topology", None) or {}
    grammar = options.grammar or configured.get("grammar")
    if grammar is None:
        raise UsageError("the model's configuration names no grammar", "pass grammar='multiverse' or 'medverse'")
    mode = options.mode or configured.get("mode", "dag")
    check_grammar(grammar, mode)
    token_ids = control_token_ids(options.tokenizer, grammar)
    known = configured.get("token_ids") or {}
    if configured.get("grammar") == grammar:
        if getattr(model, "supports_topology", False) and not known:
            raise TopologyError(
                "the model's configuration has no control tokens: topology['token_ids'] is empty",
                f"convert the model with `hf-efficient convert --patch {grammar}`",
            )
        wrong = [tag for tag, token in known.items() if token_ids.get(tag) != token]
        if wrong:
            raise TopologyError(
                f"the model's id of {wrong[0]} is {known[wrong[0]]}, and the tokenizer's is {token_ids.get(wrong[0])}",
                "use the tokenizer that belongs to this checkpoint",
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if max(token_ids.values()) >= rows:
        raise TopologyError(
            f"the tokenizer's control tokens reach id {max(token_ids.values())}, and the embedding has {rows} rows",
            "resize the embedding, or use the tokenizer that belongs to this checkpoint",
        )
    separator = configured.get("separator", "\n") if options.separator is None else options.separator
    if not isinstance(separator, str) or separator.strip():
        raise UsageError(f"separator={separator!r} is not white space", "pass white space or an empty string")
    return grammar, mode, separator, token_ids


def _tokenizer_of(model: Any) -> Any:
    """Return the tokenizer stored with the model's weights; loaded once for each model.

    Raises:
        UsageError: no tokenizer can be loaded from there, or the model was not loaded from a folder or repository.
    """
    folder = getattr(model.config, "_name_or_path", "")
    known = _TOKENIZERS.get(model)
    if known is not None and known[0] == folder:
        return known[1]
    # The folder may contain code, which is trusted only if the model itself was loaded with remote code.
    trusted = type(model).__module__.startswith("transformers_modules.")
    try:
        if folder:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            _TOKENIZERS[model] = folder, tokenizer
            return tokenizer
    except (OSError, ValueError):
        pass
    raise UsageError(
        "parallel generation needs a tokenizer for labels and headers, and none is stored with the model",
        "pass tokenizer=",
    )


def _sampler(
    model: Any,
    options: _Options,
    processors: LogitsProcessorList,
    generation_config: GenerationConfig,
    forced: ForcedText,
    eos_ids: tuple[int, ...],
) -> Sampler:
    """Return the sampler of a call: the given one, plain greedy search, or one that applies the logits processors.

    For the last, a missing seed is drawn from PyTorch's generator.

    Args:
        model: the causal language model.
        options: options of `parallel_generate`.
        processors: logits processors that transformers has prepared.
        generation_config: `do_sample` chooses between sampling and greedy search.
        forced: knows which ids `constrain` disallows.
        eos_ids: ids of the tokens that end a branch.
    """
    if options.sampler is not None:
        return options.sampler
    constant = [each for each in processors if type(each) is SuppressTokensLogitsProcessor]
    if len(constant) == len(processors) and not (generation_config.do_sample or options.constrain):
        # Steps suppress these ids on the device, so no logits are needed on the host: converted checkpoints suppress
        # their unused embedding rows, and this keeps them fast. Ids beyond the vocabulary are ignored, as in
        # transformers.
        rows = model.get_input_embeddings().weight.shape[0]
        suppressed = {token for each in constant for token in each.suppress_tokens.tolist() if 0 <= token < rows}
        return Sampler(sorted(suppressed))
    seed = options.seed
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    disallowed = forced.disallowed_ids(eos_ids) if options.constrain else None
    return ProcessedSampler(processors, bool(generation_config.do_sample), seed, disallowed)


class ParallelGeneration:
    """Mixin, listed before `GenerationMixin`: `generate` decodes in parallel if the model was trained to fork.

    Attributes:
        config: configuration of the model.
        supports_topology: True: the model's `forward` accepts the argument `topology`.
        generates_in_parallel: True: `generate` accepts the options of `parallel_generate`. The code in a checkpoint's
            `custom_generate/` then calls it.
    """

    config: Any
    supports_topology = True
    generates_in_parallel = True

    def generate(self, *args: Any, parallel: bool | None = None, **kwargs: Any) -> Any:
        """Call `parallel_generate` or, without parallel decoding, `GenerationMixin.generate`; return its result.

        Args:
            *args, **kwargs: as for `GenerationMixin.generate`; with parallel decoding also those of
                `parallel_generate`.
            parallel: decode in parallel; True logs a warning if the model was not trained for it. By default if
                ``config.topology["trained"]`` is True, unless `custom_generate` is passed or the model is the assistant
                of another one.

        Raises:
            UsageError: `parallel` is not a bool or None, or an option of `parallel_generate` other than `tokenizer` is
                passed without parallel decoding. Further errors are those of the function that is called.
        """
        if parallel not in (None, True, False):
            raise UsageError(f"parallel={parallel!r} is neither True nor False", "pass one of them, or leave it out")
        trained = is_trained(self.config)
        if parallel and not trained:
            get_logger().warning(
                "the model was not trained to generate control tokens: it forks only where the prompt does "
                "(after training: mark_topology_trained(model))"
            )
        if parallel is None:
            parallel = trained and not _uses_other_decoding(kwargs)
        if parallel:
            return parallel_generate(self, *_name_positional(args, kwargs), **kwargs)
        options = sorted(kwargs.keys() & asdict(_Options()).keys() - {"tokenizer"})
        if options:
            raise UsageError(f"{options[0]} belongs to parallel generation, which is off", "pass parallel=True")
        return super().generate(*args, **kwargs)


def _name_positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Move all but the first two positional arguments of `generate` into `kwargs`, by their names; return the first
    two.

    The first two are `inputs` and `generation_config`, which `parallel_generate` takes in the same places. A keyword of
    the same name is overwritten.
    """
    names = (
        *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model"),
        *("streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"),
    )
    kwargs.update(zip(names, args[2:], strict=False))
    return args[:2]


def _uses_other_decoding(kwargs: dict[str, Any]) -> bool:
    """True if a call passes `custom_generate`, or if the model is the assistant of another model (`is_assistant`)."""
    config = kwargs.get("generation_config")
    return kwargs.get("custom_generate") is not None or bool(getattr(config, "is_assistant", False))


__all__ = ["BranchInfo", "ParallelGeneration", "TopologyGenerateOutput", "parallel_generate"]
