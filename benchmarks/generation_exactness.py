"""Does captured generation give the tokens of stock transformers, and where it does not, how near was the tie?

    python -m benchmarks.generation_exactness MODEL [--output FOLDER]

MODEL is a folder, a `.gguf` file or a Hub id of a Llama, Mistral, Qwen2 or Qwen3 model. Twenty prompts, 256 greedy
tokens each, batched with left padding, and the first of them alone as well. In float32 the tokens must be identical. In
bfloat16 they must be identical up to the first step at which stock's two best logits are closer than twice the largest
difference of logits that was measured; both are in the report. Another order of additions changes the last bits of a
logit, and a tie that is nearer than that has no right answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import RESULTS, describe_machine
from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM

NEW = 256
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three laws of thermodynamics state that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the difference between a list and a tuple in Python?\nA:",
    "In the year 1492,",
    "The recipe needs two eggs, a cup of flour and",
    "To be, or not to be, that is",
    "The mitochondria are",
    "import numpy as np\n\n# Solve a linear system\n",
    "A train leaves the station at 60 km/h. After two hours",
    "The moon goes round the earth because",
    "List of the planets, from the sun outwards:\n1.",
    "She opened the old wooden door and saw",
    "The stock market fell sharply on Monday after",
    "SELECT name, COUNT(*) FROM",
    "The most important thing about learning a language is",
    "In conclusion,",
)


def load(path: str, dtype: torch.dtype) -> tuple[Any, EfficientDecoderForCausalLM, Any]:
    """The stock model, ours with its weights, and the tokenizer with left padding."""
    file = Path(path)
    options = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    folder = str(file.parent) if options else path
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to("cuda").eval()
    ours = EfficientDecoderForCausalLM(decoder_config(stock.config)).to("cuda", dtype).eval()
    ours.load_state_dict(stock.state_dict())
    ours.tie_weights()
    return stock, ours, tokenizer


def generate(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """New tokens [B, NEW] and the logits that they were chosen from [B, NEW, V]."""
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def compare(stock: Any, ours: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """First differing step of each row (NEW where there is none), the largest difference of logits on the common way,
    and stock's margin where they part."""
    (a, logits_a), (b, logits_b) = generate(stock, inputs), generate(ours, inputs)
    same = (a == b).cumprod(1).sum(1)
    steps = torch.arange(NEW, device=a.device)
    # Up to the step at which they diverge both have the same tokens.
    common = steps[None] <= same[:, None]
    difference = ((logits_a - logits_b).abs().amax(-1) * common).max().item()
    best = logits_a.topk(2, dim=-1).values
    margins = best[..., 0] - best[..., 1]
    parted = (same < NEW).nonzero().flatten().tolist()
    return {
        "first_difference": same.tolist(),
        "largest_logit_difference": difference,
        "margins_where_they_part": [margins[row, same[row]].item() for row in parted],
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--output", type=Path, default=RESULTS, help="folder for generation_exactness.json")
    options.add_argument("--alone", type=int, default=1, help="prompts that are generated alone too")
    options.add_argument("--commit", help="commit to record where the checkout has no .git")
    arguments = options.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {"new_tokens": NEW, "prompts": len(PROMPTS), "model": Path(arguments.model).name}
    report |= describe_machine(torch.device("cuda"), arguments.commit)
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        stock, ours, tokenizer = load(arguments.model, dtype)
        batches = {"batched": [list(PROMPTS)]}
        if arguments.alone:
            batches["alone"] = [[prompt] for prompt in PROMPTS[: arguments.alone]]
        for way, prompts in batches.items():
            found = [
                compare(stock, ours, dict(tokenizer(p, return_tensors="pt", padding=True).to("cuda"))) for p in prompts
            ]
            difference = max(x["largest_logit_difference"] for x in found)
            margins = [m for x in found for m in x["margins_where_they_part"]]
            first = [step for x in found for step in x["first_difference"]]
            identical = sum(step == NEW for step in first)
            holds = identical == len(first) if dtype == torch.float32 else all(m < 2 * difference for m in margins)
            failed |= not holds
            report[f"{name}, {way}"] = {
                "holds": holds,
                "identical_prompts": identical,
                "first_difference": first,
                "largest_logit_difference": difference,
                "margins_where_they_part": margins,
            }
            (arguments.output / "generation_exactness.json").write_text(json.dumps(report, indent=1) + "\n")
            print(
                f"{name}, {way}: {identical} of {len(first)} identical, largest difference of logits {difference:.3g}"
            )
            print(f"  margins where they part: {[float(f'{m:.3g}') for m in margins]}; holds: {holds}", flush=True)
        # A cache that is returned takes its step along; one that is not shows here that steps are captured.
        ours.generate(torch.tensor([[1]], device="cuda"), max_new_tokens=3, pad_token_id=0)
        assert ours.captured_steps(), "nothing was captured, so nothing was compared"
        del stock, ours
    if failed:
        raise SystemExit("captured generation is not exact; see above")


if __name__ == "__main__":
    main()
