"""Pools with the geometry of Llama-3-8B in bf16: 32 layers, 8 KV heads of 128, 128 KiB a token."""

from __future__ import annotations

import numpy as np

from kvtier.bench.memory import Bytes
from kvtier.gpu.describe import cross_layer, paged
from kvtier.gpu.pool import Pool
from kvtier.gpu.tensors import DeviceBytes, TensorSpec

LAYERS, HEADS, DIM, ITEM = 32, 8, 128, 2
BLOCK_TOKENS, PAGE_TOKENS = 256, 16
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * ITEM
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


def scattered_pool(memory: Bytes | DeviceBytes, blocks: int, seed: int = 2) -> tuple[Pool, list[int]]:
    """K and V tensors for each layer, 16-token pages of 32 KiB, and a random order of all pages."""
    pages = blocks * (BLOCK_TOKENS // PAGE_TOKENS)
    shape = (pages, PAGE_TOKENS, HEADS, DIM)
    strides = (PAGE_TOKENS * HEADS * DIM * ITEM, HEADS * DIM * ITEM, DIM * ITEM, ITEM)
    nbytes = pages * PAGE_TOKENS * HEADS * DIM * ITEM
    begin = memory.address if isinstance(memory, DeviceBytes) else int(memory.ctypes.data)
    offsets = range(0, 2 * LAYERS * nbytes, nbytes)
    specs = [TensorSpec(shape, strides, ITEM, "uint16", begin + offset) for offset in offsets]
    layers = list(zip(specs[::2], specs[1::2], strict=True))
    layout = paged(layers, "page token head dim", block_tokens=BLOCK_TOKENS)
    order = np.random.default_rng(seed).permutation(pages).tolist()
    return Pool(layout, [_part(memory, offset, nbytes) for offset in offsets]), order


def _part(memory: Bytes | DeviceBytes, offset: int, nbytes: int) -> Bytes | DeviceBytes:
    if isinstance(memory, DeviceBytes):
        return DeviceBytes(memory.address + offset, nbytes, memory.location, memory)
    return memory[offset : offset + nbytes]


def contiguous_pool(memory: Bytes, blocks: int) -> tuple[Pool, list[int]]:
    """All layers of a 256-token page side by side: one piece of 32 MiB for each block, in order."""
    storage = memory.view(np.uint16).reshape(blocks, LAYERS, 2, BLOCK_TOKENS, HEADS, DIM)
    layout = cross_layer(storage, "page layer kv token head dim", block_tokens=BLOCK_TOKENS)
    return Pool(layout, [storage]), list(range(blocks))
