"""What a conversion of SmolLM2-135M to BHyT costs in perplexity, on text that nothing was fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open
from torch import Tensor

from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.measuring.evaluation import checkpoint_logits, nll_by_position
from hf_efficient.conversion.measuring.text import load_text, pack
from hf_efficient.conversion.reading.source import Source, open_source
from hf_efficient.convert_checkpoint import convert

pytestmark = pytest.mark.real_model
EVALUATED, FITTED = 1024, 1024


def loss(source: Source, ids: Tensor) -> float:
    with torch.no_grad():
        return float(nll_by_position(checkpoint_logits(source.config, source.reader)(ids), ids).double().mean())


@pytest.fixture(scope="module")
def ratio(
    smollm_gguf: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Bhyt], tuple[float, Path]]:
    """Perplexity of the converted model over that of its source, and the folder of the converted model."""
    text = shared_data / "c4_en_valid_1k.jsonl"
    source = open_source(str(smollm_gguf))
    ids = pack(source.tokenizer(), load_text(str(text))[1], EVALUATED, source.config.vocab_size)
    before = loss(source, ids)

    def measure(patch: Bhyt) -> tuple[float, Path]:
        output = tmp_path_factory.mktemp("smollm") / "bhyt"
        options = {"calibration": text, "calibration_tokens": FITTED, "evaluate": False, "progress": False}
        convert(smollm_gguf, output, [patch], **options)
        return math.exp(loss(open_source(str(output)), ids) - before), output

    return measure


def test_the_lossless_conversion_costs_nothing(ratio: Callable[[Bhyt], tuple[float, Path]]) -> None:
    """With the final norm converted too."""
    cost, output = ratio(Bhyt(final="bhyt"))
    assert abs(cost - 1) < 1e-4
    with safe_open(output / "model.safetensors", "pt") as file:
        scale = file.get_tensor("model.layers.7.post_attention_layernorm.out_scale")
    assert torch.equal(scale, torch.full((576,), 1024.0))


def test_estimated_second_sites_cost_little(ratio: Callable[[Bhyt], tuple[float, Path]]) -> None:
    """0.7 % on this little text. Layer 24 is found to follow no line; estimated too, it alone would cost 0.8 % more."""
    patch = Bhyt(second_site="affine")
    cost, _ = ratio(patch)
    assert cost < 1.01
    misses = patch.report()["line_misses"]
    assert max((index for index in misses if index > 1), key=lambda index: misses[index]) == 24
    assert sum(miss > 0.03 for miss in misses.values()) < 15  # most layers are estimated


def test_the_bounded_model_stays_a_language_model(ratio: Callable[[Bhyt], tuple[float, Path]]) -> None:
    """lambda / kappa = 0.1; with plain gains the perplexity is 2.6 times the source's."""
    cost, _ = ratio(Bhyt(bound=1.0))
    assert 1.05 < cost < 1.35
