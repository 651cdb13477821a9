"""What every node has: serving workers, a drive, and tiers, in which the two kinds of nodes differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from kvtier.sim.cluster.costs import ServingCost
from kvtier.sim.cluster.engine import Engine
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.forecasts import Forecasts
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.links import Drive, Link
from kvtier.sim.cluster.scenario import Scenario


@dataclass(slots=True)
class Kept:
    """What a node's tiers did up to now. By tenant: bytes written to disk, byte-seconds held."""

    dropped: int = 0
    written: dict[int, float] = field(default_factory=dict)
    host_byte_s: dict[int, float] = field(default_factory=dict)
    disk_byte_s: dict[int, float] = field(default_factory=dict)


class Node(ABC):
    """first_token: see Engine. ended: called when a job has its last token."""

    to_peers: Link | None = None

    def __init__(
        self,
        scenario: Scenario,
        cost: ServingCost,
        events: Events,
        first_token: Callable[[Job, float], None],
        ended: Callable[[Job], None],
    ) -> None:
        self._events, self._cost, self._scenario = events, cost, scenario
        self._job_ended = ended
        self.forecasts = Forecasts()
        disk = scenario.disk
        self.drive = Drive(disk.read_bytes_per_s, disk.write_bytes_per_s, disk.start_s, disk.batch_bytes)
        self.engines = [
            Engine(scenario.worker, cost, events, scenario.host.start_s, first_token, self._ended)
            for _ in range(scenario.nodes.workers)
        ]

    def load(self) -> tuple[float, int]:
        """What routing compares: the shortest backlog of a worker, and how many requests run."""
        # Asked of every node for every new conversation.
        now_s, least_s, running = self._events.now_s, inf, 0
        for engine in self.engines:
            running += engine.running
            if least_s > 0.0:
                least_s = min(least_s, engine.backlog_s(now_s))
        return least_s, running

    def begins_within(self, limit_s: float) -> bool:
        """Whether some worker has no longer backlog than that."""
        now_s = self._events.now_s
        return any(engine.backlog_s(now_s) <= limit_s for engine in self.engines)

    @abstractmethod
    def take(self, job: Job, home: Node | None) -> None:
        """Load what the policy wants for it, then queue it. home: where it was, when that is not here."""

    @abstractmethod
    def kept(self) -> Kept:
        """See Kept."""

    @abstractmethod
    def _park(self, job: Job, engine: Engine) -> None:
        """Keep what the job computed."""

    def _ended(self, job: Job, engine: Engine) -> None:
        self._park(job, engine)
        self._job_ended(job)

    def _engine(self, job: Job) -> Engine:
        """The worker that has the conversation still; otherwise the one with the shortest backlog.

        Where several have the end of one chain, they have equally much of it.
        """
        for engine in self.engines if job.front is not None else ():
            if engine.idle_tokens(job):
                return engine
        now_s = self._events.now_s
        return min(self.engines, key=lambda engine: (engine.backlog_s(now_s), engine.running))
