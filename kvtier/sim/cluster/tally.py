"""What is counted while a simulation runs."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from kvtier.sim.cluster.costs import ServingCost
from kvtier.sim.cluster.job import Job


@dataclass(slots=True)
class Counts:
    """Tokens and GPU-seconds of some requests.

    in: prompts.  known: of them, what an earlier row had computed.  gpu, host, disk, peer: what was found and
    used.  prefill_s: computed.  from nothing, saved by the engine's own pool, by loads, and what would have
    been saved had all that was known been found: seconds of one worker.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    known: int = 0
    gpu: int = 0
    host: int = 0
    disk: int = 0
    peer: int = 0
    late: int = 0
    prefill_s: float = 0.0
    plain_s: float = 0.0
    pool_saved_s: float = 0.0
    load_saved_s: float = 0.0
    could_save_s: float = 0.0

    def add(self, other: Counts) -> None:
        """Take in others."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Tally:
    """By tenant; and for each request the time to first token, of resumed ones beside their idle time."""

    tenants: dict[int, Counts] = field(default_factory=dict)
    ttft_s: array[float] = field(default_factory=lambda: array("f"))
    resumed_ttft_s: array[float] = field(default_factory=lambda: array("f"))
    resumed_idle_s: array[float] = field(default_factory=lambda: array("f"))
    resumed_hit: array[float] = field(default_factory=lambda: array("f"))
    refused: int = 0
    moved: int = 0

    def first_token(self, job: Job, now_s: float, takes_s: float, cost: ServingCost) -> None:
        """A request has its first token."""
        turn = job.turn
        counts = self.tenants.get(turn.tenant)
        if counts is None:
            counts = self.tenants[turn.tenant] = Counts()
        counts.requests += 1
        counts.tokens_in += turn.tokens_in
        counts.tokens_out += turn.tokens_out
        counts.known += job.usable
        counts.gpu += job.gpu_tokens
        counts.host += job.host_tokens
        counts.disk += job.disk_tokens
        counts.peer += job.peer_tokens
        counts.late += job.late
        counts.prefill_s += takes_s
        plain_s = cost.seconds(0, turn.tokens_in)
        counts.plain_s += plain_s
        pool_s = cost.seconds(job.gpu_tokens, turn.tokens_in - job.gpu_tokens) if job.gpu_tokens else plain_s
        counts.pool_saved_s += plain_s - pool_s
        counts.load_saved_s += pool_s - takes_s
        best_s = takes_s if job.usable == job.found else cost.seconds(job.usable, turn.tokens_in - job.usable)
        counts.could_save_s += plain_s - best_s
        ttft_s = now_s - job.arrived_s
        self.ttft_s.append(ttft_s)
        if job.resumes:
            self.resumed_ttft_s.append(ttft_s)
            self.resumed_idle_s.append(job.idle_s)
            self.resumed_hit.append(job.found / job.usable if job.usable else 0.0)

    def total(self) -> Counts:
        """Over all tenants."""
        total = Counts()
        for _, counts in sorted(self.tenants.items()):
            total.add(counts)
        return total
