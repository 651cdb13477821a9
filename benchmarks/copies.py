"""The CPU copy engine, alone: pool pages to slots and back, with and without checksums."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import numpy as np

from benchmarks.lines import Line, alternate, rate_line
from benchmarks.llama import BLOCK_BYTES, BLOCK_TOKENS, contiguous_pool, scattered_pool
from benchmarks.memory import Bytes, CopyLimits, faulted
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult, Direction
from kvtier.gpu.pool import Binding, Pool

_BATCH_BLOCKS = 8
_ROUNDS = 5


class _Arena:
    """Slots side by side in one array."""

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        return self._memory[address[1] : address[1] + nbytes]

    def generation(self, slot_id: int) -> int:
        return 1


def copies(nbytes: int) -> Iterator[Line]:
    """Gather and scatter of `nbytes` of Llama-3-8B KV, scattered 16-token pages and contiguous blocks."""
    blocks = nbytes // BLOCK_BYTES
    # The limits copy to memory of their own: what lies in the slots must stay what was gathered.
    memory, arena, aside = (faulted(blocks * BLOCK_BYTES) for _ in range(3))
    memory.view(np.uint64)[:] = np.random.default_rng(1).integers(0, 1 << 63, memory.nbytes // 8, np.uint64)
    limits = CopyLimits(memory, aside)
    engine = CpuCopyEngine(_Arena(arena))
    try:
        for name, pool, pages in (
            ("scattered 16-token pages", *scattered_pool(memory, blocks)),
            ("contiguous 256-token blocks", *contiguous_pool(memory, blocks)),
        ):
            yield from _measure(name, pool, pages, blocks, engine, limits)
    finally:
        engine.close()
        limits.close()


def _measure(
    name: str, pool: Pool, pages: list[int], blocks: int, engine: CpuCopyEngine, limits: CopyLimits
) -> Iterator[Line]:
    binding = pool.bind(pages, tokens=blocks * BLOCK_TOKENS)
    sums = _run(engine, binding, blocks, "gather", True, [None] * blocks)
    for direction in ("gather", "scatter"):
        for verify in (False, True):
            way: Direction = "gather" if direction == "gather" else "scatter"
            held_against = limits.copies_and_hashes() if verify else limits.copies()
            took = alternate(
                held_against, lambda w=way, v=verify: _run(engine, binding, blocks, w, v, sums), _ROUNDS
            )
            label = "with checksum" if verify else "without checksum"
            limit = "best copy and hash" if verify else "best copy"
            yield rate_line(
                f"engine {direction}, {name}, {label}", blocks * BLOCK_BYTES, *took, limit_is=limit
            )


def _run(
    engine: CpuCopyEngine,
    binding: Binding,
    blocks: int,
    direction: Direction,
    verify: bool,
    sums: list[int | None],
) -> list[int | None]:
    """Copy all blocks in batches; answers their checksums."""
    done: queue.SimpleQueue[CopyResult] = queue.SimpleQueue()
    firsts = range(0, blocks, _BATCH_BLOCKS)
    for first in firsts:
        items = tuple(_item(block, sums[block]) for block in range(first, min(first + _BATCH_BLOCKS, blocks)))
        engine.submit(CopyBatch("bench", first, direction, binding, items, verify), done.put)
    results = sorted((done.get() for _ in firsts), key=lambda r: r.batch)
    assert all(result.ok for result in results), "a benchmark's copy failed"
    return [checksum for result in results for checksum in result.checksums]


def _item(block: int, checksum: int | None) -> CopyItem:
    return CopyItem(
        group=0,
        start=block * BLOCK_TOKENS,
        tokens=BLOCK_TOKENS,
        first_valid=0,
        slot_id=block,
        generation=1,
        address=(0, block * BLOCK_BYTES),
        nbytes=BLOCK_BYTES,
        checksum=checksum,
    )
