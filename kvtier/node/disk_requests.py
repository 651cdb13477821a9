"""Writes and removals on their way to the disk service, in an order that its answers cannot upset.

The service may carry out what it is sent in any order.  So a request is held back as long as a write under
way names one of its objects or records: else a removal could overtake the write of the same object, and
what was forgotten would be back.  Requests behind one that is held back wait with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvtier.node.blocks import Stored
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot
from kvtier.tier_messages import DiskRemove, DiskWrite

# Who waits for a write: told whether it is durable, and why not.
WriteDone: TypeAlias = Callable[[bool, str, str], None]
RemoveDone: TypeAlias = Callable[[bool, str], None]
Purpose: TypeAlias = Literal["park", "spill", "record"]


@dataclass(slots=True)
class WriteRequest:
    """Objects with the metas and slots that they had when the write was asked for.

    names: object ids, and (tenant, conversation) of records.  retried: the disk was full once already.
    """

    message: DiskWrite
    objects: list[Stored]
    metas: list[ObjectMeta]
    slots: list[Slot]
    names: frozenset[Hashable]
    purpose: Purpose
    done: WriteDone
    retried: bool = False


@dataclass(slots=True)
class RemoveRequest:
    """names: as of a WriteRequest."""

    message: DiskRemove
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

    def sendable(self) -> Iterator[Request]:
        """Requests that may be sent now, in order; each counts as sent."""
        while self._queue and not self._is_held_back(self._queue[0]):
            request = self._queue.popleft()
            if isinstance(request, WriteRequest):
                self._writes[request.message.job] = request
            else:
                self._removals[request.message.job] = request
            yield request

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
