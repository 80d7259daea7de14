"""Runs a decoder checkpoint layer by layer: only one layer's weights and the text's hidden states are in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_efficient.conversion.architecture import token_tables
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.errors import TokenIdError
from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.decoder_layer import DecoderLayer
from hf_efficient.modeling.decoder.rms_norm import add_and_norm
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderModel

EMBEDDING = "model.embed_tokens.weight"
# Tokens that a layer processes at a time (at least one sequence).
MICRO_BATCH_TOKENS = 2048
# Positions whose logits are computed at a time.
LOGIT_POSITIONS = 256


def read_token_rows(reader: TensorReader, name: str, ids: Tensor) -> Tensor:
    """Rows `ids` [R] of the tensor `name` [V, W], as [R, W] in its stored dtype on the CPU.

    Args:
        reader: the checkpoint's tensors.
        name: name of the tensor.
        ids: token ids, sorted and unique; consecutive ids are read together.

    Raises:
        HFEError: a row holds NaN or infinity, or the file cannot be read or is truncated.
    """
    if ids.numel() == 0:
        return torch.empty(0, reader.shape(name)[1], dtype=reader.dtype(name))
    ids = ids.cpu()
    breaks = (ids.diff() != 1).nonzero().flatten() + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in torch.tensor_split(ids, breaks)]
    return torch.cat([reader.read_rows(name, start, stop) for start, stop in runs])


@dataclass
class BatchState:
    """One batch of a `LayerwisePass` between two layers.

    Attributes:
        ids: token ids [B, S], int64.
        local_ids: index of each token in `LayerwisePass.vocabulary` [B, S], int64.
        hidden: hidden states after the layers run so far [B, S, hidden_size], fp32.
    """

    ids: Tensor
    local_ids: Tensor
    hidden: Tensor

    def clone(self) -> BatchState:
        """The same batch with a copy of the hidden states, so that each can be run through different layers."""
        return BatchState(self.ids, self.local_ids, self.hidden.clone())


class LayerwisePass:
    """A forward pass of several batches through a checkpoint, layer after layer, in fp32.

    Creating it computes the embedding. Of tensors with a row for each token, only the rows of the batches' tokens are
    read; the layers therefore get local ids, the indices of the tokens in `vocabulary`.

    Args:
        config: the checkpoint's configuration.
        reader: the checkpoint's tensors.
        batches: token ids [B, S] of each batch, without padding.
        device: device of the layers and the hidden states.

    Attributes:
        vocabulary: the token ids that occur in the batches, sorted [R].
        embeddings: the embedding's rows of these ids [R, hidden_size], fp32.
        batches: the state of each batch, at first the output of the embedding.

    Raises:
        TokenIdError: an id lies outside the vocabulary.
        HFEError: the embedding holds NaN or infinity, or its file cannot be read or is truncated.
    """

    def __init__(
        self,
        config: EfficientDecoderConfig,
        reader: TensorReader,
        batches: Sequence[Tensor],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = copy.deepcopy(config)  # building a model writes `_attn_implementation` into the configuration
        self.reader = reader
        self.device = torch.device(device)
        with torch.device("meta"):
            self.model = EfficientDecoderModel(self.config).eval()
        # No checkpoint stores the buffers of the rotary embedding, so it is created outside the meta device.
        self.model.rotary_emb = type(self.model.rotary_emb)(self.config).to(self.device)

        self.vocabulary = torch.unique(torch.cat([ids.flatten() for ids in batches]))
        _check_vocabulary(self.vocabulary, config.vocab_size)
        self.embeddings = read_token_rows(reader, EMBEDDING, self.vocabulary).to(self.device, torch.float32)
        self.batches = [self._embed(ids) for ids in batches]
        self._shapes: dict[tuple[int, int], tuple[dict, tuple[Tensor, Tensor], Tensor]] = {}

    def _embed(self, ids: Tensor) -> BatchState:
        """The state of a batch of token ids [B, S] after the embedding."""
        local_ids = torch.searchsorted(self.vocabulary, ids.contiguous()).to(self.device)
        return BatchState(ids, local_ids, self.embeddings[local_ids])

    def layers(self) -> Iterator[tuple[int, DecoderLayer]]:
        """Yield (index, layer) for each layer with its weights loaded; they are freed when the iterator advances.

        Raises:
            HFEError: a weight holds NaN or infinity, or its file is truncated.
        """
        for index, layer in enumerate(self.model.layers):
            self._materialise(layer, f"model.layers.{index}.")
            yield index, layer
            layer.to("meta")

    @torch.no_grad()
    def run_layer(self, index: int, layer: DecoderLayer, batch: BatchState) -> None:
        """Apply layer `index` to a batch and write the result into `batch.hidden`, without gradients."""
        kind = self.config.layer_types[index]
        sequences, length, _ = batch.hidden.shape
        step = max(MICRO_BATCH_TOKENS // length, 1)
        for start in range(0, sequences, step):
            part = slice(start, start + step)
            hidden = batch.hidden[part]
            masks, position_embeddings, position_ids = self._positions(hidden)
            batch.hidden[part] = layer(
                hidden,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=False,
                token_ids=batch.local_ids[part],
            )

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Apply every layer to every batch; after each layer `progress(layers done, number of layers)` is called.

        Errors as for `layers`.
        """
        for index, layer in self.layers():
            for batch in self.batches:
                self.run_layer(index, layer, batch)
            if progress:
                progress(index + 1, self.config.num_hidden_layers)

    @torch.no_grad()
    def logits(self, *batches: BatchState) -> Iterator[Iterator[Tensor]]:
        """For each batch that has passed the last layer, an iterator over its logits in chunks [LOGIT_POSITIONS, V].

        The chunks are those of `measuring.evaluation.LogitSource`: each sequence in turn, whose last chunk may be
        shorter. Reads the final norm and the head, in fp32.

        Raises:
            HFEError: a weight holds NaN or infinity, or its file cannot be read or is truncated.
        """
        self._materialise(self.model.norm, "model.norm.")
        name = EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"
        head = self.reader.read(name).to(self.device, torch.float32)
        for batch in batches:
            yield (
                nn.functional.linear(add_and_norm(self.model.norm, chunk)[0], head)
                for sequence in batch.hidden
                for chunk in sequence.split(LOGIT_POSITIONS)
            )

    def _positions(self, hidden: Tensor) -> tuple[dict, tuple[Tensor, Tensor], Tensor]:
        """Masks by layer type, (cos, sin) [1, S, head_dim] and position ids [1, S] for hidden states [B, S, D].

        Computed once for each shape [B, S].
        """
        shape = hidden.shape[0], hidden.shape[1]
        if shape not in self._shapes:
            position_ids = torch.arange(shape[1], device=self.device).unsqueeze(0)
            masks = self.model.build_masks(
                inputs_embeds=hidden, attention_mask=None, position_ids=position_ids, **cache_argument(None)
            )
            self._shapes[shape] = masks, self.model.rotary_emb(hidden, position_ids), position_ids
        return self._shapes[shape]

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        """Load every parameter and buffer of `module`, in fp32, from the tensors `prefix + name`.

        Tensors with a row for each token get the rows of `vocabulary` only. Errors as for `layers`.
        """
        parameters = {name for name, _ in module.named_parameters()}
        for name in module.state_dict():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if any(part in name for part in token_tables()):
                tensor = read_token_rows(self.reader, prefix + name, self.vocabulary)
            else:
                tensor = self.reader.read(prefix + name)
            tensor = tensor.to(self.device, torch.float32)
            if name in parameters:
                owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(leaf, tensor)


def _check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raise `TokenIdError` unless all ids are in 0..`vocab_size` - 1."""
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if bad.numel():
        raise TokenIdError(
            f"the text holds token id {int(bad[-1])}, the model's vocabulary is 0..{vocab_size - 1}",
            "use the tokenizer that belongs to this checkpoint",
        )
