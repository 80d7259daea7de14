"""Structured transcripts of given lengths, as scripts for parallel generation: what is sampled, branch by branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_efficient.modeling.topology.generation.branches import BranchPath
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS, control_token_ids
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText, encode_function

EOS = "<eos>"
_WORDS = " and so the other one is seen from here with care while some of them wait"


@cache
def tokenizer_of(grammar: str) -> Any:
    """A byte-level BPE of headers and a few words, in which a header has about as many tokens as in a large one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    headers = "".join(f" Transient Step {n}: A -> B; Dependency: [{n}]\n{n}: A" for n in range(1, 17))
    bpe.train_from_iterator([headers + _WORDS] * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    tokenizer.add_tokens(list(CONTROL_TOKENS[grammar]), special_tokens=True)
    return tokenizer


@dataclass
class Transcript:
    """A prompt and what follows it.

    Attributes:
        grammar: `multiverse` or `medverse`.
        prompt: token ids.
        scripts: what each branch samples; () is the trunk.
        tokens: number of tokens after the prompt, forced ones among them.
        forced: how many are forced.
        critical_path: the longest chain of tokens after the prompt.
    """

    grammar: str
    prompt: list[int]
    scripts: dict[BranchPath, list[int]] = field(default_factory=dict)
    tokens: int = 0
    forced: int = 0
    critical_path: int = 0

    @property
    def bound(self) -> float:
        """Tokens over the longest chain of tokens: no schedule can be faster than sequential decoding by more."""
        return self.tokens / self.critical_path


class _Writer:
    """Ids of one grammar, and texts of exact lengths."""

    def __init__(self, grammar: str) -> None:
        self.tokenizer = tokenizer_of(grammar)
        self.encode = encode_function(self.tokenizer)
        self.ids = control_token_ids(self.tokenizer, grammar)
        self.forced = ForcedText(grammar, self.ids, self.encode)
        self.words = list(self.encode(_WORDS))

    def text(self, length: int) -> list[int]:
        if length < 0:
            raise SystemExit(f"a part of a transcript is {-length} tokens too short for its tags")
        return [self.words[i % len(self.words)] for i in range(length)]

    def filled(self, length: int, end: str | Sequence[int]) -> list[int]:
        """`length` tokens that end in `end`."""
        last = list(self.encode(end)) if isinstance(end, str) else list(end)
        return [*self.text(length - len(last)), *last]

    def eos(self) -> list[int]:
        return [self.tokenizer.eos_token_id]


def multiverse(prompt: int, blocks: Sequence[tuple[int, int]], trunk: Sequence[int]) -> Transcript:
    """Blocks of (paths, tokens of each path), and trunk tokens before, between and behind them.

    Where nothing comes before the first block, its goal stands in the prompt.
    """
    writer, opened = _Writer("multiverse"), bool(trunk[0])
    forced = writer.forced

    def goal(paths: int) -> str:
        lines = "".join(f"<Outline> {n}: A </Outline>\n" for n in range(1, paths + 1))
        return f"<Parallel>\n<Goal>\n{lines}</Goal>"

    found = Transcript("multiverse", writer.filled(prompt, "" if opened else goal(blocks[0][0])))
    root: list[int] = writer.filled(trunk[0], goal(blocks[0][0])) if opened else []
    found.critical_path = found.tokens = len(root)
    for number, (paths, length) in enumerate(blocks):
        for path in range(1, paths + 1):
            ahead = len(forced.path_header(str(path))) + len(forced.separator_ids)
            found.scripts[((number, str(path)),)] = writer.filled(length - ahead, "</Path>")
            found.forced += ahead
        ahead = len(forced.separator_ids) + len(forced.join_ids)
        end = goal(blocks[number + 1][0]) if number + 1 < len(blocks) else ""
        closing = [writer.ids["</Conclusion>"], *writer.encode("\n"), writer.ids["</Parallel>"]]
        rest = trunk[number + 1] - ahead - len(closing)
        root += [*closing, *writer.filled(rest, end or writer.eos())]
        found.forced += ahead
        found.tokens += paths * length + trunk[number + 1]
        found.critical_path += length + trunk[number + 1]
    found.scripts[()] = root
    return found


def medverse(prompt: int, steps: Mapping[int, Sequence[int]], length: int, conclusion: int) -> Transcript:
    """A plan in the prompt, `steps` (number -> steps that it needs) of `length` tokens, and a conclusion."""
    writer = _Writer("medverse")
    forced = writer.forced
    lines = "".join(
        f"<Outline> Transient Step {n}: A -> B; Dependency: {list(needs)} </Outline>\n" for n, needs in steps.items()
    )
    found = Transcript("medverse", writer.filled(prompt, f"<Plan>\n{lines}</Plan>"))
    depth: dict[int, int] = {}
    for number, needs in steps.items():
        depth[number] = 1 + max((depth[need] for need in needs), default=0)
        ahead = len(forced.step_header(number, "A -> B")) + len(forced.separator_ids)
        found.scripts[((0, str(number)),)] = writer.filled(length - ahead, "</Step>")
        found.forced += ahead
    ahead = len(forced.separator_ids) + len(forced.execution_ids) + len(forced.join_ids)
    found.forced += ahead
    found.scripts[()] = writer.filled(conclusion - ahead, [writer.ids["</Conclusion>"], *writer.eos()])
    found.tokens = len(steps) * length + conclusion
    found.critical_path = max(depth.values()) * length + conclusion
    return found
