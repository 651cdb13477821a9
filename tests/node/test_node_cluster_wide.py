"""Forgetting, listing and locating over several nodes; what a node keeps of the cluster's answers."""

from __future__ import annotations

import random

import pytest

from kvtier.host.slots import HostSlots
from kvtier.keys import pack_tokens
from kvtier.messages import cluster as c
from kvtier.messages.calls import Forget, ListConversations, Locate, Show
from kvtier.node.adoption import Adoption
from kvtier.node.events import Left, Received
from kvtier.node.journal import digest, pack, unpack
from kvtier.node.state import NodeState
from kvtier.policy.defaults import make_policies
from kvtier.testing.core_rig import SECRET
from kvtier.testing.rig_cluster import NodeRig, begun, end_well, objects_of, pair, park_at
from kvtier.testing.rig_uses import UNIT

# --- forgetting ---------------------------------------------------------------------------------------------


def forget(rig: NodeRig, name: str = "chat"):
    answer = rig.ask(Forget(conversation=name, tenant="acme"))
    rig.run()
    return answer.receipt if answer is not None else rig.answers[max(rig.answers)][0].receipt


def test_forgetting_reaches_all_nodes_before_its_receipt():
    a, b = pair()
    cluster = a.cluster
    park_at(a, level="disk")
    b.resume(b.attach(), "chat", range(10))
    receipt = forget(b)
    assert receipt.durable
    for rig in (a, b):
        assert not objects_of(rig, "chat")
        assert not rig.store.objects
    cluster.announce()
    assert cluster.shard.conversation("acme", "chat") is None
    assert b.plan(b.attach(), "chat", range(10)).plan.load_tokens == 0
    end_well(a, b)


def test_a_node_that_was_away_erases_when_it_returns():
    a, b = pair()
    cluster = a.cluster
    park_at(a, level="disk")
    store = cluster.lose("a")
    cluster.cut.add("a")
    receipt = forget(b)
    assert receipt.durable and "a" in receipt.detail
    b.announce()
    cluster.cut.discard("a")
    a = NodeRig(cluster, "a", epoch=7, disk=store)
    a.announce()
    assert not a.store.objects and not a.store.records
    assert a.plan(a.attach(), "chat", range(10)).plan.load_tokens == 0
    assert b.plan(b.attach(), "chat", range(10)).plan.load_tokens == 0
    # Parked anew it is there, also after the next return.
    park_at(a, level="disk")
    assert b.resume(b.attach(), "chat", range(10)).receipt.tokens == 10
    graves, store = tuple(a.graves), cluster.lose("a")
    a = NodeRig(cluster, "a", graves=graves, epoch=8, disk=store)
    a.announce()
    assert a.resume(a.attach(), "chat", range(10)).receipt.tokens == 10


def test_what_is_forgotten_while_it_is_on_its_way_does_not_come_back():
    a, b = pair()
    park_at(a, 24)
    restore = begun(b, 24)
    b.finish_pull(b.pulls[0])
    b.run_copies()
    pull = b.pulls[0]
    _erase_at(b)
    b.finish_pull(pull)
    b.run()
    assert restore.receipt.reason
    assert not objects_of(b, "chat")
    end_well(a, b)


def _erase_at(rig: NodeRig) -> None:
    """As if another node had forgotten it, before the holder heard of it."""
    erased = rig.question(c.Erase(stone=c.Stone("z.1", "acme", "chat", rig.now_s)))
    rig.run_disk()
    assert erased is not None or any(isinstance(reply, c.Erased) for reply in rig.replies)


def test_it_does_not_come_back_either_when_its_tombstone_is_over_by_then():
    a, b = pair()
    park_at(a, 24)
    restore = begun(b, 24)
    pull = b.pulls[0]
    _erase_at(b)
    b.tell(Received(c.DIRECTORY, c.Over(ids=("z.1",))))
    b.tick()
    b.finish_pull(pull)
    b.run()
    assert restore.receipt.reason
    assert not objects_of(b, "chat")
    b.tick(200.0)
    assert not b.core.state.stones
    end_well(a, b)


def test_the_end_of_an_earlier_tombstone_costs_no_pull():
    a, b = pair()
    for rig in (a, b):
        rig.tell(Received(c.DIRECTORY, c.Graves(stones=(c.Stone("z.0", "acme", "chat", b.now_s),))))
    park_at(a)
    restore = begun(b)
    b.tell(Received(c.DIRECTORY, c.Over(ids=("z.0",))))
    for pull in list(b.pulls):
        b.finish_pull(pull)
    b.core.cluster.burials.tick()
    b.run()
    assert restore.receipt.tokens == 10


def test_the_control_a_pull_that_looks_at_no_tombstone_brings_it_back(monkeypatch):
    a, b = pair()
    park_at(a, 24)
    begun(b, 24)
    pull = b.pulls[0]
    monkeypatch.setattr(NodeState, "stones_of", lambda self, name: ())
    _erase_at(b)
    b.finish_pull(pull)
    b.run()
    assert objects_of(b, "chat"), "the check above would not have noticed"


def test_who_forgot_it_takes_nothing_from_a_node_that_has_not_heard_of_it_yet():
    a, b = pair()
    cluster = a.cluster
    park_at(a, 24)
    cluster.cut.add("a")
    receipt = forget(b)
    assert receipt.durable and "a" in receipt.detail
    b.announce()
    cluster.cut.discard("a")
    # The directory knows that it is forgotten; the other node has it all, and is reached again.
    assert objects_of(a, "chat")
    assert b.plan(b.attach(), "chat", range(24)).plan.load_tokens == 0
    assert b.plan(b.attach(), "another", range(24)).plan.load_tokens == 24


def forgotten_but_at_a():
    """Node b forgot what node a has of a conversation, and goes on with its name; a has not heard of it."""
    a, b = pair()
    park_at(a, 26)
    a.cluster.cut.add("a")
    assert forget(b).durable
    a.cluster.cut.discard("a")
    worker = b.attach()
    b.park(worker, "chat", [*range(500, 524)])
    b.run()
    return a, b, worker


@pytest.mark.parametrize("heard", [True, False], ids=["heard", "on its way"])
def test_a_name_that_goes_on_takes_nothing_of_what_was_forgotten_from_who_has_not_heard(heard):
    """The directory may not know of the tombstone yet: whoever asks does."""
    a, b, worker = forgotten_but_at_a()
    if heard:
        b.announce()
    assert objects_of(a, "chat")
    for tokens in (range(26), range(24), range(40)):
        assert b.plan(worker, "chat", tokens).plan.load_tokens == 0


def test_a_name_that_goes_on_is_found_by_who_forgot_it_where_the_turn_came_after():
    a, b, _ = forgotten_but_at_a()
    b.announce()
    # With its next announcement it hears of it.
    park_at(a, 5, name="other")
    assert not objects_of(a, "chat")
    a.park(a.attach(), "chat", [*range(500, 533)])
    a.run()
    a.announce()
    assert b.core.state.stones_of(("acme", "chat"))
    plan = b.plan(b.attach(), "chat", [*range(500, 540)]).plan
    assert plan.load_tokens == 33


def test_the_control_a_plan_that_goes_by_the_directory_alone_brings_it_back(monkeypatch):
    a, b, worker = forgotten_but_at_a()
    known = a.cluster.shard.conversation
    monkeypatch.setattr(a.cluster.shard, "conversation", lambda tenant, name, after: known(tenant, name))
    assert b.plan(worker, "chat", range(26)).plan.load_tokens == 26


def test_the_control_a_plan_that_looks_for_its_tokens_alone_brings_it_back(monkeypatch):
    _, b, worker = forgotten_but_at_a()
    b.announce()
    monkeypatch.setattr(NodeState, "unheard_stones_of", lambda self, name: ())
    assert b.plan(worker, "chat", range(26)).plan.load_tokens == 24


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "over"])
def test_an_erasure_before_the_disk_is_read_spares_what_came_after_it(kept: bool):
    """After a start another node that has not heard of a tombstone's end has the directory tell it anew."""
    a, _ = pair()
    cluster = a.cluster
    park_at(a, level="disk")
    assert forget(a).durable
    stone = next(iter(a.core.state.stones["acme", "chat"].values()))
    park_at(a, level="disk")
    past = c.Graves(stones=(stone,) if kept else (), past=() if kept else (stone.id,))
    store = cluster.lose("a")
    a = NodeRig(cluster, "a", epoch=8, disk=None, wishes={"disk_expected": True})
    a.tell(Received(c.DIRECTORY, past))
    answer = a.question(c.Erase(stone=stone))
    a.store = store
    a.start_disk()
    a.run()
    assert answer is not None and answer.ok is not kept
    assert a.resume(a.attach(), "chat", range(10)).receipt.tokens == 10
    assert a.question(c.Erase(stone=stone)).ok
    assert a.resume(a.attach(), "chat", range(10)).receipt.tokens == 10


def test_an_erasure_that_runs_is_answered_when_it_is_durable_whoever_asks_for_it():
    a, _ = pair()
    park_at(a, level="disk")
    erase = c.Erase(stone=c.Stone("z.1", "acme", "chat", a.now_s))
    # The node that forgot it asks, and the directory does.
    assert a.question(erase) is None
    assert a.question(erase) is None
    a.run_disk()
    assert [reply.ok for reply in a.replies if isinstance(reply, c.Erased)] == [True, True]
    assert a.question(erase).ok


def test_an_erasure_that_fails_is_told_to_all_who_asked():
    a, _ = pair()
    park_at(a, level="disk")
    erase = c.Erase(stone=c.Stone("z.1", "acme", "chat", a.now_s))
    assert a.question(erase) is None
    assert a.question(erase) is None
    a.tell(Left(a.core.state.disk.peer))
    assert [reply.ok for reply in a.replies if isinstance(reply, c.Erased)] == [False, False]


def test_a_shard_that_lost_everything_is_told_again():
    a, b = pair()
    cluster = a.cluster
    park_at(a)
    cluster.shard = type(cluster.shard)()
    assert b.plan(b.attach(), "chat", range(10)).plan.load_tokens == 0
    a.announcer.senders[0].probe()
    cluster.announce()
    assert b.resume(b.attach(), "chat", range(10)).receipt.tokens == 10


def test_the_stimuli_of_a_node_in_a_cluster_replay():
    """What the cluster told a core is in its log, and leads to the same instructions again."""
    a, _ = pair()
    cluster = a.cluster
    told: list[tuple[float, object, bytes]] = []
    rig = NodeRig(cluster, "e", epoch=9)
    handle = rig.core.handle

    def noted(now_s, stimulus):
        sends = handle(now_s, stimulus)
        told.append((now_s, unpack(pack(stimulus)), digest(sends)))
        return sends

    before = list(rig.stimuli)
    rig.core.handle = noted  # type: ignore[method-assign]
    park_at(a, 20, level="disk")
    rig.resume(rig.attach(), "chat", range(20))
    park_at(rig, 24, level="disk")
    rig.question(c.WhatIs(keys=objects_of(rig, "chat")[0].meta.object_id.block_key, shard="s0"))
    forget(rig)
    cluster.announce()
    assert rig.violations == []
    core = type(rig.core)(
        rig.settings,
        _empty_host(9),
        make_policies(),
        SECRET,
        random.Random(9),
        epoch=9,
        arena_bytes=[64 * UNIT],
        generation_slots=1024,
    )
    for at_s, stimulus in before:
        core.handle(at_s, stimulus)
    assert len(told) > 30
    assert [digest(core.handle(at_s, stimulus)) for at_s, stimulus, _ in told] == [said for *_, said in told]


def _empty_host(epoch: int) -> HostSlots:
    return HostSlots((64 * UNIT,), first_generation=epoch, publish=lambda slot, generation: None)


# --- what people ask ----------------------------------------------------------------------------------------


def test_lists_and_locations_are_of_all_nodes():
    a, b = pair()
    cluster = a.cluster
    park_at(a, 20, "one")
    park_at(b, 12, "one")
    park_at(b, 8, "two")
    for rig in (a, b):
        page = rig.ask(ListConversations())
        assert [(i.conversation, i.tokens, i.nodes) for i in page.conversations] == [
            ("one", 20, ("a", "b")),
            ("two", 8, ("b",)),
        ]
        assert not page.more
        first = rig.ask(ListConversations(limit=1))
        assert ([i.conversation for i in first.conversations], first.more) == (["one"], True)
        rest = rig.ask(ListConversations(after=("acme", "one")))
        assert [i.conversation for i in rest.conversations] == ["two"]
        (shown,) = rig.ask(Show(conversation="two", tenant="acme")).conversations
        assert (shown.nodes, shown.tokens) == (("b",), 8)
        located = rig.ask(Locate(conversation="one", tenant="acme")).nodes
        assert [(node, tokens) for node, tokens, _ in located] == [("a", 20), ("b", 12)]
    packed = pack_tokens([*range(14), 99])
    by_tokens = b.ask(Locate(conversation="one", tenant="acme", tokens=packed)).nodes
    assert [(node, tokens) for node, tokens, _ in by_tokens] == [("b", 12), ("a", 12)]
    packed = pack_tokens([*range(18), 99])
    by_tokens = b.ask(Locate(conversation="one", tenant="acme", tokens=packed)).nodes
    assert [(node, tokens) for node, tokens, _ in by_tokens] == [("a", 16), ("b", 12)]
    cluster.at_directory = lambda rig, message: None  # type: ignore[method-assign]
    assert a.ask(Locate(conversation="one", tenant="acme", tokens=packed)) is None
    a.tick(0.3)
    assert [node for node, *_ in a.answers[max(a.answers)][0].nodes] == ["a"]
    assert a.ask(Show(conversation="two", tenant="acme")) is None
    a.tick(3.1)
    assert a.answers[max(a.answers)][0].conversations == []
    assert a.ask(Locate(conversation="one", tenant="acme")) is None
    a.tick(3.1)
    assert [node for node, *_ in a.answers[max(a.answers)][0].nodes] == ["a"]


def test_a_node_that_returns_serves_when_it_was_told_what_was_forgotten():
    a, _ = pair()
    park_at(a)
    a.tell(Received(c.DIRECTORY, c.Graves(stones=(), wait_s=1.0)))
    worker = a.attach()
    assert a.plan(worker, "chat", range(10)) is None
    a.tell(Received(c.DIRECTORY, c.Heard()))
    assert a.answers[max(a.answers)][0].plan.load_tokens == 10
    # Nor does it wait for ever for a directory that is away.
    a.tell(Received(c.DIRECTORY, c.Graves(stones=(), wait_s=1.0)))
    assert a.plan(worker, "chat", range(10)) is None
    a.tick(1.1)
    assert a.answers[max(a.answers)][0].plan.load_tokens == 10


# --- where the next turn is soonest -------------------------------------------------------------------------

SLOW = c.Load(host=c.Speed(0.01, 1e3), disk=c.Speed(0.5, 1e2), peer=c.Speed(0.01, 1e3))


def places(rig: NodeRig, tokens=()) -> list[tuple[str, int, float]]:
    return rig.ask(
        Locate(conversation="chat", tenant="acme", tokens=pack_tokens(tokens) if tokens else b"")
    ).nodes


def on_both():
    a, b = pair()
    park_at(a, 16)
    b.resume(b.attach(), "chat", range(16))
    park_at(b, 16)
    return a, b


def test_the_node_whose_workers_have_a_queue_comes_later():
    a, b = on_both()
    for ask in ((), range(20)):
        assert [node for node, *_ in places(a, ask)] == ["a", "b"], "of equals the one that was asked"
        assert [node for node, *_ in places(b, ask)] == ["b", "a"]
    # Every worker of a waits: the one that waits least counts.
    a.attach()
    for wait_s, worker in zip((5.0, 7.0), a.workers, strict=True):
        a.plan(worker, "chat", range(4), prefill_wait_s=wait_s)
    a.tick(1.0)
    for rig in (a, b):
        for ask in ((), range(20)):
            (first, _, soon_s), (last, held, late_s) = places(rig, ask)
            assert (first, last, held) == ("b", "a", 16)
            assert 0 < soon_s < 1 < 3.5 < late_s < 5
    # Nobody said so again, and the time passed.
    a.tick(6.0)
    assert [node for node, *_ in places(b)] == ["b", "a"]
    assert places(b)[1][2] < 1


def test_a_shorter_front_is_sooner_where_the_longer_one_loads_slowly():
    a, b = pair()
    park_at(a, 20)
    park_at(b, 16)
    assert places(b, range(24))[0][:2] == ("a", 20)
    # What b lacks is pulled at this pace, too, and is less.
    a.cluster.loads["a"] = SLOW
    (first, held, _), (last, most, slow_s) = places(b, range(24))
    assert (first, held, last, most) == ("b", 16, "a", 20)
    assert slow_s > 10 * places(a, range(24))[0][2]
    # A node that goes out of service is a source, and no place to go.
    a.cluster.loads["a"] = c.Load(SLOW.host, SLOW.disk, SLOW.peer, accepts=False)
    assert [node for node, *_ in places(b, range(24))] == ["b"]


def test_what_nothing_is_known_of_comes_last():
    a, b = on_both()
    a.cluster.loads.clear()
    b.core.cluster.everywhere._loads.of.clear()
    ((first, _, known_s), (last, held, unknown_s)) = places(b)
    assert (first, last, held, unknown_s) == ("b", "a", 16, 0.0)
    assert known_s > 0


def test_a_load_is_said_when_it_changed_and_not_with_each_tick(monkeypatch):
    a, _ = pair()
    said: list[c.Load] = []
    at_directory = a.cluster.at_directory

    def noted(rig, message):
        if rig is a and isinstance(message, c.Holdings) and message.load is not None:
            said.append(message.load)
        at_directory(rig, message)

    monkeypatch.setattr(a.cluster, "at_directory", noted)
    for _ in range(5):
        a.tick(1.1)
    assert said == []
    a.plan(a.attach(), "new", range(4), prefill_wait_s=1.0)
    for _ in range(5):
        a.tick(0.1)
    assert len(said) <= 1
    a.tick(1.1)
    a.tick(1.1)
    assert said[-1].wait_s == 0
    a.tell(Received(c.SERVICE, c.Drain()))
    a.tick(1.1)
    assert not said[-1].accepts


# --- what was pulled ----------------------------------------------------------------------------------------


def pulled_and_spilled(*, parks: bool):
    """b pulled what a parked, wrote it to its drive, parked the next turn there or not, and starts anew."""
    a, b = pair()
    park_at(a, 16, level="disk")
    b.resume(b.attach(), "chat", range(16))
    if parks:
        park_at(b, 20, level="disk")
    b.tell(Received(c.SERVICE, c.Drain()))
    b.run()
    end_well(b)
    assert b.store.objects, "nothing was written"
    b = NodeRig(a.cluster, "b", epoch=7, disk=a.cluster.lose("b"))
    a.cluster.announce()
    return a, b


def test_what_was_only_pulled_is_a_cache_and_ends_with_a_restart():
    a, b = pulled_and_spilled(parks=False)
    assert not b.store.objects
    restore = b.resume(b.attach(), "chat", range(16))
    assert restore.receipt.sources == {"peer": 16}
    assert forget(a).durable
    for rig in (a, b):
        assert not objects_of(rig, "chat") and not rig.store.objects
    end_well(a, b)


def test_the_control_unnamed_blocks_that_stay_would_be_seen(monkeypatch):
    monkeypatch.setattr(Adoption, "_remove_unnamed", lambda self: iter(()))
    _, b = pulled_and_spilled(parks=False)
    assert b.store.objects, "the check above would not have noticed"


def test_what_was_pulled_and_parked_on_is_kept():
    a, b = pulled_and_spilled(parks=True)
    assert b.store.objects
    assert b.resume(b.attach(), "chat", range(20)).receipt.sources == {"disk": 20}
    end_well(a, b)
