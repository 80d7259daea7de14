"""A small ViT that is trained here on handwritten digits keeps its accuracy with Monarch attention.

An image of 8 x 8 pixels is 64 tokens and a class token: with blocks of 8 tokens and padding in front, block 0 holds the
class token, and each further block is a row of pixels. Weights, order of the images and initialisation are the same for
both attentions, so that differences are paired. Initial weights of deviation 0.1 train in few epochs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from hf_efficient.modeling.monarch.monarch_layers import enable_monarch
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec

EPOCHS, FINE_TUNING_EPOCHS, SEEDS = 5, 4, 5
TRAINED_IMAGES = 1437
SHAPE = {"image_size": 8, "patch_size": 1, "num_channels": 1, "num_labels": 10}
SHAPE |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPEC = MonarchSpec(block_size=8, pad="pre")


class Digits:
    """Images [N, 1, 8, 8] in -1..1 and their labels [N], in an order fixed once; the last 360 are held out."""

    def __init__(self, folder: Path) -> None:
        stored = load_file(folder / "digits_u8.safetensors")
        order = torch.randperm(len(stored["labels"]), generator=torch.Generator().manual_seed(0))
        self.images = stored["images"].float()[order, None] / 8 - 1
        self.labels = stored["labels"].long()[order]

    def train(self, model: ViTForImageClassification, epochs: int, learning_rate: float, seed: int) -> None:
        """Train on the images that are not held out."""
        generator = torch.Generator().manual_seed(seed)
        batches = [
            batch for _ in range(epochs) for batch in torch.randperm(TRAINED_IMAGES, generator=generator).split(64)
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches))
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(model(self.images[batch]).logits, self.labels[batch]).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def accuracy(self, model: ViTForImageClassification) -> float:
        """Share of the held-out images that are classified correctly."""
        found = model(self.images[TRAINED_IMAGES:]).logits.argmax(-1)
        return (found == self.labels[TRAINED_IMAGES:]).float().mean().item()


def accuracies(digits: Digits, seed: int) -> dict[str, float]:
    """Attention -> accuracy: of a model trained with softmax attention, of the same weights with Monarch attention in
    one layer and in both, and after fine-tuning them with either attention."""
    torch.manual_seed(seed)
    config = ViTConfig(**SHAPE, initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = ViTForImageClassification(config)
    model.set_attn_implementation("sdpa")
    digits.train(model, EPOCHS, 3e-3, seed)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    found = {"softmax": digits.accuracy(model)}
    for name, layers in (("monarch in the last layer", [1]), ("monarch", None)):
        enable_monarch(model, SPEC, layers=layers)
        found[name] = digits.accuracy(model)
    digits.train(model, FINE_TUNING_EPOCHS, 3e-3, seed + SEEDS)
    found["monarch, fine-tuned"] = digits.accuracy(model)
    model.load_state_dict(trained)
    model.set_attn_implementation("sdpa")
    digits.train(model, FINE_TUNING_EPOCHS, 3e-3, seed + SEEDS)
    found["softmax, fine-tuned"] = digits.accuracy(model)
    return found


@pytest.mark.slow
def test_a_vit_keeps_its_accuracy_with_monarch_attention_after_fine_tuning(shared_data: Path) -> None:
    digits = Digits(shared_data)
    runs = [accuracies(digits, seed) for seed in range(SEEDS)]
    mean = {name: sum(run[name] for run in runs) / SEEDS for name in runs[0]}
    assert mean["softmax, fine-tuned"] > 0.9
    assert mean["monarch, fine-tuned"] > mean["softmax, fine-tuned"] - 0.01, mean
    # Without training the first layer is approximated badly; the test says so, so that the documentation stays true.
    assert mean["monarch"] < mean["monarch in the last layer"] - 0.1, mean
