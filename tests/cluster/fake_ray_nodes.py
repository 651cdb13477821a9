"""Ray as the reconciler's shell sees it, with a mock clock. No Ray here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvtier.cluster.reconciler import (
    ROLES,
    Desired,
    Incarnation,
    MarkLost,
    Observed,
    Reconciler,
    Seen,
    Start,
    Stop,
    TierRole,
    Wanted,
)


@dataclass
class Wish:
    """The same on every node but those that are drained."""

    config: str = "c1"
    roles: tuple[TierRole, ...] = ROLES
    drained: frozenset[str] = frozenset()
    stopping: bool = False

    def over(self, nodes: Iterable[str]) -> Desired:
        if self.stopping:
            return Desired({})
        return Desired({node: Wanted(self.config, self.roles) for node in nodes if node not in self.drained})


@dataclass
class FakeActor:
    who: Incarnation
    ready_at_s: float
    stops_at_s: float | None = None
    deaf: bool = False
    silent_from_s: float | None = None


@dataclass
class FakeCluster:
    """Ray as the reconciler's shell sees it: actors appear late, stop late, die and are noticed or not."""

    reconciler: Reconciler
    now_s: float = 1000.0
    nodes: set[str] = field(default_factory=set)
    actors: dict[Incarnation, FakeActor] = field(default_factory=dict)
    asked: dict[Incarnation, float] = field(default_factory=dict)
    ended: set[Incarnation] = field(default_factory=set)
    started: list[Incarnation] = field(default_factory=list)
    stopped: list[Stop] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    start_delay_s: float = 0.5
    desired: Wish = field(default_factory=Wish)

    def observe(self) -> Observed:
        ended, self.ended = frozenset(self.ended), set()
        alive = []
        for actor in self.actors.values():
            if actor.who.node in self.nodes:
                silent = 0.0 if actor.silent_from_s is None else self.now_s - actor.silent_from_s
                alive.append(Seen(actor.who, self.now_s >= actor.ready_at_s, silent))
        machines = {node: node.partition("#")[0] for node in self.nodes}
        return Observed(frozenset(self.nodes), tuple(alive), ended, machines)

    def step(self) -> int:
        """One round; answers how many actions there were."""
        actions = self.reconciler.step(self.observe(), self.desired.over(self.nodes), self.now_s)
        for action in actions:
            if isinstance(action, Start):
                self.started.append(action.who)
                self.asked[action.who] = self.now_s
            elif isinstance(action, Stop):
                self.stopped.append(action)
                actor = self.actors[action.who]
                if action.force:
                    self.die(action.who)
                elif not actor.deaf:
                    actor.stops_at_s = self.now_s + 0.2
            elif isinstance(action, MarkLost):
                self.lost.append(action.node)
        return len(actions)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for who, asked_s in list(self.asked.items()):
            if who.node not in self.nodes:
                del self.asked[who]
            elif self.now_s - asked_s >= self.start_delay_s / 2:
                del self.asked[who]
                self.actors[who] = FakeActor(who, asked_s + self.start_delay_s)
        for actor in list(self.actors.values()):
            if actor.stops_at_s is not None and self.now_s >= actor.stops_at_s:
                self.die(actor.who)

    def die(self, who: Incarnation, *, noticed: bool = True) -> None:
        del self.actors[who]
        if noticed:
            self.ended.add(who)

    def leave(self, node: str) -> None:
        self.nodes.discard(node)
        for who in [who for who in self.actors if who.node == node]:
            del self.actors[who]

    def run(self, seconds: float, every_s: float = 0.5) -> None:
        for _ in range(int(seconds / every_s)):
            self.step()
            self.advance(every_s)

    def at(self, node: str, role: str) -> list[Incarnation]:
        return [who for who in self.actors if (who.node, who.role) == (node, role)]

    def check_converged(self) -> None:
        wishes = self.desired.over(self.nodes).nodes
        for node in self.nodes:
            for role in ROLES:
                here = self.at(node, role)
                wanted = node in wishes and role in wishes[node].roles
                assert len(here) == int(wanted), (node, role, here)
                assert all(who.config == wishes[node].config for who in here)

    def check_never_two(self) -> None:
        places = [(who.node, who.role) for who in self.actors]
        assert len(places) == len(set(places)), "two actors of a role on one node"
        assert len({who.epoch for who in self.started}) == len(self.started), "an epoch was given twice"
