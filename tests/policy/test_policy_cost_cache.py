"""The cost policy keeps to the rules of a replay, looks at nothing to come, and is worth its name."""

import io
import json
import random

import numpy as np
import pytest

from kvtier.policy import cost_cache
from kvtier.policy.baselines.interfaces import plain
from kvtier.policy.baselines.lru import LruCache
from kvtier.policy.cost_cache import CostCache, CostTwoTiers
from kvtier.policy.cost_cache_tier import Shadow
from kvtier.policy.survival import CLASSES, SurvivalCurve, survival_kernels
from kvtier.sim.compiled import compiled
from kvtier.sim.read_trace import read_trace
from kvtier.sim.registry import Setup, make_policy
from kvtier.sim.replay import replay, replay_two_tiers

FIELDS = ["t", "sid", "turn", "in", "out", "kind", "stop", "dur", "ref", "lcp", "n"]
TOKENS = 16


def chats(seed, requests=260, ids=True):
    """Conversations that grow, pause, branch, end, and share a system prompt; some requests have no block."""
    chance = random.Random(seed)
    rows, last, t_s = [], {}, 0.0
    for row in range(requests):
        t_s = round(t_s + chance.expovariate(1), 3)
        chat = min(int(chance.expovariate(0.3)), 11) + (row // 60) * 3
        ref, turn = last.get(chat, (0 if rows else -1, -1))
        of = rows[ref][10] if ref >= 0 else 0
        shared = min(2, of) if turn < 0 else of - (chance.random() < 0.2) * chance.randrange(of + 1)
        blocks = shared + chance.randrange(0 if chance.random() < 0.1 else 1, 6)
        stop = chance.choice(["tool_use", "end_turn", ""])
        dur = chance.choice([-1, 0.5, 3.0])
        sid = chat if ids else -1
        rows.append([t_s, sid, turn + 1, blocks * TOKENS + 3, 40, "u", stop, dur, ref, shared, blocks])
        last[chat] = (row, turn + 1)
    return trace_of(rows)


def trace_of(rows):
    header = {"format": "kvtrace/1", "fields": FIELDS, "block_tokens": TOKENS}
    return read_trace(io.BytesIO("".join(json.dumps(line) + "\n" for line in [header, *rows]).encode()))


def tools_and_strays(requests=1200):
    """A few agents that come back every 20 s, and a stream of others that never do."""
    rows, last, number = [], {}, 100
    for step in range(requests):
        t_s = float(step)
        if step % 4 == 0:
            agent = (step // 4) % 5
            ref, turn = last.get(agent, (-1, -1))
            shared = rows[ref][10] if ref >= 0 else 0
            blocks = max(shared, 20)
            rows.append(
                [t_s, agent, turn + 1, blocks * TOKENS, 40, "t", "tool_use", 0.5, ref, shared, blocks]
            )
            last[agent] = (step, turn + 1)
        else:
            number += 1
            rows.append([t_s, number, 0, 20 * TOKENS, 900, "u", "end_turn", 0.5, -1, 0, 20])
    return trace_of(rows)


def served(trace, policy, **more):
    lines = []
    score = replay(trace, policy, on_served=lambda _row, done: lines.append(done), **more)
    return score, lines


def check(trace, capacity, lines):
    """An independent reading of the decisions: hits, bound and leaf rule; returns the hit blocks."""
    resident, hits = set(), 0
    for row, done in enumerate(lines):
        path = trace.path(row).tolist()
        front = next((i for i, block in enumerate(path) if block not in resident), len(path))
        assert done.hit == front
        hits += front
        evicted, bypassed = set(done.evicted.tolist()), set(done.bypassed.tolist())
        assert evicted <= resident and not bypassed & resident and bypassed <= set(path)
        resident = (resident | set(path)) - evicted - bypassed
        assert len(resident) <= capacity
        assert all(trace.parent[block] in resident for block in resident if trace.parent[block] >= 0)
    return hits


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("by_cost", [True, False])
@pytest.mark.parametrize("capacity", [1, 7, 40, 5000])
def test_the_decisions_keep_to_the_rules(ids, causal, by_cost, capacity):
    trace = chats(3, ids=ids)
    policy = CostCache(capacity, TOKENS, by_cost, plain)
    score, lines = served(trace, policy, causal=causal)
    hits = check(trace, capacity, lines)
    assert score.token_hit_percent == pytest.approx(100 * hits * TOKENS / trace.tokens_in.sum())


def test_a_wrong_decision_is_seen():
    trace = chats(3)
    _, lines = served(trace, CostCache(40, TOKENS, False, plain))
    with pytest.raises(AssertionError):
        check(trace, 39, lines)


@pytest.mark.parametrize("causal", [True, False])
def test_decisions_do_not_depend_on_what_follows(causal):
    whole, front = chats(5), chats(5, requests=150)
    _, long = served(whole, CostCache(30, TOKENS, False, plain), causal=causal)
    _, short = served(front, CostCache(30, TOKENS, False, plain), causal=causal)
    for a, b in zip(long, short, strict=False):
        assert a.hit == b.hit
        assert a.evicted.tolist() == b.evicted.tolist()
        assert a.bypassed.tolist() == b.bypassed.tolist()


def test_a_causal_replay_learns_outcomes_only_when_they_are_told():
    trace = chats(6)
    silent = CostCache(30, TOKENS, False, plain)
    silent.finished = lambda row, outcome: None
    told, _ = served(trace, CostCache(30, TOKENS, False, plain), causal=True)
    untold, _ = served(trace, silent, causal=True)
    assert told != untold


def test_the_compiled_loops_decide_the_same():
    trace = chats(8)
    _, slow = served(trace, CostCache(35, TOKENS, True, plain))
    _, fast = served(trace, CostCache(35, TOKENS, True, compiled))
    assert [line.hit for line in slow] == [line.hit for line in fast]
    assert all(a.evicted.tolist() == b.evicted.tolist() for a, b in zip(slow, fast, strict=True))


def test_agents_that_come_back_are_kept_and_strays_are_bypassed():
    trace = tools_and_strays()
    lru = replay(trace, LruCache(105, compiled))
    cost = replay(trace, CostCache(105, TOKENS, False, compiled))
    causal = replay(trace, CostCache(105, TOKENS, False, compiled), causal=True)
    assert lru.token_hit_percent < 1
    assert cost.token_hit_percent > 15
    assert causal.token_hit_percent > 15


def test_all_is_kept_where_all_fits():
    trace = chats(9)
    score = replay(trace, CostCache(10**6, TOKENS, False, plain))
    hits = int(trace.blocks.sum()) - trace.unique_blocks
    assert score.token_hit_percent == pytest.approx(100 * hits * TOKENS / trace.tokens_in.sum())


@pytest.mark.parametrize("fast", [1, 8, 35])
def test_two_tiers_hold_their_bounds_and_write_little(fast):
    trace = chats(4)
    policy = CostTwoTiers(fast, 40 - fast, TOKENS, False, plain)
    bounds = []
    settle = policy._settle

    def settled(now_s):
        written = settle(now_s)
        in_fast, in_slow = policy._fast.resident, policy._in_slow
        either = policy._either.resident
        bounds.append((int(in_fast.sum()), int(in_slow.sum())))
        assert np.array_equal(in_fast | in_slow, either)
        return written

    policy._settle = settled
    score, writes = replay_two_tiers(trace, policy)
    assert max(a for a, _ in bounds) <= fast and max(b for _, b in bounds) <= 40 - fast
    assert writes <= 1.6
    assert score.token_hit_percent > 0


def writes_of(capacity=60, fast=6):
    trace = chats(4, requests=1000)
    return replay_two_tiers(trace, CostTwoTiers(fast, capacity - fast, TOKENS, False, compiled))[1]


def test_writes_are_bounded_and_without_a_price_they_are_not(monkeypatch):
    assert writes_of() <= 1.6
    monkeypatch.setattr(cost_cache, "_WRITES_PER_BLOCK", 100.0)
    assert writes_of() > 1.6


@pytest.mark.parametrize("seed", [4, 7])
def test_in_two_tiers_the_shadow_can_be_caught_up(monkeypatch, seed):
    """The control: with room for what both tiers hold at most, it leads for ever, and that costs hits."""
    monkeypatch.setattr(cost_cache, "_WRITES_PER_BLOCK", 100.0)

    def hits():
        policy = CostTwoTiers(40, 80, TOKENS, False, compiled)
        found = replay_two_tiers(trace, policy)[0].token_hit_percent
        return found, policy._shadow.leads

    trace = chats(seed, requests=1500)
    mended, leads = hits()
    monkeypatch.setattr(Shadow, "trim", lambda self, count: None)
    before, led = hits()
    assert led and not leads
    assert mended > before + 1.0


def test_in_two_tiers_the_shadow_holds_at_most_what_both_do_and_more_than_either():
    policy, most = CostTwoTiers(40, 60, TOKENS, False, compiled), 0
    serve = policy.serve

    def served_by_both(arrival):
        nonlocal most
        done = serve(arrival)
        held = int((policy._fast.resident | policy._in_slow).sum())
        shadow = int(policy._shadow._lru.resident.sum())
        assert shadow == policy._shadow._lru._count <= held
        most = max(most, shadow)
        return done

    policy.serve = served_by_both
    replay_two_tiers(chats(4, requests=400), policy)
    assert 60 < most <= 100


def test_what_is_likely_is_worth_a_write_sooner_than_what_would_be_soon():
    kernels = survival_kernels(plain)
    # Back in a second, if at all, one time in four; and in a few minutes, nearly always.
    soon = SurvivalCurve.of_hazards(np.where(np.arange(CLASSES) == 2, 0.25, 0.0)).survival
    likely = SurvivalCurve.of_hazards(np.where(np.arange(CLASSES) < 16, 0.3, 0.0)).survival
    for age_s in (0.0, -2.0):
        free = [kernels.rate_after(curve, age_s, 0.0) for curve in (soon, likely)]
        paid = [kernels.rate_after(curve, age_s, 0.5) for curve in (soon, likely)]
        assert paid[0] == 0.0 < paid[1] < free[1]
        assert free[0] > 0.0


@pytest.mark.parametrize("age_s", [-5.0, 0.0, 3.0, 500.0, 1e12])
def test_without_a_cost_the_rate_is_the_same(age_s):
    kernels, times = survival_kernels(plain), np.random.default_rng(1)
    curve = SurvivalCurve.of_hazards(times.random(CLASSES) * 0.5).survival
    rates = np.zeros(CLASSES + 1, np.float32)
    kernels.rank(curve, rates)
    assert kernels.rate_after(curve, age_s, 0.0) == pytest.approx(kernels.rate(curve, rates, age_s), rel=1e-5)
    assert kernels.rate_after(curve, age_s, 1.0) == 0.0


def test_the_registry_makes_it_for_both_objectives():
    trace = chats(2)
    for objective in ("tokens", "gpu_seconds"):
        policy = make_policy("cost", Setup(20, TOKENS, objective), trace)
        assert replay(trace, policy).cost_hit_percent > 0
