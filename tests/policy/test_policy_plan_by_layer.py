"""Plans of restores layer by layer: what a deadline cuts off leaves nothing there, so nothing may be late."""

import dataclasses
import math
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy.cost_restore import CostRestore
from kvtier.policy.interfaces import RestoreWish, Segment
from kvtier.policy.restore_plan import queue_weight
from kvtier.policy.runs import runs_of

BLOCK, MB = 256, 10**6
SOURCES = ("host", "disk")


@dataclasses.dataclass(frozen=True)
class Flat:
    """Every token takes as long."""

    token_s: float

    def seconds(self, past, new):
        return new * self.token_s


@cache
def learned(host_rate, disk_rate, spread):
    """What is known after some loads by each path; choosing does not change it."""
    policy = CostRestore()
    for source, rate in zip(SOURCES, (host_rate, disk_rate), strict=True):
        for number in range(12):
            nbytes = (4 * MB, 16 * MB)[number % 2]
            policy.observed(source, nbytes, nbytes / rate * (1 + spread * (number % 3 - 1)))
    return policy.loads


@st.composite
def cases(draw):
    """(a policy that has seen loads, what is stored, what is wished)."""
    rates, spreads = st.sampled_from([2e7, 3e8]), st.sampled_from([0.0, 0.4])
    policy = CostRestore(learned(draw(rates), draw(rates), draw(spreads)))
    stored = draw(st.lists(st.sampled_from(SOURCES), min_size=1, max_size=8))
    segments = [Segment(n * BLOCK, (n + 1) * BLOCK, source, 8 * MB) for n, source in enumerate(stored)]
    wish = RestoreWish(
        recompute=Flat(draw(st.floats(1e-6, 1e-2))),
        waiting_requests=draw(st.integers(0, 3)),
        prefill_wait_s=draw(st.sampled_from([0.0, 0.1])),
        deadline_s=draw(st.floats(1e-3, 3.0)),
    )
    return policy, segments, wish


def seconds_of(policy, segments, wish, end, *, late):
    """Of loading up to here: the slower path, as expected or at the upper end of its interval."""
    lines = policy._lines(runs_of(segments), wish)
    longest = 0.0
    for key, line in lines.items():
        nbytes = sum(s.nbytes for s in segments if s.end <= end and s.source == key)
        longest = max(longest, line.seconds(nbytes) * (line.late_factor if late else 1.0) if nbytes else 0.0)
    return longest


def best_safe(policy, segments, wish):
    """By brute force over all cuts: the least cost of those that are there in time at the upper end."""
    tokens, weight = segments[-1].end, queue_weight(wish.waiting_requests)
    found = {}
    for end in (0, *(s.end for s in segments)):
        if seconds_of(policy, segments, wish, end, late=True) <= wish.deadline_s:
            load_s = seconds_of(policy, segments, wish, end, late=False)
            gpu_s = wish.recompute.seconds(end, tokens - end)
            found[end] = max(wish.prefill_wait_s, load_s) + (1 + weight) * gpu_s
    return found


@settings(max_examples=80, deadline=None)
@given(cases())
def test_by_layer_the_best_of_the_safe_fronts_is_taken(case):
    policy, segments, wish = case
    found = best_safe(policy, segments, wish)
    choice = policy.choose(segments, segments[-1].end, dataclasses.replace(wish, by_layer=True))
    assert choice.tokens in found
    assert math.isclose(found[choice.tokens], min(found.values()), rel_tol=1e-9)


def risky():
    """Expected just before the deadline, and dear to compute: what is worth a risk where a front remains."""
    policy = CostRestore()
    for number in range(60):
        nbytes = (8 * MB, 64 * MB)[number // 2 % 2]
        policy.observed("host", nbytes, nbytes / (80 * MB) * (0.8 if number % 2 else 1.2))
    segments = [Segment(n * BLOCK, (n + 1) * BLOCK, "host", 8 * MB) for n in range(8)]
    return policy, segments, RestoreWish(recompute=Flat(0.01), deadline_s=0.85)


def test_control_where_a_front_remains_the_risk_is_taken():
    policy, segments, wish = risky()
    bold = policy.choose(segments, segments[-1].end, wish)
    safe = policy.choose(segments, segments[-1].end, dataclasses.replace(wish, by_layer=True))
    assert 0 < safe.tokens < bold.tokens
    assert seconds_of(policy, segments, wish, safe.tokens, late=True) <= wish.deadline_s
    assert seconds_of(policy, segments, wish, bold.tokens, late=True) > wish.deadline_s


def half_known(by_layer):
    """Half lies in host memory, which was measured, and half on a disk that was not, and would be late."""
    policy = CostRestore()
    for number in range(40):
        nbytes = (8 * MB, 64 * MB)[number % 2]
        policy.observed("host", nbytes, nbytes / (160 * MB))
    segments = [Segment(n * BLOCK, (n + 1) * BLOCK, "host", 8 * MB) for n in range(4)]
    segments.append(Segment(4 * BLOCK, 8 * BLOCK, "disk", 600 * MB))
    return policy, segments, RestoreWish(recompute=Flat(0.001), deadline_s=0.3, by_layer=by_layer)


def test_a_front_that_is_safe_is_not_put_at_risk_for_a_path_that_was_never_measured():
    policy, segments, wish = half_known(by_layer=True)
    taken = [policy.choose(segments, 8 * BLOCK, wish).tokens for _ in range(5)]
    assert taken == [4 * BLOCK] * 5
    assert seconds_of(policy, segments, wish, 4 * BLOCK, late=True) <= wish.deadline_s


def test_control_where_nothing_safe_is_at_risk_it_is_tried():
    policy, segments, wish = half_known(by_layer=False)
    assert policy.choose(segments, 8 * BLOCK, wish).tokens == 8 * BLOCK
    policy, segments, wish = half_known(by_layer=True)
    unknown = [Segment(0, 8 * BLOCK, "disk", 600 * MB)]
    assert policy.choose(unknown, 8 * BLOCK, wish).tokens == 8 * BLOCK
    policy, segments, wish = half_known(by_layer=True)
    segments[-1] = dataclasses.replace(segments[-1], nbytes=900 * MB)
    endless = dataclasses.replace(wish, recompute=Flat(0.0002), deadline_s=math.inf)
    assert "tried" in policy.choose(segments, 8 * BLOCK, endless).why
    assert policy.choose(segments, 8 * BLOCK, endless).tokens == 4 * BLOCK


def test_what_is_safe_teaches_enough():
    """A front that is safe is loaded each time, so none is loaded blindly to see how long it takes."""
    policy, segments, wish = risky()
    by_layer = dataclasses.replace(wish, by_layer=True)
    taken = {policy.choose(segments, segments[-1].end, by_layer).tokens for _ in range(100)}
    assert len(taken) == 1
    none = dataclasses.replace(by_layer, deadline_s=0.001)
    assert {policy.choose(segments, segments[-1].end, none).tokens for _ in range(100)} == {0, 8 * BLOCK}
