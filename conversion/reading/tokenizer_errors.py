"""Turns the errors of tokenizer libraries into `HFEError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_efficient.errors import HFEError, error_text


@contextmanager
def tokenizer_errors(problem: str, remedy: str) -> Iterator[None]:
    """Context: any `Exception` inside becomes `HFEError` with the text `problem (cause); remedy`.

    So does a panic of the library tokenizers. An `HFEError` passes through, as do KeyboardInterrupt and the like.
    """
    try:
        yield
    except HFEError:
        raise
    except BaseException as error:
        # The library tokenizers panics on some files; PanicException derives from BaseException only.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = error_text(error, named=True)
        raise HFEError(f"{problem} ({cause})", remedy) from error
