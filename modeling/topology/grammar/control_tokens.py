"""The two grammars of parallel reasoning: their control tokens, and what is read from the text between them.

Multiverse: text, and blocks of parallel paths that may be nested.

    <Parallel> <Goal> (<Outline> 1: text </Outline>)+ </Goal>
    (<Path> 1: text </Path>)+ <Conclusion> text </Conclusion> </Parallel>

MedVerse: one plan of numbered steps with their dependencies, and the steps.

    <Plan> (<Outline> Transient Step 1: A -> B; Dependency: [] </Outline>)+ </Plan>
    <Execution> (<Step> Transient Step 1: A -> B\\n text </Step>)+ </Execution> <Conclusion> text </Conclusion>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_efficient.errors import TopologyError, UsageError

MULTIVERSE = (
    *("<Think>", "</Think>", "<Parallel>", "</Parallel>", "<Goal>", "</Goal>", "<Outline>", "</Outline>"),
    *("<Path>", "</Path>", "<Conclusion>", "</Conclusion>"),
)
MEDVERSE = (
    *("<Think>", "</Think>", "<Plan>", "</Plan>", "<Step>", "</Step>", "<Outline>", "</Outline>"),
    *("<Execution>", "</Execution>", "<Conclusion>", "</Conclusion>"),
)
CONTROL_TOKENS: dict[str, tuple[str, ...]] = {"multiverse": MULTIVERSE, "medverse": MEDVERSE}
GRAMMARS = tuple(CONTROL_TOKENS)
# What a MedVerse step sees: its ancestors; every step of the earlier layers; nothing but the text before the steps.
MODES = ("dag", "layers", "flat")

# Nine digits at most: a model may write any number of them.
STEP_NUMBER = re.compile(r"Transient\s+Step\s+([0-9]{1,9})(?![0-9])", re.IGNORECASE)
STEP_TITLE = re.compile(
    r"Transient\s+Step\s+[0-9]{1,9}\s*:\s*(.*?)\s*(?:;\s*Dependency\b|$)", re.IGNORECASE | re.DOTALL
)
DEPENDENCIES = re.compile(r"Dependency\s*:\s*\[([0-9,\s]*)\]", re.IGNORECASE)
PATH_LABEL = re.compile(r"\s*([0-9]+(?:\.[0-9]+)*)\s*:")

Decode = Callable[[Sequence[int]], str]


def check_grammar(grammar: str, mode: str) -> None:
    """Raise `UsageError` for a grammar or a visibility mode that does not exist."""
    for name, value, known in (("grammar", grammar, GRAMMARS), ("mode", mode, MODES)):
        if value not in known:
            raise UsageError(f"{name}={value!r} is unknown", f"choose one of {', '.join(known)}")


def is_trained(config: Any) -> bool:
    """True for the configuration of a model that has learnt to write control tokens."""
    return bool((getattr(config, "topology", None) or {}).get("trained"))


def token_ids_of(tokenizer: Any, grammar: str) -> dict[str, int]:
    """The id of each control token of `grammar`.

    Raises:
        UsageError: this is no tokenizer.
        TopologyError: a tag is not one token of this tokenizer.
    """
    check_grammar(grammar, "dag")
    if not callable(getattr(tokenizer, "encode", None)) or isinstance(tokenizer, str):
        raise UsageError(f"tokenizer={tokenizer!r} is not a tokenizer", "pass AutoTokenizer.from_pretrained(…)")
    found = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in CONTROL_TOKENS[grammar]}
    # A tokenizer with an unknown token has one id for every tag that it lacks.
    unknown = getattr(tokenizer, "unk_token_id", None)
    lacking = [tag for tag, ids in found.items() if len(ids) != 1 or ids[0] == unknown]
    if lacking:
        raise TopologyError(
            f"the tokenizer lacks topology tokens: {' '.join(lacking)}",
            f"convert the model with `hf-efficient convert --patch {grammar}`, which adds them, or pass such a "
            "model's tokenizer",
        )
    return {tag: ids[0] for tag, ids in found.items()}


def decoder_of(tokenizer: Any) -> Decode:
    """The text of token ids as it stands, control tokens included."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode
