"""The controller's hold on the tier actors: starts them, waits on their calls, and says who lives.

Each actor's serve() is a reference that is waited on, so an actor's death is heard of at once; its health is
asked for again and again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvtier.carriage import Bytes, Passing
from kvtier.cluster import store
from kvtier.cluster.actors import ACTORS, concurrency
from kvtier.cluster.carrier import ActorCarrier, actor_of
from kvtier.cluster.drain import Progress
from kvtier.cluster.members import Member
from kvtier.cluster.reconciler import Incarnation, Seen, TierRole

_PREFIX = "tier"
_ROLES: dict[str, TierRole] = {role: role for role in ACTORS}
_LOG = logging.getLogger("kvtier.cluster")


@dataclass(slots=True)
class Known:
    """An actor that is believed to live: its handle and the calls that are under way."""

    handle: Any
    serve: Any
    health: Any = None
    asked_at_s: float = 0.0
    unanswered_from_s: float | None = None
    report: dict[str, Any] | None = None
    drain: Any = None

    def silent_s(self, now_s: float) -> float:
        """For how long its health was asked for in vain; time in which nobody could ask does not count."""
        return 0.0 if self.unanswered_from_s is None else now_s - self.unanswered_from_s

    def asks(self, call: Any, now_s: float) -> None:
        """Its health is asked for with this call."""
        self.health, self.asked_at_s = call, now_s
        if self.unanswered_from_s is None:
            self.unanswered_from_s = now_s

    def answers(self, report: dict[str, Any]) -> None:
        """It answered."""
        self.report, self.unanswered_from_s = report, None

    @property
    def state(self) -> str:
        """What it said last."""
        return str((self.report or {}).get("state", "starting"))


@dataclass(slots=True)
class Grip:
    """All actors of ours that are known, and what became of others."""

    health_every_s: float
    known: dict[Incarnation, Known] = field(default_factory=dict)
    reasons: dict[tuple[str, TierRole], str] = field(default_factory=dict)
    _failed: set[Incarnation] = field(default_factory=set)
    _gone: set[Incarnation] = field(default_factory=set)

    def look(self, nodes: Iterable[str], now_s: float) -> tuple[tuple[Seen, ...], frozenset[Incarnation]]:
        """Who lives on these nodes, and whose end was noticed since the last call."""
        listed = named()
        # Ray lists an actor for a moment after its end.
        self._gone &= listed
        here = frozenset(nodes)
        alive = {who for who in listed - self._gone if who.node in here}
        for who in alive - self.known.keys() - self._failed:
            self._adopt(who)
        ended = self._collect_ended()
        for who in list(self.known):
            if who not in alive:
                del self.known[who]
        for known in self.known.values():
            self._collect_health(known, now_s)
        seen = (
            Seen(who, known.state == "ready", known.silent_s(now_s))
            for who, known in sorted(self.known.items())
        )
        return tuple(seen), ended

    def start(self, who: Incarnation, member: Member) -> None:
        """Ask Ray for it, on its node and nowhere else."""
        actor = ray.remote(ACTORS[who.role]).options(
            name=name_of(who),
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=concurrency(member.config_text),
            scheduling_strategy=NodeAffinitySchedulingStrategy(who.node, soft=False),
        )
        try:
            service = dict(member.services)[who.role]
            handle = actor.remote(service, member.config_text, who.epoch, member.grace_s)
        except ValueError as error:
            # The name is taken, so this epoch is somebody's: the next one will do.
            self.reasons[(who.node, who.role)] = str(error)
            self._failed.add(who)
            return
        self.known[who] = Known(handle, handle.serve.remote())

    def stop(self, who: Incarnation, grace_s: float, *, force: bool) -> None:
        """End it; one that is not known has ended."""
        known = self.known.get(who)
        if known is None:
            return
        if force:
            ray.kill(known.handle, no_restart=True)
        else:
            known.handle.stop.remote(grace_s)

    def lose(self, node: str) -> None:
        """Forget all of a node that is gone."""
        self.known = {who: known for who, known in self.known.items() if who.node != node}
        self.reasons = {where: why for where, why in self.reasons.items() if where[0] != node}

    def on(self, node: str) -> dict[TierRole, Known]:
        """The actors of one node, the newest of each role."""
        return {who.role: known for who, known in sorted(self.known.items()) if who.node == node}

    def flush(self, node: str, within_s: float) -> tuple[Progress | None, bool]:
        """Ask the node's host to write what only its memory holds: its newest answer, and whether it can."""
        host = self.on(node).get("host")
        if host is None:
            return None, True
        progress, can = None, True
        if host.drain is not None and ray.wait([host.drain], timeout=0)[0]:
            try:
                answer = ray.get(host.drain, timeout=1.0)
                can = answer is not None
                progress = Progress.of(answer) if can else None
            except (RayError, KeyError, TypeError, ValueError) as error:
                _LOG.warning("drain of %s: %s", node, error)
            host.drain = None
        if host.drain is None and can:
            host.drain = host.handle.drain.remote(within_s)
        return progress, can

    def wait(self, timeout_s: float) -> None:
        """Until something ends, a new actor or a drain answers, or the time is over."""
        starting = [k.health for k in self.known.values() if k.health is not None and k.state != "ready"]
        starting += [known.drain for known in self.known.values() if known.drain is not None]
        refs = [known.serve for known in self.known.values()]
        if refs or starting:
            ray.wait(refs + starting, num_returns=1, timeout=timeout_s)
            if starting:
                # A service that is still starting answers at once: do not ask as fast as it can.
                time.sleep(min(0.02, timeout_s))
        else:
            time.sleep(timeout_s)

    def _adopt(self, who: Incarnation) -> None:
        try:
            handle = ray.get_actor(name_of(who))
        except ValueError:
            # It died between the listing and this call.
            return
        self.known[who] = Known(handle, handle.serve.remote())

    def _collect_ended(self) -> frozenset[Incarnation]:
        """Incarnations whose serve() answered since the last round, and those that could not be started."""
        ended, self._failed = self._failed, set()
        refs = {known.serve: who for who, known in self.known.items()}
        done = ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []
        for ref in done:
            who = refs[ref]
            try:
                reason = str(ray.get(ref, timeout=1.0))
            except RayError as error:
                reason = str(error).strip().splitlines()[-1]
            if reason == "superseded":
                # Another controller serves it now; this one only goes on looking.
                self.known[who].serve = self.known[who].handle.serve.remote()
                continue
            self.reasons[(who.node, who.role)] = reason[:500]
            _LOG.warning("%s on %s (epoch %d) ended: %s", who.role, who.node, who.epoch, reason)
            ray.kill(self.known.pop(who).handle, no_restart=True)
            self._gone.add(who)
            ended.add(who)
        return frozenset(ended)

    def _collect_health(self, known: Known, now_s: float) -> None:
        if known.health is not None:
            if not ray.wait([known.health], timeout=0)[0]:
                return
            try:
                known.answers(ray.get(known.health, timeout=1.0))
            except (RayError, GetTimeoutError) as error:
                _LOG.info("health: %s", error)
            known.health = None
        # Until it is ready, each round asks: `up` waits for the answer.
        every_s = self.health_every_s if known.state == "ready" else 0.0
        if now_s - known.asked_at_s >= every_s:
            known.asks(known.handle.health.remote(), now_s)


def carrier() -> ActorCarrier:
    """Ray as what carries bytes between nodes."""
    return ActorCarrier(_find, _carry)


def _find(called: str) -> Any:
    try:
        who = actor_of(called, store.members().values(), named())
        return None if who is None else ray.get_actor(name_of(who))
    except (ValueError, RayError) as error:
        raise OSError(f"Ray does not say where '{called}' is: {error}") from error


def _carry(handle: Any, call: Passing, timeout_s: float) -> Bytes | None:
    try:
        came: Bytes | None = ray.get(handle.carried.remote(call), timeout=timeout_s)
    except RayError as error:
        raise OSError(f"Ray: {error}") from error
    return came


def named() -> set[Incarnation]:
    """The incarnations whose names stand in the namespace."""
    return {who for who in map(parse_name, list_named_actors()) if who is not None}


def name_of(who: Incarnation) -> str:
    """The actor's name in the namespace."""
    return f"{_PREFIX}:{who.role}:{who.node}:{who.epoch}:{who.config}"


def parse_name(name: str) -> Incarnation | None:
    """The incarnation that an actor's name tells of, or None for other actors."""
    parts = name.split(":")
    if len(parts) != 5 or parts[0] != _PREFIX or parts[1] not in ACTORS or not parts[3].isdigit():
        return None
    return Incarnation(parts[2], _ROLES[parts[1]], int(parts[3]), parts[4])
