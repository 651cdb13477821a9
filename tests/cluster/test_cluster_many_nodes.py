"""The reconciler with hundreds of nodes and with two controllers, against a fake cluster and a mock clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from fake_ray_nodes import FakeActor, FakeCluster, Wish
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.cluster.reconciler import (
    EPOCHS_PER_TERM,
    ROLES,
    Desired,
    Incarnation,
    Observed,
    Pace,
    Reconciler,
    Start,
    Wanted,
    next_term,
)

PACE = Pace(actions_per_round=50)
NODES = 300


def many(nodes: int = NODES, pace: Pace = PACE, term: int = 1) -> FakeCluster:
    fake = FakeCluster(Reconciler(term, pace))
    fake.nodes = {f"n{number:03d}" for number in range(nodes)}
    return fake


def settle(fake: FakeCluster) -> None:
    fake.run(len(fake.nodes) * len(ROLES) / fake.reconciler._pace.actions_per_round * 0.5 + 2)
    fake.check_converged()


def test_three_hundred_nodes_start_host_first_and_in_bounded_rounds() -> None:
    fake = many()
    while fake.step():
        assert len(fake.started) <= PACE.actions_per_round * (fake.now_s - 999.5) / 0.5
        fake.advance(0.5)
    fake.run(1)
    fake.check_converged()
    order: dict[str, list[str]] = {}
    for who in fake.started:
        order.setdefault(who.node, []).append(who.role)
    assert set(map(tuple, order.values())) == {ROLES}


def test_joins_and_losses_touch_no_other_node() -> None:
    fake = many()
    settle(fake)
    before = {who for who in fake.actors if who.node >= "n100"}
    fake.started.clear()
    for number in range(100):
        fake.leave(f"n{number:03d}")
        fake.nodes.add(f"x{number:03d}")
    settle(fake)
    assert before <= set(fake.actors)
    assert not fake.stopped
    assert {who.node[0] for who in fake.started} == {"x"}
    assert len(fake.started) == 100 * len(ROLES)


def test_a_node_that_only_answers_late_is_left_alone() -> None:
    fake = many(20)
    settle(fake)
    alive = dict(fake.actors)
    for _ in range(20):
        for actor in fake.actors.values():
            if actor.who.node == "n003":
                actor.silent_from_s = fake.now_s
        fake.run(PACE.silent_s - 2)
    assert fake.actors == alive
    assert not fake.stopped


def test_nodes_that_are_not_wanted_are_left_alone() -> None:
    reconciler = Reconciler(1, PACE)
    observed = Observed(frozenset({"ours", "theirs"}), ())
    actions = reconciler.step(observed, Desired({"ours": Wanted("c1")}), 0.0)
    assert {action.who.node for action in actions if isinstance(action, Start)} == {"ours"}
    assert len(actions) == len(ROLES)


def test_actors_that_die_in_a_loop_are_no_storm_and_starve_nobody() -> None:
    fake = many(200)
    settle(fake)
    fake.started.clear()
    sick = {f"n{number:03d}" for number in range(150)}
    joined_s = None
    for step in range(1200):
        for who in [who for who in fake.actors if who.node in sick]:
            fake.die(who)
        if step == 600:
            fake.nodes.update(f"x{number:03d}" for number in range(20))
            joined_s = fake.now_s
        assert fake.step() <= PACE.actions_per_round
        fake.advance(0.5)
        if joined_s is not None and fake.now_s - joined_s == 3.0:
            assert all(fake.at(node, role) for node in fake.nodes if node[0] == "x" for role in ROLES)
    starts = Counter((who.node, who.role) for who in fake.started if who.node in sick)
    # Ten minutes: delays double to a minute, so a place is started about 16 times and not 1200.
    assert max(starts.values()) < 20
    fake.run(PACE.backoff_max_s + 60)
    fake.check_converged()


def test_the_others_wait_for_a_host_that_does_not_live() -> None:
    fake = many(1)
    settle(fake)
    for role in ROLES:
        fake.die(fake.at("n000", role)[0])
    for _ in range(4):
        fake.step()
        fake.ended.update(who for who in fake.asked if who.role == "host")
        fake.asked = {who: at for who, at in fake.asked.items() if who.role != "host"}
        fake.advance(0.1)
    fake.started.clear()
    fake.die(fake.at("n000", "gpu")[0])
    fake.step()
    assert fake.started == [], "started beside a host that waits"
    fake.run(20)
    fake.check_converged()
    assert fake.started[0].role == "host"


def flap(fake: FakeCluster, seconds: float, away_s: float = 1.0) -> int:
    """A machine that joins under a new id each time; answers how often something was started there."""
    before, life = len(fake.started), 0
    end_s = fake.now_s + seconds
    while fake.now_s < end_s:
        life += 1
        node = f"bad#{life}"
        fake.nodes.add(node)
        fake.run(2.0)
        fake.leave(node)
        fake.run(away_s)
    return len({who.node for who in fake.started[before:]})


def test_a_flapping_machine_is_started_ever_more_rarely_and_then_forgiven() -> None:
    fake = many(1)
    settle(fake)
    assert flap(fake, 300) < 10, "of a hundred lives"
    assert fake.reconciler.machines_lost()["bad"] > 50
    fake.run(2 * PACE.backoff_max_s + 1)
    assert fake.reconciler.machines_lost() == {}
    fake.nodes.add("bad#last")
    fake.run(3)
    fake.check_converged()


def test_without_names_of_machines_the_flapping_is_seen_in_the_starts() -> None:
    fake = many(1)
    settle(fake)
    observe = fake.observe
    fake.observe = lambda: Observed(*(getattr(observe(), name) for name in ("nodes", "alive", "ended")))  # type: ignore[method-assign]
    assert flap(fake, 300) > 50, "the check above would not notice"


def test_a_node_lost_once_comes_back_at_once() -> None:
    fake = many(3)
    settle(fake)
    fake.leave("n001")
    fake.run(1)
    fake.nodes.add("n001#again")
    fake.run(2)
    fake.check_converged()


def test_a_node_is_not_started_on_while_it_drains_and_its_actors_stay() -> None:
    fake = many(1)
    settle(fake)
    desired = Desired({"n000": Wanted("c1", starts=False)})
    fake.die(fake.at("n000", "gpu")[0])
    assert fake.reconciler.step(fake.observe(), desired, fake.now_s) == []
    assert fake.at("n000", "host")
    fake.run(3)
    fake.check_converged()


def test_terms_grow_whatever_is_known() -> None:
    assert next_term(1700000000.9, [], []) == 1700000000
    assert next_term(5.0, [9, 7], []) == 10
    assert next_term(5.0, [9], [12 * EPOCHS_PER_TERM + 3]) == 13


def test_a_term_that_is_used_up_gives_no_epoch_of_the_next() -> None:
    reconciler = Reconciler(1, PACE)
    last = Incarnation("n", "host", 2 * EPOCHS_PER_TERM - 2, "c1")
    fake = FakeCluster(reconciler)
    fake.nodes = {"n"}
    fake.actors[last] = FakeActor(last, 0.0)
    fake.run(3)
    assert [who.epoch for who in fake.started] == [2 * EPOCHS_PER_TERM - 1]
    assert reconciler.superseded


class Unfenced(Reconciler):
    """Goes on though a later controller acts."""

    def __init__(self, term: int, pace: Pace) -> None:
        super().__init__(term, pace)
        self._end_epoch = 1 << 62


def duel(first: Reconciler, fake: FakeCluster) -> tuple[int, int]:
    """Two controllers that both see all; answers how many starts each asked for once the second acts."""
    second = Reconciler(2, PACE)
    asked = [0, 0]
    for round_number in range(40):
        for turn, reconciler in enumerate((first, second)):
            fake.reconciler = reconciler
            before = len(fake.started)
            fake.step()
            if round_number > 0:
                asked[turn] += len(fake.started) - before
            fake.advance(0.3)
        for who in sorted(fake.actors)[:5]:
            fake.die(who)
    return asked[0], asked[1]


def test_of_two_controllers_only_the_later_acts() -> None:
    fake = many(10)
    settle(fake)
    for who in list(fake.actors)[:6]:
        fake.die(who)
    first = fake.reconciler
    fake.reconciler = Reconciler(2, PACE)
    fake.step()
    fake.advance(1.0)
    assert duel(first, fake)[0] == 0
    assert first.superseded
    fake.run(PACE.backoff_max_s + 5)
    fake.check_converged()


def test_the_check_catches_a_controller_without_a_fence() -> None:
    fake = many(10, term=1)
    fake.reconciler = Unfenced(1, PACE)
    settle(fake)
    first = fake.reconciler
    fake.die(sorted(fake.actors)[0])
    fake.reconciler = Reconciler(2, PACE)
    fake.step()
    fake.advance(1.0)
    assert duel(first, fake)[0] > 0


class Machine(RuleBasedStateMachine):
    """Faults, joins, flaps and a second controller, in any order."""

    second_class: type[Reconciler] = Reconciler

    @initialize(nodes=st.integers(1, 8), budget=st.sampled_from([1, 3, 50]))
    def begin(self, nodes: int, budget: int) -> None:
        self.pace = Pace(backoff_max_s=8.0, actions_per_round=budget)
        self.fake = many(nodes, self.pace)
        self.term = 1
        self.old: list[Reconciler] = []
        self.lives = 0

    def act(self, reconciler: Reconciler) -> None:
        current, self.fake.reconciler = self.fake.reconciler, reconciler
        assert self.fake.step() - len(self.fake.lost) <= self.pace.actions_per_round
        self.fake.lost.clear()
        self.fake.reconciler = current

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 5.0]))
    def round(self, seconds: float) -> None:
        self.act(self.fake.reconciler)
        self.fake.advance(seconds)

    @precondition(lambda self: self.old)
    @rule()
    def an_old_controller_acts(self) -> None:
        before = len(self.fake.started)
        self.act(self.old[-1])
        later = any(who.epoch // EPOCHS_PER_TERM == self.term for who in self.fake.actors)
        assert not later or len(self.fake.started) == before, "a controller of an earlier term acted"

    @rule()
    def a_second_controller(self) -> None:
        self.fake.advance(self.fake.start_delay_s)
        self.old.append(self.fake.reconciler)
        self.term = next_term(0, [self.term], [who.epoch for who in self.fake.actors])
        self.fake.reconciler = Reconciler(self.term, self.pace)

    @precondition(lambda self: self.fake.actors)
    @rule(number=st.integers(0, 50), noticed=st.booleans())
    def death(self, number: int, noticed: bool) -> None:
        self.fake.die(sorted(self.fake.actors)[number % len(self.fake.actors)], noticed=noticed)

    @precondition(lambda self: self.fake.actors)
    @rule(number=st.integers(0, 50))
    def silence(self, number: int) -> None:
        who = sorted(self.fake.actors)[number % len(self.fake.actors)]
        self.fake.actors[who].silent_from_s = self.fake.now_s

    @precondition(lambda self: self.fake.nodes)
    @rule(number=st.integers(0, 50), again=st.booleans())
    def loss(self, number: int, again: bool) -> None:
        node = sorted(self.fake.nodes)[number % len(self.fake.nodes)]
        self.fake.leave(node)
        if again:
            self.lives += 1
            self.fake.nodes.add(f"{node.partition('#')[0]}#{self.lives}")

    @rule(config=st.sampled_from(["c1", "c2"]), drained=st.sets(st.sampled_from(["n000", "n001"])))
    def wish(self, config: str, drained: set[str]) -> None:
        self.fake.desired = Wish(config, drained=frozenset(drained))

    @rule()
    def faults_stop(self) -> None:
        self.fake.run(200.0)
        self.fake.check_converged()
        assert self.fake.step() == 0, "it acts though nothing is to be done"

    @invariant()
    def never_two(self) -> None:
        if hasattr(self, "fake") and not self.old:
            self.fake.check_never_two()

    @invariant()
    def epochs_are_given_once(self) -> None:
        if hasattr(self, "fake"):
            epochs = Counter(who.epoch for who in self.fake.started)
            assert not epochs or max(epochs.values()) == 1, "an epoch was given twice"


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class Boundless(Reconciler):
    """Asks for everything at once."""

    def _place(self, place, where, here, wanted, left, now_s):  # type: ignore[no-untyped-def]
        return super()._place(place, where, here, wanted, 1 << 30, now_s)


def test_the_check_catches_rounds_without_a_bound() -> None:
    machine = Machine()
    machine.begin(8, 3)
    machine.fake.reconciler = Boundless(1, machine.pace)
    with pytest.raises(AssertionError):
        machine.round(0.3)


def test_random_faults_over_three_hundred_nodes_converge() -> None:
    fake = many()
    dice = random.Random(11)
    settle(fake)
    for life in range(60):
        for who in dice.sample(sorted(fake.actors), min(20, len(fake.actors))):
            fake.die(who, noticed=dice.random() < 0.5)
        node = dice.choice(sorted(fake.nodes))
        fake.leave(node)
        fake.nodes.add(f"{node.partition('#')[0]}#{life}")
        fake.step()
        fake.check_never_two()
        fake.advance(0.5)
    fake.run(80)
    fake.check_converged()
