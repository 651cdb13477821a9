"""The second mode: the GPU actor maps a worker's pool by CUDA IPC, and copies by itself.

Not run on a GPU yet, and unproven until it is: the logic runs in tests on a fake device with two processes'
views of it.

    worker  export_pool(device, pool)            a description: handles of allocations, offsets, the layout
    actor   MappedPool.attach(device, said)      maps each allocation once; a Pool for the copy engine
    both    probe: the worker writes a random pattern into scratch pages and says its digest; the actor reads
            it, writes another, and the worker reads that.  Only then is the mapping used.
    both    EventRing.handles() -> PeerEvents    events of one side that the other's streams wait for: the
            worker's before a park or restore, the actor's after each layer of a restore
    actor   close() when the worker's process has ended (a pidfd says so), after its batches were answered

A mapping keeps the worker's memory alive on the device, even past the worker's end, until it is closed.  What
CUDA gives no handle for is refused at export with the fix: expandable segments and other virtual memory
management (cuMem*, sleep-mode allocators), and memory of the driver's own pools (cudaMallocAsync).
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.device import Device, Event, Stream
from kvtier.gpu.cuda.events import DeviceEvent, mark
from kvtier.gpu.cuda.shapes import ShapeCache, pieces_of
from kvtier.gpu.engine import StreamEvent
from kvtier.gpu.pool import Pool
from kvtier.gpu.shared_pool import Answer, Challenge, layout_from, whole
from kvtier.gpu.tensors import Bytes, DeviceBytes

VERSION = 1
# CUDA's have 64 bytes.
MOST_HANDLE_BYTES = 256
# A restore of a large model takes some 80 for its layers, a park as many.
RING_EVENTS = 256


def export_pool(device: Device, pool: Pool) -> dict[str, Any]:
    """A description of plain values and bytes for another process. Raises GeometryError, TierUnavailable."""
    handles: list[bytes] = []
    numbers: dict[int, int] = {}
    buffers = []
    for address, nbytes in _buffers(pool):
        base, _ = device.extent(address)
        if base not in numbers:
            handle, _ = device.export_memory(address)
            numbers[base] = len(handles)
            handles.append(handle)
        buffers.append({"handle": numbers[base], "offset": address - base, "nbytes": nbytes})
    return {
        "version": VERSION,
        "device": device.identity,
        "handles": handles,
        "buffers": buffers,
        "layout": asdict(pool.layout),
    }


def _buffers(pool: Pool) -> list[tuple[int, int]]:
    """(address, bytes) of each of the layout's buffers."""
    if pool.device_memory:
        return [(part.address, part.nbytes) for part in pool.device_memory]
    return [(int(part.ctypes.data), part.nbytes) for part in pool.memory]


class MappedPool:
    """Another process's pool, mapped here. pool: over the mapping."""

    def __init__(self, device: Device, addresses: Sequence[int], pool: Pool) -> None:
        self._device = device
        self._addresses = list(addresses)
        self.pool = pool

    @classmethod
    def attach(cls, device: Device, description: Mapping[str, Any]) -> MappedPool:
        """Map what was described.

        Raises GeometryError for a description that is malformed, of another device, or reaches past the end
        of an allocation; TierUnavailable when CUDA refuses.  Then nothing stays mapped.
        """
        if description.get("version") != VERSION or description.get("device") != device.identity:
            raise GeometryError(
                "the pool's description is of another version or device",
                fix=f"this process uses the device {device.identity}",
            )
        mapped: list[int] = []
        try:
            for handle in handles_of(description, "handles"):
                mapped.append(device.open_memory(handle))
            return cls(device, mapped, _pool_over(device, mapped, description))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            _unmap(device, mapped)
            raise GeometryError(f"the description of a pool is malformed: {error!r}") from error
        except BaseException:
            _unmap(device, mapped)
            raise

    def close(self) -> None:
        """Unmap. No copy may run; again is no error."""
        _unmap(self._device, self._addresses)


def handles_of(description: Mapping[str, Any], name: str) -> list[bytes]:
    """CUDA's handles in a description that another process sent. Raises GeometryError."""
    handles = description.get(name)
    if not isinstance(handles, list):
        raise GeometryError(f"the description of a pool has no {name}")
    for handle in handles:
        # bytes() of a number would be that many zeros.
        if not isinstance(handle, bytes) or not 0 < len(handle) <= MOST_HANDLE_BYTES:
            raise GeometryError(f"one of the {name} in the description of a pool is no handle")
    return list(handles)


def _pool_over(device: Device, mapped: Sequence[int], description: Mapping[str, Any]) -> Pool:
    parts = []
    for buffer in description["buffers"]:
        number, offset, nbytes = (whole(buffer[name]) for name in ("handle", "offset", "nbytes"))
        base, size = device.extent(mapped[number])
        if mapped[number] + offset + nbytes > base + size:
            raise GeometryError("a buffer of the pool reaches past the end of its allocation")
        parts.append(DeviceBytes(mapped[number] + offset, nbytes, device.location, None))
    sizes = {"offsets": [0] * len(parts), "nbytes": max(part.nbytes for part in parts)}
    return Pool(layout_from({**sizes, "layout": description["layout"]}), parts)


def _unmap(device: Device, mapped: list[int]) -> None:
    while mapped:
        device.close_memory(mapped.pop())


# -- events between processes


class EventRing:
    """Events of this process that another waits for, used in turn. Calls from any thread.

    The other side is told an event's number after it was recorded.  An event that is recorded again before
    the other side waited stands for the later point: it waits longer than it must, never less.  Once it is
    closed, nothing is recorded any more.
    """

    def __init__(self, device: Device, count: int = RING_EVENTS) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._closed = False
        self._stream = device.stream()
        self._events: list[Event] = []
        self._next = 0
        try:
            for _ in range(count):
                self._events.append(device.event(shared=True))
        except TierUnavailable:
            self.close()
            raise

    def handles(self) -> list[bytes]:
        """What the other side opens. Raises TierUnavailable."""
        with self._lock:
            self._open()
            return [self.device.export_event(event) for event in self._events]

    def mark(self, stream: Stream) -> int:
        """Number of an event for all that is queued on a stream so far. Raises TierUnavailable."""
        with self._lock:
            self._open()
            return self._record(stream)

    def relay(self, *events: StreamEvent) -> int:
        """Number of an event that comes after these, such as a layer's. Raises TierUnavailable."""
        with self._lock:
            self._open()
            for event in events:
                event.wait(self._stream)
            return self._record(self._stream)

    def _open(self) -> None:
        if self._closed:
            raise TierUnavailable("the events are closed: nothing waits for them any more")

    def _record(self, stream: Stream) -> int:
        number, self._next = self._next, (self._next + 1) % len(self._events)
        self.device.record(self._events[number], stream)
        return number

    def close(self) -> None:
        """Destroy them; again is no error. The other side must ask them no more: see EventRings."""
        with self._lock:
            closed, self._closed = self._closed, True
            if closed:
                return
            for event in self._events:
                self.device.destroy_event(event)
            self.device.destroy_stream(self._stream)


class EventRings:
    """Rings for one worker's pool after the other. Calls from any thread.

    CUDA leaves undefined what another process's operations on an event do after it was destroyed here
    (cudaIpcOpenEventHandle).  The other side asks this process's events until it has heard that they mean
    nothing any more, which this process cannot know: so a ring is not destroyed, but used again, the one that
    was given back first.  Whoever still asks of its last user's events waits for a later point, or gets the
    answer that they were reached.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[EventRing] = []

    def take(self, device: Device) -> EventRing:
        """A ring of this device. Raises TierUnavailable."""
        with self._lock:
            for number, ring in enumerate(self._free):
                if ring.device is device:
                    return self._free.pop(number)
        return EventRing(device)

    def give(self, ring: EventRing) -> None:
        """Its user records nothing in it any more."""
        with self._lock:
            self._free.append(ring)

    def close(self) -> None:
        """Destroy those that were given back. No process may be there that asks them."""
        with self._lock:
            while self._free:
                self._free.pop().close()


class PeerEvents:
    """Another process's ring, opened here; an event stays open as long as somebody has it.

    Raises TierUnavailable, and then nothing stays open.
    """

    def __init__(self, device: Device, handles: Sequence[bytes]) -> None:
        self._events: list[StreamEvent] = []
        try:
            for handle in handles:
                self._events.append(DeviceEvent(device, device.open_event(handle)))
        except TierUnavailable:
            self.close()
            raise

    def event(self, number: int) -> StreamEvent:
        """The event with this number. Raises GeometryError."""
        if not 0 <= number < len(self._events):
            raise GeometryError(f"there are {len(self._events)} events, not one numbered {number}")
        return self._events[number]

    def close(self) -> None:
        """Give them back."""
        self._events.clear()


# -- the copy-and-compare probe


class Prober:
    """Reads and writes scratch pages of group 0 by plain copies, on either side of the probe."""

    def __init__(self, device: Device, pool: Pool) -> None:
        self._device, self._pool = device, pool
        self._challenge: Challenge | None = None
        self._digest = b""

    def challenge(self, pages: Sequence[int]) -> Challenge:
        """On the worker's side: write a random pattern into the pages, whose content is lost."""
        self._challenge = Challenge(tuple(pages), secrets.token_bytes(16))
        self._digest = self._write(self._challenge)
        return self._challenge

    def answer(self, challenge: Challenge, may_write: Callable[[], None] = lambda: None) -> Answer:
        """On the actor's side: read the pages, then write another pattern into them.

        may_write: called right before that; raises where the pages are not this probe's any more.
        """
        seen = self._read(challenge)
        return Answer(seen, self._write(challenge, may_write))

    def judge(self, answer: Answer) -> bool:
        """On the worker's side: whether each read what the other wrote."""
        if self._challenge is None:
            return False
        seen = secrets.compare_digest(answer.seen, self._digest)
        written = secrets.compare_digest(answer.written, self._read(self._challenge))
        return seen and written and answer.seen != answer.written

    def _write(self, challenge: Challenge, may_write: Callable[[], None] = lambda: None) -> bytes:
        def pattern(size: int) -> Bytes:
            made = np.frombuffer(secrets.token_bytes(size), np.uint8)
            # Here the device has given all memory that it may take its time for.
            may_write()
            return made

        self._copy(challenge.pages, pattern)
        return self._read(challenge)

    def _read(self, challenge: Challenge) -> bytes:
        data = self._copy(challenge.pages, None)
        return hashlib.blake2b(data, key=challenge.nonce, digest_size=16).digest()

    def _copy(self, pages: Sequence[int], fill: Callable[[int], Bytes] | None) -> bytes:
        """All bytes of the pages through pinned memory: out of them, or into them when `fill` is given."""
        device = self._device
        binding = self._pool.bind(pages)
        tokens = len(pages) * self._pool.layout.page_tokens(0)
        shape = ShapeCache().shape(binding, 0, 0, tokens, 0)
        pieces = pieces_of(shape, binding.page_ids(0, 0, tokens, 0), 0, shape.nbytes)
        host, stream = device.pinned(shape.nbytes), device.stream()
        try:
            host[:] = 0 if fill is None else fill(shape.nbytes)
            begin = int(host.ctypes.data)
            rows = zip(pieces.address.tolist(), pieces.offset.tolist(), pieces.nbytes.tolist(), strict=True)
            for address, offset, nbytes in rows:
                target, source = (begin + offset, address) if fill is None else (address, begin + offset)
                device.copy(target, source, nbytes, stream)
            mark(device, stream).synchronize()
            return host.tobytes()
        finally:
            device.destroy_stream(stream)
            device.free_pinned(host)
