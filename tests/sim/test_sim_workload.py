"""The generator of long-idle chat: in order, repeatable, and as far from published figures as it says."""

import io
import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.sim.workload import profiles
from kvtier.sim.workload.day import HOUR_S, Day
from kvtier.sim.workload.distance import distances
from kvtier.sim.workload.generate import Generator
from kvtier.sim.workload.quantiles import Quantiles, Sampler
from kvtier.sim.workload.recorded import recorded_turns
from kvtier.sim.workload.settings import Synthetic
from kvtier.sim.workload.write import kvtrace_lines

SMALL = Synthetic(sessions_per_day=3000, hours=12, tenants=3, prompts_per_tenant=2)
# A day is more than this test has; the tail of p99 needs many draws.
WIDE = {
    "human wait, p99": 25,
    "human wait, longest": 60,
    "requests in a session, mean": 12,
    "requests in a session, p99": 40,
}


def turns(seed=1, settings=SMALL):
    return list(Generator(settings, seed).turns())


def test_the_same_seed_is_the_same_load_and_another_seed_another_one():
    assert turns(7) == turns(7)
    assert turns(7) != turns(8)


def test_turns_come_in_order_and_name_rows_before_them():
    found = turns()
    assert len(found) > 5000
    assert all(a.t_s <= b.t_s for a, b in itertools.pairwise(found))
    for row, turn in enumerate(found):
        assert -1 <= turn.ref < row
        assert turn.tokens_in > 0 and turn.tokens_out > 0
        assert 0 <= turn.shared_tokens <= turn.tokens_in
        if turn.ref >= 0:
            before = found[turn.ref]
            assert turn.shared_tokens <= before.tokens_in + before.tokens_out
            assert before.tenant == turn.tenant


def test_a_conversation_waits_for_its_own_answers():
    ended = {}
    for turn in turns():
        assert turn.t_s >= ended.get(turn.conversation, 0.0)
        ended[turn.conversation] = turn.t_s + turn.service_s


def test_a_load_ends_after_the_requests_that_were_asked_for():
    settings = Synthetic(sessions_per_day=3000, requests=500)
    assert turns(1, settings) == turns(1, Synthetic(sessions_per_day=3000))[:500]


def test_edits_leave_branches_and_none_without_them():
    def branches(probability):
        changed = [
            type(p)(**{f: getattr(p, f) for f in p.__struct_fields__} | {"edit_probability": probability})
            for p in SMALL.profiles
        ]
        settings = Synthetic(sessions_per_day=3000, hours=6, profiles=tuple(changed))
        followed = Counter(t.ref for t in turns(1, settings) if t.turn > 0)
        found = turns(1, settings)
        return sum(n > 1 for ref, n in followed.items() if found[ref].turn > 0)

    assert branches(0.0) == 0
    assert branches(0.5) > 50


def test_generated_figures_are_near_the_published_ones_and_say_how_near():
    generator = Generator(Synthetic(sessions_per_day=12000), 3)
    for _ in generator.turns():
        pass
    found = distances(generator.draws)
    assert len(found) == 12
    for one in found:
        assert abs(one.off_percent) < WIDE.get(one.quantity, 6), one


def test_a_wrong_table_shows_in_the_distances():
    wrong = Quantiles(((0, 1), (0.5, 30), (1, 100)))
    coding = profiles.CODING
    changed = type(coding)(**{f: getattr(coding, f) for f in coding.__struct_fields__} | {"wait": wrong})
    generator = Generator(Synthetic(sessions_per_day=3000, profiles=(changed,)), 3)
    for _ in generator.turns():
        pass
    off = {one.quantity: one.off_percent for one in distances(generator.draws)}
    assert off["human wait, p50"] < -50 and off["waits within 5 min"] > 20


def test_the_published_points_are_those_of_the_tables():
    waits = profiles.CODING_WAITS
    assert waits.share_below(86) == pytest.approx(0.5)
    assert waits.share_below(300) == pytest.approx(0.75)
    assert waits.share_below(1260) == pytest.approx(0.9)
    assert 0.95 <= waits.share_below(3600) <= 0.96
    assert waits.points[-1][1] == 31 * 86400
    assert waits.sum_over(3600) / waits.mean() == pytest.approx(0.9, abs=0.025)
    assert profiles.AGENT_WAITS.share_below(1) == pytest.approx(0.86)
    assert profiles.CHAT_WAITS.share_below(600) == pytest.approx(0.8)
    assert profiles.CODING_REQUESTS.mean() == pytest.approx(9.2, rel=0.05)


def test_nights_are_quiet_and_late_leavers_come_back_in_the_morning():
    found = turns(1, Synthetic(sessions_per_day=8000, hours=24))
    hours = Counter(int(t.t_s // HOUR_S) for t in found)
    assert sum(hours[h] for h in range(1, 6)) < sum(hours[h] for h in range(10, 15)) / 4
    day = Day()
    assert day.night_left_s(2 * HOUR_S) == 5 * HOUR_S
    assert day.night_left_s(23.5 * HOUR_S) == 7.5 * HOUR_S
    assert day.night_left_s(12 * HOUR_S) == 0


def test_a_generated_load_is_a_trace_that_reads_back(tmp_path):
    generator = Generator(Synthetic(sessions_per_day=1000, hours=10), 5)
    text = "".join(kvtrace_lines(generator.stream()))
    found = list(recorded_turns(io.BytesIO(text.encode())).turns)
    for a, b in zip(turns(5, Synthetic(sessions_per_day=1000, hours=10)), found, strict=True):
        assert (a.conversation, a.tenant, a.turn, a.tokens_in, a.tokens_out, a.kind, a.stop) == (
            b.conversation, b.tenant, b.turn, b.tokens_in, b.tokens_out, b.kind, b.stop
        )  # fmt: skip
        assert b.t_s == pytest.approx(a.t_s, abs=0.001)
        # A trace shares whole blocks of prompts; what goes on from an output is found by its length.
        assert a.shared_tokens - 64 < b.shared_tokens <= a.shared_tokens
        assert b.ref == a.ref or b.shared_tokens % 64 == 0
    assert json.loads(text.splitlines()[0])["block_tokens"] == 64


@st.composite
def tables(draw):
    shares = sorted(draw(st.sets(st.floats(0.01, 0.99), min_size=0, max_size=5)))
    values = sorted(draw(st.lists(st.floats(0.01, 1e6), min_size=len(shares) + 2, max_size=len(shares) + 2)))
    return Quantiles(tuple(zip([0.0, *shares, 1.0], values, strict=True)))


@given(tables())
def test_a_table_and_what_is_drawn_from_it_agree(table):
    sampler = Sampler(table)
    grid = [sampler.value((i + 0.5) / 4000) for i in range(4000)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(grid))
    assert sum(grid) / 4000 == pytest.approx(table.mean(), rel=0.02)
    middle = 0.997 * math.sqrt(table.points[0][1] * table.points[-1][1])
    assert sum(v > middle and v for v in grid) / 4000 == pytest.approx(
        table.sum_over(middle), rel=0.03, abs=table.points[-1][1] / 1000
    )


@pytest.mark.parametrize(
    "points",
    [((0, 1),), ((0, 1), (0.5, 2)), ((0, 2), (1, 1)), ((0, 0), (1, 1)), ((0, 1), (0.5, 2), (0.5, 3), (1, 4))],
)
def test_a_table_that_does_not_rise_is_refused(points):
    with pytest.raises(ConfigError, match="points"):
        Quantiles(points)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sessions_per_day", 0),
        ("hours", -1),
        ("tenants", 0),
        ("requests", -1),
        ("sessions_per_day", math.nan),
    ],
)
def test_nonsense_settings_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        Synthetic(**{field: value})
    assert caught.value.field == field
