"""What was asked of the GPU and disk services of a rig and has not ended: copies, writes, reads, removals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtier.messages import tiers as t
from kvtier.messages.calls import Message
from kvtier.testing.rig_world import TORN, Content, DiskStore, Memory, OnDisk, Pages, content_sum


@dataclass
class Proc:
    """A process. peer: its connection; connected: that is open.  stopped: nothing of it moves (SIGSTOP)."""

    peer: str
    pid: int
    alive: bool = True
    connected: bool = True
    stopped: bool = False


@dataclass(eq=False)
class Op:
    """One message to a service. executor: the process that carries it out; via: the service that it was
    sent to.  carried: (item, content) that a scatter has moved.
    """

    message: Any
    executor: Proc
    via: Proc
    begun: bool = False
    cancelled: bool = False
    stale: set[int] = field(default_factory=set)
    carried: list[tuple[t.WireItem, Content]] = field(default_factory=list)

    def items(self) -> list[t.WireItem]:
        """The slots that it may touch."""
        if isinstance(self.message, t.Copy):
            return self.message.items
        return self.message.slots if isinstance(self.message, t.DiskWrite | t.DiskRead) else []

    def begin(self, memory: Memory, generations: Mapping[int, int]) -> None:
        """Start: what is written to is torn until the end."""
        self.begun = True
        if not isinstance(self.message, t.Copy) or self.cancelled:
            return
        for index, item in enumerate(self.message.items):
            if generations.get(item.slot_id) != item.generation:
                self.stale.add(index)
            elif self.message.direction == "gather":
                memory.write(item, TORN)

    # --- copies -----------------------------------------------------------------------------------------

    def end_copy(
        self, pages: Pages, memory: Memory, generations: Mapping[int, int], failure: str
    ) -> t.Copied:
        """Move the rows; the worker's answer. failure: a reason for all items to have failed."""
        message = self.message
        failure = "cancelled" if self.cancelled else failure
        failed: list[tuple[int, str]] = []
        sums: list[int | None] = []
        for index, item in enumerate(message.items):
            why = failure or ("stale" if index in self.stale else self._move(item, pages, memory))
            if not why and generations.get(item.slot_id) != item.generation:
                why = "stale"
            if why:
                failed.append((index, why))
            gathered = message.direction == "gather" and not why
            sums.append(content_sum(memory.read(item)) if gathered else None)
        moved = sum(item.nbytes for item in message.items) if not failed else 0
        return t.Copied(
            job=message.job,
            batch=message.batch,
            ok=not failed,
            checksums=sums,
            failed=failed,
            bytes=moved,
            seconds=0.001,
        )

    def _move(self, item: t.WireItem, pages: Pages, memory: Memory) -> str:
        if self.message.direction == "gather":
            memory.write(item, pages.gather(item))
            return ""
        content = memory.read(item)
        pages.scatter(item, content)
        self.carried.append((item, content))
        corrupt = self.message.verify and content_sum(content) != item.checksum
        return "corrupt" if corrupt else ""

    # --- disk -------------------------------------------------------------------------------------------

    def end_disk(self, store: DiskStore, memory: Memory, failure: str) -> Message:
        """Carry it out on the store; the service's answer. failure: a reason why a write was not done."""
        message = self.message
        if isinstance(message, t.DiskWrite):
            reason = failure or self._write(store, memory)
            return t.DiskWritten(job=message.job, ok=not reason, reason=reason, seconds=0.001)
        if isinstance(message, t.DiskRead):
            failed = self._read(store, memory, failure)
            nbytes = sum(item.nbytes for item in message.slots)
            return t.DiskReadDone(job=message.job, batch=0, failed=failed, bytes=nbytes, seconds=0.001)
        return t.DiskRemoved(job=message.job, ok=not failure, detail=failure)

    def _write(self, store: DiskStore, memory: Memory) -> str:
        message = self.message
        objects = [
            OnDisk(meta, message.roots[meta.root], memory.read(item))
            for meta, item in zip(message.metas, message.slots, strict=True)
        ]
        store.models.update(dict(message.models))
        return store.put(objects, message.records)

    def _read(self, store: DiskStore, memory: Memory, failure: str) -> list[tuple[int, str]]:
        failed = []
        for index, (key, item) in enumerate(zip(self.message.object_keys, self.message.slots, strict=True)):
            stored = store.objects.get(tuple(key))
            if failure or stored is None or stored.meta.nbytes != item.nbytes:
                failed.append((index, failure or "missing"))
                continue
            memory.write(item, stored.content)
            if stored.corrupt:
                failed.append((index, "corrupt"))
                store.quarantined += 1
                del store.objects[tuple(key)]
        return failed
