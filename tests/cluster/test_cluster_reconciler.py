"""The reconciler against a fake cluster and a mock clock."""

from __future__ import annotations

import random

import pytest
from fake_ray_nodes import FakeActor, FakeCluster, Wish
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.cluster.reconciler import EPOCHS_PER_TERM, ROLES, Incarnation, Pace, Reconciler, next_term

PACE = Pace()


def cluster(nodes: int = 1, pace: Pace = PACE) -> FakeCluster:
    fake = FakeCluster(Reconciler(1, pace))
    fake.nodes = {f"n{number:03d}" for number in range(nodes)}
    return fake


def test_host_is_started_first_and_only_once() -> None:
    fake = cluster()
    fake.step()
    assert [who.role for who in fake.started] == list(ROLES)
    fake.step()
    assert len(fake.started) == len(ROLES), "started again while the start was under way"
    fake.run(3)
    fake.check_converged()
    assert len(fake.started) == len(ROLES)


def test_hundreds_of_nodes_take_a_few_bounded_rounds() -> None:
    fake = cluster(300)
    assert fake.step() == PACE.actions_per_round
    fake.run(900 / PACE.actions_per_round * 0.5 + 1)
    fake.check_converged()
    assert fake.step() == 0
    for node in sorted(fake.nodes)[:100]:
        fake.leave(node)
    fake.step()
    assert len(fake.lost) == 100
    fake.check_converged()


def test_first_death_is_answered_at_once_and_epochs_grow() -> None:
    fake = cluster()
    fake.run(3)
    before = fake.at("n000", "host")[0]
    fake.die(before)
    fake.step()
    assert fake.started[-1].role == "host"
    assert fake.started[-1].epoch > before.epoch


def test_a_death_that_nobody_reported_is_seen_by_absence() -> None:
    fake = cluster()
    fake.run(3)
    before = fake.at("n000", "disk")[0]
    fake.die(before, noticed=False)
    fake.step()
    assert fake.started[-1].role == "disk"


def test_deaths_in_a_row_are_answered_ever_later_and_a_stable_life_forgives() -> None:
    fake = cluster()
    fake.desired = Wish("c1", ("host",))
    fake.run(3)
    starts = []
    for _ in range(5):
        fake.die(fake.at("n000", "host")[0])
        died_s = fake.now_s
        while not fake.at("n000", "host"):
            fake.step()
            fake.advance(0.1)
        starts.append(fake.asked.get(fake.started[-1], fake.now_s) - died_s)
    assert starts == sorted(starts)
    assert starts[0] < 0.6 < starts[3] < starts[4]
    assert fake.reconciler.deaths() == {("n000", "host"): 5}
    fake.run(PACE.stable_s + 2)
    assert fake.reconciler.deaths() == {}


def test_a_backoff_has_a_limit() -> None:
    pace = Pace(backoff_s=0.5, backoff_max_s=4.0)
    fake = cluster(pace=pace)
    fake.desired = Wish("c1", ("gpu",))
    for _ in range(80):
        fake.step()
        fake.ended.update(fake.asked)
        fake.asked.clear()
        fake.advance(4.1)
    assert len(fake.started) > 35


def test_a_start_that_never_arrives_is_tried_again() -> None:
    fake = cluster()
    fake.start_delay_s = 1e9
    fake.run(PACE.start_timeout_s - 1, every_s=1.0)
    assert len(fake.started) == len(ROLES)
    fake.run(4, every_s=1.0)
    assert len(fake.started) == 2 * len(ROLES)


def test_new_configuration_replaces_without_overlap() -> None:
    fake = cluster(3)
    fake.run(3)
    fake.desired = Wish("c2")
    for _ in range(20):
        fake.step()
        fake.check_never_two()
        fake.advance(0.1)
    fake.run(3)
    fake.check_converged()
    assert {stop.reason for stop in fake.stopped} == {"its configuration changed"}
    assert fake.reconciler.deaths() == {}, "a replacement was taken for a death"


def test_drain_ends_all_on_one_node_and_comes_back() -> None:
    fake = cluster(2)
    fake.run(3)
    fake.desired = Wish("c1", drained=frozenset({"n001"}))
    fake.run(3)
    fake.check_converged()
    fake.desired = Wish("c1")
    fake.run(3)
    fake.check_converged()


def test_stopping_ends_all_and_starts_none() -> None:
    fake = cluster(2)
    fake.run(3)
    fake.desired = Wish("c1", stopping=True)
    fake.run(3)
    assert not fake.actors
    assert len(fake.started) == 2 * len(ROLES)


def test_an_actor_that_ignores_stop_is_ended_by_force() -> None:
    fake = cluster()
    fake.run(3)
    actor = fake.actors[fake.at("n000", "gpu")[0]]
    actor.deaf = True
    fake.desired = Wish("c1", stopping=True)
    fake.run(PACE.stop_timeout_s - 1)
    assert fake.at("n000", "gpu")
    fake.run(3)
    assert not fake.actors
    assert [stop.force for stop in fake.stopped if stop.who == actor.who] == [False, True]


def test_a_silent_actor_is_replaced() -> None:
    fake = cluster()
    fake.run(3)
    before = fake.at("n000", "host")[0]
    fake.actors[before].silent_from_s = fake.now_s
    fake.run(PACE.silent_s - 2)
    assert fake.at("n000", "host") == [before]
    fake.run(5)
    assert fake.at("n000", "host") != [before]
    fake.check_converged()


def test_a_new_controller_adopts_and_its_epochs_are_above_all() -> None:
    fake = cluster(2)
    fake.run(3)
    alive = dict(fake.actors)
    fake.reconciler = Reconciler(2)
    fake.run(2)
    assert fake.actors == alive, "adoption started or ended something"
    fake.die(fake.at("n000", "host")[0])
    fake.step()
    assert fake.started[-1].epoch > max(who.epoch for who in alive)


def test_of_two_of_a_role_the_newer_stays() -> None:
    fake = cluster()
    fake.run(3)
    old = fake.at("n000", "host")[0]
    new = Incarnation("n000", "host", EPOCHS_PER_TERM + 99, "c1")
    fake.actors[new] = FakeActor(new, 0.0)
    fake.run(2)
    assert fake.at("n000", "host") == [new]
    assert [stop.who for stop in fake.stopped] == [old]


def test_a_node_that_returns_gets_larger_epochs() -> None:
    fake = cluster(2)
    fake.run(3)
    highest = max(who.epoch for who in fake.actors)
    fake.leave("n001")
    fake.run(1)
    fake.nodes.add("n001")
    fake.run(3)
    fake.check_converged()
    assert min(who.epoch for who in fake.actors if who.node == "n001") > highest


def test_wake_is_the_end_of_the_next_delay() -> None:
    fake = cluster()
    fake.desired = Wish("c1", ("host",))
    fake.run(3)
    for _ in range(3):
        fake.die(fake.at("n000", "host")[0])
        while not fake.at("n000", "host"):
            fake.step()
            fake.advance(0.1)
    fake.die(fake.at("n000", "host")[0])
    fake.step()
    assert fake.reconciler.next_wake_s(fake.now_s) == pytest.approx(2.0)


class Machine(RuleBasedStateMachine):
    """Faults in any order; whenever they stop for a while, there is one actor for each role and node."""

    reconciler_class: type[Reconciler] = Reconciler

    @initialize(nodes=st.integers(1, 4))
    def begin(self, nodes: int) -> None:
        self.fake = FakeCluster(self.reconciler_class(1, Pace(backoff_max_s=8.0)))
        self.fake.nodes = {f"n{number}" for number in range(nodes)}

    def _pick(self, number: int) -> Incarnation:
        return sorted(self.fake.actors)[number % len(self.fake.actors)]

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 5.0]))
    def round(self, seconds: float) -> None:
        self.fake.step()
        self.fake.advance(seconds)

    @precondition(lambda self: self.fake.actors)
    @rule(number=st.integers(0, 50), noticed=st.booleans())
    def death(self, number: int, noticed: bool) -> None:
        self.fake.die(self._pick(number), noticed=noticed)

    @precondition(lambda self: self.fake.asked)
    @rule(number=st.integers(0, 50))
    def failed_start(self, number: int) -> None:
        who = sorted(self.fake.asked)[number % len(self.fake.asked)]
        del self.fake.asked[who]
        self.fake.ended.add(who)

    @precondition(lambda self: self.fake.actors)
    @rule(number=st.integers(0, 50))
    def deafness(self, number: int) -> None:
        self.fake.actors[self._pick(number)].deaf = True

    @precondition(lambda self: self.fake.actors)
    @rule(number=st.integers(0, 50))
    def silence(self, number: int) -> None:
        self.fake.actors[self._pick(number)].silent_from_s = self.fake.now_s

    @rule(name=st.integers(0, 5))
    def join_or_leave(self, name: int) -> None:
        node = f"n{name}"
        if node in self.fake.nodes:
            self.fake.leave(node)
        else:
            self.fake.nodes.add(node)

    @rule(config=st.sampled_from(["c1", "c2"]), drained=st.sets(st.sampled_from(["n0", "n1"])))
    def wish(self, config: str, drained: set[str]) -> None:
        self.fake.desired = Wish(config, drained=frozenset(drained))

    @rule()
    def controller_restarts(self) -> None:
        # Only once what it asked for has arrived: Ray lists an actor from the moment it is asked for.
        self.fake.advance(self.fake.start_delay_s)
        term = next_term(0, [], [who.epoch for who in self.fake.started])
        self.fake.reconciler = self.reconciler_class(term, Pace(backoff_max_s=8.0))

    @rule()
    def faults_stop(self) -> None:
        self.fake.run(150.0)
        self.fake.check_converged()
        assert self.fake.step() == 0, "it acts though nothing is to be done"

    @invariant()
    def never_two(self) -> None:
        if hasattr(self, "fake"):
            self.fake.check_never_two()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class Hasty(Reconciler):
    """Starts the next one without waiting for the end of the one before."""

    def _place(self, place, where, here, wanted, left, now_s):  # type: ignore[no-untyped-def]
        right = [seen for seen in here if seen.who.config == wanted.config]
        if not right and here:
            place.current = None
        return super()._place(place, where, right, wanted, left, now_s)


def test_the_check_catches_a_reconciler_that_overlaps() -> None:
    fake = FakeCluster(Hasty(1))
    fake.nodes = {"n000"}
    fake.run(3)
    fake.desired = Wish("c2")
    with pytest.raises(AssertionError, match="two actors"):
        for _ in range(20):
            fake.step()
            fake.advance(0.1)
            fake.check_never_two()


def test_random_faults_over_many_nodes_converge() -> None:
    fake = cluster(200)
    dice = random.Random(7)
    for _ in range(60):
        for who in dice.sample(sorted(fake.actors), min(10, len(fake.actors))):
            fake.die(who, noticed=dice.random() < 0.5)
        fake.step()
        fake.check_never_two()
        fake.advance(0.5)
    fake.run(70)
    fake.check_converged()
