"""Parallel generation with weights that accelerate keeps elsewhere: the tokens of the model as a whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload

PROMPTS = {
    "multiverse": "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>",
    "medverse": "<Plan><Outline> Transient Step 1: A -> B; Dependency: [] </Outline></Plan>",
}


@pytest.mark.parametrize("grammar", PROMPTS)
def test_an_offloaded_model_generates_the_same_branches(
    grammar: str, model_of: Callable, toy: Callable, toy_tokenizer: Callable
) -> None:
    model = model_of(grammar)
    ids = torch.tensor([toy(grammar).encode(PROMPTS[grammar])])
    settings = {"parallel": True, "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    tokenizer = toy_tokenizer(grammar)
    whole = model.generate(ids, tokenizer=tokenizer, **settings)
    cpu_offload(model, "cpu")
    assert model.device.type == "meta"
    split = model.generate(ids, tokenizer=tokenizer, **settings)
    assert torch.equal(split.sequences, whole.sequences)
    assert int(whole.segment_ids.max()) > 0  # there were branches
