"""Sizes of the random models of the tests, as fields of a configuration."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Wide enough for several programs of a kernel.
SMALL: dict[str, Any] = TINY | {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
