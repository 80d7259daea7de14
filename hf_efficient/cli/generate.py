"""`hf-efficient generate`."""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer

from hf_efficient.cli.options import Device, Json, Revision, Token, print_json
from hf_efficient.errors import HFEError, UsageError


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue, or the user's message where the model chats.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; by default where there is one.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of --sample; 1.0 if it is not given.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of a checkpoint that is not one of ours.")
    ] = False,
    json: Json = False,
) -> None:
    """Generate text from a prompt.

    Example: hf-efficient generate smollm-stem "What is the capital of France?"
    """
    import torch
    from transformers import TextStreamer

    from hf_efficient.conversion.architecture import active_architectures, load
    from hf_efficient.conversion.reading.tokenizer_errors import tokenizer_errors
    from hf_efficient.loading import load_for_generation

    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens} must be at least 1", "give 1 or more")
    if temperature is not None and not sample:
        raise UsageError(
            f"--temperature {temperature} has no effect on greedy decoding", "add --sample, or leave it out"
        )
    if temperature is not None and not (0 < temperature < math.inf):
        raise UsageError(f"--temperature {temperature} must be a positive number", "1.0 is the default")
    if not -(1 << 63) <= seed < 1 << 64:
        raise UsageError(f"--seed {seed} does not fit into 64 bits", "give a smaller number")
    tokenizer, model = load_for_generation(
        checkpoint, dtype=dtype, device=device, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    if chat and not tokenizer.chat_template:
        raise HFEError(
            f"{checkpoint} has no chat template", "leave out --chat, or use a model that was trained to chat"
        )
    with tokenizer_errors("the tokenizer does not take the prompt", "try --no-chat, or another prompt"):
        if chat if chat is not None else bool(tokenizer.chat_template):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    if not ids.numel():
        raise HFEError(f"the prompt {prompt!r} gives no token, and a model continues at least one", "give some text")
    count = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= count:
        raise HFEError(
            f"the tokenizer gives id {int(ids.max())}, the model's vocabulary is 0..{count - 1}",
            "use the tokenizer that belongs to this checkpoint",
        )
    active = active_architectures(model.config)
    hooks = [load(spec.writes_special_tokens) for spec in active if spec.writes_special_tokens]
    # Special tokens that the model was trained to write are part of its text.
    special = any(hook(model.config) for hook in hooks)
    figures = [name for spec in active for name in spec.generation_figures if special]
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        temperature=(1.0 if temperature is None else temperature) if sample else None,
        top_p=None,
        top_k=None,
        streamer=None if json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=not special),
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    rate = len(new) / seconds
    if json:
        text = tokenizer.decode(new, skip_special_tokens=not special)
        result = {"text": text, "new_tokens": len(new), "seconds": seconds, "tokens_per_second": rate}
        warnings = {"warnings": output.warnings[0]} if special else {}
        print_json(result | {name: getattr(output, name) for name in figures} | warnings)
    else:
        shown = "".join(f", {name} {getattr(output, name):.2f}" for name in figures)
        typer.echo(f"[{len(new)} tokens in {seconds:.1f} s, {rate:.1f} tokens/s{shown}]", err=True)
        for warning in output.warnings[0] if special else ():
            typer.echo(f"warning: {warning}", err=True)
