"""A GPU's queues without a GPU: streams that run late and in any order, and a detector of races.

Work runs only when somebody waits for it, one operation at a time, from a stream chosen by chance among those
that may go on.  Each operation knows what it comes after (a vector clock: its stream, the events that the
stream waited for, and what the host had seen when it was queued).  Two operations that touch the same bytes,
one of them writing, where neither comes after the other, are a race, even if they ran in a good order.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvtier.gpu.tensors import Bytes

Clock = dict[int, int]
Range = tuple[int, int]


def memory_at(address: int, nbytes: int) -> Bytes:
    """The process's memory at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


class DeviceFault(Exception):
    """An operation did what a real device would stop at."""


@dataclass(slots=True)
class Access:
    """Bytes that an operation touched: begins and ends, ascending, apart. stamp: (stream, number)."""

    lo: npt.NDArray[np.int64]
    hi: npt.NDArray[np.int64]
    writes: bool
    stamp: tuple[int, int]
    what: str

    @classmethod
    def of(cls, ranges: Iterable[Range], writes: bool, stamp: tuple[int, int], what: str) -> Access:
        """Of ranges in any order."""
        merged: list[list[int]] = []
        for lo, hi in sorted(ranges):
            if merged and lo <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], hi)
            else:
                merged.append([lo, hi])
        table = np.array(merged, np.int64).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1], writes, stamp, what)

    def meets(self, other: Access) -> bool:
        """Whether they share a byte that one of them writes."""
        if not (self.writes or other.writes) or not self.lo.size or not other.lo.size:
            return False
        after = np.searchsorted(self.hi, other.lo, "right")
        inside = after < self.lo.size
        return bool((self.lo[after[inside]] < other.hi[inside]).any())


@dataclass(slots=True)
class Marker:
    """What a recorded event stands for."""

    clock: Clock
    reached: bool = False
    time_s: float = 0.0


@dataclass(slots=True)
class Op:
    """Queued work. run: does it, and answers (reads, writes, seconds); None for a recorded event."""

    what: str
    stamp: tuple[int, int]
    clock: Clock
    run: Callable[[], tuple[list[Range], list[Range], float]] | None = None
    marker: Marker | None = None
    waits: Marker | None = None


@dataclass(slots=True)
class _Stream:
    queue: deque[Op] = field(default_factory=deque)
    clock: Clock = field(default_factory=dict)
    issued: int = 0


def merge(into: Clock, other: Clock) -> None:
    """`into` comes after `other` too."""
    for stream, number in other.items():
        into[stream] = max(into.get(stream, 0), number)


class FakeGpu:
    """What several processes share: streams, the order of work, and the log of accesses.

    seed: of the order in which streams go on.  detect: whether races are looked for.
    """

    def __init__(self, seed: int = 0, *, detect: bool = True) -> None:
        self.lock = threading.RLock()
        self._moved = threading.Condition(self.lock)
        self._still: set[int] = set()
        self.races: list[str] = []
        self.fault = ""
        self.time_s = 0.0
        self.executed = 0
        self._random = random.Random(seed)
        self._detect = detect
        self._streams: dict[int, _Stream] = {}
        self._numbers = 1
        self._log: list[Access] = []
        self.handles: dict[bytes, object] = {}

    def number(self) -> int:
        """A number that nothing else has."""
        self._numbers += 1
        return self._numbers

    # -- streams

    def add_stream(self) -> int:
        """A new stream."""
        stream = self.number()
        self._streams[stream] = _Stream()
        return stream

    def drop_stream(self, stream: int) -> None:
        """End it once its work has run."""
        while self._streams[stream].queue:
            self.step()
        del self._streams[stream]

    def enqueue(
        self, stream: int, what: str, host: Clock, run: Callable[[], tuple[list[Range], list[Range], float]]
    ) -> None:
        """Queue work. host: what the process had seen."""
        self._put(stream, what, host).run = run

    def record(self, stream: int, host: Clock) -> Marker:
        """Queue a mark."""
        op = self._put(stream, "record", host)
        op.marker = Marker(dict(self._streams[stream].clock))
        return op.marker

    def wait(self, stream: int, marker: Marker, host: Clock) -> None:
        """What is queued from now on comes after the mark."""
        self._put(stream, "wait", host).waits = marker
        merge(self._streams[stream].clock, marker.clock)

    def _put(self, stream: int, what: str, host: Clock) -> Op:
        there = self._streams[stream]
        merge(there.clock, host)
        there.issued += 1
        op = Op(what, (stream, there.issued), dict(there.clock))
        there.clock[stream] = there.issued
        there.queue.append(op)
        return op

    # -- running

    def step(self) -> bool:
        """Run one operation of a stream that may go on; False when there is none."""
        ready = [
            s
            for number, s in self._streams.items()
            if s.queue
            and number not in self._still
            and (s.queue[0].waits is None or s.queue[0].waits.reached)
        ]
        if not ready:
            return False
        op = self._random.choice(ready).queue.popleft()
        self.executed += 1
        if op.marker is not None:
            op.marker.reached, op.marker.time_s = True, self.time_s
        if op.run is not None and not self.fault:
            self._run(op)
        return True

    def _run(self, op: Op) -> None:
        assert op.run is not None
        try:
            reads, writes, seconds = op.run()
        except DeviceFault as fault:
            self.fault = f"{op.what}: {fault}"
            return
        self.time_s += seconds
        if self._detect:
            self.note(Access.of(reads, False, op.stamp, op.what), op.clock)
            self.note(Access.of(writes, True, op.stamp, op.what), op.clock)

    def note(self, access: Access, clock: Clock) -> None:
        """Log an access, and compare it with those before."""
        for other in self._log:
            stream, number = other.stamp
            if other.stamp != access.stamp and clock.get(stream, 0) < number and access.meets(other):
                self.races.append(f"{access.what} {access.stamp} and {other.what} {other.stamp}")
        if access.lo.size:
            self._log.append(access)
        if len(self._log) > 256:
            self._prune()

    def _prune(self) -> None:
        """Forget what everything that is still to run comes after."""
        clocks = [op.clock for s in self._streams.values() for op in s.queue]
        clocks += [s.clock for s in self._streams.values()]
        self._log = [a for a in self._log if any(clock.get(a.stamp[0], 0) < a.stamp[1] for clock in clocks)][
            -2048:
        ]

    def run_until(self, marker: Marker) -> None:
        """Run until the mark is reached; waits for streams that stand. DeviceFault when it never will be."""
        while not marker.reached:
            if self.step():
                continue
            if not self._still:
                raise DeviceFault("a stream waits for what nobody will do")
            self._moved.wait(1.0)

    def stand(self, stream: int) -> None:
        """What is queued on the stream does not run until go_on(): as behind a kernel that waits."""
        with self.lock:
            self._still.add(stream)

    def go_on(self) -> None:
        """Every stream runs again."""
        with self.lock:
            self._still.clear()
            self._moved.notify_all()
