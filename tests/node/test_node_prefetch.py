"""Reading ahead of a return: who is expected is in host memory by then, and nobody pays for it."""

import dataclasses
import hashlib
from io import BytesIO

import msgspec
import pytest

from kvtier.errors import KvtierError
from kvtier.geometry import Geometry, GroupGeometry
from kvtier.host.slots import HostSlots
from kvtier.messages import calls as m
from kvtier.messages.cluster import SERVICE, Drain
from kvtier.messages.tiers import DiskRead
from kvtier.node import prefetch
from kvtier.node.events import Received, Remembered
from kvtier.node.journal import JournaledCore, Origin, read, replay
from kvtier.node.prefetch import Prefetch
from kvtier.node.settings import NodeSettings
from kvtier.policy.defaults import make_policies
from kvtier.policy.prefetch import WorthPrefetch
from kvtier.testing.core_rig import SECRET, CoreRig
from kvtier.testing.rig_uses import UNIT

BLOCK = 2 * UNIT
DAY_S = 86400.0
OFF = NodeSettings(batch_bytes=2 * BLOCK, batches_in_flight=2)
ON = dataclasses.replace(OFF, prefetch_s=3600.0)
# Eight blocks, which are four conversations.
ARENA = 8 * BLOCK
LOSSY = GroupGeometry("full", token_bytes=UNIT // 2, lossy_token_bytes=UNIT // 4)


def tokens_of(number, count=8):
    return range(1000 * number, 1000 * number + count)


def cost_rig(make_rig, **how):
    rig = make_rig(**{"arena_bytes": [ARENA], "eviction": "cost", "settings": OFF} | how)
    return rig, rig.attach()


def park(rig, worker, name, number, tenant="acme", **how):
    rig.park(worker, name, tokens_of(number), tenant=tenant, level="disk", **how)
    rig.run()


def host_tokens(rig, name, tenant="acme"):
    (info,) = rig.ask(m.Show(conversation=name, tenant=tenant)).conversations
    return info.host_tokens


def pass_time(rig, seconds, steps=1):
    for _ in range(steps):
        rig.tick(seconds / steps)
        rig.run()


def fill(rig, worker, first=2, **how):
    for number in range(first, first + 5):
        park(rig, worker, f"b{number}", number, **{"stop": "tool_use"} | how)


def forget(rig, first=2):
    for number in range(first, first + 5):
        rig.ask(m.Forget(conversation=f"b{number}", tenant="acme"))
    rig.run()


def long_away(rig, worker, days=7.0):
    """Conversation 'a' is only on disk, and has been away for long; host memory is empty."""
    park(rig, worker, "a", 1, stop="end_turn")
    fill(rig, worker)
    forget(rig)
    pass_time(rig, days * DAY_S, 30)
    assert host_tokens(rig, "a") == 0


def reads(rig):
    return [op for op in rig.ops if isinstance(op.message, DiskRead)]


def switch(rig, settings=ON):
    rig.core.state.settings = settings


def hint(rig, name="a", returns_in_s=30.0):
    rig.ask(m.Hint(conversation=name, tenant="acme", returns_in_s=returns_in_s))


def being_read(rig, worker):
    """The conversation is on disk alone, its return was hinted at, and its first read is under way."""
    long_away(rig, worker)
    switch(rig)
    hint(rig)
    rig.tick(0.1)
    rig.tick(0.1)
    assert len(reads(rig)) == 1


# --- what comes in ----------------------------------------------------------------------------------------


def test_who_says_when_they_return_is_there_before(make_rig):
    rig, worker = cost_rig(make_rig)
    long_away(rig, worker)
    switch(rig)
    hint(rig)
    pass_time(rig, 2.0, 2)
    assert host_tokens(rig, "a") == 8
    counters = rig.core.state.counters
    assert counters.prefetched_bytes == 2 * BLOCK
    assert rig.resume(worker, "a", tokens_of(1, 9)).receipt.sources == {"host": 8}
    assert (counters.prefetch_used_bytes, counters.prefetch_wasted_bytes) == (2 * BLOCK, 0)
    assert rig.core.status().counters["prefetch_used_bytes"] == 2 * BLOCK


@pytest.mark.parametrize("how", ["switched off", "no hint", "by last use", "nobody serves it"])
def test_else_it_stays_on_disk(make_rig, how):
    """The controls."""
    rig, worker = cost_rig(make_rig, eviction="lru" if how == "by last use" else "cost")
    long_away(rig, worker)
    switch(rig, OFF if how == "switched off" else ON)
    if how != "no hint":
        hint(rig)
    if how == "nobody serves it":
        rig.ask(m.Detach(worker=worker.name), worker.peer)
    pass_time(rig, 20.0, 20)
    assert rig.core.state.counters.prefetched_bytes == 0


def test_a_hint_for_later_counts_when_its_time_comes(make_rig):
    rig, worker = cost_rig(make_rig)
    long_away(rig, worker)
    switch(rig)
    hint(rig, returns_in_s=5400.0)
    pass_time(rig, 600.0, 10)
    assert host_tokens(rig, "a") == 0
    pass_time(rig, 4500.0, 45)
    assert host_tokens(rig, "a") == 8


@pytest.mark.parametrize("served", [4, 8])
def test_what_is_stored_at_a_lossy_fidelity_comes_too(make_rig, served):
    """For who can take it: not in blocks of another size."""
    rig = make_rig(arena_bytes=[ARENA], eviction="cost", settings=OFF)
    worker = rig.attach(Geometry(4, 2, (LOSSY,)))
    park(rig, worker, "a", 1, stop="end_turn", fidelity="int8")
    fill(rig, worker)
    forget(rig)
    pass_time(rig, 7 * DAY_S, 30)
    assert host_tokens(rig, "a") == 0
    rig.attach(Geometry(served, 2, (LOSSY,)))
    rig.ask(m.Detach(worker=worker.name), worker.peer)
    switch(rig)
    hint(rig)
    pass_time(rig, 2.0, 2)
    assert host_tokens(rig, "a") == (8 if served == 4 else 0)
    assert rig.core.state.counters.prefetched_bytes == (BLOCK if served == 4 else 0)


# --- the overnight hump -----------------------------------------------------------------------------------


def come_back(rig, worker, tenant, gap_s, first):
    """Conversations of the tenant come back after gap_s."""
    for number in range(first, first + 4):
        park(rig, worker, f"t{number}", number, tenant=tenant)
    pass_time(rig, gap_s, 40)
    for number in range(first, first + 4):
        planned = rig.plan(worker, f"t{number}", tokens_of(number, 9), tenant=tenant)
        if planned.plan.plan_id:
            rig.ask(m.DropPlan(plan_id=planned.plan.plan_id))
    pass_time(rig, 120.0, 10)
    for number in range(first, first + 4):
        rig.ask(m.Forget(conversation=f"t{number}", tenant=tenant))
        rig.run()


@pytest.fixture(scope="module")
def lessons():
    """People of tenant 'night' come back after ten hours."""
    rig, worker = cost_rig(CoreRig, arena_bytes=[8 * ARENA])
    for night in range(25):
        come_back(rig, worker, "night", 36_000.0, 500 + 10 * night)
    return rig.core.learned()


def sleeper(make_rig, lessons):
    """By hour, whether somebody who left at night is in host memory."""
    rig, worker = cost_rig(make_rig)
    rig.tell(Remembered(lessons))
    park(rig, worker, "sleeper", 1, tenant="night")
    fill(rig, worker)
    assert host_tokens(rig, "sleeper", "night") == 0
    forget(rig)
    # Not before they are away for an hour: by then they did not leave for a moment only.
    pass_time(rig, 3600.0, 20)
    switch(rig)
    found = []
    for _ in range(9):
        pass_time(rig, 3600.0, 20)
        found.append(host_tokens(rig, "sleeper", "night") > 0)
    return found


def test_who_sleeps_is_read_shortly_before_they_come_back(make_rig, lessons):
    found = sleeper(make_rig, lessons)
    assert found == sorted(found)
    assert not any(found[:4])
    assert found[-1]


def test_without_what_was_learned_nobody_is_expected_in_the_morning(make_rig):
    assert not any(sleeper(make_rig, {}))


# --- what does not go for it ------------------------------------------------------------------------------


def full_of_better(make_rig):
    """Somebody may be back within the hour, or not; host memory is full of tools that are about to answer.

    Answers the rig, and what left host memory from when reading ahead was switched on.
    """
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "a", 1, stop="end_turn")
    fill(rig, worker)
    pass_time(rig, 600.0, 20)
    forget(rig)
    fill(rig, worker, first=12)
    counters = rig.core.state.counters
    evicted, named = counters.evicted_objects, []
    due = rig.core.state.policies.prefetch.due
    rig.core.state.policies.prefetch.due = lambda *asked: named.append(due(*asked)) or named[-1]
    switch(rig)
    pass_time(rig, 1.0, 5)
    assert ("acme", "a") in [ahead.name for ahead in named if ahead is not None]
    return rig, counters.evicted_objects - evicted


def test_nothing_comes_where_all_is_worth_more(make_rig):
    rig, evicted = full_of_better(make_rig)
    assert rig.core.state.host.usage().used_bytes == ARENA
    assert not evicted
    assert host_tokens(rig, "a") == 0


def test_a_policy_that_lets_all_go_is_noticed(make_rig, monkeypatch):
    monkeypatch.setattr(WorthPrefetch, "displaces", lambda self, ahead, key: True)
    assert full_of_better(make_rig)[1] > 0


@pytest.mark.parametrize("wear_limit_bytes", [0, 1])
def test_nothing_is_written_or_lost_to_make_room(make_rig, wear_limit_bytes):
    """Nor where the drive may be written no more: what is dropped then is gone."""
    rig, worker = cost_rig(make_rig)
    park(rig, worker, "a", 1, stop="end_turn")
    fill(rig, worker)
    forget(rig)
    for number in range(12, 16):
        rig.park(worker, f"b{number}", tokens_of(number))
        rig.run()
    pass_time(rig, 30 * DAY_S, 30)
    disk = rig.core.state.disk
    disk.said = msgspec.structs.replace(disk.said, wear_limit_bytes=wear_limit_bytes)
    switch(rig)
    hint(rig)
    written = rig.core.state.counters.spilled_bytes
    pass_time(rig, 5.0, 5)
    assert rig.core.state.counters.spilled_bytes == written
    assert host_tokens(rig, "a") == 0
    assert rig.core.state.dirty_bytes == ARENA


# --- whoever waits comes first ----------------------------------------------------------------------------


def test_it_waits_while_others_read(make_rig):
    rig, worker = cost_rig(make_rig)
    long_away(rig, worker)
    park(rig, worker, "c", 30)
    fill(rig, worker)
    forget(rig)
    switch(rig)
    planned = rig.plan(worker, "c", tokens_of(30, 9))
    restore = rig.restore(worker, planned, tokens_of(30, 9))
    hint(rig)
    rig.tick(0.1)
    assert rig.core.state.counters.prefetched_bytes == 0
    assert len(reads(rig)) == 1, "the restore's read alone"
    rig.run()
    assert restore.receipt.sources == {"disk": 8}
    pass_time(rig, 1.0, 5)
    assert host_tokens(rig, "a") == 8


def test_who_returns_while_it_is_read_is_served(make_rig):
    rig, worker = cost_rig(make_rig)
    being_read(rig, worker)
    assert rig.resume(worker, "a", tokens_of(1, 9)).receipt.tokens == 8


@pytest.mark.parametrize("what", ["forget", "fail", "disk dies"])
def test_what_goes_wrong_meanwhile_leaves_nothing(make_rig, what):
    rig, worker = cost_rig(make_rig)
    being_read(rig, worker)
    if what == "forget":
        rig.ask(m.Forget(conversation="a", tenant="acme"))
    elif what == "fail":
        rig.finish(reads(rig)[0], "disk_error")
    else:
        rig.kill(rig.disk)
        rig.start_disk()
    rig.run()
    pass_time(rig, 1.0, 5)
    state = rig.core.state
    assert sum(state.prefetched.values()) == state.host.usage().used_bytes
    assert state.counters.prefetch_used_bytes == 0


@pytest.mark.parametrize("drains", [True, False])
def test_a_node_on_its_way_out_reads_no_further(make_rig, monkeypatch, drains):
    monkeypatch.setattr(prefetch, "_BATCH_BYTES", 1)
    rig, worker = cost_rig(make_rig)
    long_away(rig, worker)
    switch(rig)
    hint(rig)
    rig.tick(0.1)
    rig.tick(0.1)
    if drains:
        rig.tell(Received(SERVICE, Drain()))
    pass_time(rig, 1.0, 5)
    assert rig.core.state.counters.prefetched_bytes == (BLOCK if drains else 2 * BLOCK)


def test_what_is_read_in_vain_is_counted(make_rig):
    rig, worker = cost_rig(make_rig)
    long_away(rig, worker)
    switch(rig)
    hint(rig)
    pass_time(rig, 2.0, 2)
    rig.ask(m.Forget(conversation="a", tenant="acme"))
    rig.run()
    assert rig.core.state.counters.prefetch_wasted_bytes == 2 * BLOCK


# --- replay -----------------------------------------------------------------------------------------------


class LoggedRig(CoreRig):
    """A rig whose core is logged."""

    def __init__(self, **how):
        self.log, self.journal = [], None
        super().__init__(arena_bytes=[ARENA], eviction="cost", settings=ON, **how)

    def handle(self, stimulus):
        if self.journal is None:
            secret = hashlib.sha256(SECRET).hexdigest()
            self.journal = JournaledCore(self.core, Origin(ON, secret, 1, 1, (ARENA,), 1024), self.log.append)
        return self.journal.handle(self.now_s, stimulus)


def replayed(log):
    def host(origin):
        return HostSlots(origin.arena_bytes, first_generation=origin.epoch)

    return replay(read(BytesIO(log)), host, lambda: make_policies("cost"), SECRET)


def logged_hints():
    rig = LoggedRig()
    worker = rig.attach()
    for number in range(1, 7):
        park(rig, worker, f"b{number}", number, stop="end_turn")
    pass_time(rig, 3 * DAY_S, 20)
    for number in (1, 3, 2):
        hint(rig, f"b{number}")
        pass_time(rig, 5.0, 5)
        rig.resume(worker, f"b{number}", tokens_of(number, 9))
    assert rig.core.state.counters.prefetch_used_bytes > 0
    return b"".join(rig.log)


def test_a_replay_reads_the_same_ahead():
    assert replayed(logged_hints()) > 50


def test_a_replay_that_reads_nothing_ahead_is_noticed(monkeypatch):
    log = logged_hints()
    monkeypatch.setattr(Prefetch, "tick", lambda self: None)
    with pytest.raises(KvtierError, match="gave other instructions"):
        replayed(log)
