"""Writes and removals on their way to the disk service, in an order that its answers cannot upset.

The service may carry out what it is sent in any order.  So a request is held back as long as a write under
way names one of its objects or records: else a removal could overtake the write of the same object, and
what was forgotten would be back.  Others may go before a write that is held back, unless they name the same
things: a park does not wait for the spill of another conversation.  Nothing goes before a removal that is
held back, since what is behind it may count on the room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from kvtier.messages.tiers import DiskRemove, DiskWrite
from kvtier.node.blocks import Stored
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot


class Written(NamedTuple):
    """What became of a write. retry_after_s: when it may be tried again, where that is known."""

    ok: bool
    reason: str = ""
    detail: str = ""
    retry_after_s: float | None = None


# Who waits for a write: told whether it is durable, and why not.
WriteDone: TypeAlias = Callable[[Written], None]
RemoveDone: TypeAlias = Callable[[bool, str], None]
# 'spill': its room in host memory is needed; 'ahead': it may be soon.
Purpose: TypeAlias = Literal["park", "spill", "ahead", "record"]


@dataclass(slots=True)
class WriteRequest:
    """Objects with the metas and slots that they had when the write was asked for.

    names: object ids, and (tenant, conversation) of records.  host_bytes, disk_bytes: room of the objects.
    retried: the disk was full once already.
    """

    message: DiskWrite
    objects: list[Stored]
    metas: list[ObjectMeta]
    slots: list[Slot]
    names: frozenset[Hashable]
    purpose: Purpose
    done: WriteDone
    host_bytes: int
    disk_bytes: int
    retried: bool = False

    @property
    def spills(self) -> bool:
        """Whether host memory, and nobody else, wants it."""
        return self.purpose in ("spill", "ahead")


@dataclass(slots=True)
class RemoveRequest:
    """metas: of its objects.  names: as of a WriteRequest."""

    message: DiskRemove
    metas: list[ObjectMeta]
    names: frozenset[Hashable]
    done: RemoveDone | None = None


Request: TypeAlias = WriteRequest | RemoveRequest


class DiskRequests:
    """What waits to be sent, and what was sent and is not answered."""

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()
        self._writes: dict[str, WriteRequest] = {}
        self._removals: dict[str, RemoveRequest] = {}

    def add(self, *requests: Request) -> None:
        """To be sent after all others."""
        self._queue.extend(requests)

    def add_first(self, *requests: Request) -> None:
        """To be sent before all others, in this order."""
        self._queue.extendleft(reversed(requests))

    def sendable(self) -> list[Request]:
        """Requests that may be sent now, in order; each counts as sent."""
        going: list[Request] = []
        staying: deque[Request] = deque()
        held: set[Hashable] = set()
        while self._queue:
            request = self._queue.popleft()
            if not (self._is_held_back(request) or not request.names.isdisjoint(held)):
                self._count_as_sent(request)
                going.append(request)
                continue
            staying.append(request)
            held |= request.names
            if isinstance(request, RemoveRequest):
                break
        self._queue.extendleft(reversed(staying))
        return going

    def _count_as_sent(self, request: Request) -> None:
        if isinstance(request, WriteRequest):
            self._writes[request.message.job] = request
        else:
            self._removals[request.message.job] = request

    def written(self, job: str) -> WriteRequest | None:
        """The write that was answered; None when nobody waits for it."""
        return self._writes.pop(job, None)

    def removed(self, job: str) -> RemoveRequest | None:
        """The removal that was answered; None when nobody waits for it."""
        return self._removals.pop(job, None)

    def writes(self) -> Iterator[WriteRequest]:
        """All writes, sent or not."""
        yield from self._writes.values()
        yield from (r for r in self._queue if isinstance(r, WriteRequest))

    def take_all(self) -> tuple[list[Request], list[Request]]:
        """Everything (sent and not answered, not sent); nothing is left."""
        sent: list[Request] = [*self._writes.values(), *self._removals.values()]
        unsent = list(self._queue)
        self._writes, self._removals = {}, {}
        self._queue.clear()
        return sent, unsent

    def _is_held_back(self, request: Request) -> bool:
        return any(not request.names.isdisjoint(write.names) for write in self._writes.values())
