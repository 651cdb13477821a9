"""The CPU copy engine, alone: pool pages to slots and back, with and without checksums."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from kvtier.bench.lines import Line, alternate, rate_line
from kvtier.bench.llama import BLOCK_BYTES, BLOCK_TOKENS, contiguous_pool, scattered_pool
from kvtier.bench.memory import CopyLimits, faulted
from kvtier.errors import TierUnavailable
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.cuda.measure import ScratchSlots
from kvtier.gpu.engine import CopyBatch, CopyEngine, CopyItem, CopyResult, Direction
from kvtier.gpu.pool import Binding, Pool

_BATCH_BLOCKS = 8
WAIT_S = 60.0
ROUNDS = 5


# Each takes memory and a number of blocks.
SCATTERED = "scattered 16-token pages"
POOLS = {SCATTERED: scattered_pool, "contiguous 256-token blocks": contiguous_pool}


def copies(nbytes: int, rounds: int = ROUNDS, pools: Sequence[str] = tuple(POOLS)) -> Iterator[Line]:
    """Gather and scatter of `nbytes` of Llama-3-8B KV, in pools of these kinds. Takes three times as much."""
    blocks = nbytes // BLOCK_BYTES
    # The limits copy to memory of their own: what lies in the slots must stay what was gathered.
    memory, arena, aside = (faulted(blocks * BLOCK_BYTES) for _ in range(3))
    memory.view(np.uint64)[:] = np.random.default_rng(1).integers(0, 1 << 63, memory.nbytes // 8, np.uint64)
    limits = CopyLimits(memory, aside)
    engine = CpuCopyEngine(ScratchSlots(arena))
    try:
        for name in pools:
            yield from _measure(name, POOLS[name](memory, blocks), blocks, engine, limits, rounds)
    finally:
        engine.close()
        limits.close()


def _measure(
    name: str,
    pool: tuple[Pool, list[int]],
    blocks: int,
    engine: CpuCopyEngine,
    limits: CopyLimits,
    rounds: int,
) -> Iterator[Line]:
    binding = pool[0].bind(pool[1], tokens=blocks * BLOCK_TOKENS)
    sums = run(engine, binding, blocks, "gather", True, [None] * blocks)
    for direction in ("gather", "scatter"):
        for verify in (False, True):
            way: Direction = "gather" if direction == "gather" else "scatter"
            held_against = limits.copies_and_hashes() if verify else limits.copies()
            work = partial(run, engine, binding, blocks, way, verify, sums)
            took = alternate(held_against, work, rounds)
            label = "with checksum" if verify else "without checksum"
            limit = "best copy and hash" if verify else "best copy"
            yield rate_line(
                f"engine {direction}, {name}, {label}", blocks * BLOCK_BYTES, *took, limit_is=limit
            )


def run(
    engine: CopyEngine,
    binding: Binding,
    blocks: int,
    direction: Direction,
    verify: bool,
    sums: list[int | None],
) -> list[int | None]:
    """Copy all blocks in batches; answers their checksums. Raises TierUnavailable."""
    done: queue.SimpleQueue[CopyResult] = queue.SimpleQueue()
    firsts = range(0, blocks, _BATCH_BLOCKS)
    for first in firsts:
        items = tuple(_item(block, sums[block]) for block in range(first, min(first + _BATCH_BLOCKS, blocks)))
        engine.submit(CopyBatch("bench", first, direction, binding, items, verify), done.put)
    try:
        results = sorted((done.get(timeout=WAIT_S) for _ in firsts), key=lambda r: r.batch)
    except queue.Empty:
        raise TierUnavailable(f"copies took longer than {WAIT_S:g} s") from None
    failed = [result.failed[0][1] for result in results if result.failed]
    if failed:
        raise TierUnavailable(f"a copy failed: {failed[0]}")
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
