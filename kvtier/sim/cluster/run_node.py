"""A node over runs: fast, and with the simplifications that `store` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

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

# How far apart the places lie where a load may begin or end.
_STEP_TOKENS: Final = 512


class _Beyond(NamedTuple):
    """Another node that has more of a conversation."""

    node: RunNode
    link: Link
    found: Found


class _Parts(NamedTuple):
    """Tokens of a load, by where they come from."""

    host: int
    disk: int
    peer: int

    @property
    def tokens(self) -> int:
        return self.host + self.disk + self.peer


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
        beyond = _beyond(home, job, own)
        self._pass(now_s)
        self.store.policies.usage.asked(_name(job), job.turn.tokens_in, now_s)
        self.store.use(own, now_s)
        job.ready_s = now_s
        if min(beyond.found.tokens if beyond is not None else own.tokens, job.usable) > job.past:
            self._load(job, engine, own, beyond)
        engine.expect(job)
        self._events.at(job.ready_s, engine.ready, job)

    def _load(self, job: Job, engine: Engine, own: Found, beyond: _Beyond | None) -> None:
        now_s, held = self._events.now_s, job.gpu_tokens
        token_bytes = self._cost.token_bytes
        restore = self.store.policies.restore
        mixed = self._scenario.worker.mixed and not held
        wish = self._wish(engine, mixed=mixed)
        reach = beyond.found.tokens if beyond is not None else own.tokens
        segments = self.store.segments(own, reach, held, token_bytes, _STEP_TOKENS)
        choice = restore.choose(segments, job.turn.tokens_in, wish)
        begin, upto = held + choice.compute_front, min(choice.tokens, reach, job.usable)
        parts = _parts(own, begin, upto)
        if not parts.tokens:
            return
        until_s = now_s + self._scenario.deadline_s
        nbytes, disk_bytes = int(parts.tokens * token_bytes), int(parts.disk * token_bytes)
        done_s, slowest = engine.to_gpu.send(now_s, nbytes, until_s), "host"
        front = engine.to_gpu.front(upto, done_s - until_s, token_bytes)
        if disk_bytes:
            read_s, slowest = self.drive.read(now_s, disk_bytes, until_s), "disk"
            restore.observed("disk", disk_bytes, read_s - now_s, wish.queued_bytes["disk"])
            front = min(front, self.drive.front(upto - parts.peer, read_s - until_s, token_bytes))
            done_s = max(done_s, read_s)
        if parts.peer and beyond is not None:
            pulled_s, slowest = self._pull(beyond, upto - parts.peer, upto, until_s), "peer"
            nbytes = int(parts.peer * token_bytes)
            restore.observed("peer", nbytes, pulled_s - now_s, wish.queued_bytes["peer"])
            front = min(front, beyond.link.front(upto, pulled_s - until_s, token_bytes))
            done_s = max(done_s, pulled_s)
        elif not disk_bytes:
            restore.observed("host", nbytes, done_s - now_s, wish.queued_bytes["host"])
        restore.restored(choice, done_s - now_s)
        eta_s = (choice.eta_low_s, choice.eta_high_s)
        self.forecasts.see(eta_s, slowest, done_s - now_s, loaded=wish.queued_bytes[slowest] > 0)
        job.late, job.ready_s = done_s > until_s, min(done_s, until_s)
        if front <= begin:
            return
        job.past = front
        if choice.compute_front:
            job.computed_front, job.loaded_s, job.ready_s = choice.compute_front, job.ready_s, now_s
        came = _parts(own, begin, front)
        job.host_tokens, job.disk_tokens, job.peer_tokens = came.host, came.disk, came.peer
        self.store.bring(own.on_disk, front, now_s)

    def _pull(self, beyond: _Beyond, start: int, upto: int, until_s: float) -> float:
        """When tokens [start, upto) of another node are here; nothing is sent behind the deadline."""
        now_s, token_bytes = self._events.now_s, self._cost.token_bytes
        done_s = beyond.link.send(now_s, int((upto - start) * token_bytes), until_s)
        from_disk = upto - max(start, beyond.found.host_tokens)
        if from_disk > 0:
            done_s = max(done_s, beyond.node.drive.read(now_s, int(from_disk * token_bytes), until_s))
        return done_s

    def _wish(self, engine: Engine, *, mixed: bool) -> RestoreWish:
        now_s = self._events.now_s
        copied = engine.to_gpu.queued_bytes(now_s)
        return RestoreWish(
            recompute=self._cost,
            waiting_requests=engine.waiting,
            prefill_wait_s=engine.backlog_s(now_s),
            deadline_s=self._scenario.deadline_s,
            takes="both" if mixed else "fronts",
            # How much a peer has to send to others is not known here.
            queued_bytes={"host": copied, "disk": self.drive.queued_bytes(now_s), "peer": copied},
            now_s=now_s,
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


def _beyond(home: Node | None, job: Job, own: Found) -> _Beyond | None:
    """Where the conversation was, if that node has more of it and may send it."""
    if not isinstance(home, RunNode) or home.to_peers is None:
        return None
    theirs = home.store.find(job.front, job.known)
    return _Beyond(home, home.to_peers, theirs) if theirs.tokens > own.tokens else None


def _parts(own: Found, begin: int, upto: int) -> _Parts:
    """What of [begin, upto) comes from where."""
    return _Parts(
        max(min(own.host_tokens, upto) - begin, 0),
        max(min(own.tokens, upto) - max(own.host_tokens, begin), 0),
        max(upto - max(own.tokens, begin), 0),
    )


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
