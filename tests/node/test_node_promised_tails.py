"""What was promised of a turn that ends in a tail: it stays until a longer turn is all on disk, by name.

Each test plays a longer park against something that goes wrong, and after every step the power fails in a
copy of the node: then the promised turn is there, or a whole longer one that goes on from it, and in both
cases every full block of the promised one.
"""

import pytest

from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.node import naming, park_writes
from kvtier.node.conversations import Conversation

STORY = list(range(40))
TURN, FULL_BLOCKS = 10, 8
LONGER = (11, 12, 13, 16, 21)


def promised(make_rig):
    """A node whose disk has ten tokens of a conversation: two blocks, and a tail of two."""
    rig = make_rig()
    worker = rig.attach()
    park = rig.park(worker, "chat", STORY[:TURN], level="disk")
    rig.run()
    assert park.receipt.level == "disk"
    return rig, worker


def comes_back(rig, tokens):
    """How many of the first tokens a node has after power loss, which a user then goes on from otherwise."""
    reborn = rig.restarted()
    restore = reborn.resume(reborn.attach(), "chat", [*STORY[:tokens], 999])
    assert reborn.violations == []
    return restore.receipt.tokens


def is_kept(rig, parked):
    """Whether the promise holds: the turn itself, or a longer one that was parked comes back whole."""
    own = comes_back(rig, TURN)
    return own == TURN or (own == FULL_BLOCKS and any(comes_back(rig, n) == n for n in parked if n > TURN))


def step_by_step(rig, parked, *, until=200):
    """Everything that is asked for happens, one thing at a time, and the power fails after each."""
    for _ in range(until):
        assert is_kept(rig, parked), rig.ops
        if not rig.ops:
            return
        rig.finish(rig.ops[0])
    raise AssertionError("it does not end")


def tails(rig):
    return sorted(block.end for block in rig.core.state.tree if block.is_tail)


# --- each way in which the longer turn may come, or not ---------------------------------------------------


@pytest.mark.parametrize("tokens", LONGER)
@pytest.mark.parametrize("level", ["host", "disk"])
def test_power_loss_at_any_step_of_a_longer_park_loses_nothing(make_rig, tokens, level):
    rig, worker = promised(make_rig)
    rig.park(worker, "chat", STORY[:tokens], level=level)
    step_by_step(rig, [tokens])
    rig.park(worker, "chat", STORY[: tokens + 9], level="disk")
    step_by_step(rig, [tokens, tokens + 9])
    assert TURN not in tails(rig)


def fail_one(rig, op, how):
    """One thing that was asked for fails, in one of the ways in which it may."""
    if how == "killed":
        rig.kill(op.executor)
    elif how == "late":
        rig.tick(31.0)
    elif how == "unheard" and op.executor is rig.disk:
        # Carried out, but the connection is gone before that is said.
        rig.finish(op, answer=False)
        rig.disconnect(op.via)
    elif isinstance(op.message, t.Copy):
        rig.finish(op, "error: of the device")
    else:
        rig.finish(op, how)


@pytest.mark.parametrize("how", ["killed", "late", "unheard", "disk_error", "wear"])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("tokens", [12, 13])
def test_a_longer_park_that_fails_midway_leaves_what_was_promised(make_rig, tokens, at, how):
    rig, worker = promised(make_rig)
    rig.park(worker, "chat", STORY[:tokens], level="disk")
    for _ in range(at):
        if rig.ops:
            rig.finish(rig.ops[0])
    if rig.ops:
        fail_one(rig, rig.ops[0], how)
    step_by_step(rig, [tokens])
    if rig.gpu is None:
        rig.start_gpu()
    if rig.disk is None:
        rig.start_disk()
    rig.tick(1.0)
    step_by_step(rig, [tokens])
    again = rig.attach()
    rig.park(again, "chat", STORY[:21], level="disk")
    step_by_step(rig, [tokens, 21])
    assert comes_back(rig, 21) == 21


def test_a_longer_park_whose_time_is_over_may_reach_the_disk_later_and_takes_the_tails_place_then(make_rig):
    """What its receipt said is less than what came of it: the shorter turn alone is cut to full blocks."""
    rig, worker = promised(make_rig)
    late = rig.park(worker, "chat", STORY[:13], level="disk")
    while not any(is_record(op) for op in rig.ops):
        rig.finish(rig.ops[0])
    rig.tick(31.0)
    assert (late.receipt.level, late.receipt.reason) == ("host", "deadline")
    assert TURN in tails(rig)
    step_by_step(rig, [13])
    rig.park(worker, "chat", STORY[:13])
    step_by_step(rig, [13])
    assert TURN not in tails(rig)
    assert (comes_back(rig, TURN), comes_back(rig, 13)) == (FULL_BLOCKS, 13)


def test_what_others_have_of_the_longer_turn_takes_no_tail_that_a_conversation_ends_in(make_rig):
    rig, worker = promised(make_rig)
    rig.park(worker, "other", STORY[:13], level="disk")
    step_by_step(rig, [])
    assert comes_back(rig, TURN) == TURN


def test_a_turn_that_is_parked_again_after_its_tail_went_is_there_again(make_rig):
    rig, worker = promised(make_rig)
    rig.park(worker, "chat", STORY[:13], level="disk")
    rig.run()
    assert comes_back(rig, TURN) == FULL_BLOCKS
    rig.park(worker, "chat", STORY[:TURN], level="disk")
    step_by_step(rig, [13])
    assert (comes_back(rig, TURN), comes_back(rig, 13)) == (TURN, 13)


# --- the longer turn breaks while its record is written -----------------------------------------------------


def broken_while_recorded(make_rig):
    """The block that takes the tail's place is found to be corrupt while its record is written."""
    first, worker = promised(make_rig)
    first.park(worker, "other", STORY[:12], level="disk")
    first.run()
    rig = first.restarted()
    worker, reader = rig.attach(), rig.attach()
    place = next(i for i, key in enumerate(rig.store.objects) if key[0] == block_at(rig, 8, 4).key)
    rig.park(worker, "chat", STORY[:13], level="disk")
    while not any(is_record(op) for op in rig.ops):
        rig.finish(rig.ops[0])
    (record,) = (op for op in rig.ops if is_record(op))
    rig.corrupt_disk(place)
    rig.restore(reader, rig.plan(reader, "other", STORY[:12]), STORY[:12])
    while others := [op for op in rig.ops if op is not record]:
        rig.finish(others[0])
    return rig, record


def is_record(op):
    return isinstance(op.message, t.DiskWrite) and op.message.records and not op.message.metas


def block_at(rig, start, tokens):
    return next(b for b in rig.core.state.tree if (b.start, b.tokens) == (start, tokens))


def said_again(rig):
    """Something else has the record written, as it is now."""
    rig.ask(m.Hint(conversation="chat", tenant="acme", returns_in_s=5.0))
    rig.tick(1.0)
    rig.run()


def test_a_record_takes_no_end_away_where_the_longer_turn_broke_meanwhile(make_rig):
    rig, record = broken_while_recorded(make_rig)
    rig.finish(record)
    step_by_step(rig, [13])
    said_again(rig)
    assert comes_back(rig, TURN) == TURN


# --- controls -----------------------------------------------------------------------------------------------


def test_without_the_look_at_what_is_durable_a_crash_would_lose_the_tail(make_rig, monkeypatch):
    monkeypatch.setattr(naming, "droppable", lambda state, tail, by: True)
    rig, worker = promised(make_rig)
    rig.park(worker, "chat", STORY[:13])
    with pytest.raises(AssertionError):
        step_by_step(rig, [13])
    assert comes_back(rig, TURN) == FULL_BLOCKS
    assert comes_back(rig, 13) == FULL_BLOCKS


def test_without_ends_that_were_continued_a_record_would_lose_them(make_rig, monkeypatch):
    set_head = Conversation.set_head

    def forgetful(self, head, replaces, at_most):
        set_head(self, head, replaces, at_most)
        self.earlier = []

    monkeypatch.setattr(Conversation, "set_head", forgetful)
    rig, worker = promised(make_rig)
    rig.park(worker, "chat", STORY[:13])
    rig.run()
    said_again(rig)
    assert not is_kept(rig, [13])


def test_without_the_look_at_what_broke_a_record_would_lose_the_end(make_rig, monkeypatch):
    monkeypatch.setattr(park_writes.ParkWrites, "_is_on_disk", lambda self, job, head: True)
    rig, record = broken_while_recorded(make_rig)
    rig.finish(record)
    rig.run()
    said_again(rig)
    assert not is_kept(rig, [13])
