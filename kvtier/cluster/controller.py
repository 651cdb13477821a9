"""The reconciler's shell: a detached Ray actor that looks, decides and acts, again and again.

It keeps nothing that it could not find out again: what an actor is stands in its name, so a controller
that Ray restarted adopts what runs.  Each actor's serve() is a reference that it waits on, so an actor's
death wakes it at once; everything else is seen once per period.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvtier.cluster.actors import ACTORS, CONCURRENCY
from kvtier.cluster.reconciler import (
    Desired,
    Incarnation,
    MarkLost,
    Observed,
    Pace,
    Reconciler,
    Seen,
    Start,
    Stop,
    TierRole,
)

RESOURCE = "kvtier"
_PREFIX = "tier"
_ROLES: dict[str, TierRole] = {role: role for role in ACTORS}
_LOG = logging.getLogger("kvtier.cluster")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the controller is to keep running; all of it survives the controller, as its arguments.

    nodes: Ray node ids, or none for every node that has the resource.  services: 'module:Class' by role.
    """

    services: tuple[tuple[TierRole, str], ...]
    config_text: bytes
    grace_s: float
    nodes: tuple[str, ...] = ()
    pace: Pace = field(default_factory=Pace)
    period_s: float = 0.5
    health_every_s: float = 2.0

    @property
    def digest(self) -> str:
        """Names configuration and services in the actors' names."""
        return hashlib.sha256(repr(self.services).encode() + self.config_text).hexdigest()[:12]


@dataclass(slots=True)
class _Known:
    """An actor that is believed to live: its handle and the calls that are under way."""

    handle: Any
    serve: Any
    health: Any = None
    asked_at_s: float = 0.0
    answered_at_s: float = 0.0
    report: dict[str, Any] | None = None


def name_of(who: Incarnation) -> str:
    """The actor's name in the namespace."""
    return f"{_PREFIX}:{who.role}:{who.node}:{who.epoch}:{who.config}"


def parse_name(name: str) -> Incarnation | None:
    """The incarnation that an actor's name tells of, or None for other actors."""
    parts = name.split(":")
    if len(parts) != 5 or parts[0] != _PREFIX or parts[1] not in ACTORS or not parts[3].isdigit():
        return None
    return Incarnation(parts[2], _ROLES[parts[1]], int(parts[3]), parts[4])


class Controller:
    """See the module's text. Its loop starts with the actor, so that a restart needs nobody's call."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        # Above all epochs of a controller before this one, without anything stored: at most one a second.
        self._reconciler = Reconciler(int(time.time()), plan.pace)
        self._desired = Desired(plan.digest, tuple(role for role, _ in plan.services))
        self._known: dict[Incarnation, _Known] = {}
        self._failed: set[Incarnation] = set()
        self._gone: set[Incarnation] = set()
        self._reasons: dict[tuple[str, str], str] = {}
        self._nodes: frozenset[str] = frozenset()
        self._status: dict[str, Any] = {"rounds": 0, "pid": os.getpid(), "nodes": {}}
        self._rounds = 0
        threading.Thread(target=self._loop, name="kvtier-controller", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """What was seen in the last round: by node and role: state, epoch, pid, deaths."""
        return self._status

    def drain(self, nodes: list[str]) -> None:
        """Run nothing on these nodes from now on, and on all others again."""
        self._desired = replace(self._desired, drained=frozenset(nodes))

    def stop(self) -> None:
        """End all actors and start none; status() tells when that is done."""
        self._desired = replace(self._desired, stopping=True)

    def _loop(self) -> None:
        while True:
            try:
                self._round()
            except (RayError, OSError, ValueError, RuntimeError) as error:
                # Ray's head is away: what runs goes on, and the next round sees what became of it.
                _LOG.warning("a round failed: %s", error)
                time.sleep(self._plan.period_s)
            self._sleep()

    def _round(self) -> None:
        now_s = time.monotonic()
        observed = self._observe(now_s)
        for action in self._reconciler.step(observed, self._desired, now_s):
            _LOG.info("%s", action)
            if isinstance(action, Start):
                self._start(action.who, now_s)
            elif isinstance(action, Stop):
                self._stop(action)
            elif isinstance(action, MarkLost):
                self._known = {who: known for who, known in self._known.items() if who.node != action.node}
        self._publish(now_s)

    def _observe(self, now_s: float) -> Observed:
        self._nodes = self._eligible()
        listed = {who for who in map(parse_name, list_named_actors()) if who is not None}
        # Ray lists an actor for a moment after its end.
        self._gone &= listed
        alive = {who for who in listed - self._gone if who.node in self._nodes}
        for who in alive - self._known.keys() - self._failed:
            self._adopt(who, now_s)
        ended = self._collect_ended()
        for who in list(self._known):
            if who not in alive:
                del self._known[who]
        for known in self._known.values():
            self._collect_health(known, now_s)
        seen = [
            Seen(who, _state(known) == "ready", now_s - known.answered_at_s)
            for who, known in sorted(self._known.items())
        ]
        return Observed(self._nodes, tuple(seen), ended)

    def _eligible(self) -> frozenset[str]:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if self._plan.nodes:
            return frozenset(node["NodeID"] for node in nodes if node["NodeID"] in self._plan.nodes)
        return frozenset(node["NodeID"] for node in nodes if node["Resources"].get(RESOURCE))

    def _adopt(self, who: Incarnation, now_s: float) -> None:
        try:
            handle = ray.get_actor(name_of(who))
        except ValueError:
            # It died between the listing and this call.
            return
        self._known[who] = _Known(handle, handle.serve.remote(), answered_at_s=now_s)

    def _collect_ended(self) -> frozenset[Incarnation]:
        """Incarnations whose serve() answered since the last round, and those that could not be started."""
        ended, self._failed = self._failed, set()
        refs = {known.serve: who for who, known in self._known.items()}
        done = ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []
        for ref in done:
            who = refs[ref]
            try:
                reason = str(ray.get(ref, timeout=1.0))
            except RayError as error:
                reason = str(error).strip().splitlines()[-1]
            if reason == "superseded":
                # Another controller serves it now; this one only goes on looking.
                self._known[who].serve = self._known[who].handle.serve.remote()
                continue
            self._reasons[(who.node, who.role)] = reason[:500]
            _LOG.warning("%s on %s (epoch %d) ended: %s", who.role, who.node, who.epoch, reason)
            ray.kill(self._known.pop(who).handle, no_restart=True)
            self._gone.add(who)
            ended.add(who)
        return frozenset(ended)

    def _collect_health(self, known: _Known, now_s: float) -> None:
        if known.health is not None:
            if not ray.wait([known.health], timeout=0)[0]:
                return
            try:
                known.report = ray.get(known.health, timeout=1.0)
                known.answered_at_s = now_s
            except (RayError, GetTimeoutError) as error:
                _LOG.info("health: %s", error)
            known.health = None
        # Until it is ready, each round asks: `up` waits for the answer.
        every_s = self._plan.health_every_s if _state(known) == "ready" else 0.0
        if now_s - known.asked_at_s >= every_s:
            known.health, known.asked_at_s = known.handle.health.remote(), now_s

    def _start(self, who: Incarnation, now_s: float) -> None:
        actor = ray.remote(ACTORS[who.role]).options(
            name=name_of(who),
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=CONCURRENCY,
            scheduling_strategy=NodeAffinitySchedulingStrategy(who.node, soft=False),
        )
        try:
            handle = actor.remote(
                dict(self._plan.services)[who.role], self._plan.config_text, who.epoch, self._plan.grace_s
            )
        except ValueError as error:
            # The name is taken, so this epoch is somebody's: the next one will do.
            self._reasons[(who.node, who.role)] = str(error)
            self._failed.add(who)
            return
        self._known[who] = _Known(handle, handle.serve.remote(), answered_at_s=now_s)

    def _stop(self, action: Stop) -> None:
        known = self._known.get(action.who)
        if known is None:
            return
        if action.force:
            ray.kill(known.handle, no_restart=True)
        else:
            known.handle.stop.remote(self._plan.grace_s)

    def _sleep(self) -> None:
        """Until something ends, a new actor answers, or the period is over."""
        starting = [k.health for k in self._known.values() if k.health is not None and _state(k) != "ready"]
        refs = [known.serve for known in self._known.values()]
        period_s = min(self._plan.period_s, self._reconciler.next_wake_s(time.monotonic()))
        if refs or starting:
            ray.wait(refs + starting, num_returns=1, timeout=period_s)
            if starting:
                # A service that is still starting answers at once: do not ask as fast as it can.
                time.sleep(min(0.02, period_s))
        else:
            time.sleep(period_s)

    def _publish(self, now_s: float) -> None:
        self._rounds += 1
        deaths = self._reconciler.deaths()
        nodes: dict[str, dict[str, Any]] = {node: {} for node in sorted(self._nodes)}
        for who, known in sorted(self._known.items()):
            report = known.report or {}
            nodes.setdefault(who.node, {})[who.role] = {
                "state": _state(known),
                "epoch": who.epoch,
                "pid": report.get("pid", 0),
                "silent_s": round(now_s - known.answered_at_s, 3),
                "service": report.get("service", {}),
            }
        for (node, role), reason in self._reasons.items():
            if node in nodes:
                entry = nodes[node].setdefault(role, {"state": "absent", "epoch": 0, "pid": 0})
                entry |= {"deaths": deaths.get((node, _ROLES[role]), 0), "last_end": reason}
        self._status = {
            "rounds": self._rounds,
            "pid": os.getpid(),
            "stopping": self._desired.stopping,
            "drained": sorted(self._desired.drained),
            "roles": list(self._desired.roles),
            "nodes": nodes,
        }


def _state(known: _Known) -> str:
    return str((known.report or {}).get("state", "starting"))
