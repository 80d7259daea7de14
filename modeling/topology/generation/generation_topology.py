"""Parallel generation: paths and steps of one text side by side, each branch at its own pace, over one shared cache."""

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
from transformers.utils import ModelOutput

from hf_efficient.errors import TopologyError, UsageError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENTS
from hf_efficient.modeling.topology.generation.branches import BranchPath, BranchState, all_branches
from hf_efficient.modeling.topology.generation.limits import Limits, is_integer
from hf_efficient.modeling.topology.generation.parallel_decoding import ParallelDecodeLoop
from hf_efficient.modeling.topology.generation.sampling import ProcessedSampler, Sampler
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler
from hf_efficient.modeling.topology.generation.topology_step import free_session, idle_session
from hf_efficient.modeling.topology.grammar.control_tokens import (
    check_grammar,
    control_token_ids,
    decode_function,
    is_trained,
)
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText, encode_function

# Arguments of `generate` that ask for another way of decoding, and those that a shared cache cannot serve.
_NOT_WITH_BRANCHES = (
    *("assistant_model", "assistant_tokenizer", "custom_generate", "inputs_embeds", "negative_prompt_attention_mask"),
    *("negative_prompt_ids", *CACHE_ARGUMENTS, "position_ids", "prefix_allowed_tokens_fn"),
)
_CONFIGURED_ELSE = {
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
# Where a model's weights came from, and the tokenizer that lies there.
_TOKENIZERS: WeakKeyDictionary[Any, tuple[str, Any]] = WeakKeyDictionary()
_IGNORED = {*CACHE_ARGUMENTS, "attention_mask", "cache_position", "logits_to_keep", "position_ids", "use_cache"}


@dataclass
class BranchInfo:
    """One branch of a generated row.

    Attributes:
        path: from the trunk, which is (): at each fork its number among those of the branch above, and the label.
        state: `done`, or `skipped` where there was no budget to begin it.
        finish_reason: why it ended before its own closing tag (`eos`, `length`, `max_time`, `stopping_criteria`,
            `branch_max_new_tokens`, or the tag that was sampled in its place), or an empty text. For the trunk, why the
            row ended.
        tokens: that it wrote, forced ones and those of its joins among them.
        num_sampled_tokens: that were chosen for it.
        segments: that it wrote to.
        logprobs: of each chosen token, under the distribution that it was chosen from; empty unless `output_scores`.
    """

    path: BranchPath
    state: str
    finish_reason: str
    tokens: int
    num_sampled_tokens: int
    segments: list[int]
    logprobs: list[float]

    @property
    def truncated(self) -> bool:
        """True for a path or step that did not come to its own end."""
        return bool(self.path) and bool(self.finish_reason)


@dataclass
class TopologyGenerateOutput(ModelOutput):
    """What parallel generation gives with ``return_dict_in_generate=True``.

    Args:
        sequences: [B, L]: prompts and what was generated, in the order of the text: trunk, paths by label, join; padded
            on the right. Read again, it has the same topology.
        segment_ids: int32 [B, L], -1 at padding. Segments are numbered in the order of the text.
        position_ids: int64 [B, L].
        parents: for each row, the segments that each segment follows.
        branch_info: for each row, its branches in the order of the text, the trunk first.
        warnings: for each row, what was malformed or refused.
        num_forward_passes: of the model, the prompt's among them.
        generated_tokens: of each row, forced ones among them.
        critical_path: positions that each row has filled: the tokens on its longest chain.
        parallelism: generated tokens by critical path, of all rows.
    """

    sequences: Tensor | None = None
    segment_ids: Tensor | None = None
    position_ids: Tensor | None = None
    parents: list[list[list[int]]] | None = None
    branch_info: list[list[BranchInfo]] | None = None
    warnings: list[list[str]] | None = None
    num_forward_passes: int | None = None
    generated_tokens: list[int] | None = None
    critical_path: list[int] | None = None
    parallelism: float | None = None


@dataclass
class _Options:
    """What parallel generation takes besides transformers' own arguments; see `parallel_generate`."""

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
    """Generate text whose paths or steps run side by side: each forward pass serves every live branch of every row.

    Where the model ends a `<Goal>` (MedVerse: a `<Plan>`), one branch begins for each outline, with its header written
    for it; a step begins as soon as the steps that it needs are done. When all have ended, the trunk goes on with the
    conclusion, which sees them all. Nothing is copied or computed twice. Text without blocks is decoded as ever.

    Args:
        model: a model of this package, or any other causal language model of transformers with full attention and
            rotary positions, whose attention implementation is ``hfe_topology``, ``sdpa`` or ``eager``.
        inputs: prompts [B, P], padded on the left; blocks in them are followed, and one that ends where branches begin
            begins them.
        generation_config: as in transformers. `num_return_sequences` repeats the rows.
        tokenizer: reads labels and encodes headers; by default the one that lies beside the model's weights.
        grammar: `multiverse` or `medverse`; by default that of the model's configuration, as are the next two.
        mode: what a step of MedVerse sees: `dag`, `layers` or `flat`.
        separator: text between two tags.
        max_branches: branches of a row that write at once; others begin as one of them ends, with the same result.
        max_depth: blocks inside each other; the paths of deeper ones are written one after the other.
        min_fork_budget: with less budget left, paths are written one after the other.
        budget: what `max_new_tokens` limits: `positions`, the longest chain of tokens, or `tokens`, all of them. A
            branch that runs out of it is closed, early enough for the joins above it.
        branch_max_new_tokens: tokens that one branch may sample.
        constrain: paths and steps may not choose the end of the text, or a tag that cannot stand in them.
        seed: of the samples; by default from PyTorch's generator. The same seed gives each branch the same tokens
            whatever runs beside it.
        sampler: chooses tokens in place of greedy search or sampling; logits processors are not applied then.
        **kwargs: as for `generate`. Logits processors and stopping criteria get the ids that a branch sees, and a
            criterion that holds ends that branch. A streamer gets tokens in the order of the text; a `BranchStreamer`
            gets them as they come.

    Returns:
        [B, L], or `TopologyGenerateOutput` with ``return_dict_in_generate=True``; log-probabilities with
        ``output_scores=True``.

    Raises:
        UsageError: an option has no such value, or an argument cannot be honoured (beams, assistants, a cache of the
            caller's, …).
        TopologyError: the tokenizer lacks the control tokens, or the prompt is padded on the right.
    """
    for name in _NOT_WITH_BRANCHES:
        if kwargs.get(name) is not None:
            raise UsageError(f"parallel generation does not take {name}", "leave it out, or pass parallel=False")
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    if type(constrain) is not bool:
        raise UsageError(f"constrain={constrain!r} is neither True nor False", "pass one of them")
    if seed is not None and not is_integer(seed):
        raise UsageError(f"seed={seed!r} is not a whole number", "pass one, or leave it out")
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
    decoding = _Decoding(options, kwargs.get("streamer"), bool(kwargs.pop("synced_gpus", False)))
    # transformers' own method, with nothing of ours above it.
    return GenerationMixin.generate(model, inputs, generation_config, custom_generate=decoding, **kwargs)


def _with_stop_strings(
    model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any], tokenizer: Any
) -> StoppingCriteriaList:
    """The call's stopping criteria and its stop strings: to a loop of one's own transformers hands no tokenizer."""
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or ())
    configured = [getattr(config, "stop_strings", None) for config in (generation_config, model.generation_config)]
    asked = [kwargs.pop("stop_strings", None), *configured]
    stop_strings = next((strings for strings in asked if strings is not None), None)
    if stop_strings is not None:
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    if any(strings is not None for strings in configured):
        kwargs["stop_strings"] = None  # or transformers would ask for the tokenizer
    return criteria


class _Decoding:
    """The loop that transformers' `generate` calls, once it has prepared its arguments.

    It hands a loop of one's own neither streamer nor tokenizer, so they come another way.
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
        options = self.options
        _refuse(generation_config, self.synced_gpus, model_kwargs)
        grammar, mode, separator, token_ids = _grammar_of(model, options)
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
            keeps_logprobs=bool(generation_config.return_dict_in_generate and generation_config.output_scores),
            streamer=self.streamer,
        )
        loop.run()
        pad = generation_config._pad_token_tensor
        output = _output(loop, 0 if pad is None else int(pad.reshape(-1)[0]), input_ids.device)
        if generation_config.return_dict_in_generate:
            return output
        told = [warning for row in output.warnings or () for warning in row]
        if told:
            get_logger().warning("%s (return_dict_in_generate=True gives all %d warnings)", told[0], len(told))
        return output.sequences


def _refuse(generation_config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """Raise for what a call asks and branches cannot have."""
    asked = {"synced_gpus": True} if synced_gpus else {}
    for name, usual in _CONFIGURED_ELSE.items():
        value = getattr(generation_config, name, None)
        if value not in (usual or (None,)):
            asked[name] = value
    asked.update((name, value) for name, value in model_kwargs.items() if name not in _IGNORED and value is not None)
    for name, value in asked.items():
        shown = "" if isinstance(value, Tensor) else f"={value!r}"
        raise UsageError(f"parallel generation does not take {name}{shown}", "leave it out, or pass parallel=False")


def _grammar_of(model: Any, options: _Options) -> tuple[str, str, str, dict[str, int]]:
    """Grammar, mode, separator and control tokens: as the call says, else as the model's configuration does."""
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
        raise UsageError(f"separator={separator!r} is not white space", "pass white space or an empty text")
    return grammar, mode, separator, token_ids


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer beside the model's weights; read once for each model."""
    folder = getattr(model.config, "_name_or_path", "")
    known = _TOKENIZERS.get(model)
    if known is not None and known[0] == folder:
        return known[1]
    # The configuration beside it may name code. Whoever loaded the model with it trusts it; nobody else is asked.
    trusted = type(model).__module__.startswith("transformers_modules.")
    try:
        if folder:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            _TOKENIZERS[model] = folder, tokenizer
            return tokenizer
    except (OSError, ValueError):
        pass
    raise UsageError(
        "parallel generation reads labels and writes headers, and there is no tokenizer beside the model",
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
    if options.sampler is not None:
        return options.sampler
    constant = [each for each in processors if type(each) is SuppressTokensLogitsProcessor]
    if len(constant) == len(processors) and not (generation_config.do_sample or options.constrain):
        # The step itself leaves these out; a conversion has some: rows that belong to no token. Ids that the model has
        # no rows for are nothing to leave out, as in transformers.
        rows = model.get_input_embeddings().weight.shape[0]
        suppressed = {token for each in constant for token in each.suppress_tokens.tolist() if 0 <= token < rows}
        return Sampler(sorted(suppressed))
    seed = options.seed
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    banned = forced.disallowed_ids(eos_ids) if options.constrain else None
    return ProcessedSampler(processors, bool(generation_config.do_sample), seed, banned)


def _output(loop: ParallelDecodeLoop, pad: int, device: torch.device) -> TopologyGenerateOutput:
    rows = loop.rows
    columns = [list(row.slots_in_text_order()) for row in rows]
    length = max(offset + len(listed) for offset, listed in zip(loop.offsets, columns, strict=True))
    sequences = torch.full((len(rows), length), pad, dtype=torch.long)
    segment_ids = torch.full((len(rows), length), -1, dtype=torch.int32)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    parents, info = [], []
    for b, (row, offset, listed) in enumerate(zip(rows, loop.offsets, columns, strict=True)):
        number: dict[int, int] = {}
        for column in listed:
            number.setdefault(row.segments[column], len(number))
        end = offset + len(listed)
        sequences[b, :offset] = torch.from_numpy(loop.prompt[b, :offset])
        sequences[b, offset:end] = torch.tensor([row.tokens[column] for column in listed])
        segment_ids[b, offset:end] = torch.tensor([number[row.segments[column]] for column in listed]).int()
        position_ids[b, offset:end] = torch.tensor([row.positions[column] for column in listed])
        parents.append([[number[p] for p in row.graph.parents[segment] if p in number] for segment in number])
        info.append(_branch_info(row, number))
    generated, critical = [row.num_generated_tokens for row in rows], [row.critical_path for row in rows]
    return TopologyGenerateOutput(
        sequences=sequences.to(device),
        segment_ids=segment_ids.to(device),
        position_ids=position_ids.to(device),
        parents=parents,
        branch_info=info,
        warnings=[row.trunk.builder.warnings for row in rows],
        num_forward_passes=loop.passes,
        generated_tokens=generated,
        critical_path=critical,
        parallelism=sum(generated) / max(sum(critical), 1),
    )


def _branch_info(row: SequenceScheduler, number: dict[int, int]) -> list[BranchInfo]:
    found = []
    for branch in all_branches(row.trunk):
        columns = [item for item in branch.contents if isinstance(item, int)]
        segments = sorted({number[row.segments[column]] for column in columns})
        state = "skipped" if branch.state is BranchState.SKIPPED else "done"
        found.append(
            BranchInfo(
                branch.path,
                state,
                branch.finish_reason,
                len(columns),
                branch.num_sampled_tokens,
                segments,
                list(branch.logprobs),
            )
        )
    return found


class ParallelGeneration:
    """Mixin before `GenerationMixin`: `generate` follows the model's own forks where it was trained to make them."""

    # Of the model that this is mixed into.
    config: Any

    # The model's forward takes `topology=`.
    supports_topology = True

    def generate(self, *args: Any, parallel: bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; with `parallel`, or by default where the configuration says ``topology["trained"]``, as
        `parallel_generate`, whose options it takes.
        """
        if parallel not in (None, True, False):
            raise UsageError(f"parallel={parallel!r} is neither True nor False", "pass one of them, or leave it out")
        trained = is_trained(self.config)
        if parallel and not trained:
            get_logger().warning(
                "the model was not trained to write control tokens: it forks only where the prompt has it fork "
                "(after training: mark_topology_trained(model))"
            )
        if parallel is None:
            parallel = trained and not _asks_for_something_else(kwargs)
        if parallel:
            return parallel_generate(self, *_positional(args, kwargs), **kwargs)
        own = sorted(kwargs.keys() & asdict(_Options()).keys() - {"tokenizer"})
        if own:
            raise UsageError(f"{own[0]} belongs to parallel generation, which is off", "pass parallel=True")
        return super().generate(*args, **kwargs)

    def captured_steps(self) -> list[dict[str, Any]]:
        """What `generate` keeps for its next calls, captured steps of parallel generation among them."""
        session = idle_session(self)
        return super().captured_steps() + ([] if session is None else session.report())

    def free_captured_steps(self) -> None:
        """Free the memory that `captured_steps` tells of."""
        free_session(self)
        super().free_captured_steps()


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The first two positional arguments of `generate`; the others get their names."""
    names = (
        *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model"),
        *("streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"),
    )
    kwargs.update(zip(names, args[2:], strict=False))
    return args[:2]


def _asks_for_something_else(kwargs: dict[str, Any]) -> bool:
    """True for a call with a `generate` of its own, or one that serves another model's generation."""
    config = kwargs.get("generation_config")
    return kwargs.get("custom_generate") is not None or bool(getattr(config, "is_assistant", False))


__all__ = ["BranchInfo", "ParallelGeneration", "TopologyGenerateOutput", "parallel_generate"]
