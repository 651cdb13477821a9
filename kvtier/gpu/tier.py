"""A tier in device memory: a pool of kvtier's own, next to the engine's, where objects are parked.

The copies are a CopyEngine's, so that the same tier lies in host memory or on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvtier.checksum import Buffer
from kvtier.errors import CorruptObject, TierUnavailable
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.engine import CopyBatch, CopyEngine, CopyItem, CopyResult, Direction, SlotMemory
from kvtier.gpu.pool import Binding, Pool
from kvtier.gpu.pool_slots import PoolSlots, Room
from kvtier.gpu.tensors import Bytes
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.tier import Slot, Tier, TierUsage

COPY_TIMEOUT_S = 30.0


class _Buffers:
    """Callers' buffers as the engine's slots; a buffer is there from the start of its copy to the end."""

    def __init__(self) -> None:
        self._open: dict[int, Bytes] = {}

    def put(self, number: int, buffer: Bytes) -> None:
        self._open[number] = buffer

    def drop(self, number: int) -> None:
        del self._open[number]

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        return self._open[address[0]]

    def generation(self, slot_id: int) -> int:
        return 1 if slot_id in self._open else 0


class PoolTier(Tier):
    """Objects in runs of pages of `pool`, which nobody else uses.

    make_engine: the engine that reaches the pool's memory, given where its slots are.  A read or write that
    takes longer than copy_timeout_s raises TierUnavailable; its pages stay taken until the copy did end.
    """

    name = "gpu"
    durable = False

    def __init__(
        self,
        pool: Pool,
        *,
        make_engine: Callable[[SlotMemory], CopyEngine] = CpuCopyEngine,
        copy_timeout_s: float = COPY_TIMEOUT_S,
    ) -> None:
        self._pool = pool
        self._timeout_s = copy_timeout_s
        self._lock = threading.Lock()
        self._slots = PoolSlots(pool.layout)
        self._buffers = _Buffers()
        self._engine = make_engine(self._buffers)
        self._copies = 0
        self._closed = False

    def reserve(self, meta: ObjectMeta, *, holder: str) -> Slot:
        """As in the contract. Raises GeometryError for an object that is not of this pool's geometry."""
        with self._lock:
            if self._closed:
                raise TierUnavailable(f"the tier {self.name} is closed")
            return self._slots.reserve(meta, holder=holder)

    def write(self, slot: Slot, data: Buffer) -> None:
        """As in the contract: a scatter, without the lock."""
        source = np.frombuffer(data, np.uint8)
        room = self._pinned(slot, self._slots.filling, source.nbytes)
        result = self._copy("scatter", room, source)
        if not result.ok:
            raise TierUnavailable(f"writing {room.meta.object_id} failed: {result.failed[0][1]}")

    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None:
        """As in the contract. The checksums are believed: whoever wrote the bytes made them."""
        with self._lock:
            self._slots.commit(slots)

    def abort(self, slot: Slot, *, quiet: bool) -> None:
        """As in the contract."""
        with self._lock:
            self._slots.abort(slot, quiet=quiet)

    def find(self, object_id: ObjectId) -> Slot | None:
        """As in the contract."""
        with self._lock:
            room = self._slots.committed(object_id)
            return None if room is None else room.slot

    def meta(self, object_id: ObjectId) -> ObjectMeta | None:
        """As in the contract."""
        with self._lock:
            room = self._slots.committed(object_id)
            return None if room is None else room.meta

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """As in the contract; on a slot being filled, an end to its writer's hold."""
        with self._lock:
            self._slots.lease(slot, holder, until_s)

    def release(self, slot: Slot, holder: str) -> None:
        """As in the contract."""
        with self._lock:
            self._slots.release(slot, holder)

    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        """As in the contract."""
        with self._lock:
            return self._slots.expire(now_s)

    def holder_ended(self, holder: str) -> None:
        """As in the contract."""
        with self._lock:
            self._slots.holder_ended(holder)

    def read(self, slot: Slot, into: Buffer) -> None:
        """As in the contract: a gather that is checked, without the lock.

        Raises ValueError when `into` is read-only or of another length; TierUnavailable after the time-out,
        and then `into` may still be written to: it must not be used again.
        """
        target = np.frombuffer(into, np.uint8)
        if not target.flags.writeable:
            raise ValueError("cannot read into a read-only buffer")
        room = self._pinned(slot, self._slots.readable, target.nbytes)
        result = self._copy("gather", room, target)
        if not result.ok:
            raise TierUnavailable(f"reading {room.meta.object_id} failed: {result.failed[0][1]}")
        if result.checksums[0] != room.meta.checksum:
            with self._lock:
                self._slots.quarantine(room)
            raise CorruptObject(f"{room.meta.object_id} in {self.name} does not match its checksum")

    def remove(self, object_id: ObjectId) -> int:
        """As in the contract."""
        with self._lock:
            return self._slots.remove(object_id)

    def objects(self) -> Iterator[ObjectMeta]:
        """As in the contract."""
        with self._lock:
            return iter(self._slots.objects())

    def usage(self) -> TierUsage:
        """As in the contract."""
        with self._lock:
            return self._slots.usage()

    def close(self) -> None:
        """End the engine; the pool's memory is its maker's. Again is no error."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._engine.close()

    def _pinned(self, slot: Slot, check: Callable[[Slot], Room], nbytes: int) -> Room:
        with self._lock:
            if self._closed:
                raise TierUnavailable(f"the tier {self.name} is closed")
            room = check(slot)
            if nbytes != room.slot.nbytes:
                raise ValueError(f"a buffer of {nbytes} bytes for an object of {room.slot.nbytes}")
            room.pins += 1
            return room

    def _copy(self, direction: Direction, room: Room, buffer: Bytes) -> CopyResult:
        """One object through the engine; unpins the room when the copy ended, however late."""
        with self._lock:
            self._copies += 1
            number = self._copies
            self._buffers.put(number, buffer)
        answered = threading.Event()
        results: list[CopyResult] = []

        def on_done(result: CopyResult) -> None:
            with self._lock:
                self._buffers.drop(number)
                room.pins -= 1
                self._slots.settle(room)
            results.append(result)
            answered.set()

        job = f"pool-{number}"
        group, meta = room.slot.address[0], room.meta
        item = CopyItem(group, 0, meta.tokens, meta.first_valid, number, 1, (number, 0), meta.nbytes)
        binding = self._binding(room)
        self._engine.submit(CopyBatch(job, 0, direction, binding, (item,), direction == "gather"), on_done)
        if not answered.wait(self._timeout_s):
            self._engine.cancel(job)
            raise TierUnavailable(f"a copy in {self.name} took longer than {self._timeout_s} s")
        return results[0]

    def _binding(self, room: Room) -> Binding:
        """The room's pages, as if the block began at position 0."""
        group, first = room.slot.address
        groups = range(len(self._pool.layout.groups))
        size = self._pool.layout.page_tokens(group)
        pages = [range(first, first + room.pages) if g == group else range(0) for g in groups]
        base = room.meta.first_valid // size * size
        return self._pool.bind(pages, bases=[base if g == group else 0 for g in groups])
