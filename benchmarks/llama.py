"""Pools with the geometry of Llama-3-8B in bf16: 32 layers, 8 KV heads of 128, 128 KiB a token."""

from __future__ import annotations

import numpy as np

from benchmarks.memory import Bytes
from kvtier.gpu.describe import cross_layer, paged
from kvtier.gpu.pool import Pool

LAYERS, HEADS, DIM, ITEM = 32, 8, 128, 2
BLOCK_TOKENS, PAGE_TOKENS = 256, 16
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * ITEM
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


def scattered_pool(memory: Bytes, blocks: int, seed: int = 2) -> tuple[Pool, list[int]]:
    """K and V tensors for each layer, 16-token pages of 32 KiB, and a random order of all pages."""
    pages = blocks * (BLOCK_TOKENS // PAGE_TOKENS)
    tensors = memory.view(np.uint16).reshape(LAYERS, 2, pages, PAGE_TOKENS, HEADS, DIM)
    layers = [(layer[0], layer[1]) for layer in tensors]
    layout = paged(layers, "page token head dim", block_tokens=BLOCK_TOKENS)
    order = np.random.default_rng(seed).permutation(pages).tolist()
    return Pool(layout, [tensor for pair in layers for tensor in pair]), order


def contiguous_pool(memory: Bytes, blocks: int) -> tuple[Pool, list[int]]:
    """All layers of a 256-token page side by side: one piece of 32 MiB for each block, in order."""
    storage = memory.view(np.uint16).reshape(blocks, LAYERS, 2, BLOCK_TOKENS, HEADS, DIM)
    layout = cross_layer(storage, "page layer kv token head dim", block_tokens=BLOCK_TOKENS)
    return Pool(layout, [storage]), list(range(blocks))
