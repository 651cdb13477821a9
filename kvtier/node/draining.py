"""A node on its way out of service: no new parks; what only memory holds is written, the most worth first."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.node.disk_side import DiskSide
from kvtier.node.state import NodeState


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """dirty_bytes: what only memory holds now.  flushed_bytes: written since the beginning.  done: it will
    write no more.
    """

    dirty_bytes: int
    flushed_bytes: int
    done: bool


class Draining:
    """The beginning, and how far it is; the writes are the spills' (spills.py)."""

    def __init__(self, state: NodeState, disk: DiskSide) -> None:
        self._state = state
        self._disk = disk
        self._began_bytes = 0

    def begin(self) -> None:
        """Go out of service; again is no error."""
        if not self._state.draining:
            self._state.draining = True
            self._began_bytes = self._state.dirty_bytes

    def progress(self) -> DrainProgress:
        """Since `begin`."""
        state = self._state
        dirty = state.dirty_bytes
        flushed = max(0, self._began_bytes - dirty)
        return DrainProgress(dirty, flushed, not dirty or not self._disk.usable())
