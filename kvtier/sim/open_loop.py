"""A recorded day once more, with simulated services: how many decisions come out otherwise.

What workers, clients and processes did comes at its recorded times.  What the GPU and disk services answered
is forgotten: simulated ones answer, as fast as those of *another* recorded run were.  Beside it the log
itself is replayed, and whatever the two cores decide about the same request is compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from kvtier.errors import KvtierError
from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.node import journal
from kvtier.node.core import NodeCore
from kvtier.node.events import Received, Send, Stimulus
from kvtier.sim.calibration import Calibration, Entry, MakePolicies, new_core, replayed
from kvtier.sim.cluster.core_disk import SimulatedDisk
from kvtier.sim.cluster.core_services import CoreServices, Lines
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.links import Drive, Link

# What services say; all else is load.
_ANSWERS: Final = (t.Copied, t.DiskWritten, t.DiskReadDone, t.DiskRemoved, t.DiskUsage)
_BATCH_BYTES: Final = 32 << 20


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


def compare(
    entries: Iterable[Entry], make_policies: MakePolicies, secret: bytes, calibration: Calibration
) -> list[Decision]:
    """Every plan, park and restore of a recorded run beside its simulation, in order of their answers.

    Raises KvtierError for what is no log, or one of several starts of a node.
    """
    simulated: _Simulated | None = None
    recorded = _Answers()
    for at_s, stimulus, sends in replayed(entries, make_policies, secret):
        if isinstance(stimulus, journal.Origin):
            if simulated is not None:
                raise KvtierError("the log has several starts of the node", fix="cut it at the second one")
            simulated = _Simulated(new_core(stimulus, make_policies, secret), calibration)
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
