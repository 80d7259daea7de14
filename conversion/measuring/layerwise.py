"""A checkpoint run layer by layer: memory holds one layer's weights and the text's hidden states, not the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_efficient.conversion.reading.source import TensorReader
from hf_efficient.errors import TokenIdError
from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.modeling_decoder import DecoderLayer
from hf_efficient.modeling.decoder.rms_norm import add_and_norm
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderModel
from hf_efficient.modeling.stem.modeling_stem import StemTable

EMBEDDING = "model.embed_tokens.weight"
MICRO_BATCH_TOKENS = 2048
LOGIT_POSITIONS = 256


def read_token_rows(reader: TensorReader, name: str, ids: Tensor) -> Tensor:
    """Rows `ids` (sorted, unique) of a tensor [V, W] -> [len(ids), W]; consecutive ids are read in one piece."""
    if ids.numel() == 0:
        return torch.empty(0, reader.shape(name)[1], dtype=reader.dtype(name))
    ids = ids.cpu()
    breaks = (ids.diff() != 1).nonzero().flatten() + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in torch.tensor_split(ids, breaks)]
    return torch.cat([reader.read_rows(name, start, stop) for start, stop in runs])


@dataclass
class Stream:
    """One batch on its way through the layers.

    Attributes:
        ids: token ids [B, S], int64.
        slots: the same tokens as positions in the pass's `vocabulary` [B, S].
        hidden: hidden states after the layers run so far [B, S, hidden_size], fp32.
    """

    ids: Tensor
    slots: Tensor
    hidden: Tensor

    def fork(self) -> Stream:
        """A stream of its own that goes on from here."""
        return Stream(self.ids, self.slots, self.hidden.clone())


class LayerwisePass:
    """One traversal of a checkpoint by several batches of text, in fp32.

    Tables indexed by the token are read at the rows of the batches' tokens only, so inside a pass a token is known by
    its position in `vocabulary`, not by its id.

    Args:
        config: the checkpoint's configuration.
        reader: the checkpoint's tensors.
        batches: token ids [B, S], all sequences of a batch equally long and without padding.
        device: where the layers run.

    Attributes:
        vocabulary: the ids that occur in the batches, sorted [R].
        embeddings: their rows of the embedding [R, hidden_size].
        streams: one for each batch, at the embedding's output.

    Raises:
        TokenIdError: an id lies outside the vocabulary.
    """

    def __init__(
        self,
        config: EfficientDecoderConfig,
        reader: TensorReader,
        batches: Sequence[Tensor],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = copy.deepcopy(config)  # building a model writes its choice of attention into the configuration
        self.reader = reader
        self.device = torch.device(device)
        with torch.device("meta"):
            self.model = EfficientDecoderModel(self.config).eval()
        # Its buffers are computed, not stored, so it is built once more with data.
        self.model.rotary_emb = type(self.model.rotary_emb)(self.config).to(self.device)

        self.vocabulary = torch.unique(torch.cat([ids.flatten() for ids in batches]))
        _check_vocabulary(self.vocabulary, config.vocab_size)
        self.embeddings = read_token_rows(reader, EMBEDDING, self.vocabulary).to(self.device, torch.float32)
        self.streams = [self._embed(ids) for ids in batches]
        self._shapes: dict[tuple[int, int], tuple[dict, tuple[Tensor, Tensor], Tensor]] = {}

    def _embed(self, ids: Tensor) -> Stream:
        slots = torch.searchsorted(self.vocabulary, ids.contiguous()).to(self.device)
        return Stream(ids, slots, self.embeddings[slots])

    def layers(self) -> Iterator[tuple[int, DecoderLayer]]:
        """Each layer in turn, with its weights; they are freed when the next one is asked for."""
        for index, layer in enumerate(self.model.layers):
            self._materialise(layer, f"model.layers.{index}.")
            yield index, layer
            layer.to("meta")

    @torch.no_grad()
    def push(self, index: int, layer: DecoderLayer, stream: Stream) -> None:
        """Move a stream through the layer."""
        kind = self.config.layer_types[index]
        sequences, length, _ = stream.hidden.shape
        step = max(MICRO_BATCH_TOKENS // length, 1)
        for start in range(0, sequences, step):
            part = slice(start, start + step)
            hidden = stream.hidden[part]
            masks, position_embeddings, position_ids = self._positions(hidden)
            stream.hidden[part] = layer(
                hidden,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=False,
                token_ids=stream.slots[part],
            )

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Move every stream through every layer; `progress` is told (layers done, layers in all)."""
        for index, layer in self.layers():
            for stream in self.streams:
                self.push(index, layer, stream)
            if progress:
                progress(index + 1, self.config.num_hidden_layers)

    @torch.no_grad()
    def logits(self, *streams: Stream) -> Iterator[Iterator[Tensor]]:
        """For each stream that has passed the last layer, its logits in pieces: see `LogitSource`."""
        self._materialise(self.model.norm, "model.norm.")
        name = EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"
        head = self.reader.read(name).to(self.device, torch.float32)
        for stream in streams:
            yield (
                nn.functional.linear(add_and_norm(self.model.norm, piece)[0], head)
                for sequence in stream.hidden
                for piece in sequence.split(LOGIT_POSITIONS)
            )

    def _positions(self, hidden: Tensor) -> tuple[dict, tuple[Tensor, Tensor], Tensor]:
        """Masks by layer kind, rotary embedding and position ids for a micro-batch, computed once for each shape."""
        shape = hidden.shape[0], hidden.shape[1]
        if shape not in self._shapes:
            position_ids = torch.arange(shape[1], device=self.device).unsqueeze(0)
            masks = self.model.build_masks(
                inputs_embeds=hidden, attention_mask=None, position_ids=position_ids, **cache_argument(None)
            )
            self._shapes[shape] = masks, self.model.rotary_emb(hidden, position_ids), position_ids
        return self._shapes[shape]

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        parameters = {name for name, _ in module.named_parameters()}
        for name in module.state_dict():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if isinstance(owner, StemTable):
                tensor = read_token_rows(self.reader, prefix + name, self.vocabulary)
            else:
                tensor = self.reader.read(prefix + name)
            tensor = tensor.to(self.device, torch.float32)
            if name in parameters:
                owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(leaf, tensor)


def _check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if bad.numel():
        raise TokenIdError(
            f"the text holds token id {int(bad[-1])}, the model's vocabulary is 0..{vocab_size - 1}",
            "use the tokenizer that belongs to this checkpoint",
        )
