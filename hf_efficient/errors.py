"""The package's errors, whose messages say what was given, which rule it breaks, and what to do about it.

All packages and the exported code use this module, so it imports only the standard library.
"""

from __future__ import annotations

import re
from urllib.parse import quote

# A token of the Hub, up to a blank, quote or bracket.
_HUB_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}[^\s'\"()]*")
_secrets: set[str] = set()


def hide_secret(secret: str | None) -> None:
    """From now on, `redact` replaces `secret`, e.g. a Hub token, in each form in which a library may print it.

    None and texts of at most three characters have no effect.
    """
    for text in {secret, secret.strip(), " ".join(secret.split())} if secret else ():
        if len(text) > 3:  # anything shorter would hide parts of other words
            raw = str(text.encode("utf-8", "surrogatepass"))[2:-1]
            _secrets.update((text, repr(text)[1:-1], ascii(text)[1:-1], raw, quote(text, safe="", errors="replace")))


def redact(text: str) -> str:
    """`text` with `<token>` in place of each secret given to `hide_secret`, and of anything like a Hub token."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "<token>")
    return _HUB_TOKEN.sub("<token>", text)


def one_line(text: str) -> str:
    """`text` on one line, for a terminal: control characters are escaped, and tokens are redacted."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in redact(text))
    return redact(shown)


def error_text(error: BaseException, *, named: bool = False, most: int | None = 200) -> str:
    """The message of an error on one line, at most `most` characters (None: all); `named`: after its class name."""
    return " ".join((f"{type(error).__name__}: {error}" if named else str(error)).split())[:most]


class HFEError(ValueError):
    """An error in the data or at run time. The command line exits with status 1.

    Args:
        problem: what was given and the rule it breaks, with the offending value.
        remedy: what the user can do about it.

    Attributes:
        problem, remedy: the arguments on one line, without Hub tokens; the message is "problem; remedy".
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = one_line(problem)
        self.remedy = one_line(remedy)
        super().__init__(f"{self.problem}; {self.remedy}" if remedy else self.problem)


class UsageError(HFEError):
    """An argument or option is wrong. The command line exits with status 2."""

    exit_code = 2


class TokenIdError(HFEError, IndexError):
    """A token id lies outside the vocabulary or table it indexes."""


class BackendError(HFEError, RuntimeError):
    """The requested kernel backend cannot run here."""
