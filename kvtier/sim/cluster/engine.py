"""A serving worker: one prefill after the other, decoding beside them, a finite pool of KV.

Idle conversations stay in the pool until their room is needed, least recently used first and whole, as an
engine's own prefix cache has them, unless `keeps_idle` is off; a branch from an earlier turn does not find
them.  Decoding does not slow prefills down, and a decode step is as long as the batch at the request's first
token makes it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from kvtier.sim.cluster.costs import ServingCost
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.links import Link
from kvtier.sim.cluster.scenario import Worker


class Engine:
    """first_token: called when a prefill ends, with the seconds that it took; ended: when all is written."""

    def __init__(
        self,
        settings: Worker,
        cost: ServingCost,
        events: Events,
        start_s: float,
        first_token: Callable[[Job, float], None],
        ended: Callable[[Job, Engine], None],
    ) -> None:
        self._settings, self._cost, self._events = settings, cost, events
        self._first_token, self._ended = first_token, ended
        self.pool_tokens = int(settings.pool_bytes / cost.token_bytes)
        self.to_gpu = Link(settings.link_bytes_per_s, start_s)
        self.from_gpu = Link(settings.link_bytes_per_s, start_s)
        self._queue: deque[Job] = deque()
        # Number of the last run -> tokens.
        self._idle: OrderedDict[int, int] = OrderedDict()
        self._idle_tokens = self._reserved = 0
        self._prefilling = False
        self.running = 0
        self._busy_until_s = 0.0
        self._queued_s = 0.0
        self.prefill_s = self.decode_s = 0.0

    def backlog_s(self, now_s: float) -> float:
        """Seconds of prefill that stand before a new request, those that still load included."""
        return max(self._busy_until_s - now_s, 0.0) + max(self._queued_s, 0.0)

    @property
    def waiting(self) -> int:
        """Requests that wait for their prefill."""
        return len(self._queue)

    def idle_tokens(self, job: Job) -> int:
        """Tokens of the job's front that the pool still has."""
        if job.front is None or job.known <= job.front.start:
            return 0
        return min(self._idle.get(job.front.number, 0), job.usable)

    def fits(self, job: Job) -> bool:
        """Whether the pool could hold the job at all."""
        return job.pool_tokens <= self.pool_tokens

    def expect(self, job: Job) -> None:
        """The job is on its way here, and will be given to `ready`."""
        job.expected_s = self._wanted_s(job)
        self._queued_s += job.expected_s

    def ready(self, job: Job) -> None:
        """Everything that is loaded for it is in place."""
        self._queue.append(job)
        self._advance()

    def _wanted_s(self, job: Job) -> float:
        rest_s = self._cost.seconds(job.past, job.turn.tokens_in - job.past)
        return rest_s + self._cost.seconds(0, job.computed_front) if job.computed_front else rest_s

    def _advance(self) -> None:
        while self._queue and not self._prefilling and self.running < self._settings.batch:
            job = self._queue[0]
            if self._reserved + job.pool_tokens > self.pool_tokens:
                return
            self._queue.popleft()
            self._start(job)

    def _start(self, job: Job) -> None:
        self._queued_s -= job.expected_s
        if job.gpu_tokens:
            kept = self._idle.pop(job.front.number, 0) if job.front is not None else 0
            self._idle_tokens -= kept
            if not kept:
                # Its room was needed while it waited, so what was to go on from it is of no use.
                job.gpu_tokens = job.host_tokens = job.disk_tokens = job.peer_tokens = job.past = 0
        self._reserved += job.pool_tokens
        while self._reserved + self._idle_tokens > self.pool_tokens:
            self._idle_tokens -= self._idle.popitem(last=False)[1]
        self.running += 1
        self._prefilling = True
        takes_s = self._wanted_s(job)
        self.prefill_s += takes_s
        self._busy_until_s = self._events.now_s + takes_s
        if job.computed_front:
            # Nobody else computes while the rest of a front is still on its way.
            front_s = self._cost.seconds(0, job.computed_front)
            self._busy_until_s += max(job.loaded_s - self._events.now_s - front_s, 0.0)
        self._events.at(self._busy_until_s, self._prefilled, (job, takes_s))

    def _prefilled(self, what: tuple[Job, float]) -> None:
        job, takes_s = what
        self._prefilling = False
        self._first_token(job, takes_s)
        step_s = self._settings.token_s + self._settings.token_s_per_request * self.running
        # A step is shared by all that decode in it.
        self.decode_s += job.turn.tokens_out * step_s / self.running
        self._events.at(self._events.now_s + job.turn.tokens_out * step_s, self._decoded, job)
        self._advance()

    def _decoded(self, job: Job) -> None:
        self.running -= 1
        self._reserved -= job.pool_tokens
        if job.last is not None and self._settings.keeps_idle:
            tokens = job.last.end
            self._idle_tokens += tokens - self._idle.pop(job.last.number, 0)
            self._idle[job.last.number] = tokens
        self._ended(job, self)
        self._advance()
