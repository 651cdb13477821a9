"""Writes objects until it is killed, and says on stdout what was promised. Run by the kill and power tests.

    disk_worker.py DIRECTORY FIRST_INDEX SEED [eager | sealed]

Lines: 'ready'; 'commit i j ...' when commit returned for these objects and record i; 'remove i' before an
object may be gone.  'eager' says so before the commit: the negative control.  'sealed' encodes and seals.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

from kvtier.checksum import checksum
from kvtier.disk.index import ConversationRecord
from kvtier.disk.tier import DiskTier
from kvtier.disk.vault import Vault
from kvtier.errors import TierFull
from kvtier.objects import ObjectMeta
from kvtier.testing.tier_kit import content, default_meta

CAPACITY_BYTES = 24 << 20
SEGMENT_BYTES = 8 << 20
FEW_VALUES = bytes(60 + (byte & 3) for byte in range(256))
LENGTHS = (1, 70_001, 262_144, 600_000)


def open_tier(directory: Path, *, sealed: bool = False) -> DiskTier:
    """The tier that worker and test share."""
    folder = directory.parent / "vault"
    return DiskTier(
        directory,
        CAPACITY_BYTES,
        segment_bytes=SEGMENT_BYTES,
        open_vault=(lambda store_id: Vault(folder, store_id, bytes(32))) if sealed else None,
    )


def payload_of(index: int, *, sealed: bool = False) -> bytes:
    """The bytes of object `index`; of the sealed ones every second byte takes few values."""
    data = bytearray(content(index, length_of(index)))
    if sealed:
        data[1::2] = data[1::2].translate(FEW_VALUES)
    return bytes(data)


def length_of(index: int) -> int:
    """Length of object `index`."""
    return LENGTHS[index % len(LENGTHS)]


def described(index: int) -> ObjectMeta:
    """Object `index`; its start says the index, so that a listing tells which objects are there."""
    return replace(default_meta(index, length_of(index)), start=index)


def say(*words: object) -> None:
    """One line, at once."""
    print(*words, flush=True)


def main() -> None:
    """Commit batches of one to four objects; remove old ones when the tier is full."""
    directory, index, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    eager = sys.argv[4:] == ["eager"]
    sealed = sys.argv[4:] == ["sealed"]
    tier = open_tier(directory, sealed=sealed)
    tier.make_room_ahead()
    stored = sorted(meta.start for meta in tier.objects())
    say("ready")
    while True:
        ready, ids = [], []
        for _ in range(draw.randint(1, 4)):
            index += 1
            data = payload_of(index, sealed=sealed)
            slot = None
            while slot is None:
                try:
                    slot = tier.reserve(described(index), holder="w")
                except TierFull:
                    oldest = stored.pop(0)
                    say("remove", oldest)
                    tier.remove(described(oldest).object_id)
            ready.append((slot, data))
            ids.append(index)
        for future in tier.write_many(ready, codec="planes-zstd" if sealed else "raw"):
            future.result()
        if eager:
            say("commit", *ids)
        tier.commit_with_records(
            [(slot, checksum(data)) for slot, data in ready],
            [ConversationRecord("t", str(ids[0]), 1, b"x")],
        )
        if not eager:
            say("commit", *ids)
        stored += ids


if __name__ == "__main__":
    main()
