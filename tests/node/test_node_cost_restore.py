"""Plans by cost: load, recompute or both, what they say of their time, and what is learned from it."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.messages.calls import Attached, Failed, Prefilled
from kvtier.node.eta import ERROR_BOUNDS, EtaCounters
from kvtier.node.events import Remembered
from kvtier.policy.cost_restore import CostRestore
from kvtier.policy.defaults import make_policies
from kvtier.policy.interfaces import RestoreWish, Segment
from kvtier.policy.intervals import ResidualTracker
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_uses import HYBRID, UNIT

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TOKENS = 40


def by_cost(rig, restore="cost"):
    made, state = make_policies("lru", restore), rig.core.state
    state.policies = dataclasses.replace(
        state.policies, restore=made.restore, rates=made.rates, learned=made.learned
    )
    return rig


@pytest.fixture
def rig(make_rig):
    return by_cost(make_rig())


def attach(rig, prefill_s=None, **shown):
    """A worker that shows its model and, if asked to, has told of prefills that took so long each."""
    worker = rig.attach(config=CONFIG, **shown)
    for _ in range(12 if prefill_s else 0):
        told = Prefilled(worker=worker.name, past=0, tokens=TOKENS, seconds=prefill_s)
        rig.ask(told, worker.proc.peer)
    return worker


def parked(rig, worker, tokens=TOKENS):
    rig.park(worker, "chat", range(tokens), level="disk")
    rig.run()
    return worker


def spread(plan):
    return [(r.start, r.end, r.source) for r in plan.ranges]


def take(rig, restore, seconds):
    """Have a restore take so long."""
    rig.now_s += seconds
    rig.run()
    return restore.receipt


# --- what is chosen -----------------------------------------------------------------------------------------


def test_without_a_model_all_is_loaded(rig):
    plan = rig.plan(parked(rig, rig.attach()), "chat", range(TOKENS + 1)).plan
    assert spread(plan) == [(0, TOKENS, "host"), (TOKENS, TOKENS + 1, "compute")]
    assert "prefill rate is not known" in plan.why
    assert plan.recompute_ttft_s == 0


def test_an_unknown_device_is_measured_before_it_is_believed(rig):
    worker = parked(rig, attach(rig))
    assert rig.plan(worker, "chat", range(TOKENS)).plan.load_tokens == TOKENS
    for number in range(8):
        assert rig.plan(worker, "chat", range(TOKENS)).plan.recompute_ttft_s == 0, number
        told = Prefilled(worker=worker.name, past=0, tokens=TOKENS, seconds=1e-6)
        rig.ask(told, worker.proc.peer)
    assert rig.plan(worker, "chat", range(TOKENS)).plan.reason == "recompute"


def test_computing_that_is_sooner_is_chosen_and_said(rig):
    worker = parked(rig, attach(rig, prefill_s=1e-6))
    plan = rig.plan(worker, "chat", range(TOKENS)).plan
    assert (plan.plan_id, plan.reason, plan.load_tokens) == ("", "recompute", 0)
    assert plan.recompute_ttft_s < plan.load_ttft_s
    assert "recomputing all" in plan.why
    counters = rig.core.status().counters
    assert counters["plans.recompute"] == 1
    # A decision is no miss.
    assert not any(name.startswith("misses") for name in counters)


def test_loading_that_is_sooner_is_chosen_and_said(rig):
    worker = parked(rig, attach(rig, prefill_s=5.0))
    plan = rig.plan(worker, "chat", range(TOKENS)).plan
    assert plan.load_tokens == TOKENS
    assert 0 < plan.eta_s[0] <= plan.eta_mid_s <= plan.eta_s[1] < plan.recompute_ttft_s
    assert rig.core.status().counters["plans.load"] == 1


def test_a_queue_of_prefills_makes_loading_worth_more(rig):
    worker = parked(rig, attach(rig, prefill_s=0.0002))
    assert "never measured" in rig.plan(worker, "chat", range(TOKENS)).plan.why
    assert rig.plan(worker, "chat", range(TOKENS)).plan.reason == "recompute"
    busy = rig.plan(worker, "chat", range(TOKENS), waiting=50)
    assert busy.plan.load_tokens == TOKENS


def test_with_the_policy_load_nothing_is_weighed(make_rig):
    rig = by_cost(make_rig(), "load")
    worker = parked(rig, attach(rig, prefill_s=1e-6))
    assert rig.plan(worker, "chat", range(TOKENS), deadline_s=0.0).plan.load_tokens == TOKENS


def test_what_would_be_late_is_not_loaded(rig):
    worker = parked(rig, rig.attach())
    plan = rig.plan(worker, "chat", range(TOKENS), deadline_s=0.0).plan
    assert (plan.load_tokens, plan.reason) == (0, "deadline")
    assert rig.core.status().counters["misses.deadline"] == 1


def test_an_engine_that_takes_all_or_nothing_gets_no_part(rig):
    policy, segments = CostRestore(), [Segment(256 * n, 256 * n + 256, "disk", 10**8) for n in range(10)]
    worker = parked(rig, rig.attach())
    part = policy.choose(segments, 2600, RestoreWish(deadline_s=0.5))
    assert 0 < part.tokens < 2560
    assert "not all would arrive" in part.why
    whole = RestoreWish(deadline_s=0.5, takes="all_or_nothing")
    # It was never measured, and may be in time: that is tried once.
    assert [policy.choose(segments, 2600, whole).tokens for _ in range(3)] == [2560, 0, 0]
    assert policy.choose(segments, 2600, dataclasses.replace(whole, deadline_s=9.0)).tokens == 2560
    for takes, reason in (("all_or_nothing", "deadline"), ("fronts", "deadline")):
        plan = rig.plan(worker, "chat", range(TOKENS), deadline_s=1e-4, takes=takes).plan
        assert (plan.load_tokens, plan.reason) == (0, reason)
    plan = rig.plan(worker, "chat", range(TOKENS + 1), deadline_s=9.0, takes="all_or_nothing").plan
    assert plan.load_tokens == TOKENS


def mixed(rig):
    """A plan to load what follows a front that is computed."""
    worker = parked(rig, attach(rig))
    rate = rig.core.state.workers[worker.name].rate
    rig.core.state.workers[worker.name].rate = Even(0.001)
    assert rate is not None
    for _ in range(20):
        # Of two sizes: one alone would not say whether bytes take the time, or the beginning.
        for tokens in (TOKENS, TOKENS // 8):
            rig.core.state.policies.restore.observed("host", tokens * UNIT // 2, 0.001 * tokens)
    return worker, rig.plan(worker, "chat", range(TOKENS + 2), takes="both")


@dataclasses.dataclass
class Even:
    """Every token takes equally long."""

    token_s: float
    known: bool = True

    def seconds(self, past, new):
        return self.token_s * new

    def observed(self, past, new, seconds):
        raise AssertionError("nothing is measured here")


def test_the_front_is_computed_while_the_rest_is_loaded(rig):
    worker, planned = mixed(rig)
    front = planned.plan.load_from
    assert 0 < front < TOKENS
    assert front % 4 == 0
    assert spread(planned.plan) == [
        (0, front, "compute"),
        (front, TOKENS, "host"),
        (TOKENS, TOKENS + 2, "compute"),
    ]
    assert planned.plan.bytes == (TOKENS - front) * UNIT // 2
    receipt = take(rig, rig.restore(worker, planned, range(TOKENS + 2)), 0.01)
    assert (receipt.loaded_from, receipt.tokens, receipt.ok) == (front, TOKENS, True)
    assert receipt.sources == {"host": TOKENS - front}
    assert receipt.bytes == planned.plan.bytes
    assert rig.core.status().counters["plans.both"] == 1


def test_what_is_missing_behind_a_computed_front_is_not_claimed(rig):
    worker, planned = mixed(rig)
    restore = rig.restore(worker, planned, range(TOKENS + 2), deadline_s=0.5)
    rig.tick(5.0)
    rig.run()
    assert (restore.receipt.tokens, restore.receipt.loaded_from) == (0, 0)
    assert restore.receipt.reason == "deadline"


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"waiting": -1},
        {"waiting": 10**9},
        {"prefill_wait_s": -1.0},
        {"prefill_wait_s": math.nan},
        {"prefill_wait_s": math.inf},
        {"deadline_s": math.nan},
    ],
)
def test_a_wish_that_is_none_is_refused(rig, wrong):
    worker = parked(rig, rig.attach())
    failed = rig.plan(worker, "chat", range(TOKENS), **wrong)
    assert isinstance(failed, Failed)
    assert failed.error == "ProtocolError"


@pytest.mark.parametrize(
    ("shown", "error"),
    [
        ({"config": {"model_type": "llama"}}, "ModelSpecError"),
        ({"config": CONFIG | {"hidden_size": [1]}}, "ModelSpecError"),
        ({"config": CONFIG | {"num_hidden_layers": 10**400}}, "ModelSpecError"),
        ({"config": CONFIG, "devices": 0}, "ProtocolError"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(rig, shown, error):
    rig.attach(**shown)
    answers = [a for found in rig.answers.values() for a in found if isinstance(a, Failed | Attached)]
    assert [type(a) for a in answers] == [Failed]
    assert answers[0].error == error
    rig.workers.clear()


@pytest.mark.parametrize(
    ("past", "tokens", "seconds"), [(0, 0, 1.0), (-1, 5, 1.0), (0, 5, math.nan), (0, 1 << 62, 1)]
)
def test_nothing_is_learned_from_a_prefill_that_was_none(rig, past, tokens, seconds):
    worker = attach(rig, prefill_s=0.5)
    rate = rig.core.state.workers[worker.name].rate
    before = rate.state()
    rig.ask(Prefilled(worker=worker.name, past=past, tokens=tokens, seconds=seconds), worker.proc.peer)
    assert rate.state() == before


# --- what is learned ----------------------------------------------------------------------------------------


def test_a_device_that_turns_out_slow_is_believed(rig):
    worker = parked(rig, attach(rig, device="NVIDIA H100 80GB HBM3"))
    guess = rig.plan(worker, "chat", range(TOKENS)).plan.recompute_ttft_s
    for _ in range(20):
        told = Prefilled(worker=worker.name, past=0, tokens=TOKENS, seconds=100 * guess)
        rig.ask(told, worker.proc.peer)
    assert rig.plan(worker, "chat", range(TOKENS)).plan.recompute_ttft_s == pytest.approx(
        100 * guess, rel=0.3
    )
    assert rig.core.status().counters["eta.prefills"] == 20


def test_a_restore_teaches_the_path_that_it_came_by(make_rig):
    rig = by_cost(make_rig())
    worker = parked(rig, rig.attach())
    cold = by_cost(make_rig(disk=rig.store, epoch=2))
    worker = cold.attach()
    loads = cold.core.state.policies.restore.loads
    for _ in range(30):
        by_cost_again = cold.plan(worker, "chat", range(TOKENS))
        assert {r.source for r in by_cost_again.plan.ranges} == {"disk"}
        take(cold, cold.restore(worker, by_cost_again, range(TOKENS)), 0.7)
        for block in list(cold.core.state.tree):
            for stored in list(block.parts.values()):
                cold.core.state.remove_from_host(block, stored)
    plan = cold.plan(worker, "chat", range(TOKENS)).plan
    assert plan.eta_mid_s == pytest.approx(0.7, rel=0.2)
    assert plan.eta_s[0] <= 0.7 * 1.01
    assert plan.eta_s[1] >= 0.7 * 0.99
    assert set(loads.state()) == {"disk"}
    counters = cold.core.status().counters
    assert counters["eta.inside"] + counters["eta.early"] + counters["eta.late"] == 30


def test_what_was_cut_off_teaches_that_it_takes_longer(rig):
    worker = parked(rig, rig.attach())
    before = rig.plan(worker, "chat", range(TOKENS)).plan.eta_mid_s
    for _ in range(20):
        restore = rig.restore(worker, rig.plan(worker, "chat", range(TOKENS)), range(TOKENS), deadline_s=1.0)
        rig.finish(rig.copies()[0])
        rig.tick(2.0)
        rig.run()
        assert restore.receipt.reason == "deadline"
    assert rig.plan(worker, "chat", range(TOKENS)).plan.eta_mid_s > 100 * before
    assert rig.core.status().counters["eta.late"] > 0


def test_what_is_under_way_is_a_queue(rig):
    worker = parked(rig, rig.attach())
    queues = rig.core._plans._chooser._queues
    assert set(queues.bytes().values()) == {0}
    rig.restore(worker, rig.plan(worker, "chat", range(TOKENS)), range(TOKENS))
    nbytes = TOKENS * UNIT // 2
    assert queues.bytes()["host"] == queues.bytes()["disk"] == nbytes
    rig.run()
    assert set(queues.bytes().values()) == {0}
    rig.park(worker, "other", range(100, 108), level="disk")
    assert queues.bytes()["host"] == 8 * UNIT // 2
    rig.run_copies()
    assert queues.bytes() == {"host": 0, "peer": 0, "disk": 8 * UNIT // 2}
    rig.run()
    assert set(queues.bytes().values()) == {0}


def test_loading_is_tried_again_though_it_was_not_worth_it():
    """Else a path that was slow once would never be used again, and so never be learned anew."""
    policy = CostRestore()
    for _ in range(30):
        policy.observed("disk", 10**6, 10.0)
    segments, wish = [Segment(0, 256, "disk", 10**6)], RestoreWish(Even(0.001))
    for asked in (wish, dataclasses.replace(wish, deadline_s=0.1)):
        # Also what would be too late for every deadline by what is known.
        choices = [policy.choose(segments, 300, asked).tokens for _ in range(195)]
        assert choices.count(256) == 3
        assert choices[:64] == [0] * 64


def slow_once():
    """A policy whose disk took long, and how often it loads of it when asked every so many seconds."""
    policy = CostRestore()
    for _ in range(30):
        policy.observed("disk", 10**6, 10.0)
    segments = [Segment(0, 256, "disk", 10**6)]

    def loads(seconds, asked=60, questions=0):
        found = []
        for number in range(asked):
            wish = RestoreWish(Even(0.001), now_s=1000.0 + number * seconds)
            found.append(policy.choose(segments, 300, wish).tokens == 256)
            for _ in range(questions):
                assert policy.choose(segments, 300).tokens == 256
        return [number for number, loaded in enumerate(found) if loaded]

    return policy, loads


@pytest.mark.parametrize(
    ("seconds", "first"), [(0.0, None), (0.5, 60), (5.0, 6), (7.5, 4), (600.0, 4)], ids=str
)
def test_after_half_a_minute_fewer_refusals_are_enough(seconds, first):
    """A worker that asks now and again would be an hour older before a path that is well again is used."""
    _, loads = slow_once()
    assert (loads(seconds, 61) or [None])[0] == first


def test_no_more_than_one_of_five_is_loaded_to_see_how_long_it_takes():
    _, loads = slow_once()
    assert loads(600.0, 30) == [4, 9, 14, 19, 24, 29]


def test_a_question_that_nobody_carries_out_does_not_count_as_a_load():
    _, loads = slow_once()
    assert loads(5.0, 7, questions=3) == [6]


def test_a_load_that_was_seen_says_how_long_it_takes_now():
    policy, loads = slow_once()
    assert loads(5.0, 6) == []
    policy.observed("disk", 10**6, 10.0)
    assert loads(5.0, 6) == []


# --- kept across restarts -----------------------------------------------------------------------------------


def test_the_next_core_goes_on_from_what_was_learned(make_rig):
    rig = by_cost(make_rig())
    worker = parked(rig, attach(rig, prefill_s=0.3))
    for seconds in (0.2, 0.25, 0.3):
        take(rig, rig.restore(worker, rig.plan(worker, "chat", range(TOKENS)), range(TOKENS)), seconds)
    learned = rig.core.learned()
    again = by_cost(make_rig())
    again.tell(Remembered(learned))
    worker = parked(again, attach(again))
    plans = [r.plan(w, "chat", range(TOKENS)).plan for r, w in ((rig, rig.workers[0]), (again, worker))]
    assert plans[0].eta_s == plans[1].eta_s
    assert plans[0].recompute_ttft_s == plans[1].recompute_ttft_s > 0
    assert again.core.learned() == learned


def test_damaged_memories_are_lost_and_said(make_rig):
    rig = make_rig()
    rig.tell(Remembered({"costs": b"{", "unheard of": b"x"}))
    assert any("what was learned of costs is lost" in warning for warning in rig.core.status().warnings)


# --- how often intervals hold -------------------------------------------------------------------------------


def coverage(rig, worker, restores, seed):
    """Share of restores within their interval: sizes, noise, stalls and a change of speed in the middle."""
    random = np.random.default_rng(seed)
    held = []
    for number in range(restores):
        tokens = 4 * int(random.integers(1, TOKENS // 4 + 1))
        planned = rig.plan(worker, "chat", range(tokens))
        pace = 0.002 if number < restores // 2 else 0.006
        seconds = (0.004 + pace * tokens) * float(np.exp(random.normal(0, 0.2)))
        if random.random() < 0.05:
            seconds += float(random.exponential(0.2))
        receipt = take(rig, rig.restore(worker, planned, range(tokens)), seconds)
        low, high = planned.plan.eta_s
        held.append(low <= receipt.seconds <= high)
    return float(np.mean(held))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_four_of_five_restores_are_within_their_interval(rig, seed):
    worker = parked(rig, rig.attach())
    share = coverage(rig, worker, 600, seed)
    assert 0.75 <= share <= 0.85
    counters = rig.core.status().counters
    assert counters["eta.inside"] == round(share * 600)
    assert counters["eta.relative_error"] < 1


def test_an_estimator_that_never_learns_is_seen(rig, monkeypatch):
    """The control."""
    monkeypatch.setattr(CostRestore, "observed", lambda *args, **how: None)
    monkeypatch.setattr(CostRestore, "restored", lambda *args: None)
    assert not 0.75 <= coverage(rig, parked(rig, rig.attach()), 200, 1) <= 0.85


def test_intervals_that_never_learn_are_seen(rig, monkeypatch):
    monkeypatch.setattr(ResidualTracker, "outcome", lambda self, interval, seconds: None)
    assert not 0.75 <= coverage(rig, parked(rig, rig.attach()), 300, 1) <= 0.85


# --- the same each time -------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, TOKENS), st.floats(1e-4, 10), st.sampled_from(["fronts", "both", "all_or_nothing"])
        ),
        max_size=12,
    )
)
def test_equal_stimuli_give_equal_plans(turns):
    def plans():
        rig = by_cost(CoreRig())
        worker = parked(rig, attach(rig, prefill_s=0.02))
        found = []
        for tokens, seconds, takes in turns:
            planned = rig.plan(worker, "chat", range(tokens), takes=takes)
            found.append(planned.plan)
            if planned.plan.plan_id:
                take(rig, rig.restore(worker, planned, range(tokens)), seconds)
        assert not rig.violations
        return found, rig.core.learned()

    assert plans() == plans()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["host", "disk", "peer"]), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)),
        max_size=30,
    )
)
def test_every_restore_is_counted_once(seen):
    counters = EtaCounters()
    for source, expected_s, seconds in seen:
        counters.see(source, (expected_s / 2, expected_s, expected_s * 2), seconds)
    assert sum(counters.outcomes.values()) == sum(counters.errors) == len(seen)
    assert len(counters.errors) == len(ERROR_BOUNDS) + 1
    inside = sum(e / 2 <= s <= e * 2 for _, e, s in seen)
    assert counters.total("inside") == inside


def test_groups_of_layers_are_loaded_behind_a_computed_front(make_rig):
    """Windows that reach into the front: the engine computes it, so nothing of it is loaded."""
    rig = by_cost(make_rig())
    worker = parked(rig, rig.attach(HYBRID), tokens=TOKENS)
    rig.core.state.workers[worker.name].rate = Even(0.001)
    for _ in range(40):
        rig.core.state.policies.restore.observed("host", TOKENS * UNIT // 2, 0.001 * TOKENS)
    planned = rig.plan(worker, "chat", range(TOKENS), takes="both")
    receipt = take(rig, rig.restore(worker, planned, range(TOKENS)), 0.01)
    assert receipt.tokens == TOKENS
    assert receipt.loaded_from == planned.plan.load_from
