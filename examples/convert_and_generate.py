"""Convert a checkpoint to STEM in Python, measure its loss, load it with the Auto classes, generate.

python examples/convert_and_generate.py HuggingFaceTB/SmolLM2-135M-Instruct smollm-stem --layers 1,2,3
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_efficient
from hf_efficient import Stem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id, local folder or .gguf file")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--layers", default="auto", help="STEM layers, e.g. 1,4,7; auto chooses by measured loss")
    parser.add_argument("--calibration", help="text to calibrate on: a .jsonl or .txt file")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    arguments = parser.parse_args()

    report = hf_efficient.convert(
        arguments.source, arguments.output, [Stem(layers=arguments.layers)], calibration=arguments.calibration
    )
    print(report.table())

    # The folder carries its own code: the lines below also run where hf_efficient is not installed.
    tokenizer = AutoTokenizer.from_pretrained(arguments.output, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.output, trust_remote_code=True)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
