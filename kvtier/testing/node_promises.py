"""What receipts promised to be on disk, held against every removal and every power loss."""

from __future__ import annotations

from typing import Any, TypeAlias

from kvtier.messages.tiers import DiskRemove
from kvtier.node import wire
from kvtier.node.blocks import ConversationId
from kvtier.node.coverage import Piece, restored_end
from kvtier.node.park_job import ParkJob
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import pieces_of, watch_promises
from kvtier.testing.rig_world import Key

Promise: TypeAlias = tuple[ConversationId, tuple[int, ...]]  # of these tokens


class Promises:
    """Parks that were said to be on disk, each with the objects that it needs there.

    evicts: whether what is on disk may have to go for others.  loose: whether it may be found to be wrong.
    """

    def __init__(self, evicts: bool) -> None:
        self._evicts = evicts
        self.loose = False
        self._kept: dict[Promise, tuple[ParkJob, set[Key]]] = {}

    def names(self) -> list[ConversationId]:
        """Conversations of which something is promised, in order."""
        return sorted({name for name, _ in self._kept})

    def watch(self, rig: CoreRig) -> None:
        """Hold this node to what is promised from now on."""
        self._rig = rig
        watch_promises(rig, self._promised)
        arrive = rig._at_disk

        def watched(peer: str, message: Any) -> None:
            arrive(peer, message)
            if isinstance(message, DiskRemove):
                self._removed(message)

        rig._at_disk = watched  # type: ignore[method-assign]

    def forget(self, name: ConversationId) -> None:
        """Nothing is promised of the conversation any more."""
        self._kept = {promise: kept for promise, kept in self._kept.items() if promise[0] != name}

    def clear(self) -> None:
        """Nothing is promised any more."""
        self._kept.clear()

    def check(self, reborn: CoreRig) -> None:
        """After power loss everything is there; what is not is a violation of the node that came back."""
        self._rig = reborn
        for promise, (job, _) in list(self._kept.items()):
            self._check(reborn, promise, job)

    def _promised(self, job: ParkJob, pieces: list[Piece]) -> None:
        tokens = self._rig.requests[job.message.request].pages.text.tokens
        keys = {wire.key_of(p.stored.meta.object_id) for p in pieces}
        # A longer turn of the same conversation takes the place of the ones that it continues.
        for other in [o for o in self._kept if o[0] == job.name and o[1] == tokens[: len(o[1])]]:
            del self._kept[other]
        # What the test has flipped is a promise that a check will break.
        on_disk = self._rig.store.objects if self._rig.store is not None else {}
        if not any(on_disk[key].corrupt for key in keys if key in on_disk):
            self._kept[job.name, tokens] = (job, keys)

    def _removed(self, message: DiskRemove) -> None:
        """Whatever the core removes from the disk, its promises stand: unless they may be broken."""
        gone = {tuple(key) for key in message.object_keys}
        names = {(r.tenant, r.conversation) for r in message.records}
        for promise, (job, keys) in list(self._kept.items()):
            if job.name in names:
                del self._kept[promise]
            elif keys & gone:
                del self._kept[promise]
                if not (self._evicts or self.loose):
                    self._check(self._rig.restarted(), promise, job)

    def _check(self, reborn: CoreRig, promise: Promise, job: ParkJob) -> None:
        pieces = pieces_of(reborn, job, promise[1])
        if restored_end(pieces) < len(promise[1]):
            known = self._rig.core.state.conversations.get(job.name)
            # A longer turn may be on disk although its park was told that it took too long.
            if known and any(e.key in known.durable and e.tokens > len(promise[1]) for e in known.ends):
                self._kept.pop(promise, None)
                return
            self._rig.violations.append(f"{promise} was promised to be on disk, there is {pieces}")
        self._kept[promise] = (job, {wire.key_of(p.stored.meta.object_id) for p in pieces})
