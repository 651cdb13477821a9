"""Reads from disk: what comes is host memory's from then on, if nobody changed it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from kvtier.messages.tiers import DiskRead, DiskReadDone
from kvtier.node import wire
from kvtier.node.blocks import Stored
from kvtier.node.counters import count
from kvtier.node.reads import Orphans, Reads
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot

# A write or read that the disk service has not answered by then no longer has a right to its slots.
DISK_LEASE_S = 60.0
# Why a read failed, where the disk has the object no longer: it removes what it finds to be corrupt.
_GONE = ("corrupt", "missing")
# Forgotten, or written anew, while it was being read.
REMOVED: Final = "removed"

# An object on its way from disk or from another node: its entry, the copy that is read, and where to.
Read: TypeAlias = tuple[Stored, ObjectMeta, Slot]
# Who waits for a read: told of each object why it is not in host memory, or '', and how many seconds it took.
ReadEnded: TypeAlias = Callable[[list[tuple[Stored, str]], float], None]


class DiskReads(Reads):
    """Reads that the disk service has not answered."""

    def __init__(self, state: NodeState, orphans: Orphans) -> None:
        super().__init__(state, orphans, "disk_error")

    def start(self, job: str, reads: Sequence[Read], ended: ReadEnded) -> None:
        """Read objects into host slots that were reserved by `job`."""
        state = self._state

        def done(failed: dict[int, str], nbytes: int, seconds: float) -> None:
            ended(
                [(read[0], self._arrived(read, failed.get(i, ""))) for i, read in enumerate(reads)], seconds
            )

        self._begin(job, [(meta, slot) for _, meta, slot in reads], state.now_s + DISK_LEASE_S, done)
        state.send(
            state.disk.peer,
            DiskRead(
                job=job,
                batch=0,
                object_keys=[wire.key_of(meta.object_id) for _, meta, _ in reads],
                slots=[wire.item(meta, slot) for _, meta, slot in reads],
            ),
        )

    def _arrived(self, read: Read, why: str) -> str:
        """Take an object into host memory; answers why not, or ''. why: of a read that failed."""
        state = self._state
        stored, meta, slot = read
        if why:
            count(state.counters.errors, why)
            block = state.tree.get(meta.object_id.block_key)
            if why in _GONE and block is not None and state.is_stored(stored):
                state.removed_from_disk(block, stored)
            return why
        if stored.on_disk is not meta or not state.is_stored(stored):
            state.host.abort(slot, quiet=True)
            return REMOVED
        assert meta.checksum is not None, "what is on disk has a checksum"
        state.host.commit([(slot, meta.checksum)])
        state.stored_in_host(meta)
        return ""

    def on_read(self, peer: str, message: DiskReadDone) -> None:
        """The answer to a read."""
        self._answered(peer, message)

    def expired(self, job: str) -> None:
        """A read's right to its slots ended, and it is not answered: it counts as failed."""
        self._give_up(self._state.disk.peer, [job])

    def lost(self, peer: str) -> None:
        """The disk service went away: its last reads may still be running."""
        self._give_up(peer, self._reads)
