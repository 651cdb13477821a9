"""A recorded day once more, with simulated services: how many decisions come out otherwise.

What workers, clients and processes did comes at its recorded times.  What the GPU and disk services answered
is forgotten: simulated ones answer, as fast as those of *another* recorded run were.  Beside it the log
itself is replayed, and whatever the two cores decide about the same request is compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from kvtier import messages as m
from kvtier import tier_messages as t
from kvtier.errors import KvtierError
from kvtier.node import journal
from kvtier.node.core import NodeCore
from kvtier.node.events import Received, Send, Stimulus
from kvtier.policy.interfaces import Policies
from kvtier.sim.cluster.core_disk import SimulatedDisk
from kvtier.sim.cluster.core_services import CoreServices, Lines
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.links import Drive, Link
from kvtier.sim.stimuli import slots_of

_Entry = dict[str, Any]
_MakePolicies = Callable[[], Policies]
# What services say; all else is load.
_ANSWERS: Final = (t.Copied, t.DiskWritten, t.DiskReadDone, t.DiskRemoved, t.DiskUsage)
_BATCH_BYTES: Final = 32 << 20
# Where nothing was seen, and where more bytes took no longer.
_MOST_FITTED: Final = 1000
_FASTEST: Final = (0.0, 1e12)


@dataclass(frozen=True, slots=True)
class Speed:
    """seconds = start_s + bytes / bytes_per_s."""

    start_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How fast a node's services were. gather: from the pool to host memory; scatter: back."""

    gather: Speed
    scatter: Speed
    read: Speed
    write: Speed


@dataclass(frozen=True, slots=True)
class Answer:
    """What one core said. choice: what is compared; from_tiers: tokens by tier."""

    choice: tuple[object, ...]
    from_tiers: dict[str, int]


@dataclass(frozen=True, slots=True)
class Decision:
    """What both cores decided about one request.

    kind: 'plan' (how far to load, the rest is computed), 'park' (the level that was reached) or 'restore'
    (how many tokens came back), each with its reason.  from_tiers: tokens to load, by the tier that had them.
    """

    kind: str
    peer: str
    request: int
    recorded: Answer | None
    simulated: Answer | None

    @property
    def same(self) -> bool:
        """Whether they chose the same."""
        mine, other = self.recorded, self.simulated
        return mine is not None and other is not None and mine.choice == other.choice

    @property
    def misplaced_tokens(self) -> int:
        """Tokens to load that one core had in another tier than the other one, or not at all."""
        mine = self.recorded.from_tiers if self.recorded is not None else {}
        other = self.simulated.from_tiers if self.simulated is not None else {}
        return max(
            sum(max(mine.get(k, 0) - other.get(k, 0), 0) for k in mine),
            sum(max(other.get(k, 0) - mine.get(k, 0), 0) for k in other),
        )


@dataclass(frozen=True, slots=True)
class _Order:
    """What a service was asked to do. line: those of one line are done one after the other."""

    at_s: float
    kind: str
    line: str
    nbytes: int


def calibrate(entries: Iterable[_Entry], make_policies: _MakePolicies, secret: bytes) -> Calibration:
    """Fit the services of a recorded run: how long each order took, once those before it were done."""
    asked: dict[tuple[str, str, int], _Order] = {}
    free_s: dict[str, float] = {}
    seen: dict[str, list[tuple[int, float]]] = {"gather": [], "scatter": [], "read": [], "write": []}
    for at_s, stimulus, sends in _replayed(entries, make_policies, secret):
        message = stimulus.message if isinstance(stimulus, Received) else None
        if isinstance(message, t.Copied | t.DiskReadDone | t.DiskWritten):
            order = asked.pop(_job(message), None)
            if order is not None:
                begun_s = max(order.at_s, free_s.get(order.line, 0.0))
                seen[order.kind].append((order.nbytes, at_s - begun_s))
                free_s[order.line] = at_s
        for send in sends:
            found = _ordered(at_s, send.message)
            if found is not None:
                asked[_job(send.message)] = found
    return Calibration(**{kind: _fitted(pairs) for kind, pairs in seen.items()})


def _ordered(at_s: float, message: m.Message) -> _Order | None:
    if isinstance(message, t.Copy):
        nbytes = sum(item.nbytes for item in message.items)
        return _Order(at_s, message.direction, f"{message.worker} {message.direction}", nbytes)
    if isinstance(message, t.DiskRead | t.DiskWrite):
        kind = "read" if isinstance(message, t.DiskRead) else "write"
        return _Order(at_s, kind, kind, sum(item.nbytes for item in message.slots))
    return None


def compare(
    entries: Iterable[_Entry], make_policies: _MakePolicies, secret: bytes, calibration: Calibration
) -> list[Decision]:
    """Every plan, park and restore of a recorded run beside its simulation, in order of their answers.

    Raises KvtierError for what is no log, or one of several starts of a node.
    """
    simulated: _Simulated | None = None
    recorded = _Answers()
    for at_s, stimulus, sends in _replayed(entries, make_policies, secret):
        if isinstance(stimulus, journal.Origin):
            if simulated is not None:
                raise KvtierError("the log has several starts of the node", fix="cut it at the second one")
            simulated = _Simulated(_core(stimulus, make_policies, secret), calibration)
            continue
        assert simulated is not None, "a log begins with a start"
        for send in sends:
            recorded.take(send)
        simulated.load(at_s, stimulus, recorded)
    if simulated is None:
        raise KvtierError("the log is empty")
    simulated.events.run_out()
    both = {**recorded.decisions, **simulated.answers.decisions}
    return [
        Decision(*name, recorded.decisions.get(name), simulated.answers.decisions.get(name)) for name in both
    ]


def _replayed(
    entries: Iterable[_Entry], make_policies: _MakePolicies, secret: bytes
) -> Iterator[tuple[float, Any, list[Send]]]:
    """(Time, stimulus or Origin, instructions) of a log."""
    core: NodeCore | None = None
    for entry in entries:
        if "origin" in entry:
            origin = msgspec.convert(entry["origin"], journal.Origin)
            core = _core(origin, make_policies, secret)
            yield 0.0, origin, []
            continue
        if core is None:
            raise KvtierError("the log does not begin with the start of a node")
        stimulus = journal.unpack(entry)
        yield entry["at_s"], stimulus, core.handle(entry["at_s"], stimulus)


def _core(origin: journal.Origin, make_policies: _MakePolicies, secret: bytes) -> NodeCore:
    return NodeCore(
        origin.settings,
        slots_of(origin),
        make_policies(),
        secret,
        random.Random(origin.seed),
        epoch=origin.epoch,
        arena_bytes=list(origin.arena_bytes),
        generation_slots=origin.generation_slots,
    )


def _job(message: Any) -> tuple[str, str, int]:
    disk = isinstance(message, t.DiskRead | t.DiskReadDone | t.DiskWrite | t.DiskWritten)
    return ("disk" if disk else "gpu", message.job, getattr(message, "batch", 0))


def _fitted(pairs: list[tuple[int, float]]) -> Speed:
    """The median slope over pairs of orders (Theil 1950, Sen 1968) and the median start, neither negative."""
    if not pairs:
        return Speed(*_FASTEST)
    nbytes, seconds = (np.array(column, np.float64)[:_MOST_FITTED] for column in zip(*pairs, strict=True))
    more = nbytes[:, None] - nbytes[None, :]
    rising = more > np.float64(0)
    slopes = (seconds[:, None] - seconds[None, :])[rising] / more[rising]
    slope = max(float(np.median(slopes)) if slopes.size else 0.0, 1 / _FASTEST[1])
    return Speed(max(float(np.median(seconds - slope * nbytes)), 0.0), 1 / slope)


class _Answers:
    """What a core decided, by kind, peer and number; and the names that it gave."""

    def __init__(self) -> None:
        self.decisions: dict[tuple[str, str, int], Answer] = {}
        # (peer, number of the request) -> the name of a plan or a worker.
        self.named: dict[tuple[str, int], str] = {}
        self.request_of: dict[str, tuple[str, int]] = {}

    def take(self, send: Send) -> None:
        """An instruction."""
        message = send.message
        if isinstance(message, m.Planned):
            plan = message.plan
            tiers: dict[str, int] = {}
            for r in plan.ranges:
                if r.source != "compute":
                    tiers[r.source] = tiers.get(r.source, 0) + r.end - r.start
            self.decisions["plan", send.peer, message.id] = Answer((plan.load_tokens, plan.reason), tiers)
            self._name(send.peer, message.id, plan.plan_id)
        elif isinstance(message, m.Attached):
            self._name(send.peer, message.id, message.worker)
        elif isinstance(message, m.ParkDone):
            receipt = message.receipt
            self.decisions["park", send.peer, message.request] = Answer((receipt.level, receipt.reason), {})
        elif isinstance(message, m.RestoreDone):
            done = message.receipt
            found = Answer((done.tokens, done.reason), dict(done.sources))
            self.decisions["restore", send.peer, message.request] = found

    def _name(self, peer: str, number: int, name: str) -> None:
        self.named[peer, number] = name
        self.request_of[name] = (peer, number)


class _Simulated:
    """A core whose services are simulated."""

    def __init__(self, core: NodeCore, speeds: Calibration) -> None:
        self._core = core
        self.events = Events()
        self.answers = _Answers()
        read, write = speeds.read, speeds.write
        drive = Drive(read.bytes_per_s, write.bytes_per_s, (read.start_s + write.start_s) / 2, _BATCH_BYTES)
        self._disk = SimulatedDisk(0, drive)
        self._speeds = speeds
        self._lines: dict[str, Lines] = {}
        self._services = CoreServices(self.events, self._tell, self._disk, self._line)

    def load(self, at_s: float, stimulus: Stimulus, recorded: _Answers) -> None:
        """The next stimulus of the log, unless it is one that services decide about."""
        self.events.run_until(at_s)
        if not isinstance(stimulus, Received):
            self._tell(stimulus)
            return
        message = stimulus.message
        if isinstance(message, t.TierHello) and message.capacity_bytes:
            self._disk.capacity_bytes = message.capacity_bytes
        if not isinstance(message, _ANSWERS):
            self._tell(Received(stimulus.peer, self._renamed(message, recorded)))

    def _renamed(self, message: m.Message, recorded: _Answers) -> m.Message:
        """Plans and workers as this core calls them."""
        changes: dict[str, str] = {}
        for field in ("plan_id", "worker"):
            name = getattr(message, field, "")
            asked = recorded.request_of.get(name) if name else None
            if asked is not None:
                changes[field] = self.answers.named.get(asked, "")
        return msgspec.structs.replace(message, **changes) if changes else message

    def _tell(self, stimulus: Stimulus) -> None:
        for send in self._core.handle(self.events.now_s, stimulus):
            if not self._services.take(send):
                self.answers.take(send)

    def _line(self, worker: str) -> Lines:
        lines = self._lines.get(worker)
        if lines is None:
            to_gpu, from_gpu = self._speeds.scatter, self._speeds.gather
            lines = Lines(
                Link(to_gpu.bytes_per_s, to_gpu.start_s), Link(from_gpu.bytes_per_s, from_gpu.start_s)
            )
            self._lines[worker] = lines
        return lines
