"""A node over runs: fast, and with the simplifications that `store` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from kvtier.policy.interfaces import RestoreWish
from kvtier.policy.usage import ParkedBlock, Turn
from kvtier.sim.cluster.costs import ServingCost
from kvtier.sim.cluster.deciders import capacity_of, compiled_policies_of
from kvtier.sim.cluster.engine import Engine
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.links import Link
from kvtier.sim.cluster.node import Kept, Node
from kvtier.sim.cluster.scenario import Scenario, changed
from kvtier.sim.cluster.store import Found, RunStore

# Where a load that goes beside computing may begin.
_STEP_TOKENS: Final = 512


class RunNode(Node):
    """See Node."""

    def __init__(
        self,
        scenario: Scenario,
        policy: str,
        cost: ServingCost,
        events: Events,
        first_token: Callable[[Job, float], None],
        ended: Callable[[Job], None],
    ) -> None:
        super().__init__(scenario, cost, events, first_token, ended)
        disk = changed(scenario.disk, capacity_bytes=capacity_of(policy, scenario.disk.capacity_bytes))
        self.store = RunStore(
            capacity_of(policy, scenario.host.capacity_bytes),
            disk,
            self.drive,
            compiled_policies_of(policy),
            write_through=scenario.level == "disk",
        )
        # The load has one model, which has no name here.
        self.store.policies.usage.serves({b"": cost}, {})
        speed = scenario.nodes.peer_bytes_per_s
        self.to_peers = Link(speed, scenario.host.start_s) if speed else None

    def kept(self) -> Kept:
        """See Kept."""
        now_s, store = self._events.now_s, self.store
        return Kept(
            store.dropped,
            dict(store.written),
            store.host.byte_seconds(now_s),
            store.disk.byte_seconds(now_s),
        )

    def take(self, job: Job, home: Node | None) -> None:
        """Load what the policy wants for it, then queue it. home: where it was, when that is not here."""
        now_s = self._events.now_s
        engine = self._engine(job)
        job.past = job.gpu_tokens = engine.idle_tokens(job)
        own = self.store.find(job.front, job.known)
        source, found = self, own
        if isinstance(home, RunNode) and home.to_peers is not None:
            theirs = home.store.find(job.front, job.known)
            if theirs.tokens > own.tokens:
                source, found = home, theirs
        self._pass(now_s)
        self.store.policies.usage.asked(_name(job), job.turn.tokens_in, now_s)
        self.store.use(own, now_s)
        job.ready_s = now_s
        if min(found.tokens, job.usable) > job.past:
            self._load(job, engine, source, found)
        engine.expect(job)
        self._events.at(job.ready_s, engine.ready, job)

    def _load(self, job: Job, engine: Engine, source: RunNode, found: Found) -> None:
        now_s, held = self._events.now_s, job.gpu_tokens
        token_bytes = self._cost.token_bytes
        restore = self.store.policies.restore
        mixed = self._scenario.worker.mixed and not held
        wish = self._wish(engine, source, mixed=mixed)
        segments = self.store.segments(found, held, token_bytes, _STEP_TOKENS if mixed else 0)
        choice = restore.choose(segments, job.turn.tokens_in, wish)
        begin, upto = held + choice.compute_front, min(choice.tokens, found.tokens, job.usable)
        host_tokens = max(min(found.host_tokens, upto) - begin, 0)
        disk_tokens = max(upto - max(found.host_tokens, begin), 0)
        if not host_tokens + disk_tokens:
            return
        disk_bytes, nbytes = int(disk_tokens * token_bytes), int((host_tokens + disk_tokens) * token_bytes)
        done_s = engine.to_gpu.send(now_s, nbytes)
        if disk_bytes:
            read_s = source.drive.read(now_s, disk_bytes)
            restore.observed("disk", disk_bytes, read_s - now_s, wish.queued_bytes["disk"])
            done_s = max(done_s, read_s)
        else:
            restore.observed("host", nbytes, done_s - now_s, wish.queued_bytes["host"])
        if source is not self and source.to_peers is not None:
            done_s = max(done_s, source.to_peers.send(now_s, nbytes))
        restore.restored(choice, done_s - now_s)
        slowest, eta_s = "disk" if disk_bytes else "host", (choice.eta_low_s, choice.eta_high_s)
        self.forecasts.see(eta_s, slowest, done_s - now_s, loaded=wish.queued_bytes[slowest] > 0)
        if done_s - now_s > self._scenario.deadline_s:
            job.late, job.ready_s = True, now_s + self._scenario.deadline_s
            return
        job.ready_s, job.past = done_s, upto
        if choice.compute_front:
            job.computed_front, job.loaded_s, job.ready_s = choice.compute_front, done_s, now_s
        if source is self:
            job.host_tokens, job.disk_tokens = host_tokens, disk_tokens
            self.store.bring(found.on_disk, upto, now_s)
        else:
            job.peer_tokens = host_tokens + disk_tokens

    def _wish(self, engine: Engine, source: RunNode, *, mixed: bool) -> RestoreWish:
        now_s = self._events.now_s
        return RestoreWish(
            recompute=self._cost,
            waiting_requests=engine.waiting,
            prefill_wait_s=engine.backlog_s(now_s),
            deadline_s=self._scenario.deadline_s,
            takes="both" if mixed else "fronts",
            queued_bytes={
                "host": engine.to_gpu.queued_bytes(now_s),
                "disk": source.drive.queued_bytes(now_s),
            },
        )

    def _park(self, job: Job, engine: Engine) -> None:
        now_s, usage = self._events.now_s, self.store.policies.usage
        self._pass(now_s)
        name, new = _name(job), self.store.lacks(job.last)
        for run in new:
            usage.stored(name, run.parked, now_s)
        nbytes, _ = self.store.park(job.last, new, now_s)
        usage.parked(name, _chain(job), Turn(job.turn.stop), now_s)
        engine.from_gpu.send(now_s, nbytes)

    def _pass(self, now_s: float) -> None:
        disk = self.store.disk
        free_bytes = disk.capacity_bytes - disk.used_bytes
        self.store.policies.usage.passed(now_s, disk.capacity_bytes > 0, free_bytes)


def _name(job: Job) -> tuple[str, str]:
    turn = job.turn
    return f"{turn.tenant}", f"{turn.conversation}" if turn.conversation >= 0 else f"row {job.row}"


def _chain(job: Job) -> Iterator[ParkedBlock]:
    """The runs that the job leaves behind, the front first; gathered for a policy that looks at them."""
    chain: list[ParkedBlock] = []
    run = job.last
    while run is not None:
        chain.append(run.parked)
        run = run.parent
    yield from reversed(chain)
