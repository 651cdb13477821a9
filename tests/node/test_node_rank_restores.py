"""Ranks of one model plan and restore a conversation as one act."""

import dataclasses
import hashlib
import io

import pytest

from kvtier.geometry import Geometry
from kvtier.host.slots import HostSlots
from kvtier.messages.calls import DropPlan, Failed, JoinPlan
from kvtier.node.journal import JournaledCore, Origin, read, replay
from kvtier.policy.defaults import make_policies
from kvtier.testing.core_rig import SECRET, CoreRig
from kvtier.testing.rig_checks import drain
from kvtier.testing.rig_ranks import PAIR, at_rest, levels, park_all, ranks_of, resume_all, tokens_of
from kvtier.testing.rig_uses import FULL, HYBRID, PLAIN, UNIT

SMALLER = Geometry(4, 2, (dataclasses.replace(FULL, token_bytes=UNIT // 4),))


@pytest.fixture
def rig():
    return CoreRig()


# --- plans ------------------------------------------------------------------------------------------------


def test_a_plan_reaches_as_far_as_every_rank_does(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks, 8)
    rig.park(ranks[0], "chat", range(16), timeout_s=1.0)
    rig.run()
    rig.tick(2.0)
    plans = [rig.plan(rank, "chat", range(16)).plan for rank in ranks]
    assert [plan.load_tokens for plan in plans] == [8, 8]
    assert plans[0].bytes == 2 * 8 * FULL.token_bytes
    at_rest(rig)


def test_a_window_that_another_rank_has_passed_is_no_end(rig):
    """A rank that reaches further may not be able to end where another one does."""
    ranks = ranks_of(rig, geometries=(HYBRID, HYBRID))
    park_all(rig, ranks, 8)
    rig.park(ranks[0], "chat", range(16), timeout_s=1.0)
    rig.run()
    rig.tick(2.0)
    assert rig.plan(ranks[0], "chat", range(16)).plan.load_tokens == 8
    at_rest(rig)


def test_pipeline_ranks_have_slices_of_different_sizes(rig):
    shards = ["L0+2.H0+1", "L2+1.H0+1"]
    ranks = ranks_of(rig, shards, (PLAIN, SMALLER))
    assert levels(park_all(rig, ranks, level="disk")) == [("disk", "")] * 2
    _, got = resume_all(rig, ranks)
    rig.run()
    assert tokens_of(got) == [10, 10]
    at_rest(rig)


def test_without_its_other_ranks_nothing_is_planned(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks, level="disk")
    reborn = rig.restarted()
    alone = reborn.attach(shard=PAIR[0], ranks=PAIR)
    plan = reborn.plan(alone, "chat", range(10)).plan
    assert (plan.load_tokens, plan.reason) == (0, "shard_missing")
    assert PAIR[1] in plan.detail
    reborn.attach(shard=PAIR[1], ranks=PAIR)
    assert reborn.plan(alone, "chat", range(10)).plan.load_tokens == 10
    at_rest(reborn)


def test_no_more_than_the_engine_wants_is_loaded(rig):
    worker = rig.attach()
    rig.park(worker, "chat", range(10))
    rig.run()
    wanted = [rig.plan(worker, "chat", range(10), most_tokens=most).plan for most in (0, 5, 8, 99)]
    assert [plan.load_tokens for plan in wanted] == [0, 4, 8, 10]
    assert isinstance(rig.plan(worker, "chat", range(10), most_tokens=-1), Failed)
    at_rest(rig)


def test_a_plan_is_not_joined_by_others(rig):
    ranks = ranks_of(rig)
    stranger = rig.attach(shard=PAIR[0])
    other = rig.attach(shard=PAIR[0], ranks=[*PAIR, "L2+2.H0+2"])
    park_all(rig, ranks)
    planned = rig.plan(ranks[0], "chat", range(10))
    for worker in (stranger, other):
        joined = rig.ask(JoinPlan(worker=worker.name, plan_id=planned.plan.plan_id), worker.peer)
        assert (joined.plan.plan_id, joined.plan.reason) == ("", "lease_expired")
        got = rig.restore(worker, planned, range(10))
        assert (got.receipt.tokens, got.receipt.reason) == (0, "lease_expired")
    at_rest(rig)


# --- restores ---------------------------------------------------------------------------------------------


def test_the_receipts_come_together(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks, level="disk")
    reborn = rig.restarted()
    ranks = ranks_of(reborn)
    _, got = resume_all(reborn, ranks)
    seen = set()
    while reborn.ops:
        reborn.finish(reborn.ops[0])
        seen.add(sum(len(one.receipts) for one in got))
    assert seen == {0, 2}
    assert tokens_of(got) == [10, 10]
    assert reborn.core.state.counters.restored_tokens == 10
    at_rest(reborn)


def test_one_rank_that_falls_short_shortens_all(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks, 16)
    _, got = resume_all(rig, ranks, 16)
    items = [item for op in rig.copies() for item in op.items() if op.executor is ranks[1].proc]
    rig.corrupt_host(items[1])
    rig.run()
    assert tokens_of(got) == [4, 4]
    assert [one.receipt.reason for one in got] == ["corrupt", "corrupt"]
    at_rest(rig)


def test_a_rank_that_does_not_come_hangs_nobody(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks)
    planned = rig.plan(ranks[0], "chat", range(10), lease_s=30.0)
    got = rig.restore(ranks[0], planned, range(10), deadline_s=2.0)
    rig.run()
    rig.tick(1.9)
    assert not got.receipts
    rig.tick(0.2)
    assert (got.receipt.tokens, got.receipt.reason) == (0, "shard_missing")
    late = rig.restore(ranks[1], planned, range(10))
    assert (late.receipt.tokens, late.receipt.reason) == (0, "lease_expired")
    at_rest(rig)


def test_the_first_deadline_is_that_of_all(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks)
    planned = rig.plan(ranks[0], "chat", range(10))
    got = [rig.restore(ranks[i], planned, range(10), deadline_s=s) for i, s in enumerate((1.0, 20.0))]
    for op in [op for op in rig.copies() if op.executor is ranks[0].proc]:
        rig.finish(op)
    for op in rig.copies():
        rig.begin(op)
    rig.tick(1.1)
    assert not any(one.receipts for one in got), "a copy still runs"
    rig.tick(1.1)
    assert tokens_of(got) == [0, 0]
    assert [one.receipt.reason for one in got] == ["deadline", "deadline"]
    at_rest(rig)


@pytest.mark.parametrize("taken", [True, False])
def test_a_rank_that_dies_ends_the_wait_at_once(rig, taken):
    ranks = ranks_of(rig)
    park_all(rig, ranks)
    planned = rig.plan(ranks[0], "chat", range(10))
    got = rig.restore(ranks[0], planned, range(10))
    rig.run()
    if taken:
        rig.restore(ranks[1], planned, range(10))
    rig.kill(ranks[1].proc)
    assert (got.receipt.tokens, got.receipt.reason) == (0, "shard_missing")
    at_rest(rig, died=True)


def test_a_rank_that_dies_while_others_copy_keeps_no_memory(rig):
    """Its end is known before its act is over."""
    ranks = ranks_of(rig)
    park_all(rig, ranks)
    _, got = resume_all(rig, ranks)
    for op in rig.copies():
        rig.begin(op)
    rig.kill(ranks[1].proc)
    assert not got[0].receipts, "a copy still runs"
    rig.run()
    assert (got[0].receipt.tokens, got[0].receipt.reason) == (0, "shard_missing")
    at_rest(rig, died=True)


def test_a_rank_takes_one_part_only(rig):
    """Its own call again: the part of another rank with an equal slice is not its to take."""
    ranks = ranks_of(rig, [PAIR[0]] * 2)
    park_all(rig, ranks)
    planned = rig.plan(ranks[0], "chat", range(10))
    first = rig.restore(ranks[0], planned, range(10))
    again = rig.restore(ranks[0], planned, range(10))
    assert (again.receipt.tokens, again.receipt.reason) == (0, "lease_expired")
    other = rig.restore(ranks[1], planned, range(10))
    rig.run()
    assert tokens_of([first, other]) == [10, 10]
    at_rest(rig)


def test_equal_slices_do_not_hide_that_a_rank_has_died(rig):
    """The one that is there has taken its own part, and cannot come for the other one."""
    ranks = ranks_of(rig, [PAIR[0]] * 2)
    park_all(rig, ranks)
    planned = rig.plan(ranks[0], "chat", range(10))
    got = rig.restore(ranks[0], planned, range(10))
    rig.run()
    rig.kill(ranks[1].proc)
    assert (got.receipt.tokens, got.receipt.reason) == (0, "shard_missing")
    at_rest(rig, died=True)


def test_a_plan_that_is_dropped_is_dropped_for_all(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks)
    planned = rig.plan(ranks[0], "chat", range(10))
    got = rig.restore(ranks[0], planned, range(10))
    rig.ask(DropPlan(plan_id=planned.plan.plan_id))
    rig.run()
    assert (got.receipt.tokens, got.receipt.reason) == (0, "shard_missing")
    at_rest(rig)


def test_a_plan_that_nobody_takes_ends_with_its_lease(rig):
    ranks = ranks_of(rig)
    park_all(rig, ranks)
    rig.plan(ranks[0], "chat", range(10), lease_s=1.0)
    rig.tick(1.1)
    assert not rig.core._plans._held and not rig.core._plans._shared
    at_rest(rig)


class LoggedRig(CoreRig):
    """A rig whose core is logged."""

    def handle(self, stimulus):
        if not hasattr(self, "log"):
            secret = hashlib.sha256(SECRET).hexdigest()
            arenas = tuple(self.core.state.arena_bytes)
            self.log = []
            origin = Origin(self.settings, secret, self.core.state.epoch, 1, arenas, 1024)
            self.journal = JournaledCore(self.core, origin, self.log.append)
        return self.journal.handle(self.now_s, stimulus)


def test_a_replay_gives_the_same_instructions():
    rig = LoggedRig()
    ranks = ranks_of(rig, [PAIR[0], PAIR[0], PAIR[1]])
    for level in ("host", "disk"):
        park_all(rig, ranks, level=level, private_from=3)
        resume_all(rig, ranks)
        rig.run()
    rig.park(ranks[0], "chat", range(15), timeout_s=1.0)
    rig.kill(ranks[2].proc)
    rig.tick(5.0)
    drain(rig)
    entries = read(io.BytesIO(b"".join(rig.log)))
    steps = replay(
        entries, lambda origin: HostSlots(origin.arena_bytes, first_generation=1), make_policies, SECRET
    )
    assert steps == len(rig.log) - 1 > 50
