"""Many small conversations: how many parks a second, when each is durable before it is answered."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from kvtier.bench.lines import Line, seconds
from kvtier.bench.memory import Bytes, faulted
from kvtier.bench.store import blocks_of, opened, park, sums_of
from kvtier.disk.tier import DiskTier

MiB = 1 << 20
BLOCKS = 4
BLOCK_BYTES = 64 << 10
# As many write jobs as the disk service runs at once.
JOBS = 16


def many(folder: Path, conversations: int, rounds: int) -> Iterator[Line]:
    """Parks of four blocks each: together, against one after the other with a flush each."""
    memory = faulted(BLOCKS * BLOCK_BYTES)
    blocks = blocks_of(memory, BLOCK_BYTES)
    sums = sums_of(blocks)
    alone, together, flushes = [], [], []
    for number in range(rounds):
        few = max(1, conversations // 10)
        with opened(folder / f"alone-{number}", 2048 * MiB) as tier:
            alone.append(few / seconds(partial(_one_by_one, tier, few, blocks, sums)))
        with opened(folder / f"many-{number}", 2048 * MiB) as tier:
            together.append(conversations / seconds(partial(_together, tier, conversations, blocks, sums)))
            flushes.append(tier.stats().flushes)
    yield Line(
        "durable parks of four blocks",
        round(statistics.median(together)),
        "parks/s",
        round(statistics.median(alone)),
        round(statistics.median(t / a for t, a in zip(together, alone, strict=True)), 2),
        {
            "conversations": conversations,
            "jobs": JOBS,
            "block_bytes": BLOCK_BYTES,
            "flushes": round(statistics.median(flushes)),
            "limit": "one after the other, a flush each",
        },
    )


def _park(tier: DiskTier, number: int, blocks: list[Bytes], sums: list[int]) -> None:
    park(tier, range(number * BLOCKS, (number + 1) * BLOCKS), blocks, sums)


def _one_by_one(tier: DiskTier, count: int, blocks: list[Bytes], sums: list[int]) -> None:
    for number in range(count):
        _park(tier, number, blocks, sums)


def _together(tier: DiskTier, count: int, blocks: list[Bytes], sums: list[int]) -> None:
    with ThreadPoolExecutor(JOBS) as pool:
        for _ in pool.map(lambda number: _park(tier, number, blocks, sums), range(count)):
            pass
