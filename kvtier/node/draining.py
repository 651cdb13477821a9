"""A node on its way out of service: no new parks; what memory holds is written, and given to other nodes."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from kvtier.messages.cluster import Drain
from kvtier.node.disk_side import DiskSide
from kvtier.node.moving import Moving
from kvtier.node.replicas import Replicas
from kvtier.node.state import NodeState


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """dirty_bytes: what only this node's memory holds now.  flushed_bytes: written since the beginning.

    moved_bytes: read by other nodes since then.  done: it will write and give no more.
    """

    dirty_bytes: int
    flushed_bytes: int
    done: bool
    moved_bytes: int = 0


class Draining:
    """The beginning, and how far it is; the writes are the spills' (spills.py)."""

    def __init__(self, state: NodeState, disk: DiskSide, replicas: Replicas) -> None:
        self._state = state
        self._disk = disk
        self._moving = Moving(state, replicas)
        self._began_bytes = 0
        self._end_s = inf

    def drain(self, peer: str, message: Drain) -> None:
        """Go out of service; again tells only how much time is left."""
        state = self._state
        self._end_s = state.now_s + message.within_s if message.within_s else inf
        if not state.draining:
            state.draining = True
            self._began_bytes = state.dirty_bytes
            self._moving.begin()
            self.tick()

    def tick(self) -> None:
        """Time passed."""
        if self._state.draining:
            self._moving.tick(self._end_s - self._state.now_s)

    def progress(self) -> DrainProgress:
        """Since the beginning."""
        dirty = self._moving.lost_bytes()
        flushed = max(0, self._began_bytes - self._state.dirty_bytes)
        written = not self._state.dirty_bytes or not self._disk.usable()
        return DrainProgress(dirty, flushed, written and self._moving.over, self._moving.moved_bytes)
