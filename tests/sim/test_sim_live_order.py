"""The daemon's own orders on a trace: LRU as the simulator has it, and worth by what conversations do."""

import dataclasses

import numpy as np
import pytest

from benchmarks.live_order import LiveTier, live_replay, measured
from kvtier.policy.lru import LeafLru
from kvtier.sim.hitratio import Size
from kvtier.sim.registry import Setup, make_policy
from kvtier.sim.replay import replay

CAPACITIES = (5, 30, 80)


@pytest.fixture
def trace(trace_of, rows_of):
    """Nothing is known of durations: each turn is stored when it comes, as the simulator's rule is."""
    found = trace_of(rows_of(3))
    return dataclasses.replace(found, duration_s=np.full(len(found), -1.0))


def live(trace, policy, capacity, names="trace"):
    return live_replay(trace, LiveTier(policy, capacity, trace.block_tokens), names=names)


def simulated(trace, capacity):
    setup = Setup(capacity=capacity, block_tokens=trace.block_tokens)
    return replay(trace, make_policy("lru", setup, trace))


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_lru_has_the_hits_of_the_simulators_lru(trace, capacity):
    found = live(trace, "lru", capacity)
    assert found == simulated(trace, capacity)
    assert 0 < found.token_hit_percent < 100


def test_an_order_that_forgets_uses_has_other_hits(trace, monkeypatch):
    monkeypatch.setattr(LeafLru, "used", lambda self, key, now_s: None)
    assert any(live(trace, "lru", capacity) != simulated(trace, capacity) for capacity in CAPACITIES)


def test_a_turn_is_stored_when_it_ends(trace_of):
    rows = [[0.0, 1, 0, 64, 0, "u", "", 10.0, -1, 0, 4], [5.0, 2, 0, 64, 0, "u", "", 10.0, 0, 4, 4]]
    assert live(trace_of(rows), "lru", 8).token_hit_percent == 0
    rows[1][0] = 10.0
    assert live(trace_of(rows), "lru", 8).token_hit_percent == 50


@pytest.mark.parametrize("names", ["trace", "new", "one"])
def test_worth_never_holds_more_than_fits_and_says_what_it_took(trace, names):
    tier = LiveTier("cost", 30, trace.block_tokens)
    found = live_replay(trace, tier, names=names)
    assert 0 < found.token_hit_percent < live(trace, "cost", trace.unique_blocks).token_hit_percent
    assert len(tier._policies.host) == len(tier._resident) == 30
    line = measured(trace, "cost", Size(1.0, 30), names=names)
    assert line.value == line.detail["token_hit_percent"] == round(found.token_hit_percent, 2)
    assert line.detail["cpu_us_per_block"] > 0
