"""What a warm prefix hit gives: the reference for share="prefix". Knows nothing of kvtier.

An engine with a prefix cache keeps a block's KV from whoever computed it first, and gives it to everybody
whose tokens begin with the same ones.  This is that in the plainest form, for models with full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache


class WarmPrefixCache:
    """Blocks by all the tokens up to their end, each with the tensors of the first one who stored it."""

    def __init__(self, config: Any, block_tokens: int) -> None:
        self._config = config
        self._block_tokens = block_tokens
        self._blocks: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def store(self, tokens: Sequence[int], cache: DynamicCache) -> None:
        """Keep what is new of the cache's tokens, a shorter last block included."""
        for start, end in self._cuts(cache.get_seq_length()):
            name = tuple(tokens[:end])
            if name not in self._blocks:
                self._blocks[name] = [
                    (layer.keys[:, :, start:end].clone(), layer.values[:, :, start:end].clone())
                    for layer in cache.layers
                ]

    def front(self, tokens: Sequence[int], count: int) -> DynamicCache:
        """A cache of the first `count` tokens. Raises KeyError when they were not stored so."""
        cache = DynamicCache(config=self._config)
        blocks = [self._blocks[tuple(tokens[:end])] for _, end in self._cuts(count)]
        for index, layer in enumerate(cache.layers if blocks else ()):
            keys = torch.cat([block[index][0] for block in blocks], dim=2)
            values = torch.cat([block[index][1] for block in blocks], dim=2)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    def _cuts(self, count: int) -> list[tuple[int, int]]:
        """[start, end) of the blocks of `count` tokens."""
        size = self._block_tokens
        return [(start, min(start + size, count)) for start in range(0, count, size)]
