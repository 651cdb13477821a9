"""Computing and loading that meet: simulated with two servers, against either alone."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy.meeting import Meeting


def simulate(meeting, compute_s, load_s):
    """(when all blocks are there, blocks computed, blocks loaded), with what each block really takes."""
    ready = [(0.0, 0, "compute", None), (0.0, 1, "load", None)]
    computed, loaded, last_s, number = [], [], 0.0, 2
    while ready:
        now_s, _, side, block = heapq.heappop(ready)
        compute = side == "compute"
        if block is not None:
            last_s = now_s
            (meeting.block_computed if compute else meeting.block_loaded)(now_s, block)
            (computed if compute else loaded).append(block)
        following = (meeting.next_to_compute if compute else meeting.next_to_load)(now_s)
        if following is not None:
            number += 1
            took_s = (compute_s if compute else load_s)[following]
            heapq.heappush(ready, (now_s + took_s, number, side, following))
    assert computed + loaded[::-1] == list(range(len(compute_s)))
    assert meeting.computed == len(computed)
    return last_s, len(computed), len(loaded)


def blocks(count, first_s, growth, load_s):
    return [first_s * (1 + growth * i / count) for i in range(count)], [load_s] * count


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 200), st.floats(0.01, 10), st.floats(0, 5), st.floats(0.001, 100))
def test_never_over_the_better_single_way(count, first_s, growth, load_s):
    compute_s, loads_s = blocks(count, first_s, growth, load_s)
    both_s, _, _ = simulate(Meeting(compute_s, loads_s), compute_s, loads_s)
    assert both_s <= min(sum(compute_s), sum(loads_s)) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(40, 300), st.floats(0, 5))
def test_nearly_twice_as_fast_at_break_even(count, growth):
    compute_s, _ = blocks(count, 1.0, growth, 0)
    loads_s = [sum(compute_s) / count] * count
    both_s, computed, loaded = simulate(Meeting(compute_s, loads_s), compute_s, loads_s)
    assert sum(compute_s) / both_s >= 1.9
    assert computed >= loaded - 1


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 100), st.floats(0.1, 10), st.floats(0.25, 4), st.floats(0.25, 4), st.integers(0, 1000))
def test_wrong_expectations_cost_some_blocks_at_most(count, load_s, compute_off, load_off, seed):
    random = np.random.default_rng(seed)
    compute_s, loads_s = blocks(count, 1.0, 1.0, load_s)
    true_compute_s = list(compute_off * np.asarray(compute_s) * np.exp(random.normal(0, 0.2, count)))
    true_load_s = list(load_off * np.asarray(loads_s) * np.exp(random.normal(0, 0.2, count)))
    both_s, _, _ = simulate(Meeting(compute_s, loads_s), true_compute_s, true_load_s)
    single_s = min(sum(true_compute_s), sum(true_load_s))
    # What one side leaves to the other is at most a block by what was expected then.
    wrong = max(compute_off / load_off, load_off / compute_off)
    assert both_s <= single_s + (1 + wrong) * (max(true_compute_s) + max(true_load_s))


def test_mean_over_wrong_expectations_is_far_below_the_better_single_way():
    random, ratios = np.random.default_rng(1), []
    for _ in range(300):
        compute_s, loads_s = blocks(32, 1.0, 1.0, float(random.uniform(0.5, 4)))
        true_compute_s = list(np.asarray(compute_s) * np.exp(random.normal(0, 0.3)))
        true_load_s = list(np.asarray(loads_s) * np.exp(random.normal(0, 0.3)))
        both_s, _, _ = simulate(Meeting(compute_s, loads_s), true_compute_s, true_load_s)
        ratios.append(both_s / min(sum(true_compute_s), sum(true_load_s)))
    assert np.mean(ratios) < 0.7
    assert max(ratios) <= 1.02


def test_a_side_that_is_far_too_slow_takes_nothing():
    assert simulate(Meeting([100.0] * 8, [1.0] * 8), [100.0] * 8, [1.0] * 8) == (8.0, 0, 8)
    assert simulate(Meeting([1.0] * 8, [100.0] * 8), [1.0] * 8, [100.0] * 8) == (8.0, 8, 0)


def test_taking_blocks_blindly_is_what_the_rule_prevents(monkeypatch):
    monkeypatch.setattr(Meeting, "_done", lambda self, side, other, now_s, block: self._front >= self._back)
    assert simulate(Meeting([100.0] * 8, [1.0] * 8), [100.0] * 8, [1.0] * 8)[0] == 100.0


def test_nothing_stored_meets_at_once_and_nonsense_is_refused():
    meeting = Meeting([], [])
    assert meeting.next_to_compute(0.0) is None
    assert meeting.next_to_load(0.0) is None
    for compute_s, load_s in (([1.0], []), ([-1.0], [1.0]), ([1.0], [float("nan")])):
        with pytest.raises(ValueError, match="not negative"):
            Meeting(compute_s, load_s)
