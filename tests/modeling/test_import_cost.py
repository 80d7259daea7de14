"""Importing the package is cheap: it registers classes and leaves kernels and trainers for later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, time
from transformers import AutoModelForCausalLM, PreTrainedModel, GenerationMixin
heavy = lambda: {name for name in sys.modules if name.split(".")[0] in ("triton", "peft", "accelerate")}
before, start = heavy(), time.process_time()
import hf_efficient
seconds = time.process_time() - start
from transformers import AutoConfig
for model_type in ("hfe_stem", "hfe_decoder"):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, num_hidden_layers=2, hidden_size=8,
        intermediate_size=8, vocab_size=9, num_attention_heads=2, num_key_value_heads=2))
print(json.dumps({"seconds": seconds, "loaded": sorted(heavy() - before)}))
"""


def test_importing_the_package_is_cheap_and_registers_its_classes(repository_root: Path) -> None:
    """At most 0.3 s beyond transformers itself; processor time and the best of five, as other processes disturb."""
    best = 1e9
    for _ in range(5):
        output = subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=repository_root, capture_output=True, text=True, check=True
        ).stdout
        measured = json.loads(output.splitlines()[-1])
        assert measured["loaded"] == []
        best = min(best, measured["seconds"])
        if best <= 0.3:
            return
    raise AssertionError(f"import hf_efficient took {best:.2f} s at best; at most 0.3 s are allowed")
