"""A transformer so small that a test computes with it in milliseconds; the names are those of its config."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
# Of its layers, where some have a window.
PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]
