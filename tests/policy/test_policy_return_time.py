"""Return times are learned from few waits, and start from what is published."""

import random

import numpy as np
import pytest

from kvtier.policy.return_time import PEOPLE, ReturnTimes
from kvtier.policy.return_time_context import CODES, FEATURES, Context, codes_of
from kvtier.policy.survival import EDGES_S
from kvtier.sim.compiled import compiled

CHAT = Context(
    clock="end", stop="end_turn", kind="u", turns=3, tokens_in=9000, new_tokens=500, tokens_out=300
)
TOOL = CHAT._replace(stop="tool_use", kind="t")


def test_before_anything_is_seen_tools_return_sooner_than_people():
    times = ReturnTimes()
    tool, chat = times.curve(TOOL), times.curve(CHAT)
    assert float(tool.returns_within(10.0)) > float(chat.returns_within(10.0))
    assert 0.2 < float(chat.returns_within(300.0)) < 0.95


def test_waits_of_a_kind_are_told_apart_after_some_hundreds():
    times, chance = ReturnTimes(), random.Random(1)
    for _ in range(400):
        times.observe(TOOL, chance.uniform(40, 60), returned=True)
        times.observe(CHAT, chance.uniform(900, 1100), returned=True)
    assert float(times.curve(TOOL).returns_within(70.0)) > 0.8
    assert float(times.curve(CHAT).returns_within(70.0)) < 0.2
    assert float(times.curve(CHAT).returns_within(1200.0)) > 0.7


def test_waits_that_were_given_up_lower_the_chance():
    times = ReturnTimes()
    before = float(times.curve(CHAT).returns_within(600.0))
    for _ in range(200):
        times.observe(CHAT, 600.0, returned=False)
    assert float(times.curve(CHAT).returns_within(600.0)) < 0.3 * before


def test_learning_makes_the_loss_smaller():
    times, chance = ReturnTimes(), random.Random(2)
    losses = []
    for _ in range(6):
        before = times.loss
        for _ in range(100):
            times.observe(CHAT, chance.lognormvariate(5, 0.5), returned=True)
        losses.append(times.loss - before)
    assert losses[-1] < 0.9 * losses[0]


def test_conditioning_on_idle_time_forgets_what_did_not_happen():
    curve = ReturnTimes().curve(TOOL)
    assert float(curve.returns_within(10.0, 60.0)) < float(curve.returns_within(10.0))
    assert float(curve.alive(0.0)) == 1.0
    assert np.all(np.diff(curve.alive(EDGES_S)) <= 0)


@pytest.mark.parametrize("stop", [None, "", "tool_use", "end_turn", "length"])
@pytest.mark.parametrize("clock", ["end", "arrival"])
def test_codes_are_one_for_each_feature_and_in_range(stop, clock):
    codes = codes_of(CHAT._replace(stop=stop, clock=clock, gap_s=1e9, turns=10**6, tokens_in=10**9))
    assert len(codes) == len(FEATURES)
    assert len(set(codes.tolist())) == len(codes)
    assert codes.min() >= 0 and codes.max() < CODES


def test_unknown_values_are_a_class_of_their_own():
    assert set(codes_of(CHAT._replace(tokens_out=-1)).tolist()) != set(
        codes_of(CHAT._replace(tokens_out=0)).tolist()
    )


def learn(times, context, low_s, high_s, waits, seed=1):
    chance = random.Random(seed)
    for _ in range(waits):
        times.observe(context, chance.uniform(low_s, high_s), returned=True)


def learns_new_habits(times, waits):
    """Whether a change of habits, after a long time without one, is learned within so many waits.

    First one wait in two is over within 5 min, of all ages; then one in ten.
    """
    chance = random.Random(1)
    for before, parts in ((30_000, 0.5), (waits, 0.1)):
        for _ in range(before):
            soon = chance.random() < parts
            gap_s = chance.lognormvariate(4, 1.2) if soon else chance.uniform(900, 1100)
            times.observe(CHAT, gap_s, returned=True)
    return float(times.curve(CHAT).returns_within(300.0)) < 0.26


def test_a_change_of_habits_is_learned_within_100_waits():
    assert learns_new_habits(ReturnTimes(compiled), 100)


def test_without_forgetting_it_is_not():
    assert not learns_new_habits(ReturnTimes(compiled, kept=1.0), 100)


APART = {
    "hour": (CHAT._replace(hour=22.5), CHAT._replace(hour=10.5), CHAT),
    "tenant": (CHAT._replace(tenant=7), CHAT._replace(tenant=8), CHAT),
}


@pytest.mark.parametrize("feature", APART)
def test_contexts_are_told_apart_by(feature):
    """Left at one, most are back after ten hours; left at the other, after ten minutes."""
    late, soon, unknown = APART[feature]
    times, blind = ReturnTimes(compiled), ReturnTimes(compiled)
    chance = random.Random(3)
    for _ in range(600):
        for context, gap_s in ((late, 36000.0), (soon, 600.0)):
            gap_s *= chance.uniform(0.9, 1.1)
            times.observe(context, gap_s, returned=True)
            blind.observe(unknown, gap_s, returned=True)
    one, other = (float(times.curve(context).returns_within(1800.0)) for context in (late, soon))
    assert one < 0.3 and other > 0.7
    assert 0.3 < float(blind.curve(unknown).returns_within(1800.0)) < 0.7


def test_the_hours_of_a_day_go_round():
    first = codes_of(CHAT._replace(hour=0.5)).tolist()
    assert codes_of(CHAT._replace(hour=24.5)).tolist() == first
    assert codes_of(CHAT._replace(hour=23.5)).tolist() != first
    assert codes_of(CHAT).tolist() != first


def test_few_waits_leave_the_curve_near_what_is_published():
    published = [part for age_s, part in PEOPLE if 86 <= age_s <= 3600]
    ages_s = [age_s for age_s, _ in PEOPLE if 86 <= age_s <= 3600]
    start = ReturnTimes().curve(CHAT).returns_within(ages_s)
    assert np.abs(start / 0.9 - published).max() < 0.06
    few, many = ReturnTimes(compiled), ReturnTimes(compiled)
    learn(few, CHAT, 4000, 5000, 2)
    learn(many, CHAT, 4000, 5000, 500)
    assert np.abs(few.curve(CHAT).returns_within(ages_s) - start).max() < 0.12
    assert np.abs(many.curve(CHAT).returns_within(ages_s) - start).max() > 0.6


def test_a_context_that_was_seen_rarely_stays_near_what_all_have_in_common():
    times = ReturnTimes(compiled)
    learn(times, CHAT, 40, 60, 500)
    rare = CHAT._replace(stop="length", tenant=5)
    before = float(times.curve(rare).returns_within(70.0))
    learn(times, rare, 900, 1100, 1)
    assert abs(float(times.curve(rare).returns_within(70.0)) - before) < 0.35
    learn(times, rare, 900, 1100, 200)
    assert float(times.curve(rare).returns_within(70.0)) < 0.3
