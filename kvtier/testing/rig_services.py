"""The services and processes of a rig: what they are asked, carry out, and how they come and go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from kvtier.host.slots import HostSlots
from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.node.events import Left, ProcessEnded, Received, Stimulus
from kvtier.testing.rig_ops import Op, Proc
from kvtier.testing.rig_uses import RigPark, RigRestore, RigWorker
from kvtier.testing.rig_world import FLIPPED, DiskStore, Memory, flipped
from kvtier.tier import Slot


class RigServices(ABC):
    """The half of a rig behind the tier services' sockets.

    store: what the disk holds, or None without one.  ops: everything asked for that has not ended.
    generations: by slot id, as host memory publishes them.  violations: what must never happen and did.
    """

    def __init__(self, host: HostSlots, generations: dict[int, int], store: DiskStore | None) -> None:
        self.host = host
        self.generations = generations
        self.store = store
        self.memory = Memory()
        self.ops: list[Op] = []
        self.workers: list[RigWorker] = []
        self.requests: dict[int, RigPark | RigRestore] = {}
        self.violations: list[str] = []
        self.procs: list[Proc] = []
        self.disk: Proc | None = None
        self.gpu: Proc | None = None
        self._serial = 0

    @abstractmethod
    def tell(self, stimulus: Stimulus) -> None:
        """Give the core a stimulus, and let its messages arrive."""

    @abstractmethod
    def ask(self, message: m.Message, peer: str = "client:0") -> Any:
        """Send a request; answers its answer, or None when that has not come yet."""

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def _proc(self, role: str, pid: int | None = None) -> Proc:
        self.procs.append(Proc(f"{role}:{self._next()}", pid or self._next()))
        return self.procs[-1]

    # --- coming and going ---------------------------------------------------------------------------------

    def start_gpu(self, pid: int | None = None) -> Proc:
        """A GPU service connects; pid: of one that was connected before."""
        self.gpu = self._proc("gpu", pid)
        self.tell(Received(self.gpu.peer, t.TierHello(pid=self.gpu.pid, address="/gpu.sock")))
        return self.gpu

    def start_disk(self, pid: int | None = None, *, last: bool = True) -> Proc:
        """A disk service connects and announces what is durable; last: whether it comes to the end."""
        store = self.store
        assert store is not None, "this rig has no disk"
        self.disk = self._proc("disk", pid)
        hello = t.TierHello(pid=self.disk.pid, capacity_bytes=store.capacity_bytes)
        self.tell(Received(self.disk.peer, hello))
        self.say_usage(self.disk)
        for stored in store.objects.values():
            one = _alone(stored.meta)
            self.tell(Received(self.disk.peer, t.Announce(roots=[stored.root], metas=[one])))
        announce = t.Announce(
            records=list(store.records.values()), models=sorted(store.models.items()), last=last
        )
        self.tell(Received(self.disk.peer, announce))
        return self.disk

    def say_usage(self, disk: Proc) -> None:
        """The disk service tells its count and its health."""
        store = self.store
        assert store is not None, "this rig has no disk"
        usage = t.DiskUsage(
            capacity_bytes=store.capacity_bytes,
            used_bytes=store.used_bytes,
            objects=len(store.objects),
            quarantined=store.quarantined,
            written_bytes=0,
            state="degraded" if store.broken else "ready",
            detail="broken" if store.broken else "",
        )
        self.tell(Received(disk.peer, usage))

    def disconnect(self, proc: Proc) -> None:
        """The connection closes; the process goes on with what it has begun."""
        proc.connected = False
        if proc is self.gpu:
            self.gpu = None
        if proc is self.disk:
            self.disk = None
        for op in self.ops:
            if op.via is proc and not op.begun and op.executor is not proc:
                # A worker starts nothing that is queued once the GPU service is gone.
                op.cancelled = True
        self.tell(Left(proc.peer))

    def kill(self, proc: Proc, *, socket_first: bool = True) -> None:
        """The process ends, and everything that it did."""
        proc.alive = False
        self.ops = [op for op in self.ops if op.executor is not proc]
        for op in self.ops:
            if op.via is proc and not op.begun:
                op.cancelled = True
        connected, proc.connected = proc.connected, False
        if proc is self.gpu:
            self.gpu = None
        if proc is self.disk:
            self.disk = None
        if socket_first and connected:
            self.tell(Left(proc.peer))
        self.tell(ProcessEnded(proc.peer))

    def _at_gpu(self, peer: str, message: m.Message) -> None:
        if self.gpu is None or self.gpu.peer != peer or not isinstance(message, t.Copy | t.CancelCopies):
            return
        if isinstance(message, t.CancelCopies):
            for op in self.ops:
                if isinstance(op.message, t.Copy) and op.message.job == message.job and not op.begun:
                    op.cancelled = True
            return
        worker = next(w for w in self.workers if w.name == message.worker)
        executor = worker.proc if worker.mode == "worker" else self.gpu
        if executor.alive:
            self.ops.append(Op(message, executor, self.gpu))

    def _at_disk(self, peer: str, message: m.Message) -> None:
        if self.disk is None or self.disk.peer != peer or isinstance(message, t.Arenas):
            return
        if isinstance(message, t.DiskRemove) and self.store is not None:
            # The service removes as soon as it hears of it, before writes that came earlier.
            self.store.remove([(k, g, s) for k, g, s in message.object_keys], message.records)
        self.ops.append(Op(message, self.disk, self.disk))

    # --- carrying out -----------------------------------------------------------------------------------

    def copies(self) -> list[Op]:
        """Copies that have not ended."""
        return [op for op in self.ops if isinstance(op.message, t.Copy)]

    def disk_ops(self) -> list[Op]:
        """Disk jobs that have not ended."""
        return [op for op in self.ops if not isinstance(op.message, t.Copy)]

    def begin(self, op: Op) -> None:
        """It starts to run."""
        op.begin(self.memory, self.generations)

    def finish(self, op: Op, failure: str = "", *, answer: bool = True) -> None:
        """It ends, well or with `failure`; answer: whether the node can be told."""
        if not op.begun:
            self.begin(op)
        self.ops.remove(op)
        message = op.message
        if isinstance(message, t.Copy):
            use = self.requests[message.request]
            result = op.end_copy(use.pages, self.memory, self.generations, failure)
            self._check_copy(op, result)
            self._answer_copy(op, result, answer)
        elif self.store is not None:
            answered = op.end_disk(self.store, self.memory, failure)
            if answer and op.via.connected:
                self.tell(Received(op.via.peer, answered))
                if op.via is self.disk:
                    self.say_usage(op.via)

    def _answer_copy(self, op: Op, result: t.Copied, answer: bool) -> None:
        if answer and op.via.connected and op.executor.connected:
            self.tell(Received(op.via.peer, result))
        elif not op.via.connected and op.executor is not op.via and op.executor.connected:
            # The worker lost its GPU service: it speaks for itself once the job's copies have ended.
            jobs = {o.message.job for o in self.copies()}
            if result.job not in jobs:
                self.ask(m.CopiesEnded(worker="", jobs=[result.job]), op.executor.peer)

    def run_copies(self) -> None:
        """All copies, until none is left; those of stopped processes stay."""
        self._run(self.copies)

    def run_disk(self) -> None:
        """All disk jobs, until none is left."""
        self._run(self.disk_ops)

    def run(self) -> None:
        """All copies and disk jobs, until none is left."""
        self._run(lambda: list(self.ops))

    def _run(self, pending: Callable[[], list[Op]]) -> None:
        while runnable := [op for op in pending() if not op.executor.stopped]:
            self.finish(runnable[0])

    # --- what goes wrong --------------------------------------------------------------------------------

    def corrupt_host(self, item: t.WireItem) -> None:
        """Flip a bit of what lies in a slot."""
        self.memory.write(item, flipped(self.memory.read(item)))

    def corrupt_disk(self, index: int = 0) -> None:
        """Flip a bit of a durable object, the oldest first."""
        assert self.store is not None, "this rig has no disk"
        key = list(self.store.objects)[index]
        stored = self.store.objects[key]
        self.store.objects[key] = stored._replace(content=flipped(stored.content))

    # --- what must hold ---------------------------------------------------------------------------------

    def _check_rooms(self) -> None:
        """No room is somebody else's while an operation that was sent for it may touch it."""
        held = [(op, item) for op in self.ops for item in op.items()]
        for op, item in held:
            for slot in self._slots_in(item):
                if (slot.slot_id, slot.generation) != (item.slot_id, item.generation):
                    self.violations.append(f"{op} may touch {item}, where {slot} is by now")

    def _slots_in(self, item: t.WireItem) -> Iterator[Slot]:
        for entry in self.host._entries.values():
            arena, offset = entry.slot.address
            if (
                arena == item.arena
                and offset < item.offset + item.nbytes
                and item.offset < offset + entry.room
            ):
                yield entry.slot

    def _check_copy(self, op: Op, result: t.Copied) -> None:
        """A scatter has carried the right rows, unless it failed for a reason that may be."""
        why = dict(result.failed)
        text = self.requests[op.message.request].pages.text
        for item, content in op.carried:
            reason = why.get(op.message.items.index(item), "")
            first = item.start + item.tokens - len(content)
            wrong = any(not text.accepts(row, item.group, first + i) for i, row in enumerate(content))
            # A checksum hides a slot that was reused too early; here only what the test flipped is corrupt.
            if wrong and reason in ("", "corrupt") and content[0] != FLIPPED:
                self.violations.append(f"a restore was given {content} for {item} of {text}")


def _alone(meta: t.WireMeta) -> t.WireMeta:
    """As the only one of its message."""
    return msgspec.structs.replace(meta, root=0)
