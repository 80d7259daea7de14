"""The control tokens of the two grammars, and the patterns of the text between them.

A control token is a tag that is one token of the vocabulary and marks the structure of a text.

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
# Which steps a MedVerse step may attend to, besides the text before the steps: those that it depends on and their
# ancestors (`dag`), all steps of earlier layers (`layers`), or none (`flat`).
MODES = ("dag", "layers", "flat")

# Group 1 of STEP_NUMBER is the number of a step, of STEP_TITLE its title, of DEPENDENCIES the numbers between brackets,
# of PATH_LABEL the label of a path. At most nine digits: a model may generate longer numbers, and Python limits the
# digits that `int` accepts.
STEP_NUMBER = re.compile(r"Transient\s+Step\s+([0-9]{1,9})(?![0-9])", re.IGNORECASE)
STEP_TITLE = re.compile(
    r"Transient\s+Step\s+[0-9]{1,9}\s*:\s*(.*?)\s*(?:;\s*Dependency\b|$)", re.IGNORECASE | re.DOTALL
)
DEPENDENCIES = re.compile(r"Dependency\s*:\s*\[([0-9,\s]*)\]", re.IGNORECASE)
PATH_LABEL = re.compile(r"\s*([0-9]+(?:\.[0-9]+)*)\s*:")

Decode = Callable[[Sequence[int]], str]


def check_grammar(grammar: str, mode: str) -> None:
    """Raise `UsageError` unless `grammar` is one of `GRAMMARS` and `mode` one of `MODES`."""
    for name, value, known in (("grammar", grammar, GRAMMARS), ("mode", mode, MODES)):
        if value not in known:
            raise UsageError(f"{name}={value!r} is unknown", f"choose one of {', '.join(known)}")


def is_trained(config: Any) -> bool:
    """True if ``config.topology["trained"]`` says that the model was trained to generate control tokens."""
    return bool((getattr(config, "topology", None) or {}).get("trained"))


def control_token_ids(tokenizer: Any, grammar: str) -> dict[str, int]:
    """Return control token -> id, for the control tokens of `grammar`.

    Args:
        tokenizer: a tokenizer of transformers.
        grammar: `multiverse` or `medverse`.

    Raises:
        UsageError: `tokenizer` is not a tokenizer, or `grammar` is unknown.
        TopologyError: the tokenizer does not encode a control token as one token.
    """
    check_grammar(grammar, "dag")
    if not callable(getattr(tokenizer, "encode", None)) or isinstance(tokenizer, str):
        raise UsageError(f"tokenizer={tokenizer!r} is not a tokenizer", "pass AutoTokenizer.from_pretrained(…)")
    encoded = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in CONTROL_TOKENS[grammar]}
    # Some tokenizers encode a tag that they lack as the unknown token, which is a single id as well.
    unknown = getattr(tokenizer, "unk_token_id", None)
    lacking = [tag for tag, ids in encoded.items() if len(ids) != 1 or ids[0] == unknown]
    if lacking:
        raise TopologyError(
            f"the tokenizer lacks topology tokens: {' '.join(lacking)}",
            f"convert the model with `hf-efficient convert --patch {grammar}`, which adds them, or pass such a "
            "model's tokenizer",
        )
    return {tag: ids[0] for tag, ids in encoded.items()}


def decode_function(tokenizer: Any) -> Decode:
    """Return a function from token ids to their text, which keeps control tokens and does not clean up spaces."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode
