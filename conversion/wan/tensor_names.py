"""Names of the tensors of a Wan 2.1 text-to-video transformer in its two public layouts.

The layouts are that of the authors' code ("original"), whose names our model has, and that of diffusers'
`WanTransformer3DModel`. Both have the same tensors with the same values; only the names differ.
"""

from __future__ import annotations

import re

from hf_efficient.errors import HFEError

# Prefix of every name in files that hold a whole pipeline's transformer.
PREFIX = "model.diffusion_model."

# Name of a module or parameter in the original layout -> in diffusers'.
_MODEL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
# The same for what is below `blocks.N`.
_BLOCK = {
    "modulation": "scale_shift_table",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    # The norm before the cross-attention is the third one of the original and the second one of diffusers.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_NAME = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?P<part>.+?)(?P<leaf>\.(?:weight|bias))?")
# Parts of the names of tensors that only image-to-video models have, in either layout.
_IMAGE_PARTS = re.compile(
    r"\b(?:k_img|v_img|norm_k_img|img_emb|image_embedder|add_k_proj|add_v_proj|norm_added_[qk]|emb_pos)\b"
)


def diffusers_name(name: str) -> str:
    """Name in diffusers' layout of the tensor `name` of the original layout, such as `blocks.0.self_attn.q.weight`.

    Raises:
        KeyError: the original layout has no such tensor.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise KeyError(name)
    block, leaf = match["block"], match["leaf"] or ""
    return _MODEL[match["part"]] + leaf if block is None else f"blocks.{block}.{_BLOCK[match['part']]}{leaf}"


def stored_names(names: set[str], expected: set[str]) -> dict[str, str]:
    """Name in our model -> name in the checkpoint, of each tensor whose names differ.

    A checkpoint has the names of one layout, all of them with the prefix `model.diffusion_model.` or none.

    Args:
        names: names in the checkpoint.
        expected: names in our model.

    Raises:
        HFEError: the checkpoint has names of both layouts, or tensors of an image-to-video model.
    """
    check_no_image_tensors(names)
    prefix = PREFIX if names and all(name.startswith(PREFIX) for name in names) else ""
    bare = {name.removeprefix(prefix) for name in names}
    in_diffusers = {ours: diffusers_name(ours) for ours in expected}
    theirs = sorted(bare & set(in_diffusers.values()) - expected)
    original = sorted(bare & expected - set(in_diffusers.values()))
    if theirs and original:
        raise HFEError(
            f"the checkpoint has tensors by diffusers' names ({theirs[0]}, {len(theirs)} of them) and by the original "
            f"ones ({original[0]}, {len(original)} of them): it was renamed in part",
            "download or convert it again",
        )
    stored = in_diffusers if theirs else {ours: ours for ours in expected}
    return {ours: prefix + name for ours, name in stored.items() if prefix + name in names and prefix + name != ours}


def check_no_image_tensors(names: set[str]) -> None:
    """Raise `HFEError` if one of the tensors `names` is of an image-to-video model."""
    found = sorted(name for name in names if _IMAGE_PARTS.search(name))
    if found:
        raise HFEError(
            f"the checkpoint has tensor {found[0]} ({len(found)} such tensors), a part of image-to-video models; only "
            "text-to-video models can be converted",
            "use a text-to-video checkpoint",
        )
