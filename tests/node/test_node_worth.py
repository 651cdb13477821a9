"""A node that evicts by worth: what leaves which tier, what is learned, and what it says of it."""

import pytest

from kvtier.messages import calls as m
from kvtier.node.disk_room import evict
from kvtier.node.events import Remembered
from kvtier.policy.worth_order import WorthOrder
from kvtier.policy.worth_usage import CostUsage
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_uses import UNIT

DAY_S = 86400.0


def cost_rig(make_rig, units=16, **how):
    """A rig whose host memory holds `units` / 2 full blocks, and a worker of it."""
    rig = make_rig(arena_bytes=[units * UNIT], eviction="cost", **how)
    return rig, rig.attach()


def park(rig, worker, name, tokens, **how):
    park = rig.park(worker, name, tokens, **how)
    rig.run()
    return park


def tokens_of(number, count=4):
    return range(1000 * number, 1000 * number + count)


def where(rig, name, tenant="acme"):
    """Tokens of the conversation's newest branch in host memory and on disk."""
    info = next(iter(rig.ask(m.Show(conversation=name, tenant=tenant)).conversations), None)
    return (0, 0) if info is None else (info.host_tokens, info.disk_tokens)


def explain(rig, name, tenant="acme"):
    return rig.ask(m.Explain(conversation=name, tenant=tenant)).explanation


def pass_time(rig, seconds, steps=30):
    for _ in range(steps):
        rig.tick(seconds / steps)


def teach(rig, worker, tenant, gap_s, times, first=500):
    """Conversations of the tenant come back after gap_s, again and again."""
    for number in range(first, first + times):
        park(rig, worker, f"t{number}", tokens_of(number), tenant=tenant)
    pass_time(rig, gap_s)
    for number in range(first, first + times):
        planned = rig.plan(worker, f"t{number}", tokens_of(number, 5), tenant=tenant)
        if planned.plan.plan_id:
            rig.ask(m.DropPlan(plan_id=planned.plan.plan_id))
    pass_time(rig, 120.0)
    for number in range(first, first + times):
        rig.ask(m.Forget(conversation=f"t{number}", tenant=tenant))
        rig.run()


def taught(make_rig, **how):
    """People of tenant 'night' come back after ten hours, those of 'now' within a minute."""
    rig, worker = cost_rig(make_rig, units=64, **how)
    for night in range(25):
        teach(rig, worker, "night", 36_000.0, 4, first=500 + 10 * night)
        teach(rig, worker, "now", 40.0, 4, first=505 + 10 * night)
    return rig, worker


@pytest.fixture(scope="module")
def lessons():
    """What a node learned from nights and minutes."""
    rig, _ = taught(CoreRig)
    return rig.core.learned()


def learned(make_rig, lessons, **how):
    rig, worker = cost_rig(make_rig, **how)
    rig.tell(Remembered(lessons))
    return rig, worker


# --- the overnight hump -----------------------------------------------------------------------------------


def night_and_day(rig, worker):
    """The sleeper was parked at night; an hour later host memory is full of people who come back soon."""
    park(rig, worker, "sleeper", tokens_of(1, 8), tenant="night", level="disk")
    park(rig, worker, "left", tokens_of(2, 8), tenant="now", level="disk")
    pass_time(rig, 3600.0)
    for number in range(3, 9):
        park(rig, worker, f"new{number}", tokens_of(number, 8), tenant="now", level="disk")


def test_overnight_the_chat_stays_on_disk_and_leaves_host_memory(make_rig, lessons):
    rig, worker = learned(make_rig, lessons, disk=14 * 3 * UNIT)
    night_and_day(rig, worker)
    assert where(rig, "sleeper", "night") == (0, 8)
    assert where(rig, "left", "now")[1] < 8, "who did not come back in an hour goes from the disk"
    (run,) = explain(rig, "sleeper", "night").runs
    assert run.tiers == ("disk",)
    assert run.returns[1] < 0.2 < 0.5 < run.returns[2]
    assert 20_000 < run.best_s < 80_000
    assert rig.resume(worker, "sleeper", tokens_of(1, 9), tenant="night").receipt.sources == {"disk": 8}


def test_without_what_was_learned_the_sleeper_goes(make_rig):
    """The control: the published waits alone know no nights."""
    rig, worker = cost_rig(make_rig, disk=14 * 3 * UNIT)
    night_and_day(rig, worker)
    assert where(rig, "sleeper", "night")[1] < 8


def only_on_disk(make_rig):
    """A rig with a conversation that host memory has let go."""
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "sleeper", tokens_of(1, 8), level="disk")
    pass_time(rig, 1000.0)
    for number in range(2, 10):
        park(rig, worker, f"new{number}", tokens_of(number, 8), level="disk")
    assert where(rig, "sleeper") == (0, 8)
    return rig


def room_in_vain(rig):
    """Everything is walked, and nothing goes, as that is not enough. Whether all stands where it stood."""
    state = rig.core.state
    keys = [block.key for block in state.tree]
    before = [state.policies.usage.run_of(key) for key in keys], list(state.policies.disk.victims(rig.now_s))
    said = explain(rig, "sleeper")
    assert all(said.runs[0].returns)
    assert evict(state, 1 << 40, "park") == []
    after = [state.policies.usage.run_of(key) for key in keys], list(state.policies.disk.victims(rig.now_s))
    return before == after and said == explain(rig, "sleeper")


def test_room_that_cannot_be_made_on_disk_costs_nobody_their_place(make_rig):
    assert room_in_vain(only_on_disk(make_rig))


def test_control_what_is_put_back_without_its_owner_is_worth_nothing(make_rig, monkeypatch):
    rig = only_on_disk(make_rig)
    monkeypatch.setattr(CostUsage, "stays", lambda self, block, run: None)
    assert not room_in_vain(rig)
    assert not any(explain(rig, "sleeper").runs[0].returns)


# --- leaves only ------------------------------------------------------------------------------------------


def gaps(rig):
    """Blocks of host memory whose parent is not there."""
    state = rig.core.state
    blocks = [b for b in state.tree if any(state.in_host(s.meta.object_id) for s in b.parts.values())]
    keys = {b.key for b in blocks}
    return [b.start for b in blocks if b.start and b.parent not in keys]


def fill_and_fork(rig, worker):
    park(rig, worker, "a", tokens_of(1, 16))
    park(rig, worker, "fork", [*tokens_of(1, 8), *tokens_of(2, 8)])
    pass_time(rig, 1000.0)
    for number in range(3, 6):
        park(rig, worker, f"new{number}", tokens_of(number, 8))


def test_only_ends_of_chains_go(make_rig):
    rig, worker = cost_rig(make_rig, disk=None)
    fill_and_fork(rig, worker)
    assert gaps(rig) == []
    assert where(rig, "new5") == (8, 0)


def test_an_order_that_evicts_fronts_is_noticed(make_rig, monkeypatch):
    """The control."""

    def fronts_first(self, now_s):
        held = [block for block in self._blocks.values() if block.held & self._bit]
        yield from [block.key for block in sorted(held, key=lambda block: not block.children[self._index])]

    monkeypatch.setattr(WorthOrder, "victims", fronts_first)
    rig, worker = cost_rig(make_rig, disk=None)
    fill_and_fork(rig, worker)
    assert gaps(rig) != []


# --- models that nobody serves ----------------------------------------------------------------------------


def two_models(make_rig, after_s):
    """An old model's conversation, and a younger one of a new model; the old worker has left."""
    rig, old = cost_rig(make_rig, disk=None)
    new = rig.attach(fingerprint=b"n" * 32)
    park(rig, new, "new", tokens_of(2, 8))
    pass_time(rig, 500.0)
    park(rig, old, "old", tokens_of(1, 8))
    rig.ask(m.Detach(worker=old.name), old.peer)
    pass_time(rig, after_s, 100)
    for number in range(3, 6):
        park(rig, new, f"more{number}", tokens_of(number, 8))
    return where(rig, "old")[0], where(rig, "new")[0]


def test_kv_of_weights_that_are_served_no_more_goes_first(make_rig):
    assert two_models(make_rig, 4000.0) == (0, 8)


def test_before_their_time_they_go_as_others_do(make_rig):
    """The control."""
    old, new = two_models(make_rig, 100.0)
    assert old == 8
    assert new < 8


# --- what the node tells its policies ---------------------------------------------------------------------


def chats(rig):
    return rig.core.state.policies.usage._chats


def test_parks_plans_hints_and_forgetting_are_told(make_rig):
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "a", tokens_of(1, 8), stop="tool_use", returns_in_s=30.0)
    wait = chats(rig)["acme", "a"].wait
    assert wait.hint_s == 30.0
    rig.tick(20.0)
    rig.resume(worker, "a", tokens_of(1, 9))
    assert wait.over
    assert chats(rig)["acme", "a"].serving
    returns = rig.core.state.policies.learned["returns"]
    assert returns.waits_seen == 1
    assert returns.hint_trust("acme") == pytest.approx(0.6, abs=0.01), "20 s is near enough to 30 s"
    park(rig, worker, "a", tokens_of(1, 12))
    chat = chats(rig)["acme", "a"]
    assert (chat.turns, chat.tokens_in, chat.gaps_s[0]) == (1, 9, pytest.approx(20.0))
    rig.ask(m.Hint(conversation="a", tenant="acme", returns_in_s=3000.0, keep_for_s=5000.0))
    assert chat.wait.hint_s == pytest.approx(3000.0, rel=0.01)
    rig.ask(m.Forget(conversation="a", tenant="acme"))
    rig.run()
    assert ("acme", "a") not in chats(rig)
    assert returns.waits_seen == 1, "what is forgotten teaches nothing"


def test_ranks_that_park_the_same_turn_are_one_wait(make_rig):
    rig, worker = cost_rig(make_rig)
    other = rig.attach(shard="s1")
    park(rig, worker, "a", tokens_of(1, 8))
    wait = chats(rig)["acme", "a"].wait
    rig.tick(0.2)
    park(rig, other, "a", tokens_of(1, 8))
    assert chats(rig)["acme", "a"].wait is wait
    assert rig.core.state.policies.learned["returns"].waits_seen == 0


def test_a_restart_goes_on_with_what_was_learned_and_who_was_waited_for(make_rig):
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "a", tokens_of(1, 8), level="disk")
    parked_s = rig.now_s
    teach(rig, worker, "acme", 60.0, 3)
    reborn = rig.restarted()
    reborn.now_s = rig.now_s + 10.0
    reborn.tell(Remembered(rig.core.learned()))
    assert reborn.core.learned() == rig.core.learned()
    chat = chats(reborn)["acme", "a"]
    assert chat.wait.start_s == pytest.approx(parked_s, abs=1.0)
    (run,) = explain(reborn, "a").runs
    assert run.tiers == ("disk",)


def test_after_a_restart_the_shadow_of_lru_lets_go_of_what_was_parked_longest_ago(make_rig):
    """In whatever order the disk's index announces them: it goes by their names."""
    rig, worker = cost_rig(make_rig)
    for number, name in enumerate("mazb", start=1):
        park(rig, worker, name, tokens_of(number), level="disk")
        rig.tick(10.0)
    rig.store.records = dict(sorted(rig.store.records.items()))
    reborn = rig.restarted()
    reborn.run()
    usage = reborn.core.state.policies.usage
    ends = [reborn.core.state.conversations["acme", name].heads[-1].key for name in "mazb"]
    shadow, left = usage._guard.shadow, []
    while len(shadow):
        left.append([name for name, end in zip("mazb", ends, strict=True) if end in shadow])
        shadow.trim(shadow.nbytes - 1)
    assert left == [[*"mazb"], [*"azb"], [*"zb"], ["b"]]


def test_what_is_damaged_is_learned_anew_and_said(make_rig):
    rig, _ = cost_rig(make_rig)
    fresh = rig.core.learned()
    rig.tell(Remembered({"returns": b"{"}))
    assert rig.core.learned() == fresh
    assert any("returns" in warning for warning in rig.core.status().warnings)


# --- explain ----------------------------------------------------------------------------------------------


def test_explain_tells_each_run_apart(make_rig):
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "front", tokens_of(1, 8), level="disk")
    park(rig, worker, "chat", [*tokens_of(1, 4), *tokens_of(2, 8)])
    pass_time(rig, 300.0)
    explanation = explain(rig, "front")
    assert explanation.found
    assert explanation.policy.startswith("cost")
    shared, own = explanation.runs
    assert (shared.start, shared.end, own.start, own.end) == (0, 4, 4, 8)
    assert own.tiers == ("host", "disk")
    assert "idle 30" in own.why
    assert own.recompute_s > 0 < own.load_s
    assert own.host_bytes == own.disk_bytes == 2 * UNIT
    assert 0 < own.returns[0] < own.returns[1] < own.returns[2] < 1
    assert "nobody" not in own.why
    (tail,) = (run for run in explain(rig, "chat").runs if run.end == 12)
    assert tail.tiers == ("host",)
    assert "written to disk" in tail.decision
    assert own.host_worth is None, "there are no prices"


def test_explain_of_what_is_not_here_and_with_lru(make_rig):
    rig, worker = cost_rig(make_rig)
    assert not explain(rig, "nothing").found
    plain = make_rig(arena_bytes=[16 * UNIT])
    worker = plain.attach()
    park(plain, worker, "a", tokens_of(1, 8))
    park(plain, worker, "b", tokens_of(2, 8))
    explanation = explain(plain, "b")
    (run,) = explanation.runs
    assert explanation.policy.startswith("lru")
    assert "1 of 2 go before it" in run.why
    assert run.returns == ()


def test_asking_changes_nothing(make_rig):
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "a", tokens_of(1, 8))
    before = rig.core.learned()
    for _ in range(3):
        explain(rig, "a")
    assert rig.core.learned() == before
    assert where(rig, "a") == (8, 0)


def test_cost_usage_is_what_cost_means(make_rig):
    rig, _ = cost_rig(make_rig)
    assert isinstance(rig.core.state.policies.usage, CostUsage)


# --- models that nobody serves any more -------------------------------------------------------------------


def test_a_model_that_was_retired_goes_first_until_somebody_serves_it_again(make_rig):
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "old", tokens_of(1))
    park(rig, worker, "other", tokens_of(2))
    (info,) = rig.ask(m.ListModels()).models
    refused = rig.ask(m.Retire(fingerprint=info.fingerprint))
    assert isinstance(refused, m.Failed), "a worker serves it"
    assert "serve" in refused.message
    rig.ask(m.Detach(worker=worker.name), worker.peer)
    for nobody in ("", "zz"):
        assert isinstance(rig.ask(m.Retire(fingerprint=nobody)), m.Failed)
    (retired,) = rig.ask(m.Retire(fingerprint=info.fingerprint[:8])).models
    assert retired.retired
    rig.tick(0.1)
    assert "no worker serves its model any more" in explain(rig, "old").runs[0].why
    assert rig.ask(m.ListModels()).models[0].retired
    rig.attach()
    rig.tick(10.0)
    assert "no worker serves" not in explain(rig, "old").runs[0].why
    assert not rig.ask(m.ListModels()).models[0].retired
