"""Edits and captured decoding steps: a step never contains an override, and reads edited rows immediately.

`tests/editing/test_stem_overrides.py` shows the same of a step that is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient import stem_edit_rows, stem_inject, stem_override
from hf_efficient.editing.stem_edit_plan import StemEditPlan
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM
from tiny_shapes import SPECIAL_TOKENS, TINY

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = TINY | SPECIAL_TOKENS | {"max_position_embeddings": 512, "initializer_range": 0.2}
SOURCE, TARGET = 11, 12
PLAN = StemEditPlan((3,), (SOURCE,), ((TARGET,),), "one_to_one", None, "source", "target", (TARGET,))
# A row where the mean of two others stands, and padding before the prompt.
AVERAGE = StemEditPlan((1,), (SOURCE,), ((TARGET, 13),), "average", None, "source", "target", (TARGET, 13))


def _model(device: torch.device, dtype: torch.dtype = torch.float32, **fields: Any) -> StemForCausalLM:
    torch.manual_seed(0)
    config = StemConfig(**(SHAPE | fields), stem_layers=[1, 2], stem_init_std=1.0)
    return StemForCausalLM(config).to(device, dtype).eval()


def _prompts(device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(20, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[0, 3] = ids[1, 4] = SOURCE
    ids[1, :3] = 0
    return {"input_ids": ids.to(device), "attention_mask": (ids != 0).long().to(device)}


def _generate(model: Any, inputs: dict[str, Tensor], captured: bool = True) -> Tensor:
    """Greedy; with `captured` False in the loop of transformers, which calls the model for every token."""
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    return model.generate(**inputs, **settings, disable_compile=not captured)


def test_override_works_with_captured_steps(device: torch.device) -> None:
    model, inputs = _model(device), _prompts(device)
    plain = _generate(model, inputs)  # leaves a captured step behind
    with stem_override(model, [PLAN, AVERAGE]):
        expected = _generate(model, inputs, captured=False)
        found = _generate(model, inputs)
        again = _generate(model, inputs)
    assert torch.equal(found, expected) and torch.equal(again, expected) and not torch.equal(found, plain)
    assert torch.equal(_generate(model, inputs), plain)


def test_captured_steps_contain_no_override(device: torch.device) -> None:
    """The first call, which captures the step, is made within the context."""
    model, inputs = _model(device), _prompts(device)
    with stem_override(model, [PLAN, AVERAGE]):
        first = _generate(model, inputs)
    assert model.captured_steps()
    assert torch.equal(_generate(model, inputs), _generate(model, inputs, captured=False))
    with stem_override(model, [PLAN, AVERAGE]):
        assert torch.equal(_generate(model, inputs), first)


def test_captured_steps_read_edited_rows(device: torch.device) -> None:
    """A generated token's row is edited: the step, which reads the table by its address, reads the new row."""
    model, inputs = _model(device), _prompts(device)
    plain = _generate(model, inputs)
    generated = int(plain[0, 7])
    edit = stem_edit_rows(model, {generated: TARGET})
    edited = _generate(model, inputs)
    assert torch.equal(edited, _generate(model, inputs, captured=False)) and not torch.equal(edited, plain)
    edit.revert()
    assert torch.equal(_generate(model, inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "placement",
    [
        {"stem_offload": "cpu"},
        {"stem_offload": "cpu", "stem_prefetch_layers": 1},
        {"stem_offload": "cpu", "stem_cache_rows": 16},
        {"stem_offload": "disk"},
    ],
    ids=["pinned", "one-ahead", "row-cache", "mapped"],
)
def test_edits_of_tables_on_the_host_are_those_of_tables_on_the_device(
    tmp_path: Path, placement: dict[str, Any], dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    # Wide tables: two small ones can lie in one page of memory, which can be pinned only once.
    width = 1024
    _model(device, dtype, intermediate_size=width).save_pretrained(tmp_path)
    # Loaded both, since a model that is cast has cast its rotary frequencies too.
    resident = StemForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cuda")
    offloaded = StemForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cuda", **placement)
    inputs = _prompts(device)
    captured = placement["stem_offload"] == "cpu"  # otherwise a step waits for the host, in the loop of transformers
    plain = _generate(resident, inputs)
    delta = torch.randn(width, generator=torch.Generator().manual_seed(2))

    def tokens(model: Any) -> list[Tensor]:
        found = [_generate(model, inputs, captured)]
        with stem_override(model, [PLAN, AVERAGE]):
            found.append(_generate(model, inputs, captured))
        found.append(_generate(model, inputs, captured))
        edit = stem_edit_rows(model, {SOURCE: TARGET, int(plain[0, 7]): [TARGET, 13]})
        found.append(_generate(model, inputs, captured))
        added = stem_inject(model, [TARGET, 13], delta)
        found.append(_generate(model, inputs, captured))
        added.revert()
        edit.revert()
        return [*found, _generate(model, inputs, captured)]

    stages = ("before", "overridden", "after", "edited", "injected", "reverted")
    for stage, expected, found in zip(stages, tokens(resident), tokens(offloaded), strict=True):
        assert torch.equal(found, expected), stage
    assert offloaded.model.row_fetches()["direct"] == captured == bool(offloaded.captured_steps())
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, resident(**inputs).logits)
