"""A node goes out of service: no new parks, what only memory holds goes to disk, then its actors end.

Pure: no Ray, no clock, no I/O.  The shell asks the node and hands its answers in; `phase` says what it is to
do.  Nothing waits beyond the grace: what is not on disk by then is lost, as misses, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

# flushing: ask the host service, and start nothing anew.  ending: run nothing there.
Phase: TypeAlias = Literal["flushing", "ending", "done"]
# Of the grace, what the actors get to end in order, at most and as a share.
_STOP_S = 3.0
_STOP_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """A host service's answer. dirty_bytes: what only its memory holds.  moved_bytes: that others read.

    done: it will write and give no more.
    """

    dirty_bytes: int
    flushed_bytes: int
    done: bool
    moved_bytes: int = 0

    @staticmethod
    def of(answer: dict[str, Any]) -> Progress:
        """From what came over the wire. Raises KeyError, TypeError, ValueError for anything else."""
        dirty, flushed = int(answer["dirty_bytes"]), int(answer["flushed_bytes"])
        return Progress(dirty, flushed, bool(answer["done"]), int(answer.get("moved_bytes", 0)))


@dataclass(frozen=True, slots=True)
class DrainReport:
    """lost_bytes: what no tier of the node holds any more, and no other node; None where it never said.
    moved_bytes: what other nodes have read of it.

    reason: why the flushing ended: 'flushed', 'grace over', 'host ended', 'node lost' or 'cannot flush'.
    """

    phase: Phase
    flushed_bytes: int = 0
    lost_bytes: int | None = None
    reason: str = ""
    took_s: float = 0.0
    moved_bytes: int = 0


class Drain:
    """One node's way out. The times of its arguments and of `step` are of one clock that only grows."""

    def __init__(self, began_s: float, grace_s: float) -> None:
        self._began_s = began_s
        self._end_s = began_s + grace_s
        self._flush_end_s = self._end_s - min(_STOP_S, _STOP_SHARE * grace_s)
        self.report = DrainReport("flushing")

    @property
    def phase(self) -> Phase:
        """What is to be done now."""
        return self.report.phase

    @property
    def over(self) -> bool:
        """Whether nothing of ours runs there any more."""
        return self.report.phase == "done"

    def flush_s(self, now_s: float) -> float:
        """Seconds that the node has left for writing."""
        return max(0.0, self._flush_end_s - now_s)

    def stop_s(self, now_s: float) -> float:
        """Seconds that the actors have left to end."""
        return max(0.0, self._end_s - now_s)

    def step(
        self,
        *,
        node: bool,
        host: bool,
        actors: int,
        progress: Progress | None,
        now_s: float,
        can_flush: bool = True,
    ) -> None:
        """Take what is seen at this instant: whether the node and its host actor live, how many actors do.

        progress: the node's newest answer, or None when none came since the last step.
        """
        if progress is not None:
            self.report = replace(
                self.report,
                flushed_bytes=progress.flushed_bytes,
                lost_bytes=progress.dirty_bytes,
                moved_bytes=progress.moved_bytes,
            )
        if self.phase == "flushing":
            reason = self._over(node, host, can_flush, progress, now_s)
            if reason:
                self.report = replace(self.report, phase="ending", reason=reason)
        if self.phase == "ending" and (actors == 0 or not node):
            self.report = replace(self.report, phase="done", took_s=now_s - self._began_s)

    def _over(self, node: bool, host: bool, can_flush: bool, progress: Progress | None, now_s: float) -> str:
        if not node:
            return "node lost"
        if not host:
            return "host ended"
        if not can_flush:
            return "cannot flush"
        if progress is not None and progress.done:
            return "flushed"
        return "grace over" if now_s >= self._flush_end_s else ""
