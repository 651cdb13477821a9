"""The reconciler's shell: a detached Ray actor that looks, decides and acts, again and again.

It keeps nothing that it could not find out again: what an actor is stands in its name, and the members stand
in Ray's key-value store, so a controller that Ray restarted adopts what runs.  There is one for a cluster;
should Ray have started another because this one's node was cut off, the later term wins (reconciler.py).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError

from kvtier.cluster import store
from kvtier.cluster.drain import Drain
from kvtier.cluster.grip import Grip, named
from kvtier.cluster.members import find, read_member
from kvtier.cluster.reconciler import (
    Desired,
    MarkLost,
    Observed,
    Pace,
    Reconciler,
    Start,
    Stop,
    Wanted,
)

# A node has it once: where kvtier is installed and may run.
RESOURCE = "kvtier"
# What the controller itself takes of it, so that Ray restarts it only on such a node.
SHARE = 0.001
_PERIOD_S = 0.5
_HEALTH_EVERY_S = 2.0
_LOG = logging.getLogger("kvtier.cluster")


class Controller:
    """See the module's text. Its loop starts with the actor, so that a restart needs nobody's call."""

    def __init__(self, pace: Pace | None = None) -> None:
        self._term = store.claim_term(who.epoch for who in named())
        self._reconciler = Reconciler(self._term, pace)
        self._grip = Grip(_HEALTH_EVERY_S)
        self._lock = threading.Lock()
        self._members = store.members()
        self._drains: dict[str, Drain] = {}
        self._leaving: set[str] = set()
        self._closed = False
        self._nodes: dict[str, str] = {}
        self._rounds = 0
        self._status: dict[str, Any] = {}
        self._publish(time.monotonic())
        threading.Thread(target=self._loop, name="kvtier-controller", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """What was seen in the last round: by node and role: state, epoch, pid, deaths; and the members."""
        return self._status

    def join(self, data: bytes) -> str:
        """Take a node in, or back after a drain, with its settings. data: a Member as JSON.

        Answers '' or why not: 'closed' when this controller is about to end.
        """
        member = read_member(data)
        with self._lock:
            if self._closed:
                return "closed"
            drain = self._drains.get(member.node)
            if drain is not None and not drain.over:
                return "the node is being drained"
            store.save(member)
            self._members = self._members | {member.node: member}
            self._drains.pop(member.node, None)
            self._leaving.discard(member.node)
        return ""

    def drain(self, wanted: str, grace_s: float, leave: bool) -> str:
        """Begin to drain a node, by its name or Ray's id; again is no error. Answers Ray's id.

        leave: it is no member afterwards.  status() tells of it.  Raises KvtierError for unknown nodes.
        """
        with self._lock:
            member = find(self._members.values(), wanted)
            if not member.drained or member.node not in self._drains:
                drained = msgspec.structs.replace(member, drained=True)
                store.save(drained)
                self._members = self._members | {member.node: drained}
                self._drains[member.node] = Drain(time.monotonic(), grace_s)
            if leave:
                self._leaving.add(member.node)
        return member.node

    def close(self) -> bool:
        """Whether nobody is left: then no node is taken in any more, and the caller ends this actor."""
        with self._lock:
            self._closed = self._closed or not self._members
            return self._closed

    def _loop(self) -> None:
        while True:
            try:
                self._round()
            except (RayError, OSError, ValueError, RuntimeError) as error:
                # Ray's head is away: what runs goes on, and the next round sees what became of it.
                _LOG.warning("a round failed: %s", error)
                time.sleep(_PERIOD_S)
            wake_s = self._reconciler.next_wake_s(time.monotonic())
            self._grip.wait(min(_PERIOD_S, wake_s))

    def _round(self) -> None:
        now_s = time.monotonic()
        self._leave_if_superseded()
        self._nodes = self._look_at_nodes()
        seen, ended = self._grip.look(self._nodes, now_s)
        with self._lock:
            members = self._members
            self._step_drains(now_s)
            desired = self._desired()
        observed = Observed(frozenset(self._nodes), seen, ended, self._nodes)
        for action in self._reconciler.step(observed, desired, now_s):
            _LOG.info("%s", action)
            if isinstance(action, Start):
                self._grip.start(action.who, members[action.who.node])
            elif isinstance(action, Stop):
                self._grip.stop(action.who, self._grace_s(action.who.node, now_s), force=action.force)
            elif isinstance(action, MarkLost):
                self._grip.lose(action.node)
        self._publish(now_s)

    def _leave_if_superseded(self) -> None:
        if store.latest_term() > self._term or self._reconciler.superseded:
            # Should it have been this controller's own term that was used up, Ray starts it with the next.
            _LOG.warning("a later controller acts, or the term %d is used up", self._term)
            os._exit(1)

    def _look_at_nodes(self) -> dict[str, str]:
        """Members that live, with their machines' addresses; those whose node is dead are forgotten."""
        nodes = ray.nodes()
        dead = {node["NodeID"] for node in nodes if not node["Alive"]}
        with self._lock:
            gone = [node for node in self._members if node in dead]
            for node in gone:
                store.forget(node)
            self._members = {node: m for node, m in self._members.items() if node not in dead}
            return eligible(nodes, self._members)

    def _step_drains(self, now_s: float) -> None:
        for node, drain in self._drains.items():
            here = self._grip.on(node)
            progress, can = None, True
            if drain.phase == "flushing":
                progress, can = self._grip.flush(node, drain.flush_s(now_s))
            drain.step(
                node=node in self._nodes,
                host="host" in here,
                actors=len(here),
                progress=progress,
                now_s=now_s,
                can_flush=can,
            )
        left = {node for node in self._leaving if node not in self._drains or self._drains[node].over}
        for node in left:
            store.forget(node)
        self._members = {node: m for node, m in self._members.items() if node not in left}
        self._leaving -= left

    def _desired(self) -> Desired:
        wanted = {}
        for node, member in self._members.items():
            drain = self._drains.get(node)
            if not member.drained or (drain is not None and drain.phase == "flushing"):
                wanted[node] = Wanted(member.digest, member.roles, starts=not member.drained)
        return Desired(wanted)

    def _grace_s(self, node: str, now_s: float) -> float:
        if node in self._drains:
            return self._drains[node].stop_s(now_s)
        return self._members[node].grace_s if node in self._members else 0.0

    def _publish(self, now_s: float) -> None:
        self._rounds += 1
        self._status = {
            "rounds": self._rounds,
            "pid": os.getpid(),
            "term": self._term,
            "nodes": {node: self._roles(node, now_s) for node in sorted(self._nodes)},
            "members": {
                member.node: {
                    "name": member.name,
                    "roles": list(member.roles),
                    "drained": member.drained,
                    "address": self._nodes.get(member.node, ""),
                }
                for member in self._members.values()
            },
            "drains": {node: asdict(drain.report) for node, drain in self._drains.items()},
            "lost": dict(self._reconciler.machines_lost()),
        }

    def _roles(self, node: str, now_s: float) -> dict[str, dict[str, Any]]:
        deaths = self._reconciler.deaths()
        roles: dict[str, dict[str, Any]] = {}
        for (where, role), reason in self._grip.reasons.items():
            if where == node:
                absent = {"state": "absent", "epoch": 0, "pid": 0}
                roles[role] = absent | {"deaths": deaths.get((node, role), 0), "last_end": reason}
        for role, known in self._grip.on(node).items():
            report = known.report or {}
            roles[role] = roles.get(role, {}) | {
                "state": known.state,
                "epoch": report.get("epoch", 0),
                "pid": report.get("pid", 0),
                "silent_s": round(known.silent_s(now_s), 3),
                "service": report.get("service", {}),
            }
        return roles


def eligible(nodes: Iterable[dict[str, Any]], members: Iterable[str]) -> dict[str, str]:
    """Of Ray's nodes, those that live, have the resource and are members: id and machine's address."""
    wanted = set(members)
    return {
        node["NodeID"]: str(node["NodeManagerAddress"])
        for node in nodes
        if node["Alive"] and node["NodeID"] in wanted and node["Resources"].get(RESOURCE)
    }
