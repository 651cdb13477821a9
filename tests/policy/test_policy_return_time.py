"""Return times are learned from few waits, and start from what is published."""

import random
from dataclasses import replace

import numpy as np
import pytest

from kvtier.policy.return_time import ReturnTimes
from kvtier.policy.return_time_context import CODES, FEATURES, Context, codes_of
from kvtier.policy.survival import EDGES_S

CHAT = Context(
    clock="end", stop="end_turn", kind="u", turns=3, tokens_in=9000, new_tokens=500, tokens_out=300
)
TOOL = replace(CHAT, stop="tool_use", kind="t")


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
    codes = codes_of(replace(CHAT, stop=stop, clock=clock, gap_s=1e9, turns=10**6, tokens_in=10**9))
    assert len(codes) == len(FEATURES)
    assert len(set(codes.tolist())) == len(codes)
    assert codes.min() >= 0 and codes.max() < CODES


def test_unknown_values_are_a_class_of_their_own():
    assert set(codes_of(replace(CHAT, tokens_out=-1)).tolist()) != set(
        codes_of(replace(CHAT, tokens_out=0)).tolist()
    )
