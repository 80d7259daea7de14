"""Evaluates masked language models by their loss on the masked tokens of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from hf_efficient.conversion.families.derived import model_class
from hf_efficient.conversion.families.encoder import longest_input
from hf_efficient.conversion.families.family import model_tensors
from hf_efficient.conversion.measuring.evaluation import Evaluator, LogitSource, Objective
from hf_efficient.conversion.measuring.layerwise import LOGIT_POSITIONS
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.errors import HFEError

# As in BERT's training, except that every selected token becomes the mask token, none itself or a random one.
MASKED_SHARE = 0.15


class MaskedEvaluator(Evaluator):
    """Evaluates encoders by the loss at fixed random positions (seed 0). The whole model is held in memory."""

    objective: ClassVar[Objective] = "masked tokens"

    def checkpoint_logits(
        self,
        config: PreTrainedConfig,
        reader: TensorReader,
        *,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> LogitSource:
        """A function that loads the checkpoint in fp32 and computes its logits.

        `progress` is called with (sequences done, number of sequences). The function raises `HFEError` if a weight
        holds NaN or infinity or cannot be read.
        """

        def logits(ids: Tensor) -> Iterator[Tensor]:
            yield from self._logits(_loaded(config, reader).to(device), ids, progress)

        return logits

    def model_logits(self, model: nn.Module) -> LogitSource:
        """A function that computes the model's logits in eval mode; its training mode is restored afterwards."""

        def logits(ids: Tensor) -> Iterator[Tensor]:
            training = model.training
            try:
                yield from self._logits(model.eval(), ids, None)
            finally:
                model.train(training)

        return logits

    def predictions(self, ids: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`ids` with the selected tokens replaced by the mask token, `ids` itself, and True at the selected positions.

        Selected are 15 % of the positions at random (seed 0), and the middle one of each sequence. `ids` [B, S] are on
        the CPU.

        Raises:
            HFEError: the tokenizer has no mask token.
        """
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            raise HFEError(
                "the tokenizer has no mask token, and a masked language model is measured on masked tokens",
                "use the tokenizer that belongs to the checkpoint",
            )
        chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < MASKED_SHARE
        chosen[:, ids.shape[1] // 2] = True  # at least one in each sequence
        return ids.masked_fill(chosen, mask), ids, chosen

    @staticmethod
    @torch.no_grad()
    def _logits(model: Any, ids: Tensor, progress: Callable[[int, int], None] | None) -> Iterator[Tensor]:
        """Logits in chunks, see `LogitSource`; one that is too long for the model is cut into windows."""
        device, window = next(model.parameters()).device, longest_input(model.config)
        for index, sequence in enumerate(ids):
            # The first result: logits, or hidden states of a model without a head.
            windows = [model(input_ids=part[None].to(device))[0][0] for part in sequence.split(window)]
            yield from torch.cat(windows).split(LOGIT_POSITIONS)
            if progress:
                progress(index + 1, len(ids))


def _loaded(config: PreTrainedConfig, reader: TensorReader) -> Any:
    """The encoder with the checkpoint's weights, in fp32 on the CPU, in eval mode; errors of `TensorReader.read`."""
    with no_init_weights():
        model: Any = model_class(config)(config)
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name in model_tensors(config).shapes:
            parameters[name].copy_(reader.read(name))
    model.tie_weights()
    return model.float().eval()
