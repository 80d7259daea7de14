"""Loads a checkpoint's tokenizer and model for the command line; every failure is an `HFEError` of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import CONFIG_NAME

from hf_efficient.conversion.families.family import family_of
from hf_efficient.conversion.options import check_device
from hf_efficient.conversion.reading.hub_files import checked_token, is_repo_id
from hf_efficient.conversion.reading.tokenizer_errors import tokenizer_errors
from hf_efficient.errors import HFEError, UsageError, error_text
from hf_efficient.json_file import read_json

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_for_generation(
    checkpoint: str, *, dtype: str, device: str, revision: str | None, token: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Load (tokenizer, causal language model in eval mode on `device`) of a checkpoint folder or Hub id.

    Args:
        checkpoint: local folder or Hub id.
        dtype: one of `DTYPES`; `auto` is the checkpoint's own.
        revision, token: branch, tag or commit, and access token, of a Hub repository.
        trust_remote_code: run the code of a checkpoint whose architecture is not registered.

    Raises:
        UsageError: the dtype or device is not available, `checkpoint` is a file, or the token is malformed.
        HFEError: there is no such checkpoint, its architecture does not generate text, or transformers cannot load its
            tokenizer, configuration or model.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is not known", f"choose {', '.join(DTYPES)}")
    check_device(device)
    path = Path(checkpoint).expanduser()
    if path.suffix.lower() == ".gguf":
        raise UsageError(
            f"{checkpoint} is a GGUF file, and generate takes a checkpoint folder or Hub id",
            f"convert it first: hf-efficient convert {checkpoint} OUTPUT --patch none",
        )
    if path.is_dir():
        if not (path / CONFIG_NAME).exists():
            raise HFEError(f"{checkpoint} has no config.json", "name the folder of a whole checkpoint")
        # Before the tokenizer, which models that do not generate text may lack.
        _check_generates(checkpoint, str(read_json(path / CONFIG_NAME).get("model_type")))
        checkpoint = str(path)
    elif path.exists():
        raise UsageError(f"{checkpoint} is a file", "name the folder of a checkpoint or a Hub id")
    elif not is_repo_id(checkpoint):
        raise HFEError(f"there is no folder {checkpoint}", "check the path, or name a Hub repository as org/name")
    else:
        checked_token(token)
    hub = {"revision": revision or "main", "token": token, "trust_remote_code": trust_remote_code}
    with tokenizer_errors(f"{checkpoint} has no tokenizer that can be loaded", "use the files of a whole checkpoint"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
    with _model_errors(checkpoint):
        _check_generates(checkpoint, AutoConfig.from_pretrained(checkpoint, **hub).model_type)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **hub).to(device).eval()
    return tokenizer, model


def _check_generates(checkpoint: str, model_type: str) -> None:
    """Raise `HFEError` if the model type is of a family that does not generate text."""
    family = family_of(model_type)
    if family is not None and not family.generates:
        raise HFEError(
            f"{checkpoint} is one of the {family.name} ({model_type}), which do not generate text",
            "its model card, README.md, shows how to use it",
        )


@contextmanager
def _model_errors(checkpoint: str) -> Iterator[None]:
    """Context: any `Exception` while transformers loads `checkpoint` becomes `HFEError`."""
    try:
        yield
    except HFEError:
        raise
    except Exception as error:
        cause = error_text(error, named=True, most=300)
        raise HFEError(
            f"{checkpoint} cannot be loaded ({cause})", "`hf-efficient inspect` says what is wrong with a checkpoint"
        ) from error
