"""Make directories of the disk tier to try `kvtier fsck` on: a healthy, a corrupted and a half-recovered one.

    python examples/fsck_directories.py /tmp/fsck
    cd /tmp/fsck
    kvtier fsck healthy
    kvtier fsck corrupted
    kvtier fsck half-recovered --repair

docs/disk.md shows what comes out.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from kvtier.checksum import checksum
from kvtier.disk.fsck import REBUILT
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.index import ConversationRecord, Index
from kvtier.disk.segments import path_of
from kvtier.disk.store import INDEX, SEGMENTS
from kvtier.disk.tier import DiskTier
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.records import frame
from kvtier.tier import Slot

CONVERSATIONS, BLOCKS, NBYTES = 4, 12, 200_000
SEGMENT_BYTES = 8 << 20
TENANT = "acme"
ROOT = Root(hashlib.sha256(b"root").digest(), TENANT, bytes(32), "exact", 256)


def park(tier: DiskTier, conversation: int) -> list[Slot]:
    """Write the blocks of a conversation and its record with one commit."""
    parent, slots = ROOT.key, []
    for n in range(BLOCKS):
        key = hashlib.sha256(parent + bytes([conversation, n])).digest()
        payload = hashlib.shake_256(key).digest(NBYTES)
        meta = ObjectMeta(ObjectId(key, 0, "L0+32.H0+8"), ROOT, parent, n * 256, 256, 0, NBYTES)
        slot = tier.reserve(meta, holder="example")
        tier.write(slot, payload)
        slots.append((slot, checksum(payload)))
        parent = key
    name = f"chat-{conversation}"
    record = ConversationRecord(TENANT, name, 1, frame(TENANT, name, 1, b"its blocks"))
    tier.commit_with_records(slots, [record])
    return [slot for slot, _ in slots]


def make(directory: Path) -> list[Slot]:
    """A healthy store, in which one more conversation was forgotten; answers where the blocks are."""
    tier = DiskTier(directory, 4 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)
    try:
        slots = [slot for n in range(CONVERSATIONS) for slot in park(tier, n)]
        known = {meta.object_id for meta in tier.objects()}
        park(tier, CONVERSATIONS)
        for meta in list(tier.objects()):
            if meta.object_id not in known:
                tier.remove(meta.object_id)
        gone = ConversationRecord(TENANT, f"chat-{CONVERSATIONS}", 2, b"")
        tier.commit_with_records((), [gone], forget=True)
    finally:
        tier.close()
    return slots


def flip_a_bit(directory: Path, slot: Slot, offset: int) -> None:
    """As a drive does that lies: `offset` counts from the block's header."""
    segment, at = slot.address
    with open(path_of(str(directory / SEGMENTS), segment), "r+b") as file:
        file.seek(at + offset)
        byte = file.read(1)[0]
        file.seek(at + offset)
        file.write(bytes([byte ^ 1]))


def make_three(folder: Path) -> None:
    """The three directories in a folder."""
    make(folder / "healthy")
    slots = make(folder / "corrupted")
    flip_a_bit(folder / "corrupted", slots[3], 100)
    flip_a_bit(folder / "corrupted", slots[17], HEADER_BYTES + 5000)
    flip_a_bit(folder / "corrupted", slots[40], HEADER_BYTES + NBYTES - 1)
    make(folder / "half-recovered")
    # The index was lost, and the repair that made another one was killed.
    (folder / "half-recovered" / INDEX).unlink()
    Index(folder / "half-recovered" / REBUILT).close()


if __name__ == "__main__":
    make_three(Path(sys.argv[1]))
