"""A store under measurement, and the objects that are put into it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from kvtier.bench.memory import Bytes
from kvtier.checksum import checksum
from kvtier.disk.tier import DiskTier
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.tier import Slot
from kvtier.waiting import wait_until

MiB = 1 << 20
SEGMENT_BYTES = 256 * MiB
AHEAD_BYTES = 1024 * MiB
READY_S = 60.0
ROOT = Root(b"r" * 32, "bench", b"f" * 32, "exact", 256)
SHARD = "L0+32.H0+8"


def key_of(number: int) -> bytes:
    """The name of a block."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def meta_of(number: int, nbytes: int, place: int = 0, checksum: int | None = None) -> ObjectMeta:
    """Block `place` of a conversation."""
    object_id = ObjectId(key_of(number), 0, SHARD)
    return ObjectMeta(object_id, ROOT, key_of(number + 1), place * 256, 256, 0, nbytes, checksum)


@contextmanager
def opened(folder: Path, capacity_bytes: int) -> Iterator[DiskTier]:
    """A store in a folder of its own as a daemon has it, once its first segments are made."""
    tier = DiskTier(folder, capacity_bytes, segment_bytes=SEGMENT_BYTES)
    try:
        tier.make_room_ahead()
        ready_bytes = min(capacity_bytes, AHEAD_BYTES + SEGMENT_BYTES)
        if not wait_until(lambda: tier.stats().segment_bytes >= ready_bytes, READY_S):
            raise TimeoutError(f"{folder} has no room ready")
        yield tier
    finally:
        tier.close()


def blocks_of(memory: Bytes, block_bytes: int) -> list[Bytes]:
    """The memory in blocks."""
    return [memory[at : at + block_bytes] for at in range(0, memory.nbytes, block_bytes)]


def park(tier: DiskTier, numbers: Sequence[int], blocks: Sequence[Bytes], sums: Sequence[int]) -> None:
    """What the disk service does with a park: reserve, write, commit with one flush."""
    given = enumerate(zip(numbers, blocks, sums, strict=True))
    metas = [meta_of(number, block.nbytes, place, said) for place, (number, block, said) in given]
    slots = [tier.reserve(meta, holder="park") for meta in metas]
    wait(tier.write_many(list(zip(slots, blocks, strict=True))))
    tier.commit(list(zip(slots, sums, strict=True)))


def restore(tier: DiskTier, numbers: Sequence[int], blocks: Sequence[Bytes]) -> None:
    """What it does with a restore; each block is checked."""
    wait(tier.read_many([(found(tier, n), block) for n, block in zip(numbers, blocks, strict=True)]))


def found(tier: DiskTier, number: int) -> Slot:
    """Raises LookupError for a block that is not there."""
    slot = tier.find(ObjectId(key_of(number), 0, SHARD))
    if slot is None:
        raise LookupError(f"block {number} is not in the store")
    return slot


def sums_of(blocks: Sequence[Bytes]) -> list[int]:
    """A park brings them along: they are made while the blocks are gathered."""
    return [checksum(block) for block in blocks]


def wait(futures: Sequence[Future[None]]) -> None:
    """Until all are done; raises what one of them did."""
    for future in futures:
        future.result()
