"""Reads from other nodes into host memory; the node's own service carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.cluster_messages import PEERS, PeerRead, PeerReadDone
from kvtier.node import wire
from kvtier.node.disk_reads import ReadDone
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot

# The service answers by the read's own end; the right to the slots lasts this much longer.
_LEASE_MORE_S = 10.0


@dataclass(slots=True)
class _Read:
    slots: list[Slot]
    done: ReadDone


class PeerReads:
    """Reads that have not been answered."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._reads: dict[str, _Read] = {}
        self._late: set[str] = set()

    def running(self) -> bool:
        """Whether a read is under way."""
        return bool(self._reads)

    def start(
        self,
        job: str,
        node: str,
        epoch: int,
        pairs: Sequence[tuple[ObjectMeta, Slot]],
        timeout_s: float,
        done: ReadDone,
        *,
        behind: bool = False,
    ) -> None:
        """Read objects of a node into host slots that were reserved by `job`. behind: see PeerRead.

        The slots of what failed are given back before `done` is told; the others it has to commit.
        """
        state = self._state
        for _, slot in pairs:
            state.host.lease(slot, job, state.now_s + timeout_s + _LEASE_MORE_S)
        self._reads[job] = _Read([slot for _, slot in pairs], done)
        state.send(
            PEERS,
            PeerRead(
                job=job,
                node=node,
                epoch=epoch,
                object_keys=[wire.key_of(meta.object_id) for meta, _ in pairs],
                slots=[wire.item(meta, slot) for meta, slot in pairs],
                timeout_s=timeout_s,
                behind=behind,
                item_bytes=tuple(wire.item_bytes(meta.root, state.item_bytes) for meta, _ in pairs),
            ),
        )

    def on_done(self, peer: str, message: PeerReadDone) -> None:
        """The answer to a read: nothing of it touches a slot any more."""
        counters = self._state.counters
        counters.peer_received_bytes += message.received_bytes
        counters.peer_coded_bytes += message.coded_bytes
        counters.peer_wire_bytes += message.wire_bytes
        read = self._reads.pop(message.job, None)
        if read is None:
            if message.job in self._late:
                self._late.discard(message.job)
                self._state.host.holder_ended(message.job)
            return
        failed = dict(message.failed)
        for index in sorted(failed):
            self._state.host.abort(read.slots[index], quiet=True)
        read.done(failed, message.bytes, message.seconds)

    def expired(self, job: str) -> None:
        """A read's right to its slots ended, and it is not answered: it counts as failed."""
        read = self._reads.pop(job, None)
        if read is None:
            return
        self._late.add(job)
        for slot in read.slots:
            self._state.host.abort(slot, quiet=False)
        read.done(dict.fromkeys(range(len(read.slots)), "deadline"), 0, 0.0)
