"""Streams of announcements: which message counts, and for which holder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvtier.directory.announcements import Announcement
from kvtier.directory.holders import Holder, Holders

Verdict: TypeAlias = Literal["take", "again", "snapshot", "fenced"]


@dataclass(slots=True)
class Stream:
    """What one node said. epoch: of its newest incarnation that was heard of. number: of the last message.

    holder: that messages count for.  former: the one whose snapshot is being replaced; it answers until the
    end of the new one, so that a node which was not understood is not lost meanwhile.
    """

    node: str
    epoch: int = -1
    number: int = -1
    snapshots: int = 0
    phase: Literal["silent", "snapshot", "live"] = "silent"
    holder: Holder | None = None
    former: Holder | None = None


class Streams:
    """The streams of a shard. bury: what becomes of a holder that is superseded."""

    def __init__(self, holders: Holders, bury: Callable[[Holder], None]) -> None:
        self._holders = holders
        self._bury = bury
        self._streams: dict[str, Stream] = {}

    def names(self) -> list[str]:
        """All nodes that were heard of and not retired."""
        return list(self._streams)

    def absent(self) -> list[tuple[str, int]]:
        """(node, epoch) of those that hold nothing now: lost, or not understood."""
        return [(s.node, s.epoch) for s in self._streams.values() if s.holder is None]

    def of(self, node: str) -> Stream:
        """The node's stream, made if it is new."""
        return self._streams.setdefault(node, Stream(node))

    def admit(self, message: Announcement) -> Verdict:
        """Whether the message counts; for 'take' its stream has a holder, and `taken` is to follow."""
        stream = self.of(message.node)
        if message.epoch < stream.epoch:
            return "fenced"
        if message.epoch > stream.epoch:
            # Another incarnation: what the one before it had in memory is gone with it.
            self._silence(stream)
            stream.epoch, stream.number = message.epoch, -1
        if message.number <= stream.number:
            return "again" if stream.phase != "silent" else "snapshot"
        if message.phase in ("begin", "whole"):
            self._begin(stream)
        elif message.number != stream.number + 1 or stream.phase != _phase_for(message):
            stream.phase = "silent"
            return "snapshot"
        stream.number = message.number
        return "take"

    def taken(self, stream: Stream, message: Announcement) -> None:
        """The message was taken in; the last one of a snapshot supersedes what was before it."""
        if message.phase in ("end", "whole"):
            self._drop_former(stream)
            stream.phase = "live"

    def lost(self, node: str, epoch: int) -> None:
        """Nothing of the node's incarnations up to this one counts until a snapshot comes."""
        stream = self._streams.get(node)
        if stream is not None and stream.epoch <= epoch:
            self._silence(stream)

    def retire(self, node: str) -> None:
        """Forget the node, its fence included."""
        stream = self._streams.pop(node, None)
        if stream is not None:
            self._silence(stream)

    def _begin(self, stream: Stream) -> None:
        self._drop_former(stream)
        stream.former = stream.holder
        stream.holder = self._holders.add(stream.node, stream.epoch, stream.snapshots)
        stream.snapshots += 1
        stream.phase = "snapshot"

    def _drop_former(self, stream: Stream) -> None:
        if stream.former is not None:
            self._bury(stream.former)
            stream.former = None

    def _silence(self, stream: Stream) -> None:
        self._drop_former(stream)
        if stream.holder is not None:
            self._bury(stream.holder)
            stream.holder = None
        stream.phase = "silent"


def _phase_for(message: Announcement) -> str:
    return "live" if message.phase == "change" else "snapshot"
