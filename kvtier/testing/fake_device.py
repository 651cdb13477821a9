"""A device for the CUDA engine on a machine without one: numpy memory, late work, faults on demand.

Addresses are this process's own, so a pool of numpy arrays serves as device memory once it is adopted.
Staging is poisoned.  Work on memory that is not the device's, or not registered, is a fault, after which
every call fails, as on a real device.  A test looks at `races`, `leaks()` and `fault` at its end.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.device import CODED, Event, Kernel, Stream, Words
from kvtier.gpu.cuda.work import SEGMENT
from kvtier.gpu.tensors import Bytes
from kvtier.testing import fake_device_coded as coded_kernels
from kvtier.testing import fake_device_kernels as kernels
from kvtier.testing.fake_device_gpu import (
    Access,
    Clock,
    DeviceFault,
    FakeGpu,
    Marker,
    Range,
    memory_at,
    merge,
)

POISON = 0xA5
LINK_BYTES_S = 50e9
DEVICE_BYTES_S = 500e9
CALL_S = 5e-6
ALL_BYTES = 80 << 30


@dataclass(slots=True)
class _Event:
    """owner: its process. ended: it was destroyed there, and nobody may use it any more."""

    timed: bool
    shared: bool
    owner: int
    marker: Marker | None = None
    ended: bool = False


@dataclass(frozen=True, slots=True)
class _Region:
    memory: Bytes
    kind: str

    def holds(self, lo: int, hi: int) -> bool:
        begin = int(self.memory.ctypes.data)
        return begin <= lo and hi <= begin + self.memory.nbytes


class FakeDevice:
    """One process's view of a FakeGpu. seed: of the order in which streams go on, where no gpu is given."""

    def __init__(self, seed: int = 0, *, gpu: FakeGpu | None = None, can_batch: bool = True) -> None:
        self.name = "fake"
        self.identity = "fake"
        self.location = "cpu"
        self.can_batch = can_batch
        self.context_bytes = 0
        self.gpu = gpu or FakeGpu(seed)
        # 'registered' or 'device': the next write to such memory has a bit wrong.
        self.flip_next = ""
        self.launched: list[str] = []
        self._host: Clock = {}
        self._process = self.gpu.number()
        self._looks = 0
        self._events: dict[Event, _Event] = {}
        self._own_streams: set[Stream] = set()
        self._regions: dict[int, _Region] = {}
        self._mapped: dict[int, int] = {}
        self._failing: dict[str, int] = {}
        # What the process's thread queues its model on, unless a test says otherwise.
        self.current: Stream = self.gpu.add_stream()
        self.captured: set[Stream] = set()

    # -- for tests

    @property
    def races(self) -> list[str]:
        """What was found so far."""
        return self.gpu.races

    def adopt(self, memory: Bytes, *, kind: str = "device") -> None:
        """Take an array for device memory. kind 'virtual': of an allocator that cannot be exported."""
        self._regions[int(memory.ctypes.data)] = _Region(memory.reshape(-1).view(np.uint8), kind)

    def fail(self, method: str, after: int = 0) -> None:
        """Let a method raise once, after so many calls that succeed."""
        self._failing[method] = after

    def break_down(self, message: str) -> None:
        """From now on nothing works."""
        with self.gpu.lock:
            self.gpu.fault = message

    def write(self, memory: Bytes, values: Bytes, stream: Stream) -> None:
        """Queue what a model's kernel would do: put values into pool memory."""
        lo = int(memory.ctypes.data)

        def run() -> tuple[list[Range], list[Range], float]:
            memory[...] = values
            return [], [(lo, lo + memory.nbytes)], CALL_S

        self._enqueue(stream, "model", run)

    def look(self, memory: Bytes, *, writes: bool = False) -> None:
        """The process itself touches memory now: a race unless it waited for what the device does there."""
        with self.gpu.lock:
            self._looks += 1
            lo = int(memory.ctypes.data)
            stamp = (self._process, self._looks)
            self.gpu.note(Access.of([(lo, lo + memory.nbytes)], writes, stamp, "host"), self._host)
            self._host[self._process] = self._looks

    def hears(self, other: FakeDevice) -> None:
        """A message from another process: what it had waited for has happened, for this process too."""
        with self.gpu.lock:
            merge(self._host, other._host)

    def leaks(self) -> list[str]:
        """What was taken from this device and not given back."""
        with self.gpu.lock:
            kept = [r.kind for r in self._regions.values() if r.kind not in ("device", "virtual")]
            return [
                *kept,
                *["event"] * len(self._events),
                *["stream"] * len(self._own_streams),
                *["mapping"] * len(self._mapped),
            ]

    def run_all(self) -> None:
        """Let everything that is queued run."""
        with self.gpu.lock:
            while self.gpu.step():
                pass

    def _check(self, method: str) -> None:
        if self.gpu.fault:
            raise TierUnavailable(f"the device is lost: {self.gpu.fault}")
        if method in self._failing:
            self._failing[method] -= 1
            if self._failing[method] < 0:
                del self._failing[method]
                raise TierUnavailable(f"{method} failed")

    # -- Device

    def enter(self) -> None:
        """See Device."""

    def current_stream(self) -> Stream:
        """See Device."""
        return self.current

    def capturing(self, stream: Stream) -> bool:
        """See Device."""
        return stream in self.captured

    def stream(self) -> Stream:
        """See Device."""
        with self.gpu.lock:
            self._check("stream")
            made = self.gpu.add_stream()
            self._own_streams.add(made)
            return made

    def destroy_stream(self, stream: Stream) -> None:
        """See Device."""
        with self.gpu.lock:
            self._check("destroy_stream")
            self.gpu.drop_stream(stream)
            self._own_streams.remove(stream)

    def event(self, *, timed: bool = False, shared: bool = False) -> Event:
        """See Device."""
        with self.gpu.lock:
            self._check("event")
            made = self.gpu.number()
            self._events[made] = _Event(timed, shared, self._process)
            return made

    def destroy_event(self, event: Event) -> None:
        """See Device."""
        with self.gpu.lock:
            self._check("destroy_event")
            ending = self._events.pop(event)
            ending.ended = ending.ended or ending.owner == self._process

    def record(self, event: Event, stream: Stream) -> None:
        """See Device."""
        with self.gpu.lock:
            self._check("record")
            self._events[event].marker = self.gpu.record(stream, self._host)

    def wait(self, stream: Stream, event: Event) -> None:
        """See Device. CUDA takes an event that was not recorded for one that is done; here it is an error."""
        with self.gpu.lock:
            self._check("wait")
            self.gpu.wait(stream, self._marker(event), self._host)

    def done(self, event: Event) -> bool:
        """See Device. Now and then it lets some work run, so that who asks often enough gets an answer."""
        with self.gpu.lock:
            self._check("done")
            marker = self._marker(event)
            if not marker.reached:
                self.gpu.step()
            if marker.reached:
                merge(self._host, marker.clock)
            return marker.reached

    def synchronize(self, event: Event) -> None:
        """See Device."""
        with self.gpu.lock:
            self._check("synchronize")
            marker = self._marker(event)
            try:
                self.gpu.run_until(marker)
            except DeviceFault as fault:
                raise TierUnavailable(str(fault)) from fault
            self._check("synchronize")
            merge(self._host, marker.clock)

    def elapsed_s(self, begin: Event, end: Event) -> float:
        """See Device. By a plain model of a link and a device."""
        with self.gpu.lock:
            if not (self._events[begin].timed and self._events[end].timed):
                raise TierUnavailable("an event without time")
            return self._marker(end).time_s - self._marker(begin).time_s

    def _marker(self, event: Event) -> Marker:
        if self._events[event].ended:
            self.gpu.races.append("an event of another process, which had destroyed it")
        marker = self._events[event].marker
        if marker is None:
            raise TierUnavailable(f"event {event} was not recorded")
        return marker

    def allocate(self, nbytes: int) -> int:
        """See Device."""
        self._check("allocate")
        return self._take(nbytes, "allocation")

    def free(self, address: int) -> None:
        """See Device."""
        with self.gpu.lock:
            self._check("free")
            del self._regions[address]

    def pinned(self, nbytes: int) -> Bytes:
        """See Device."""
        self._check("pinned")
        return self._regions[self._take(nbytes, "pinned")].memory

    def free_pinned(self, memory: Bytes) -> None:
        """See Device."""
        self.free(int(memory.ctypes.data))

    def _take(self, nbytes: int, kind: str) -> int:
        raw = np.full(nbytes + 256, POISON, np.uint8)
        start = -int(raw.ctypes.data) % 256
        memory = raw[start : start + nbytes]
        with self.gpu.lock:
            self._regions[int(memory.ctypes.data)] = _Region(memory, kind)
        return int(memory.ctypes.data)

    def register(self, memory: Bytes) -> None:
        """See Device."""
        with self.gpu.lock:
            self._check("register")
            if int(memory.ctypes.data) in self._regions:
                raise TierUnavailable("the memory is registered already")
            self._regions[int(memory.ctypes.data)] = _Region(memory, "registered")

    def unregister(self, memory: Bytes) -> None:
        """See Device."""
        self.free(int(memory.ctypes.data))

    def device_address(self, host_address: int) -> int:
        """See Device."""
        self._need([(host_address, host_address + 1)], ("registered", "pinned"))
        return host_address

    def memory_info(self) -> tuple[int, int]:
        """See Device."""
        return ALL_BYTES - sum(r.memory.nbytes for r in self._regions.values()), ALL_BYTES

    def _need(self, ranges: list[Range], kinds: tuple[str, ...]) -> None:
        for lo, hi in ranges:
            if not any(r.kind in kinds and r.holds(lo, hi) for r in self._regions.values()):
                raise DeviceFault(f"[{lo:#x}, {hi:#x}) is not {' or '.join(kinds)} memory")

    # -- work

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See Device."""
        self._check("copy")
        self._enqueue(stream, "copy", lambda: self._copies([(target, source, nbytes)]))

    def copy_batch(self, targets: Words, sources: Words, sizes: Words, stream: Stream) -> None:
        """See Device."""
        self._check("copy_batch")
        triples = list(zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True))
        self._enqueue(stream, "copy_batch", lambda: self._copies(triples))

    def _copies(self, triples: list[tuple[int, int, int]]) -> tuple[list[Range], list[Range], float]:
        reads = [(source, source + n) for _, source, n in triples]
        writes = [(target, target + n) for target, _, n in triples]
        every = ("device", "virtual", "allocation", "registered", "pinned", "mapped")
        self._need([*reads, *writes], every)
        for target, source, n in triples:
            memory_at(target, n)[:] = memory_at(source, n)
        total = sum(n for _, _, n in triples)
        self._flip(writes)
        return reads, writes, CALL_S + total / LINK_BYTES_S

    def launch(
        self,
        kernel: Kernel,
        segments: int,
        count: int,
        tiles: int,
        base: int,
        stream: Stream,
        more: tuple[int, int] = (0, 0),
    ) -> None:
        """See Device."""
        self._check("launch")
        self.launched.append(kernel)
        if kernel in CODED:
            self._enqueue(stream, kernel, lambda: self._coded(kernel, segments, tiles, base, more))
        else:
            self._enqueue(stream, kernel, lambda: self._kernel(kernel, segments, count, tiles, base))

    def _coded(
        self, kernel: Kernel, segments: int, tiles: int, base: int, more: tuple[int, int]
    ) -> tuple[list[Range], list[Range], float]:
        described = [(segments, segments + SEGMENT.itemsize)]
        self._need(described, ("allocation",))
        pool, reads, writes = coded_kernels.run(kernel, segments, tiles, base, more)
        self._need(pool, ("device", "virtual", "mapped", "allocation"))
        self._need([*reads, *writes], ("allocation",))
        self._flip(pool if kernel == "decode" else writes)
        reads, writes = [*described, *reads], [*writes]
        (writes if kernel == "decode" else reads).extend(pool)
        return reads, writes, CALL_S + sum(hi - lo for lo, hi in pool) / DEVICE_BYTES_S

    def _kernel(
        self, kernel: Kernel, segments: int, count: int, tiles: int, base: int
    ) -> tuple[list[Range], list[Range], float]:
        described = [(segments, segments + count * SEGMENT.itemsize)]
        self._need(described, ("allocation",))
        if kernel == "checksum":
            pool, other = kernels.sums(segments, count, tiles, base)
            self._need(other, ("allocation",))
            reads, writes = [*described, *pool], other
        else:
            pool, other = kernels.move(kernel, segments, count, tiles, base)
            self._need(other, ("allocation", "registered"))
            inside, outside = (
                ([*described, *pool], other) if kernel == "gather" else ([*described, *other], pool)
            )
            reads, writes = inside, outside
            self._flip(writes)
        self._need(pool, ("device", "virtual", "mapped", "allocation"))
        return reads, writes, CALL_S + sum(hi - lo for lo, hi in pool) / DEVICE_BYTES_S

    def _flip(self, writes: list[Range]) -> None:
        for region in self._regions.values() if self.flip_next else ():
            hit = [lo for lo, hi in writes if region.kind == self.flip_next and region.holds(lo, hi)]
            if hit:
                self.flip_next = ""
                memory_at(hit[-1], 1)[0] ^= 1
                return

    def _enqueue(
        self, stream: Stream, what: str, run: Callable[[], tuple[list[Range], list[Range], float]]
    ) -> None:
        with self.gpu.lock:
            self.gpu.enqueue(stream, what, self._host, run)

    # -- other processes

    def extent(self, address: int) -> tuple[int, int]:
        """See Device."""
        for region in self._regions.values():
            if region.holds(address, address + 1):
                return int(region.memory.ctypes.data), region.memory.nbytes
        raise TierUnavailable(f"{address:#x} is no device memory")

    def export_memory(self, address: int) -> tuple[bytes, int]:
        """See Device."""
        for region in self._regions.values():
            if region.holds(address, address + 1) and region.kind in ("device", "virtual", "allocation"):
                if region.kind == "virtual":
                    raise GeometryError("memory of expandable segments has no handle for other processes")
                handle = secrets.token_bytes(64)
                self.gpu.handles[handle] = region.memory
                return handle, address - int(region.memory.ctypes.data)
        raise GeometryError(f"{address:#x} is no device memory")

    def open_memory(self, handle: bytes) -> int:
        """See Device."""
        self._check("open_memory")
        memory = self.gpu.handles.get(handle)
        if not isinstance(memory, np.ndarray):
            raise TierUnavailable("no such handle")
        address = int(memory.ctypes.data)
        with self.gpu.lock:
            self._regions[address] = _Region(memory, "mapped")
            # As CUDA counts: mapped until it was closed as often as it was opened.
            self._mapped[address] = self._mapped.get(address, 0) + 1
        return address

    def close_memory(self, address: int) -> None:
        """See Device."""
        with self.gpu.lock:
            self._mapped[address] -= 1
            if not self._mapped[address]:
                del self._mapped[address], self._regions[address]

    def export_event(self, event: Event) -> bytes:
        """See Device."""
        if not self._events[event].shared:
            raise TierUnavailable("the event is not for other processes")
        handle = secrets.token_bytes(64)
        self.gpu.handles[handle] = self._events[event]
        return handle

    def open_event(self, handle: bytes) -> Event:
        """See Device."""
        state = self.gpu.handles.get(handle)
        if not isinstance(state, _Event):
            raise TierUnavailable("no such handle")
        with self.gpu.lock:
            made = self.gpu.number()
            self._events[made] = state
            return made
