"""The host tier: objects in shared memory, behind the Tier contract.

`HostSlots` decides, `Arena` holds the bytes, one lock stands around the decisions and none around a copy:
a copy pins its slot instead, so that room is never reused under it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvtier.checksum import Buffer, checksum
from kvtier.errors import CorruptObject, TierUnavailable
from kvtier.host.allocator import ALIGN_BYTES, room_bytes
from kvtier.host.arena import WORD_BYTES, Arena
from kvtier.host.limits import MemoryLimit, check_capacity, memory_limit
from kvtier.host.numa import memory_nodes, split_capacity
from kvtier.host.prefault import STEP_BYTES, Prefaulter
from kvtier.host.slots import Entry, HostSlots, default_max_slots
from kvtier.host.sysmem import Bytes
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State
from kvtier.tier import Slot, Tier, TierUsage


class HostTier(Tier):
    """Objects in one sealed memfd for each NUMA node, shared by descriptor.

    capacity_bytes: of all sub-arenas, cut down to multiples of 4096; raises ConfigError when it is above
    the memory limit minus headroom_bytes.  limit: found on this machine when None.  numa_nodes: the node
    of each sub-arena; those of this machine when None.  fault_in: touch all memory on a thread, and serve
    from the first step on; if not, everything is ready at once, and whoever writes first pays ten copies.
    on_ready(sub_arena, ready_bytes): called from that thread when more is ready; nothing more is given out
    then before the owner calls `grow`, so that an owner which logs its calls has it in its log.  Without
    it the tier grows by itself.  max_slots and first_generation: see HostSlots.  huge_pages: whether to ask
    for them, where the kernel has them.
    """

    name = "host"
    durable = False

    def __init__(
        self,
        capacity_bytes: int,
        *,
        headroom_bytes: int = 0,
        limit: MemoryLimit | None = None,
        numa_nodes: Sequence[int] | None = None,
        fault_in: bool = True,
        on_ready: Callable[[int, int], None] | None = None,
        step_bytes: int = STEP_BYTES,
        max_slots: int | None = None,
        first_generation: int = 1,
        huge_pages: bool = True,
    ) -> None:
        check_capacity(capacity_bytes, headroom_bytes, limit or memory_limit())
        if numa_nodes is None:
            numa_nodes = [node.node_id for node in memory_nodes()]
        sizes = split_capacity(capacity_bytes, max(1, len(numa_nodes)), ALIGN_BYTES)
        slots = default_max_slots(capacity_bytes) if max_slots is None else max_slots
        self._lock = threading.Lock()
        self._arena = Arena(sizes, max_slots=slots, numa_nodes=numa_nodes, huge_pages=huge_pages)
        self._slots = HostSlots(
            sizes,
            ready_bytes=[0] * len(sizes),
            max_slots=slots,
            first_generation=first_generation,
            publish=self._arena.publish,
        )
        self._prefaulter = Prefaulter(
            sizes, self._arena.populate, on_ready or self.grow, step_bytes=step_bytes
        )
        if fault_in:
            self._prefaulter.start()
        else:
            self._prefaulter.skip()

    # -- what is shared

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors for `ArenaView.from_fds`, with `sizes`; they stay this tier's."""
        return self._arena.fds

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes behind each of `fds`."""
        return self._arena.sizes

    @property
    def pages(self) -> str:
        """What pages the memory has, for people; '' when no huge ones were asked for."""
        return self._arena.pages

    @property
    def generation_slots(self) -> int:
        """Entries of the generation table, the last of `fds`; as many slots can be in use at once."""
        return self.sizes[-1] // WORD_BYTES

    def memory(self) -> list[Bytes]:
        """All of each sub-arena, whoever uses what of it: for those who register it."""
        return [self._arena.view((part, 0), self.sizes[part]) for part in range(self._arena.sub_arenas)]

    def view(self, slot: Slot) -> Bytes:
        """The object's bytes in the arena, nbytes long, without a copy.

        For a slot that the caller is filling, or has a lease on: nothing else keeps the room.  Raises
        StaleSlot, TierUnavailable.
        """
        with self._lock:
            entry = self._slots.known(slot)
            return self._arena.view(entry.slot.address, entry.slot.nbytes)

    def room(self, slot: Slot) -> Bytes:
        """As `view`, but up to the next multiple of 4096 bytes, for O_DIRECT; zero behind the object."""
        with self._lock:
            entry = self._slots.known(slot)
            return self._arena.view(entry.slot.address, entry.room)

    def ready_bytes(self) -> int:
        """Bytes that `reserve` gives out by now, used ones included."""
        with self._lock:
            return self._slots.ready_bytes()

    def grow(self, sub_arena: int, ready_bytes: int) -> None:
        """Let the first `ready_bytes` of a sub-arena be given out, which `on_ready` named before."""
        with self._lock:
            self._slots.grow(sub_arena, ready_bytes)

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until all memory is faulted in; answers whether it is. Raises TierUnavailable."""
        return self._prefaulter.wait(timeout_s)

    # -- the contract

    def reserve(self, meta: ObjectMeta, *, holder: str, prefer: int | None = None) -> Slot:
        """As in the contract. prefer: the sub-arena to try first.

        The bytes between the object's end and the next multiple of 4096 are zeroed: disks write whole
        units straight from here, and what lay there before may be another tenant's.
        """
        with self._lock:
            if self._arena.closed:
                raise TierUnavailable("the host tier is closed")
            slot = self._slots.reserve(meta, holder=holder, prefer=prefer)
            self._arena.view(slot.address, room_bytes(slot.nbytes))[slot.nbytes :] = 0
            return slot

    def write(self, slot: Slot, data: Buffer) -> None:
        """As in the contract; a copy without the lock."""
        source = np.frombuffer(data, dtype=np.uint8)
        entry = self._pinned(slot, self._slots.filling, source.nbytes)
        try:
            np.copyto(self._arena.view(entry.slot.address, entry.slot.nbytes), source)
        finally:
            self._unpin(entry)

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
            return self._slots.find(object_id)

    def meta(self, object_id: ObjectId) -> ObjectMeta | None:
        """As in the contract."""
        with self._lock:
            return self._slots.meta(object_id)

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """As in the contract; on a slot being filled, an end to its writer's hold (see HostSlots)."""
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
        """As in the contract; a copy, then a check of the copy, without the lock.

        One long copy and one long hash: alternating them in pieces that fit a cache was a third slower,
        since short copies do not bypass the cache on their way to memory.
        Raises ValueError when `into` is read-only or of another length.
        """
        target = np.frombuffer(into, dtype=np.uint8)
        if not target.flags.writeable:
            raise ValueError("cannot read into a read-only buffer")
        entry = self._pinned(slot, self._slots.readable, target.nbytes)
        try:
            source = self._arena.view(entry.slot.address, entry.slot.nbytes)
            np.copyto(target, source)
            good = checksum(target) == entry.meta.checksum
        finally:
            self._unpin(entry)
        if not good:
            self.quarantine(slot)
            raise CorruptObject(f"{entry.meta.object_id} in {self.name} does not match its checksum")

    def remove(self, object_id: ObjectId) -> int:
        """As in the contract."""
        with self._lock:
            return self._slots.remove(object_id)

    def quarantine(self, slot: Slot) -> None:
        """Forget an object that somebody found corrupt, leased or not; nothing when it is gone already."""
        with self._lock:
            self._slots.quarantine(slot)

    def withdraw(self, slot: Slot) -> bool:
        """Forget an object, leased or not (see HostSlots); answers whether it was there still."""
        with self._lock:
            return self._slots.withdraw(slot)

    def state(self, slot: Slot) -> State:
        """Where the slot stands; ABSENT when it is somebody else's by now."""
        with self._lock:
            return self._slots.state(slot)

    def next_end_s(self) -> float | None:
        """The first end time of a lease, or None when no lease is active."""
        with self._lock:
            return self._slots.next_end_s()

    def victims_window(
        self, nbytes: int, cost_of: Callable[[ObjectId], float | None]
    ) -> list[ObjectId] | None:
        """Neighbours to remove for an object of nbytes (see HostSlots). cost_of runs under the lock."""
        with self._lock:
            return self._slots.victims_window(nbytes, cost_of)

    def objects(self) -> Iterator[ObjectMeta]:
        """As in the contract."""
        with self._lock:
            return self._slots.objects()

    def usage(self) -> TierUsage:
        """As in the contract."""
        with self._lock:
            return self._slots.usage()

    def close(self) -> None:
        """Stop faulting in, unmap, close the descriptors; again is no error."""
        self._prefaulter.stop()
        with self._lock:
            self._arena.close()

    # -- helpers

    def _pinned(self, slot: Slot, check: Callable[[Slot], Entry], nbytes: int) -> Entry:
        """The entry behind the slot, pinned, once `check` lets it pass and the length is right."""
        with self._lock:
            entry = check(slot)
            if nbytes != entry.slot.nbytes:
                raise ValueError(f"buffer of {nbytes} bytes for an object of {entry.slot.nbytes}")
            self._slots.pin(entry)
            return entry

    def _unpin(self, entry: Entry) -> None:
        with self._lock:
            self._slots.unpin(entry)
