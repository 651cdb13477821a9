"""The engine's own memory: the registered arena, the staging ring, and room for descriptors.

Not run on a GPU yet.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.errors import TierUnavailable
from kvtier.gpu.cuda.device import Device, Event
from kvtier.gpu.tensors import Bytes

SMALLEST_BLOB = 64 << 10


class PinnedArena:
    """The host arena's mappings, registered with the device once, so that slots are copied as they are.

    Registering faults in and locks every page, which takes some tenths of a second a gigabyte; so it is done
    when a worker attaches, not while it serves.  Raises TierUnavailable when the device refuses.
    """

    def __init__(self, device: Device, mappings: Sequence[Bytes]) -> None:
        self._device = device
        self._registered: list[Bytes] = []
        try:
            for memory in mappings:
                device.register(memory)
                self._registered.append(memory)
        except TierUnavailable:
            self.close()
            raise

    def address(self, slot: Bytes) -> int:
        """The slot's address. Raises TierUnavailable for memory that was not registered."""
        begin = int(slot.ctypes.data)
        for memory in self._registered:
            offset = begin - int(memory.ctypes.data)
            if offset >= 0 and offset + slot.nbytes <= memory.nbytes:
                return begin
        raise TierUnavailable("the slot's memory is not registered with the device")

    def close(self) -> None:
        """Unregister everything. No copy may run."""
        while self._registered:
            self._device.unregister(self._registered.pop())


@dataclass(slots=True)
class StagingSlot:
    """Device memory for one load. free: its own event, after which it may be filled again, once it was used.

    An event of the lane's pool would do, but may by then stand for a later load, and hold this one up.
    """

    address: int
    free: Event
    used: bool = False


class StagingRing:
    """Slots that loads take in turn. One lane's own."""

    def __init__(self, device: Device, slots: int, slot_bytes: int) -> None:
        self._device = device
        self.slot_bytes = slot_bytes
        self.nbytes = slots * slot_bytes
        self._address = device.allocate(self.nbytes)
        self._slots: list[StagingSlot] = []
        self._next = 0
        try:
            for i in range(slots):
                self._slots.append(StagingSlot(self._address + i * slot_bytes, device.event()))
        except TierUnavailable:
            self.close()
            raise

    def take(self) -> StagingSlot:
        """The slot whose last load is the longest ago."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        return slot

    def close(self) -> None:
        """Free it. No copy may run."""
        for slot in self._slots:
            self._device.destroy_event(slot.free)
        self._device.free(self._address)


@dataclass(slots=True, eq=False)
class Blob:
    """Room for a batch's descriptors: pinned host memory, and as much on the device."""

    host: Bytes
    address: int


class BlobPool:
    """Blobs, used again by later batches. take() and give() from any thread."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: list[Blob] = []
        self.nbytes = 0

    def take(self, nbytes: int) -> Blob:
        """A blob of at least this many bytes."""
        with self._lock:
            fitting = [blob for blob in self._free if blob.host.nbytes >= nbytes]
            if fitting:
                best = min(fitting, key=lambda blob: blob.host.nbytes)
                self._free.remove(best)
                return best
            size = max(SMALLEST_BLOB, 1 << (nbytes - 1).bit_length())
            host = self._device.pinned(size)
            try:
                address = self._device.allocate(size)
            except TierUnavailable:
                self._device.free_pinned(host)
                raise
            self.nbytes += size
            return Blob(host, address)

    def give(self, blob: Blob) -> None:
        """No work that reads it is queued any more."""
        with self._lock:
            self._free.append(blob)

    def close(self) -> None:
        """Free what was given back."""
        with self._lock:
            for blob in self._free:
                self._device.free_pinned(blob.host)
                self._device.free(blob.address)
            self._free.clear()
