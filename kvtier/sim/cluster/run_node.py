"""A node over runs: fast, and with the simplifications that `store` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from kvtier.policy.interfaces import LoadChoice, RestoreWish
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


class _Load(NamedTuple):
    """Tokens [begin, upto) that are to be there until until_s."""

    wish: RestoreWish
    choice: LoadChoice
    begin: int
    upto: int
    parts: _Parts
    until_s: float


class _Move(NamedTuple):
    """Bytes over one link. front: up to which token they came in time."""

    source: str
    nbytes: int
    done_s: float
    front: int


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
        self.store.policies.usage.asked(_name(job), job.turn.tokens_in, now_s, job.gpu_tokens)
        self.store.use(own, now_s)
        job.ready_s = now_s
        if min(beyond.found.tokens if beyond is not None else own.tokens, job.usable) > job.past:
            self._load(job, engine, own, beyond)
        engine.expect(job)
        self._events.at(job.ready_s, engine.ready, job)

    def _load(self, job: Job, engine: Engine, own: Found, beyond: _Beyond | None) -> None:
        """Move what the policy chooses, and let it and the job know what came by the deadline."""
        load = self._chosen(job, engine, own, beyond)
        if not load.parts.tokens:
            return
        now_s, until_s, restore = self._events.now_s, load.until_s, self.store.policies.restore
        moves = self._moved(load, engine, beyond)
        done_s, slowest = max(move.done_s for move in moves), moves[-1].source
        queued = load.wish.queued_bytes
        # The copy to the GPU is waited for alone only where nothing else is.
        for move in moves[1:] or moves:
            restore.observed(move.source, move.nbytes, move.done_s - now_s, queued[move.source])
        restore.restored(load.choice, done_s - now_s)
        eta_s = (load.choice.eta_low_s, load.choice.eta_high_s)
        self.forecasts.see(eta_s, slowest, done_s - now_s, loaded=queued[slowest] > 0)
        job.late, job.ready_s = done_s > until_s, min(done_s, until_s)
        self._found(job, own, load, min(move.front for move in moves))

    def _chosen(self, job: Job, engine: Engine, own: Found, beyond: _Beyond | None) -> _Load:
        """What the policy wants of all that is found; nothing is moved yet."""
        held = job.gpu_tokens
        wish = self._wish(engine, mixed=self._scenario.worker.mixed and not held)
        reach = beyond.found.tokens if beyond is not None else own.tokens
        segments = self.store.segments(own, reach, held, self._cost.token_bytes, _STEP_TOKENS)
        choice = self.store.policies.restore.choose(segments, job.turn.tokens_in, wish)
        begin, upto = held + choice.compute_front, min(choice.tokens, reach, job.usable)
        until_s = self._events.now_s + self._scenario.deadline_s
        return _Load(wish, choice, begin, upto, _parts(own, begin, upto), until_s)

    def _moved(self, load: _Load, engine: Engine, beyond: _Beyond | None) -> list[_Move]:
        """Everything to the GPU; before that from the drive, and from a peer, what lies there."""
        now_s, until_s, token_bytes = self._events.now_s, load.until_s, self._cost.token_bytes
        parts, upto = load.parts, load.upto
        nbytes = int(parts.tokens * token_bytes)
        done_s = engine.to_gpu.send(now_s, nbytes, until_s)
        front = engine.to_gpu.front(upto, done_s - until_s, token_bytes)
        moves = [_Move("host", nbytes, done_s, front)]
        if parts.disk:
            nbytes = int(parts.disk * token_bytes)
            done_s = self.drive.read(now_s, nbytes, until_s)
            front = self.drive.front(upto - parts.peer, done_s - until_s, token_bytes)
            moves.append(_Move("disk", nbytes, done_s, front))
        if parts.peer and beyond is not None:
            nbytes = int(parts.peer * token_bytes)
            done_s = self._pull(beyond, upto - parts.peer, upto, until_s)
            front = beyond.link.front(upto, done_s - until_s, token_bytes)
            moves.append(_Move("peer", nbytes, done_s, front))
        return moves

    def _found(self, job: Job, own: Found, load: _Load, front: int) -> None:
        """Of what was to be loaded, tokens up to `front` came."""
        if front <= load.begin:
            return
        job.past, now_s = front, self._events.now_s
        if load.choice.compute_front:
            job.computed_front = load.choice.compute_front
            job.loaded_s, job.ready_s = job.ready_s, now_s
        came = _parts(own, load.begin, front)
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
