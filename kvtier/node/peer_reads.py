"""Reads from other nodes into host memory; the node's own service carries them out."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.messages.cluster import PEERS, PeerRead, PeerReadDone
from kvtier.node import wire
from kvtier.node.reads import Orphans, ReadDone, Reads
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot

# The service answers by the read's own end; the right to the slots lasts this much longer.
_LEASE_MORE_S = 10.0


class PeerReads(Reads):
    """Reads that the node's own service has not answered."""

    def __init__(self, state: NodeState) -> None:
        super().__init__(state, Orphans(state), "deadline")

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
        self._begin(job, pairs, state.now_s + timeout_s + _LEASE_MORE_S, done)
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
        """The answer to a read, which says what of it may still touch a slot."""
        counters = self._state.counters
        counters.peer_received_bytes += message.received_bytes
        counters.peer_coded_bytes += message.coded_bytes
        counters.peer_wire_bytes += message.wire_bytes
        counters.peer_relayed_bytes += message.relayed_bytes
        counters.peer_lent_bytes += message.lent_bytes
        self._state.reached(message.node, message.way)
        self._answered(PEERS, message)

    def expired(self, job: str) -> None:
        """A read's right to its slots ended, and it is not answered: it counts as failed."""
        self._give_up(PEERS, [job])
