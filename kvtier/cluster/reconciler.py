"""Which actors should run where: compares what is wanted with what is seen and answers with actions.

Pure: no Ray, no clock, no I/O.  `step` is level-triggered: it takes all that is seen at this instant, so a
lost message or a restarted controller costs a round and nothing else.  What it remembers between rounds
is only what cannot be seen: starts that are under way, deaths to wait after, and the last epoch.

An incarnation of a role on a node is told apart by its epoch, which grows with every start over the whole
cluster.  The next incarnation starts only after the one before it is seen to have ended, or its node is
lost; an actor that runs on behind a cut is then fenced by its smaller epoch.

A controller has a term, and its epochs lie within it.  One that sees an epoch of a later term is not the
controller any more: it answers with nothing from then on.  What it had asked for in its last round has
smaller epochs than all that comes after, so the later controller ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

TierRole: TypeAlias = Literal["host", "directory", "disk", "gpu"]
# The order of starts: disk and gpu look for the host's socket and would otherwise begin with a wait.
ROLES: tuple[TierRole, ...] = ("host", "directory", "disk", "gpu")
# A million starts for each second of a controller's life, and 2**53 is still far away.
EPOCHS_PER_TERM = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Incarnation:
    """One life of one role on one node. config: digest of the configuration that it was started with."""

    node: str
    role: TierRole
    epoch: int
    config: str


@dataclass(frozen=True, slots=True)
class Seen:
    """An incarnation that is alive. silent_s: since when its health was not answered."""

    who: Incarnation
    ready: bool = False
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything alive at one instant. ended: incarnations whose end was noticed since the last step.

    machines: by node, what keeps its name when the node leaves and joins again under another id.
    """

    nodes: frozenset[str]
    alive: tuple[Seen, ...]
    ended: frozenset[Incarnation] = frozenset()
    machines: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What should run on one node. starts: whether what ends there is to be started again."""

    config: str
    roles: tuple[TierRole, ...] = ROLES
    starts: bool = True


@dataclass(frozen=True, slots=True)
class Desired:
    """What should run, by node; on all other nodes nothing of ours should."""

    nodes: Mapping[str, Wanted]


@dataclass(frozen=True, slots=True)
class Start:
    """Start this incarnation on its node."""

    who: Incarnation


@dataclass(frozen=True, slots=True)
class Stop:
    """End it, within a grace unless `force`."""

    who: Incarnation
    reason: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class MarkLost:
    """The node is gone with all that ran there."""

    node: str


Action: TypeAlias = Start | Stop | MarkLost


@dataclass(frozen=True, slots=True)
class Pace:
    """Times in seconds. The first death of a role that had proven stable is answered at once.

    actions_per_round: starts and stops that one round may ask for, so that the loss of half a cluster is no
    storm on Ray's head; the rest follows in the next rounds, first the nodes with the fewest deaths.
    """

    backoff_s: float = 0.5
    backoff_max_s: float = 60.0
    stable_s: float = 30.0
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 15.0
    silent_s: float = 60.0
    actions_per_round: int = 150


@dataclass(slots=True)
class _Place:
    """What is remembered of one role on one node."""

    current: Incarnation | None = None
    arrived: bool = False
    asked_at_s: float = 0.0
    ready_at_s: float | None = None
    deaths: int = 0
    not_before_s: float = 0.0
    stops: dict[Incarnation, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Machine:
    """What is remembered of a machine whose node was lost. losses: in a row, none of them long ago."""

    losses: int = 0
    changed_at_s: float = 0.0
    not_before_s: float = 0.0


class Reconciler:
    """See the module's text. term: above the term of every controller before this one (see `next_term`)."""

    def __init__(self, term: int, pace: Pace | None = None) -> None:
        self._next_epoch = term * EPOCHS_PER_TERM
        self._end_epoch = self._next_epoch + EPOCHS_PER_TERM
        self._pace = pace or Pace()
        self._places: dict[tuple[str, TierRole], _Place] = {}
        self._nodes: dict[str, str] = {}
        self._machines: dict[str, _Machine] = {}
        self._superseded = False

    @property
    def superseded(self) -> bool:
        """A later controller acts, or the term's epochs are used up: this object answers with nothing."""
        return self._superseded or self._next_epoch >= self._end_epoch

    def step(self, observed: Observed, desired: Desired, now_s: float) -> list[Action]:
        """The actions for this instant; changes what is remembered. `now_s` is any clock that only grows."""
        for seen in observed.alive:
            self._superseded = self._superseded or seen.who.epoch >= self._end_epoch
            self._next_epoch = max(self._next_epoch, seen.who.epoch + 1)
        if self.superseded:
            return []
        actions: list[Action] = self._changed_nodes(observed, now_s)
        alive = _by_place(observed)
        left = self._pace.actions_per_round
        for node, role in self._in_turn(observed.nodes):
            wanted = desired.nodes.get(node)
            wanted = wanted if wanted is not None and role in wanted.roles else None
            here = alive.get((node, role), [])
            if wanted or here or (node, role) in self._places:
                place = self._places.setdefault((node, role), _Place())
                self._notice(place, here, observed.ended, now_s)
                for action in self._place(place, (node, role), here, wanted, left, now_s):
                    actions.append(action)
                    left -= 1
        return actions

    def next_wake_s(self, now_s: float) -> float:
        """Seconds until a delay that runs now is over; at most a minute."""
        delays = [place.not_before_s for place in self._places.values()]
        delays += [machine.not_before_s for machine in self._machines.values()]
        return min([60.0, *(at_s - now_s for at_s in delays if at_s > now_s)])

    def machines_lost(self) -> Mapping[str, int]:
        """Losses in a row by machine, where there were some lately."""
        return {name: machine.losses for name, machine in self._machines.items()}

    def deaths(self) -> Mapping[tuple[str, TierRole], int]:
        """Deaths in a row by node and role, where there were some."""
        return {where: place.deaths for where, place in self._places.items() if place.deaths}

    def _in_turn(self, nodes: Iterable[str]) -> Iterator[tuple[str, TierRole]]:
        """All places: nodes with fewer deaths first, and on each the host before those that look for it."""

        def deaths(node: str) -> int:
            places = [self._places.get((node, role)) for role in ROLES]
            return sum(place.deaths for place in places if place is not None)

        for node in sorted(nodes, key=lambda node: (deaths(node), node)):
            for role in ROLES:
                yield node, role

    def _changed_nodes(self, observed: Observed, now_s: float) -> list[Action]:
        """Forget what ran on lost nodes, and let one that comes and goes wait ever longer."""
        lost = sorted(self._nodes.keys() - observed.nodes)
        for node in lost:
            for role in ROLES:
                self._places.pop((node, role), None)
            machine = self._machines.setdefault(self._nodes.pop(node), _Machine())
            machine.losses, machine.changed_at_s = machine.losses + 1, now_s
        for node in sorted(observed.nodes - self._nodes.keys()):
            self._nodes[node] = observed.machines.get(node, node)
            known = self._machines.get(self._nodes[node])
            if known is not None:
                known.changed_at_s = now_s
                known.not_before_s = now_s + self._delay_s(known.losses - 1)
        # Twice the longest delay without a change, here or away: it is a machine like any other again.
        quiet_s = now_s - 2 * self._pace.backoff_max_s
        self._machines = {name: m for name, m in self._machines.items() if m.changed_at_s > quiet_s}
        return [MarkLost(node) for node in lost]

    def _place(
        self,
        place: _Place,
        where: tuple[str, TierRole],
        here: list[Seen],
        wanted: Wanted | None,
        left: int,
        now_s: float,
    ) -> Iterator[Action]:
        """At most `left` actions for one place."""
        keep = self._keep(here, wanted.config) if wanted is not None else None
        if keep is not None and place.current != keep.who:
            place.current, place.arrived, place.ready_at_s = keep.who, True, None
        place.stops = {who: at for who, at in place.stops.items() if any(s.who == who for s in here)}
        for seen in here:
            if left > 0 and (keep is None or seen.who != keep.who):
                stop = self._stop(place, seen, _why(seen, keep, wanted), now_s)
                if stop is not None:
                    left -= 1
                    yield stop
        if wanted is None:
            place.deaths, place.not_before_s = 0, 0.0
        elif left > 0 and not here and place.current is None and self._may_start(place, where, wanted, now_s):
            yield self._start(place, where, wanted.config, now_s)

    def _may_start(self, place: _Place, where: tuple[str, TierRole], wanted: Wanted, now_s: float) -> bool:
        host = self._places.get((where[0], "host"))
        # The others look for the host's socket: without it they would die in a row for nothing.
        led = (
            where[1] == "host"
            or "host" not in wanted.roles
            or (host is not None and host.current is not None)
        )
        machine = self._machines.get(self._nodes[where[0]])
        not_before_s = max(place.not_before_s, machine.not_before_s if machine is not None else 0.0)
        return wanted.starts and led and now_s >= not_before_s and self._next_epoch < self._end_epoch

    def _notice(self, place: _Place, here: list[Seen], ended: frozenset[Incarnation], now_s: float) -> None:
        """Bring `place.current` up to date: has it arrived, is it dead, did its start take too long?"""
        current = place.current
        if current is None:
            return
        seen = next((s for s in here if s.who == current), None)
        if seen is not None:
            place.arrived = True
            if not seen.ready:
                place.ready_at_s = None
            elif place.ready_at_s is None:
                place.ready_at_s = now_s
            elif now_s - place.ready_at_s >= self._pace.stable_s:
                place.deaths = 0
            return
        late = not place.arrived and now_s - place.asked_at_s >= self._pace.start_timeout_s
        if current in ended or place.arrived or late:
            # An end that was asked for is no death to wait after.
            if current not in place.stops:
                place.not_before_s = now_s + self._delay_s(place.deaths)
                place.deaths += 1
            place.current = None

    def _delay_s(self, deaths: int) -> float:
        if deaths == 0:
            return 0.0
        return min(self._pace.backoff_max_s, self._pace.backoff_s * 2.0 ** min(deaths - 1, 30))

    def _keep(self, here: list[Seen], config: str) -> Seen | None:
        """Of those alive, the one that should stay: the newest of the right configuration that answers."""
        right = [s for s in here if s.who.config == config and s.silent_s < self._pace.silent_s]
        newest = max(here, key=lambda s: s.who.epoch, default=None)
        return newest if newest in right else None

    def _stop(self, place: _Place, seen: Seen, reason: str, now_s: float) -> Action | None:
        asked_s = place.stops.get(seen.who)
        if asked_s is None:
            place.stops[seen.who] = now_s
            return Stop(seen.who, reason, force=reason == "silent")
        if now_s - asked_s < self._pace.stop_timeout_s:
            return None
        place.stops[seen.who] = now_s
        return Stop(seen.who, "did not end within its grace", force=True)

    def _start(self, place: _Place, where: tuple[str, TierRole], config: str, now_s: float) -> Action:
        place.current = Incarnation(*where, self._next_epoch, config)
        place.arrived, place.asked_at_s, place.ready_at_s = False, now_s, None
        self._next_epoch += 1
        return Start(place.current)


def _why(seen: Seen, keep: Seen | None, wanted: Wanted | None) -> str:
    if wanted is None:
        return "not wanted here"
    if keep is not None:
        return "a newer one runs"
    return "silent" if seen.who.config == wanted.config else "its configuration changed"


def next_term(now_s: float, terms: Iterable[int], epochs: Iterable[int]) -> int:
    """A term above all that are known: claimed before, or seen in the epochs of actors that live.

    now_s: seconds since 1970; makes terms grow also from one cluster to the next, which knows of none.
    """
    seen = {epoch // EPOCHS_PER_TERM for epoch in epochs}
    return max([int(now_s), *(term + 1 for term in seen.union(terms))])


def _by_place(observed: Observed) -> dict[tuple[str, TierRole], list[Seen]]:
    places: dict[tuple[str, TierRole], list[Seen]] = {}
    gone: Iterable[Incarnation] = observed.ended
    for seen in observed.alive:
        if seen.who not in gone:
            places.setdefault((seen.who.node, seen.who.role), []).append(seen)
    return places
