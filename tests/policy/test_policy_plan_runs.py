"""Runs out of segments, what all ranks of a group hold, and the policy that plans over them."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.policy.always_load import AlwaysLoad
from kvtier.policy.cost_restore import CostRestore
from kvtier.policy.defaults import make_policies
from kvtier.policy.interfaces import RestorePolicy, RestoreWish, Segment
from kvtier.policy.load_cost import LoadCosts, LoadLine, Path
from kvtier.policy.restore_plan import Question, plan_restore
from kvtier.policy.runs import Run, common_runs, runs_of

MB = 10**6
BLOCK = 256


@dataclass(frozen=True)
class Flat:
    """Every token takes as long."""

    token_s: float

    def seconds(self, past, new):
        return new * self.token_s


def blocks(*sources, nbytes=MB, tokens=BLOCK):
    return [Segment(i * tokens, (i + 1) * tokens, s, nbytes) for i, s in enumerate(sources)]


def test_neighbours_of_one_source_are_one_run():
    segments = [*blocks("host", "host", "disk", "disk"), Segment(1024, 1100, "disk", 76 * MB // BLOCK)]
    tail = Segment(1024, 1152, "disk", MB // 2)
    assert runs_of(segments[:4]) == (
        Run(0, 512, BLOCK, (("host", 2 * MB),)),
        Run(512, 1024, BLOCK, (("disk", 2 * MB),)),
    )
    assert runs_of([*segments[:4], tail])[-1] == Run(512, 1152, BLOCK, (("disk", 2.5 * MB),))
    assert runs_of([]) == ()


def test_blocks_of_other_sizes_are_other_runs():
    two = [Segment(0, 256, "host", 10), Segment(256, 512, "host", 11)]
    assert len(runs_of(two)) == 2
    after_a_tail = [
        Segment(0, 256, "host", 256),
        Segment(256, 300, "host", 44),
        Segment(300, 556, "host", 256),
    ]
    assert [run.end for run in runs_of(after_a_tail)] == [300, 556]
    with pytest.raises(ValueError, match="overlap"):
        runs_of([Segment(0, 256, "host", 10), Segment(200, 456, "host", 10)])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["host", "disk"]), st.sampled_from([64, 256]), st.booleans()), max_size=30
    )
)
def test_runs_have_the_cuts_and_the_bytes_of_the_segments(parts):
    segments, at = [], 0
    for source, tokens, double in parts:
        segments.append(Segment(at, at + tokens, source, tokens * (2 if double else 1)))
        at += tokens
    runs = runs_of(segments)
    assert [run.cut(i) for run in runs for i in range(1, run.cuts + 1)] == [s.end for s in segments]
    assert sum(n for run in runs for _, n in run.loads) == sum(s.nbytes for s in segments)
    for run in runs:
        assert run.cut(0) == run.start
        assert [run.cut_at_most(run.cut(i)) for i in range(run.cuts + 1)] == list(range(run.cuts + 1))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["host", "disk"]), st.sampled_from([64, 256]), st.integers(1, 4)),
        max_size=20,
    ),
    st.booleans(),
)
def test_segments_of_many_blocks_are_cut_where_their_blocks_end(parts, stepped):
    segments, ends, at = [], [], 0
    for source, tokens, count in parts:
        ends += [at + tokens * (n + 1) for n in range(count)]
        if stepped:
            segments.append(Segment(at, ends[-1], source, 3 * tokens * count, step_tokens=tokens))
        else:
            segments += [Segment(end - tokens, end, source, 3 * tokens) for end in ends[-count:]]
        at = ends[-1]
    runs = runs_of(segments)
    assert [run.cut(i) for run in runs for i in range(1, run.cuts + 1)] == ends
    assert sum(n for run in runs for _, n in run.loads) == 3 * at
    assert all(run.loads == ((run.loads[0][0], 3 * (run.end - run.start)),) for run in runs)


def test_a_few_blocks_do_not_pass_for_a_short_one():
    two_short = Segment(256, 384, "host", 128, step_tokens=64)
    assert [run.end for run in runs_of([Segment(0, 256, "host", 256), two_short])] == [256, 384]
    one_short = Segment(256, 320, "host", 64, step_tokens=64)
    assert [run.end for run in runs_of([Segment(0, 256, "host", 256), one_short])] == [320]


@pytest.mark.parametrize("bad", [(5, 5, 1, ()), (-1, 5, 1, ()), (0, 5, 0, ()), (0, 5, 1, (("host", -1.0),))])
def test_a_run_of_nothing_is_none(bad):
    with pytest.raises(ValueError, match="is none"):
        Run(*bad)


def test_ranks_share_the_front_that_all_of_them_hold():
    one = (Run(0, 1024, BLOCK, (("0/host", 4.0),)),)
    two = (Run(0, 512, BLOCK, (("1/host", 2.0),)), Run(512, 768, BLOCK, (("disk", 1.0),)))
    assert common_runs([one, two]) == (
        Run(0, 512, BLOCK, (("0/host", 2.0), ("1/host", 2.0))),
        Run(512, 768, BLOCK, (("0/host", 1.0), ("disk", 1.0))),
    )
    assert common_runs([one, ()]) == () == common_runs([])
    assert common_runs([one]) == one
    with pytest.raises(ValueError, match="different steps"):
        common_runs([one, (Run(0, 1024, 128, (("1/host", 4.0),)),)])


def test_one_disk_for_all_ranks_is_shared():
    def group(*keys):
        return common_runs([(Run(0, 1024, BLOCK, ((key, 100.0),)),) for key in keys])

    lines = {key: LoadLine(0.0, 100.0) for key in ("disk", "0", "1")}
    question = Question(1024, Flat(1.0), lines)
    assert plan_restore(group("disk", "disk"), question).load_s == pytest.approx(2.0)
    assert plan_restore(group("0", "1"), question).load_s == pytest.approx(1.0)


def test_one_slow_rank_decides_for_the_group():
    runs = common_runs([(Run(0, 1024, BLOCK, ((key, 100.0),)),) for key in ("0", "1")])
    fast, slow = LoadLine(0.0, 1000.0), LoadLine(0.0, 10.0)
    assert plan_restore(runs, Question(1024, Flat(0.005), {"0": fast, "1": fast})).way == "load"
    assert plan_restore(runs, Question(1024, Flat(0.005), {"0": fast, "1": slow})).way == "recompute"


# --- the policy ---------------------------------------------------------------------------------------------


def learned():
    policy = CostRestore()
    random = np.random.default_rng(1)
    for _ in range(40):
        nbytes = int(random.integers(1, 500)) * MB
        policy.observed("host", nbytes, 0.001 + nbytes / 10e9)
        policy.observed("disk", nbytes, 0.002 + nbytes / 1e9)
    return policy


def test_both_policies_answer_the_same_interface():
    policies: list[RestorePolicy] = [AlwaysLoad(), CostRestore()]
    for policy in policies:
        choice = policy.choose(blocks("host", "disk"), 1000)
        assert choice.tokens == 512
        assert 0 < choice.eta_low_s < choice.eta_high_s
        policy.observed("disk", MB, 0.1, 0)
        policy.restored(choice, 0.2)
        assert policy.choose([], 1000).tokens == 0
        assert policy.choose(blocks("host", "disk"), 300).tokens <= 300


def test_the_policy_has_a_name():
    assert isinstance(make_policies(restore="cost").restore, CostRestore)
    assert isinstance(make_policies(restore="load").restore, AlwaysLoad)


def test_without_a_rate_everything_is_loaded_but_what_would_be_late():
    policy = learned()
    segments = blocks(*["disk"] * 10, nbytes=100 * MB)
    assert policy.choose(segments, 2560).tokens == 2560
    assert policy.choose(segments, 2560, RestoreWish(takes="both")).compute_front == 0
    cut = policy.choose(segments, 2560, RestoreWish(deadline_s=0.5))
    assert 0 < cut.tokens < 1280
    assert "would arrive in 0.500 s" in cut.why
    assert policy.choose(segments, 2560, RestoreWish(deadline_s=0.0)).tokens == 0


def test_what_is_quicker_is_done_and_said():
    policy = learned()
    segments = blocks(*["disk"] * 10, nbytes=100 * MB)
    quick, slow = RestoreWish(Flat(0.1 / 2560)), RestoreWish(Flat(10 / 2560))
    recomputed = policy.choose(segments, 2600, quick)
    assert recomputed.tokens == 0
    assert "recomputing all 0.1" in recomputed.why
    loaded = policy.choose(segments, 2600, slow)
    assert (loaded.tokens, loaded.compute_front) == (2560, 0)
    both = policy.choose(segments, 2560, RestoreWish(Flat(1 / 2560), takes="both"))
    assert both.tokens == 2560
    assert 1024 <= both.compute_front <= 1536
    assert both.expected_s == pytest.approx(0.5, rel=0.1)
    busy = policy.choose(segments, 2600, replace(quick, waiting_requests=50))
    assert busy.tokens == 2560
    alone = CostRestore(policy.loads, queue_scale=0.0)
    assert alone.choose(segments, 2600, replace(quick, waiting_requests=50)).tokens == 0


def test_a_queue_in_front_of_the_disk_is_counted():
    policy = learned()
    random = np.random.default_rng(2)
    for _ in range(40):
        nbytes, queue = int(random.integers(1, 500)) * MB, int(random.integers(1, 3000)) * MB
        policy.observed("disk", nbytes, 0.002 + (nbytes + queue) / 1e9, queue)
    segments = blocks(*["disk"] * 10, nbytes=10 * MB)
    wish = RestoreWish(Flat(1 / 2560))
    assert policy.choose(segments, 2600, wish).tokens == 2560
    assert policy.choose(segments, 2600, replace(wish, queued_bytes={"disk": 5000 * MB})).tokens == 0


def test_the_interval_of_whole_restores_holds_though_their_parts_are_no_sum():
    """Loads that turn out half as fast together as each alone, with noise."""
    policy, random, held = learned(), np.random.default_rng(3), []
    for _ in range(600):
        segments = blocks(*["disk"] * int(random.integers(1, 30)), nbytes=40 * MB)
        choice = policy.choose(segments, len(segments) * BLOCK)
        seconds = 2 * choice.expected_s * float(np.exp(random.normal(0, 0.2)))
        held.append(choice.eta_low_s <= seconds <= choice.eta_high_s)
        policy.restored(choice, seconds)
    assert 0.75 <= np.mean(held) <= 0.85
    assert choice.kind == "disk idle"


def test_the_interval_is_that_of_the_loads_until_whole_restores_are_known():
    segments = blocks(*["disk"] * 10, nbytes=10 * MB)
    guess = CostRestore().choose(segments, 2560)
    policy = learned()
    known = policy.choose(segments, 2560)
    assert known.eta_high_s / known.eta_low_s < guess.eta_high_s / guess.eta_low_s
    assert known.expected_s == pytest.approx(0.002 + 0.1, rel=0.1)
    for _ in range(9):
        policy.restored(known, 5 * known.expected_s)
    assert policy.choose(segments, 2560).eta_high_s == pytest.approx(known.eta_high_s)
    for _ in range(30):
        policy.restored(known, 5 * known.expected_s)
    assert policy.choose(segments, 2560).eta_high_s == pytest.approx(5 * known.expected_s, rel=0.1)


def test_learned_state_comes_back():
    policy = learned()
    choice = policy.choose(blocks("disk", "host"), 600)
    policy.restored(choice, 0.3)
    again = CostRestore()
    again.restore(json.loads(json.dumps(policy.state())))
    assert again.state() == policy.state()
    assert again.choose(blocks("disk", "host"), 600) == policy.choose(blocks("disk", "host"), 600)
    before = again.state()
    for broken in (3, {}, {**before, "restores": {"disk idle": {}}}, {**before, "loads": {"disk": 1}}):
        with pytest.raises(ConfigError, match="restore"):
            again.restore(broken)
    assert again.state() == before


def test_nothing_is_learned_from_nonsense():
    policy = learned()
    before = policy.state()
    policy.observed("disk", 0, 1.0)
    policy.observed("disk", -5, 1.0)
    policy.observed("disk", 5, math.nan)
    policy.restored(policy.choose([], 100), 1.0)
    policy.restored(policy.choose(blocks("disk"), 256), -1.0)
    assert policy.state() == before


@pytest.mark.parametrize("here", [(), ("host",)])
def test_a_path_that_was_too_late_for_every_deadline_is_looked_at_again(here):
    policy = CostRestore()
    stored, wish = blocks(*here, "peer", "peer"), RestoreWish(deadline_s=0.4)
    kept, end = len(here) * BLOCK, (len(here) + 2) * BLOCK
    assert policy.choose(stored, end, wish).tokens == end
    for _ in range(20):
        # The peer hung: each read of it took until its deadline.
        policy.observed("peer", MB, 5.0)
    refused = 0
    for _ in range(5_000):
        choice = policy.choose(stored, end, wish)
        if choice.tokens > kept:
            # It is well again.
            policy.observed("peer", (choice.tokens - kept) // BLOCK * MB, 0.005)
        else:
            assert choice.late
            refused += 1
    assert choice.tokens == end
    assert 4 * 64 < refused < 2_000


def noisy():
    """A peer whose loads of ten blocks take half a second, and one in six of them twenty times as long."""
    policy = CostRestore()
    for number in range(120):
        policy.observed("peer", 10 * MB, 10.0 if number % 6 == 5 else 0.5)
    return policy


@pytest.mark.parametrize(
    ("recompute_s", "takes", "loads"),
    [
        # Dear to compute: that the load may not come in time is worth it.
        (12.0, "fronts", True),
        # Cheap to compute: not worth waiting for the deadline now and then.
        (0.55, "fronts", False),
        # An engine that takes all or nothing has no use for what came of it.
        (12.0, "all_or_nothing", False),
    ],
)
def test_a_load_that_may_be_late_is_weighed_and_not_forbidden(recompute_s, takes, loads):
    wish = RestoreWish(recompute=Flat(recompute_s / 2560), deadline_s=5.0, takes=takes)
    choice = noisy().choose(blocks(*["peer"] * 10), 2560, wish)
    assert choice.eta_high_s > 5.0 or not loads
    assert (choice.tokens == 2560) is loads
    assert choice.late is not loads


def test_a_load_that_is_expected_late_is_cut_whatever_computing_costs():
    policy = noisy()
    wish = RestoreWish(recompute=Flat(1.0), deadline_s=0.3)
    choice = policy.choose(blocks(*["peer"] * 10), 2560, wish)
    assert choice.late
    assert choice.tokens < 2560


# --- paths that were never measured ------------------------------------------------------------------------


def guessed_s(blocks_, nbytes=MB):
    """By the guess, what it takes to read so many blocks from disk."""
    return LoadCosts().line(Path("disk"), blocks_ * nbytes).seconds(blocks_ * nbytes)


@pytest.mark.parametrize(
    ("cheaper", "tried"),
    [
        # Of what the load is guessed to take, computing takes so much: it is chosen, hoped for, or neither.
        (2.0, True),
        (0.6, True),
        (0.1, False),
    ],
)
def test_a_path_that_was_never_measured_is_tried_unless_computing_is_cheaper_even_so(cheaper, tried):
    policy = CostRestore(queue_scale=0.0)
    wish = RestoreWish(Flat(cheaper * guessed_s(40) / (40 * BLOCK)))
    choice = policy.choose(blocks(*["disk"] * 40), 40 * BLOCK, wish)
    assert bool(choice.tokens) is tried
    assert ("tried" in choice.why) is (cheaper == 0.6)
    if tried:
        assert choice.expected_s == pytest.approx(guessed_s(40), rel=0.01), "what is told is no hope"


def test_the_guess_counts_until_the_load_that_was_tried_has_been_seen():
    policy = CostRestore(queue_scale=0.0)
    stored, end = blocks(*["disk"] * 40), 40 * BLOCK
    wish = RestoreWish(Flat(0.6 * guessed_s(40) / end))
    assert [policy.choose(stored, end, wish).tokens for _ in range(3)] == [end, 0, 0]
    policy.observed("disk", 40 * MB, 0.3 * guessed_s(40))
    assert policy.choose(stored, end, wish).tokens == end, "it was as quick as hoped"
    slow = CostRestore(queue_scale=0.0)
    assert slow.choose(stored, end, wish).tokens == end
    slow.observed("disk", 40 * MB, 3 * guessed_s(40))
    assert [slow.choose(stored, end, wish).tokens for _ in range(3)] == [0, 0, 0]


def test_what_is_behind_a_front_that_is_loaded_anyhow_is_tried_too():
    policy = CostRestore(queue_scale=0.0)
    for _ in range(20):
        policy.observed("host", MB, 0.0001)
    stored, end = blocks(*["host"] * 4, *["disk"] * 40), 44 * BLOCK
    wish = RestoreWish(Flat(0.6 * guessed_s(40) / (40 * BLOCK)))
    assert [policy.choose(stored, end, wish).tokens for _ in range(2)] == [end, 4 * BLOCK]


def test_only_paths_that_are_loaded_by_count_as_tried():
    policy = CostRestore(queue_scale=0.0)
    # By the guess the peer is too slow for its many bytes, whatever may be hoped.
    stored = [*blocks(*["disk"] * 40), Segment(40 * BLOCK, 41 * BLOCK, "peer", 10**12)]
    wish = RestoreWish(Flat(0.6 * guessed_s(40) / (40 * BLOCK)))
    choice = policy.choose(stored, 41 * BLOCK, wish)
    assert (choice.tokens, "tried" in choice.why) == (40 * BLOCK, True)
    assert list(policy._tried) == ["disk"]
    # So the peer is tried as soon as there is less to load.
    light = blocks(*["peer"] * 40)
    assert policy.choose(light, 40 * BLOCK, wish).tokens == 40 * BLOCK
    assert list(policy._tried) == ["disk", "peer"]
