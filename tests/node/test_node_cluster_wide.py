"""Forgetting, listing and locating over several nodes; what a node keeps of the cluster's answers."""

from __future__ import annotations

import random

from kvtier import cluster_messages as c
from kvtier.host.slots import HostSlots
from kvtier.keys import pack_tokens
from kvtier.messages import Forget, ListConversations, Locate, Show
from kvtier.node.events import Received
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
