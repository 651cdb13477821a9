"""Which actors should run where: compares what is wanted with what is seen and answers with actions.

Pure: no Ray, no clock, no I/O.  `step` is level-triggered: it takes all that is seen at this instant, so a
lost message or a restarted controller costs a round and nothing else.  What it remembers between rounds
is only what cannot be seen: starts that are under way, deaths to wait after, and the last epoch.

An incarnation of a role on a node is told apart by its epoch, which grows with every start over the whole
cluster.  The next incarnation starts only after the one before it is seen to have ended, or its node is
lost; an actor that runs on behind a cut is then fenced by its smaller epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

TierRole: TypeAlias = Literal["host", "disk", "gpu"]
# The order of starts: the other two look for the host's socket and would otherwise begin with a wait.
ROLES: tuple[TierRole, ...] = ("host", "disk", "gpu")


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
    """Everything alive at one instant. ended: incarnations whose end was noticed since the last step."""

    nodes: frozenset[str]
    alive: tuple[Seen, ...]
    ended: frozenset[Incarnation] = frozenset()


@dataclass(frozen=True, slots=True)
class Desired:
    """What should run: these roles with this configuration on every node that is not drained."""

    config: str
    roles: tuple[TierRole, ...] = ROLES
    drained: frozenset[str] = frozenset()
    stopping: bool = False


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
    """Times in seconds. The first death of a role that had proven stable is answered at once."""

    backoff_s: float = 0.5
    backoff_max_s: float = 60.0
    stable_s: float = 30.0
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 15.0
    silent_s: float = 60.0


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


class Reconciler:
    """See the module's text. first_epoch must be above every epoch given before this object was made."""

    def __init__(self, first_epoch: int, pace: Pace | None = None) -> None:
        self._next_epoch = first_epoch
        self._pace = pace or Pace()
        self._places: dict[tuple[str, TierRole], _Place] = {}
        self._nodes: frozenset[str] = frozenset()

    def step(self, observed: Observed, desired: Desired, now_s: float) -> list[Action]:
        """The actions for this instant; changes what is remembered. `now_s` is any clock that only grows."""
        actions: list[Action] = self._lost_nodes(observed.nodes)
        alive = _by_place(observed)
        for seen in observed.alive:
            self._next_epoch = max(self._next_epoch, seen.who.epoch + 1)
        self._nodes = observed.nodes
        for role in ROLES:
            for node in sorted(observed.nodes):
                wanted = _wanted(desired, node, role)
                here = alive.get((node, role), [])
                if wanted or here or (node, role) in self._places:
                    place = self._places.setdefault((node, role), _Place())
                    actions += self._place(place, (node, role), here, observed.ended, desired, now_s)
        return actions

    def next_wake_s(self, now_s: float) -> float:
        """Seconds until a delay that runs now is over; at most a minute."""
        waits = [p.not_before_s - now_s for p in self._places.values() if p.not_before_s > now_s]
        return min([60.0, *waits])

    def deaths(self) -> Mapping[tuple[str, TierRole], int]:
        """Deaths in a row by node and role, where there were some."""
        return {where: place.deaths for where, place in self._places.items() if place.deaths}

    def _lost_nodes(self, nodes: frozenset[str]) -> list[Action]:
        lost = sorted(self._nodes - nodes)
        for node in lost:
            for role in ROLES:
                self._places.pop((node, role), None)
        return [MarkLost(node) for node in lost]

    def _place(
        self,
        place: _Place,
        where: tuple[str, TierRole],
        here: list[Seen],
        ended: frozenset[Incarnation],
        desired: Desired,
        now_s: float,
    ) -> list[Action]:
        wanted = _wanted(desired, *where)
        self._notice(place, here, ended, now_s)
        keep = self._keep(here, desired.config) if wanted else None
        if keep is not None and place.current != keep.who:
            place.current, place.arrived, place.ready_at_s = keep.who, True, None
        place.stops = {who: at for who, at in place.stops.items() if any(s.who == who for s in here)}
        actions = [
            self._stop(place, seen, _why(seen, keep, wanted, desired), now_s)
            for seen in here
            if keep is None or seen.who != keep.who
        ]
        if not wanted:
            place.deaths, place.not_before_s = 0, 0.0
        if wanted and not here and place.current is None and now_s >= place.not_before_s:
            actions.append(self._start(place, where, desired.config, now_s))
        return [action for action in actions if action is not None]

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


def _wanted(desired: Desired, node: str, role: TierRole) -> bool:
    return not desired.stopping and role in desired.roles and node not in desired.drained


def _why(seen: Seen, keep: Seen | None, wanted: bool, desired: Desired) -> str:
    if not wanted:
        return "not wanted here"
    if keep is not None:
        return "a newer one runs"
    return "silent" if seen.who.config == desired.config else "its configuration changed"


def _by_place(observed: Observed) -> dict[tuple[str, TierRole], list[Seen]]:
    places: dict[tuple[str, TierRole], list[Seen]] = {}
    gone: Iterable[Incarnation] = observed.ended
    for seen in observed.alive:
        if seen.who not in gone:
            places.setdefault((seen.who.node, seen.who.role), []).append(seen)
    return places
