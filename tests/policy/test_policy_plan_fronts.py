"""Restore plans against brute force over all cuts, and what must hold of every plan."""

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy.load_cost import LoadLine
from kvtier.policy.restore_plan import Question, plan_restore, queue_weight
from kvtier.policy.runs import Run

STEP = 16


@dataclass(frozen=True)
class Quadratic:
    """Seconds of computing: a start, a time for each token, and one for each pair."""

    start_s: float
    token_s: float
    pair_s: float = 0.0

    def seconds(self, past, new):
        end = past + new
        return self.start_s + new * self.token_s + (end * end - past * past) * self.pair_s if new else 0.0


rates = st.floats(0.2, 50.0)
starts = st.sampled_from([0.0, 0.5, 3.0])
computes = st.builds(Quadratic, starts, rates.map(lambda r: r / 10), st.sampled_from([0.0, 0.01, 0.001]))


@st.composite
def stored(draw, most_runs=4, keys=("host", "disk", "peer_host")):
    runs, at = [], 0
    for _ in range(draw(st.integers(1, most_runs))):
        tokens = draw(st.integers(1, 8 * STEP))
        end = at + tokens
        loads = tuple(
            (key, draw(st.floats(0.5, 4)) * tokens)
            for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique=True))
        )
        runs.append(Run(at, end, STEP, loads))
        at = end
    return tuple(runs)


@st.composite
def questions(draw, runs, mixed):
    lines = {
        key: LoadLine(draw(starts), draw(rates), late_factor=draw(st.sampled_from([1.0, 1.5])))
        for key in ("host", "disk", "peer_host")
    }
    return Question(
        runs[-1].end + draw(st.integers(0, 100)),
        draw(computes),
        lines,
        gpu_weight=draw(st.sampled_from([0.0, 0.3, 2.0, 50.0])),
        prefill_wait_s=draw(st.sampled_from([0.0, 5.0, 60.0])),
        deadline_s=draw(st.sampled_from([math.inf, 0.0, 3.0, 20.0, 100.0])),
        takes="both" if mixed else "fronts",
    )


@st.composite
def cases(draw, mixed=False):
    runs = draw(stored())
    return runs, draw(questions(runs, mixed))


def all_cuts(runs):
    return [0, *(run.cut(i) for run in runs for i in range(1, run.cuts + 1))]


def load_seconds(runs, lines, begin, end, late=False):
    """Seconds to load tokens [begin, end): the slowest of the paths, each by its bytes."""
    nbytes = {}
    for run in runs:
        inside = max(0, min(run.end, end) - max(run.start, begin))
        for key, total in run.loads:
            nbytes[key] = nbytes.get(key, 0.0) + total * inside / (run.end - run.start)
    return max(
        (lines[key].seconds(n) * (lines[key].late_factor if late else 1) for key, n in nbytes.items()),
        default=0.0,
    )


def cost(runs, q, front, end):
    """What is minimised, from its definition; None when it would be late."""
    if end and load_seconds(runs, q.lines, front, end, late=True) > q.deadline_s:
        return None
    load_s = load_seconds(runs, q.lines, front, end)
    front_s, rest_s = q.recompute.seconds(0, front), q.recompute.seconds(end, q.tokens - end)
    ttft_s = max(q.prefill_wait_s + front_s, load_s) + rest_s
    return ttft_s + q.gpu_weight * (front_s + rest_s)


def cheapest(runs, q, fronts=(0,), ends=None):
    found = [cost(runs, q, 0, 0)]
    for end in all_cuts(runs) if ends is None else ends:
        for front in fronts if fronts is not None else all_cuts(runs):
            if front < end:
                found.append(cost(runs, q, front, end))
    return min(c for c in found if c is not None)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_front_plan_is_the_best_of_all_cuts(case):
    runs, question = case
    plan = plan_restore(runs, question)
    assert plan.compute_front == 0
    assert plan.load_end in all_cuts(runs)
    assert plan.cost_s == pytest.approx(cost(runs, question, 0, plan.load_end))
    assert plan.cost_s == pytest.approx(cheapest(runs, question), rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(cases(mixed=True))
def test_a_mixed_plan_is_the_best_of_all_meeting_points_of_its_ends(case):
    runs, question = case
    plan = plan_restore(runs, question)
    assert plan.cost_s == pytest.approx(cost(runs, question, plan.compute_front, plan.load_end))
    ends = [run.end for run in runs]
    assert plan.cost_s <= cheapest(runs, question, None, ends) * (1 + 1e-9)
    assert plan.cost_s <= cheapest(runs, question) * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(cases(mixed=True), st.integers(1, 24))
def test_with_whole_blocks_of_one_source_a_mixed_plan_is_the_best_of_all(case, blocks):
    end = blocks * STEP
    one = (Run(0, end, STEP, (("host", 2.0 * end),)),)
    question = replace(case[1], tokens=end + 20, deadline_s=math.inf)
    assert plan_restore(one, question).cost_s == pytest.approx(cheapest(one, question, None), rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.booleans().flatmap(lambda mixed: cases(mixed=mixed)))
def test_never_worse_than_the_better_single_way_and_never_late(case):
    runs, question = case
    plan = plan_restore(runs, question)
    all_loaded = cost(runs, question, 0, runs[-1].end)
    computed = cost(runs, question, 0, 0)
    assert plan.cost_s <= computed * (1 + 1e-9)
    assert plan.late == (all_loaded is None)
    assert all_loaded is None or plan.cost_s <= all_loaded * (1 + 1e-9)
    if plan.load_end:
        late_s = load_seconds(runs, question.lines, plan.compute_front, plan.load_end, late=True)
        assert late_s <= question.deadline_s * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.booleans().flatmap(lambda mixed: cases(mixed=mixed)), st.floats(1.0, 10.0))
def test_a_faster_path_never_costs_more(case, factor):
    runs, question = case
    faster = {k: replace(line, bytes_per_s=line.bytes_per_s * factor) for k, line in question.lines.items()}
    after = plan_restore(runs, replace(question, lines=faster))
    assert after.cost_s <= plan_restore(runs, question).cost_s * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(1.0, 10.0))
def test_of_one_source_a_faster_path_never_loads_less(case, factor):
    runs, question = case
    one = (Run(0, runs[-1].end, STEP, (("host", 2.0 * runs[-1].end),)),)
    line = question.lines["host"]
    faster = {"host": replace(line, bytes_per_s=line.bytes_per_s * factor)}
    slower = plan_restore(one, replace(question, lines={"host": line}))
    assert plan_restore(one, replace(question, lines=faster)).load_end >= slower.load_end


@settings(max_examples=100, deadline=None)
@given(cases(mixed=True))
def test_a_dear_gpu_computes_no_more_than_it_must_and_a_free_one_gives_the_soonest_token(case):
    runs, question = case
    question = replace(question, deadline_s=math.inf)
    dear = plan_restore(runs, replace(question, gpu_weight=1e9))
    # Equal but for the start of a call, all is loaded.
    least = min(
        question.recompute.seconds(0, f) + question.recompute.seconds(e, question.tokens - e)
        for e in all_cuts(runs)
        for f in [0, *([e] if not e else [])]
    )
    assert dear.gpu_s == pytest.approx(least, rel=1e-6)
    free = plan_restore(runs, replace(question, gpu_weight=0.0))
    assert free.cost_s == free.ttft_s
    assert free.ttft_s <= dear.ttft_s * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(0.0, 200.0), st.floats(0.0, 200.0))
def test_a_later_deadline_never_costs_more(case, one_s, other_s):
    runs, question = case
    soon, later = (plan_restore(runs, replace(question, deadline_s=d)) for d in sorted((one_s, other_s)))
    assert later.cost_s <= soon.cost_s * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(
    rates.map(lambda r: r / 10),
    st.sampled_from([0.0, 0.0001, 0.001, 0.01]),
    st.integers(40, 400),
    st.integers(0, 40),
)
def test_at_break_even_both_are_nearly_twice_as_fast_as_either(token_s, pair_s, blocks, new):
    compute = Quadratic(0.0, token_s, pair_s)
    tokens = blocks * STEP
    load_s = compute.seconds(0, tokens)
    lines = {"host": LoadLine(0.0, tokens / load_s)}
    runs = (Run(0, tokens, STEP, (("host", float(tokens)),)),)
    single = plan_restore(runs, Question(tokens, compute, lines))
    both = plan_restore(runs, Question(tokens, compute, lines, takes="both"))
    assert single.ttft_s == pytest.approx(load_s)
    assert both.way == "mixed"
    assert single.ttft_s / both.ttft_s >= 1.9


def test_one_source_is_all_or_nothing():
    compute = Quadratic(0.0, 0.01, 1e-6)
    runs = (Run(0, 160, STEP, (("host", 160.0),)),)
    for rate in (10.0, 50.0, 90.0, 99.0, 101.0, 110.0, 200.0, 1000.0):
        plan = plan_restore(runs, Question(200, compute, {"host": LoadLine(0.1, rate)}))
        assert plan.load_end in (0, 160)


def test_an_interior_front_where_the_back_lies_on_a_slow_source():
    runs = (Run(0, 160, STEP, (("host", 160.0),)), Run(160, 320, STEP, (("disk", 160.0),)))
    lines = {"host": LoadLine(0.0, 1000.0), "disk": LoadLine(0.0, 10.0)}
    plan = plan_restore(runs, Question(320, Quadratic(0.0, 0.01), lines))
    assert (plan.way, plan.compute_front) == ("load", 0)
    # One block of the disk's arrives while the host's part does.
    assert plan.load_end == 160


def test_a_deadline_cuts_to_the_longest_front_in_time():
    runs = (Run(0, 160, STEP, (("host", 160.0),)),)
    lines = {"host": LoadLine(0.0, 100.0, late_factor=2.0)}
    question = Question(160, Quadratic(0.0, 1.0), lines, deadline_s=1.0)
    plan = plan_restore(runs, question)
    # 50 tokens in half a second, twice that at the worst; cut to whole blocks.
    assert (plan.load_end, plan.late) == (48, True)
    assert plan_restore(runs, replace(question, deadline_s=0.0)).way == "recompute"
    assert plan_restore(runs, replace(question, deadline_s=3.2)) == plan_restore(
        runs, replace(question, deadline_s=math.inf)
    )


def test_what_arrives_while_the_request_waits_for_the_engine_is_free():
    runs = (Run(0, 160, STEP, (("disk", 160.0),)),)
    compute, lines = Quadratic(0.0, 0.01), {"disk": LoadLine(0.0, 50.0)}
    assert plan_restore(runs, Question(160, compute, lines)).way == "recompute"
    waited = plan_restore(runs, Question(160, compute, lines, prefill_wait_s=2.0))
    assert waited.load_end == 96
    assert waited.ttft_s == pytest.approx(2.64)


def test_a_busy_gpu_tips_the_scale_towards_loading():
    runs = (Run(0, 160, STEP, (("disk", 160.0),)),)
    compute, lines = Quadratic(0.0, 0.01), {"disk": LoadLine(0.0, 50.0)}
    assert plan_restore(runs, Question(160, compute, lines, gpu_weight=queue_weight(0))).way == "recompute"
    assert plan_restore(runs, Question(160, compute, lines, gpu_weight=queue_weight(4))).way == "load"
    assert (
        plan_restore(runs, Question(160, compute, lines, gpu_weight=queue_weight(4, 0.0))).way == "recompute"
    )


def test_an_empty_queue_does_not_make_the_gpu_free():
    """Where both ways are about as soon, loading leaves the GPU to those who come meanwhile."""
    compute, lines = Quadratic(0.0, 0.01), {"disk": LoadLine(0.0, 100 / 1.2)}
    runs = (Run(0, 100, STEP, (("disk", 100.0),)),)
    assert queue_weight(0) == 0.5
    assert queue_weight(3) == 3.5
    assert queue_weight(0, 0.0) == queue_weight(9, 0.0) == 0
    alone = plan_restore(runs, Question(100, compute, lines, gpu_weight=queue_weight(0, 0.0)))
    assert alone.way == "recompute"
    assert plan_restore(runs, Question(100, compute, lines, gpu_weight=queue_weight(0))).way == "load"


def test_nothing_stored_is_computed():
    plan = plan_restore((), Question(100, Quadratic(1.0, 0.01), {}, takes="both"))
    assert (plan.way, plan.ttft_s, plan.load_s, plan.gpu_s, plan.late) == ("recompute", 2.0, 0.0, 2.0, False)


def test_a_wrong_formula_is_seen_by_brute_force(monkeypatch):
    runs = (Run(0, 160, STEP, (("host", 160.0),)), Run(160, 320, STEP, (("disk", 160.0),)))
    lines = {"host": LoadLine(0.0, 100.0), "disk": LoadLine(0.0, 10.0)}
    question = Question(320, Quadratic(0.0, 0.1), lines)
    best = cheapest(runs, question)
    assert plan_restore(runs, question).cost_s == pytest.approx(best)
    monkeypatch.setattr(
        "kvtier.policy.restore_plan._Planner._front_cuts", lambda self, latest: iter([(0, 1)])
    )
    assert plan_restore(runs, question).cost_s > best * 1.01


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokens": -1}, "tokens"),
        ({"gpu_weight": -1.0}, "gpu_weight"),
        ({"prefill_wait_s": float("nan")}, "prefill_wait_s"),
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"lines": {"host": LoadLine(0.0, 0.0)}}, "no bandwidth"),
        ({"lines": {"host": LoadLine(-1.0, 1.0)}}, "no bandwidth"),
    ],
)
def test_nonsense_is_refused(change, error):
    question = Question(100, Quadratic(0.0, 1.0), {"host": LoadLine(0.0, 1.0)})
    with pytest.raises(ValueError, match=error):
        replace(question, **change)


def test_runs_that_do_not_fit_are_refused():
    question = Question(100, Quadratic(0.0, 1.0), {"host": LoadLine(0.0, 1.0)})
    load = (("host", 1.0),)
    for runs in ([Run(0, 101, 16, load)], [Run(0, 20, 16, load), Run(10, 30, 16, load)]):
        with pytest.raises(ValueError, match="overlaps, or ends after"):
            plan_restore(runs, question)
    with pytest.raises(KeyError):
        plan_restore([Run(0, 10, 16, (("disk", 1.0),))], question)
    for waiting, scale in ((-1, 1.0), (1, -1.0)):
        with pytest.raises(ValueError, match="negative"):
            queue_weight(waiting, scale)
