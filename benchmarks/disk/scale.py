"""A store of a million blocks: how long it takes to open, what it needs, and how quickly it looks one up."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvtier.bench.lines import Line, micros_line, seconds
from kvtier.bench.store import SHARD, key_of, meta_of
from kvtier.disk.index import Batch, Index
from kvtier.disk.keys import EPOCH_SHIFT
from kvtier.disk.rows import ObjectRow
from kvtier.disk.segments import path_of
from kvtier.disk.store import INDEX, SEGMENTS
from kvtier.disk.tier import DiskTier
from kvtier.objects import ObjectId

MiB = 1 << 20
BLOCK_BYTES = 4096
ROOM = 2 * BLOCK_BYTES
SEGMENT_BYTES = 256 * MiB
_AT_ONCE = 20_000
_LOOKUPS = 20_000
# What the first opening of a store gives to its writes.
_FIRST = (1 << EPOCH_SHIFT) + 2


def scale(folder: Path, blocks: int) -> Iterator[Line]:
    """An index of so many blocks. Their segments are holes: to open a store reads nothing of them."""
    store = folder / "scale"
    in_segment = SEGMENT_BYTES // ROOM
    segments = -(-blocks // in_segment)
    DiskTier(store, segments * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES).close()
    index = Index(store / INDEX)
    try:
        _make_segments(store, index, segments)
        for first in range(0, blocks, _AT_ONCE):
            index.apply(Batch(add=_rows(range(first, min(first + _AT_ONCE, blocks)), in_segment)))
    finally:
        index.close()
    yield from _measure(store, blocks, segments * SEGMENT_BYTES)


def _measure(store: Path, blocks: int, capacity_bytes: int) -> Iterator[Line]:
    gc.collect()
    before = _resident_bytes()
    tiers: list[DiskTier] = []
    took_s = seconds(lambda: tiers.append(DiskTier(store, capacity_bytes, segment_bytes=SEGMENT_BYTES)))
    tier = tiers.pop()
    try:
        held = _resident_bytes() - before
        assert tier.usage().objects == blocks, "not all of the index was taken over"
        yield Line("open an index", round(took_s, 2), "s", detail={"blocks": blocks})
        yield Line("memory of an index", round(held / blocks), "bytes/block", detail={"blocks": blocks})
        yield micros_line("look up a block", _lookups(tier, blocks), blocks=blocks)
    finally:
        tier.close()


def _make_segments(store: Path, index: Index, count: int) -> None:
    for number in range(count):
        with open(path_of(str(store / SEGMENTS), number), "wb") as file:
            file.truncate(SEGMENT_BYTES)
    index.apply(Batch(add_segments=[(number, SEGMENT_BYTES) for number in range(count)]))


def _rows(numbers: Sequence[int], in_segment: int) -> list[ObjectRow]:
    rows = []
    for number in numbers:
        segment, place = divmod(number, in_segment)
        meta = meta_of(number, BLOCK_BYTES, checksum=number)
        rows.append(ObjectRow(meta, _FIRST + number, segment, place * ROOM, BLOCK_BYTES, "raw"))
    return rows


def _lookups(tier: DiskTier, blocks: int) -> list[float]:
    draw = random.Random(1)
    took = []
    for object_id in [ObjectId(key_of(draw.randrange(blocks)), 0, SHARD) for _ in range(_LOOKUPS)]:
        begun = time.perf_counter()
        slot = tier.find(object_id)
        took.append(time.perf_counter() - begun)
        assert slot is not None
    return took


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
