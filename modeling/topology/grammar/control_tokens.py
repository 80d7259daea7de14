"""The control tokens of the two grammars, and the patterns of the text between them.

Multiverse: text, and blocks of parallel paths that may be nested.

    <Parallel> <Goal> (<Outline> 1: text </Outline>)+ </Goal>
    (<Path> 1: text </Path>)+ <Conclusion> text </Conclusion> </Parallel>

MedVerse: a plan of numbered steps with their dependencies, and an execution of the steps.

    <Plan> (<Outline> Transient Step 1: A -> B; Dependency: [] </Outline>)+ </Plan>
    <Execution> (<Step> Transient Step 1: A -> B\\n text </Step>)+ </Execution> <Conclusion> text </Conclusion>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.errors import TopologyError

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
# What a MedVerse step sees besides the text before the steps: its ancestors, all steps of earlier layers, or nothing.
MODES = ("dag", "layers", "flat")

# At most nine digits: a model may write a number of any length, and Python limits the digits that `int` takes.
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
    """True for the configuration of a model that was trained to write control tokens."""
    return bool((getattr(config, "topology", None) or {}).get("trained"))


def control_token_ids(tokenizer: Any, grammar: str) -> dict[str, int]:
    """Control token -> id, for the control tokens of `grammar`.

    Raises:
        UsageError: `tokenizer` is not a tokenizer, or `grammar` is unknown.
        TopologyError: the tokenizer does not encode a control token as one token.
    """
    check_grammar(grammar, "dag")
    if not callable(getattr(tokenizer, "encode", None)) or isinstance(tokenizer, str):
        raise UsageError(f"tokenizer={tokenizer!r} is not a tokenizer", "pass AutoTokenizer.from_pretrained(…)")
    found = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in CONTROL_TOKENS[grammar]}
    # A tokenizer encodes every text that it lacks as its unknown token, which is one id too.
    unknown = getattr(tokenizer, "unk_token_id", None)
    lacking = [tag for tag, ids in found.items() if len(ids) != 1 or ids[0] == unknown]
    if lacking:
        raise TopologyError(
            f"the tokenizer lacks topology tokens: {' '.join(lacking)}",
            f"convert the model with `hf-efficient convert --patch {grammar}`, which adds them, or pass such a "
            "model's tokenizer",
        )
    return {tag: ids[0] for tag, ids in found.items()}


def decode_function(tokenizer: Any) -> Decode:
    """A function from token ids to their text, with control tokens and without cleaning up spaces."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode
