"""Models by name, for scenarios without a config.json at hand: the sizes that their publishers give."""

from __future__ import annotations

from typing import Any, Final


def _llama(hidden: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": mlp,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    }


MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama-3.1-8b": _llama(4096, 32, 32, 14336),
    "llama-3.1-70b": _llama(8192, 80, 64, 28672),
}
