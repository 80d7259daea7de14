"""The attention implementation ``monarch``: Monarch attention in encoders, whose self-attention is bidirectional.

Registered with transformers when this file is imported, so stock models take it too:

    model = AutoModel.from_pretrained("google-bert/bert-base-uncased", attn_implementation="monarch")

The settings are those of `enable_monarch`, or of the configuration's field `monarch`, or the default of
`default_spec.py`. In each layer:

- A row of a batch is the sequence of its valid tokens, wherever its padding is. A row with fewer valid tokens than
  `min_length` uses softmax attention. So the output of a row does not depend on the other rows. In eager mode the mask
  says which of this is needed; in a compiled or captured graph with a mask, every layer moves the tokens and computes
  the softmax attention of the first `min_length` tokens too.
- Layers with a sliding window, and the decoder of an encoder-decoder model, use ``sdpa`` of transformers; so do layers
  without settings, and those whose `efficient` is False.
- What Monarch attention does not have raises an error: causal attention, a bias or another mask than one of tokens,
  dropout, attention weights as output.

Letters of the shapes: B rows, N tokens, H heads, D `head_dim`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from hf_efficient.errors import HFEError
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.namespace import NS
from hf_efficient.logging import warn_once
from hf_efficient.modeling.monarch.default_spec import config_spec
from hf_efficient.modeling.monarch.monarch_mask import (
    PackedMask,
    is_packed,
    keep_of_prepared_mask,
    pack_mask,
    pack_softmax_mask,
    unpack_mask,
    valid_places,
)
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec

# An exported copy registers under a name of its own, so that two versions never replace each other.
MONARCH = "monarch" if NS == "hf_efficient" else f"{NS}_monarch"
# Arguments of attention functions that Monarch attention does not have.
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k")
_OTHER_ATTENTION = "use attn_implementation='sdpa' or 'eager' for this model"


def monarch_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function ``monarch``, see above. Under autocast the inputs are cast to its dtype.

    Args:
        module: the attention module; read are `is_causal`, `config`, and the attributes that `enable_monarch` sets.
        query: [B, H, N, D].
        key, value: [B, H, N, D], or fewer heads that groups of query heads share.
        attention_mask: what `monarch_mask` returned; or a mask of rank 4 that is the same for every query.
        dropout: must be 0, as in evaluation, where the layer uses Monarch attention.
        scaling: factor of the scores; ``D ** -0.5`` by default.
        **kwargs: arguments that transformers passes to every attention function.

    Returns:
        Output [B, N, H, D], and None in place of the attention weights. The output of a masked token has no meaning;
        it is finite.

    Raises:
        HFEError: what Monarch attention does not have was asked for, as above; the message names it.
    """
    spec = _spec_of_layer(module, kwargs)
    if spec is None:
        return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    _check(module, query, key, dropout, kwargs)
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))

    if attention_mask is not None and not is_packed(attention_mask):
        attention_mask = pack_mask(keep_of_prepared_mask(attention_mask, type(module).__name__), spec)
    mask = None if attention_mask is None else unpack_mask(attention_mask)
    if query.shape[2] < spec.least_tokens or (mask is not None and mask.softmax):
        output = _softmax(query, key, value, None if mask is None else mask.keep, scaling)
    else:
        output = _monarch(query, key, value, mask, scaling, spec)
    return output.transpose(1, 2).contiguous(), None


def _monarch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask | None,
    scaling: float | None,
    spec: MonarchSpec,
) -> Tensor:
    """Return the output [B, H, N, D]; rows with fewer than `spec.least_tokens` valid tokens get softmax attention."""
    tokens = query.shape[2]
    keep = None if mask is None else mask.keep
    if mask is not None and mask.order is not None:
        query, key, value = (_rearrange(x, mask.order) for x in (query, key, value))
        keep = valid_places(mask.length, tokens, spec.pad)
    output = monarch_attention(query, key, value, spec.layout, num_iters=spec.num_iters, scale=scaling, key_mask=keep)
    # A row of at most one block needs no replacement, because Monarch attention within a block is softmax attention.
    if mask is not None and mask.length is not None and spec.least_tokens > spec.block_size:
        # The valid tokens of a short row are all among the first of the row, or the last if the padding is in front.
        most = spec.least_tokens - 1
        part = slice(tokens - most, tokens) if spec.pad == "pre" else slice(0, most)
        short = _softmax(query[:, :, part], key[:, :, part], value[:, :, part], keep[:, part], scaling)
        is_short = (mask.length < spec.least_tokens)[:, None, None, None]
        chosen = torch.where(is_short, short, output[:, :, part])
        rest = output[:, :, : tokens - most] if spec.pad == "pre" else output[:, :, most:]
        output = torch.cat((rest, chosen) if spec.pad == "pre" else (chosen, rest), 2)
    if mask is not None and mask.place is not None:
        output = _rearrange(output, mask.place)
    return output


def _rearrange(x: Tensor, index: Tensor) -> Tensor:
    """Return `x`, [B, H, N, D], with token ``index[b, n]`` of its row b in place n; the memory is [B, N, H, D]."""
    batch, heads, tokens, head_dim = x.shape
    rows = torch.arange(batch, device=x.device, dtype=torch.int64)[:, None] * tokens + index
    flat = x.transpose(1, 2).reshape(batch * tokens, heads, head_dim).index_select(0, rows.flatten())
    return flat.view(batch, tokens, heads, head_dim).transpose(1, 2)


def _softmax(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scaling: float | None) -> Tensor:
    """Return softmax attention [B, H, N, D] to the tokens where `keep`, bool [B, N], is True; zero in rows without."""
    if keep is None:
        return scaled_dot_product_attention(query, key, value, scale=scaling)
    some = keep.any(1, keepdim=True)
    # A softmax over no key is NaN in some of PyTorch's kernels, so such a row attends to all of its tokens instead.
    mask = (keep | ~some)[:, None, None].expand(-1, 1, query.shape[2], -1)
    return scaled_dot_product_attention(query, key, value, mask, scale=scaling) * some[:, :, None, None]


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function ``sdpa`` of transformers, which gets a mask in its own form."""
    if is_packed(mask):
        mask = unpack_mask(mask).keep[:, None, None].expand(-1, 1, query.shape[2], -1)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _spec_of_layer(module: Any, kwargs: dict[str, Any]) -> MonarchSpec | None:
    """Return the settings of a layer; None if it uses softmax attention.

    Raises:
        HFEError: the attention is causal or has an argument that Monarch attention does not take; or there are no
            settings; or they are for some layers, and this layer has no number.
    """
    config, name = module.config, type(module).__name__
    if config.is_encoder_decoder and getattr(module, "is_decoder", False):
        _note(f"attn_implementation='monarch': the decoder ({name}) uses sdpa; its encoder uses Monarch attention")
        return None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", None) if causal is None else causal
    if causal is not False:
        what = "is causal" if causal else "does not say whether it is causal (is_causal)"
        raise _causal_error(f"{name} {what}")
    if kwargs.get("sliding_window") is not None or not getattr(module, "efficient", True):
        return None
    for argument in _UNSUPPORTED:
        if kwargs.get(argument) is not None:
            raise HFEError(f"{name} passes {argument}, which Monarch attention does not take", _OTHER_ATTENTION)
    if hasattr(module, "monarch"):
        return module.monarch
    spec = config_spec(config)
    if spec.layers is None:
        return spec
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise HFEError(
            f"monarch.layers={list(spec.layers)} names layers, and {name} does not know its number",
            "call enable_monarch(model) after loading",
        )
    return spec if spec.runs_in(layer) else None


def _causal_error(problem: str) -> HFEError:
    """Return the error (it is not raised here) for causal attention."""
    return HFEError(
        f"attn_implementation='monarch' supports bidirectional self-attention only, and {problem}",
        "use it in an encoder (BERT, ViT, the encoder of BART); in a model of several parts name the part, for example "
        "attn_implementation={'vision_config': 'monarch'}",
    )


def _check(module: nn.Module, query: Tensor, key: Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise `HFEError` for arguments that Monarch attention does not have."""
    name = type(module).__name__
    if kwargs.get("output_attentions"):
        raise HFEError(
            "output_attentions=True, and Monarch attention computes no matrix of attention weights",
            "load the model with attn_implementation='eager'",
        )
    if dropout:
        raise HFEError(
            f"{name} has attention dropout {dropout} in training, and Monarch attention has none",
            "set the dropout of attention weights to 0 in the configuration, as attention_probs_dropout_prob=0.0",
        )
    if query.shape[2] != key.shape[2]:
        raise HFEError(
            f"{name} has {query.shape[2]} queries and {key.shape[2]} keys, and Monarch attention is self-attention, "
            "with as many of both",
            _OTHER_ATTENTION,
        )


def _note(message: str) -> None:
    """Log a warning once; nothing while a graph is traced."""
    if not torch.compiler.is_compiling():
        warn_once(message)


def monarch_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function ``monarch``: the masks of `monarch_mask.py`, and those of ``sdpa`` where that is the attention.

    Arguments as for `sdpa_mask` of transformers.

    Raises:
        HFEError: the mask is causal and the model no encoder-decoder, or `attention_mask` is not of rank 2.
    """
    if mask_function is causal_mask_function and config is not None and not config.is_encoder_decoder:
        raise _causal_error(f"{type(config).__name__} asks for a causal mask")
    if mask_function is not bidirectional_mask_function or not allow_is_bidirectional_skip or config is None:
        # A window, a causal decoder, or a mask that the model goes on with itself: the layers check what they get.
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise HFEError(
            f"attention_mask has shape {list(attention_mask.shape)}; Monarch attention takes [batch, tokens]",
            "pass 1 for tokens and 0 for padding, or use attn_implementation='sdpa'",
        )
    keep = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
    if q_length != kv_length:
        return pack_softmax_mask(keep)  # of cross-attention, which uses softmax attention
    return pack_mask(keep, config_spec(config))


AttentionInterface.register(MONARCH, monarch_attention_forward)
AttentionMaskInterface.register(MONARCH, monarch_mask)
