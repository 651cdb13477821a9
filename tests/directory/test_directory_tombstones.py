"""Forgotten while a node was away: it stays forgotten."""

import msgpack
import pytest

from kvtier.directory import calls
from kvtier.directory.announcements import Announcement, End, Record, Tombstone
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.directory.tombstones import Tombstones

END = End(b"k" * 16, 32, 1.0)
STONE = Tombstone("b.1.0", "acme", "chat", 100.0, ("a", "b"))


class Nodes:
    """Sends messages in turn."""

    def __init__(self, **settings):
        self.shard = Shard(ShardSettings(**settings))
        self.numbers = {}

    def say(self, node, *, epoch=1, phase="change", records=(), tombstones=(), now_s=100.0):
        number = self.numbers[node, epoch] = self.numbers.get((node, epoch), -1) + 1
        return self.shard.apply(
            Announcement(
                node=node,
                epoch=epoch,
                number=number,
                shard=0,
                shards=1,
                phase=phase,
                records=records,
                tombstones=tombstones,
            ),
            now_s,
        )

    def found(self):
        return self.shard.conversation("acme", "chat")


def parked(version=1, after=()):
    return (Record("acme", "chat", version, (END,), after),)


def both():
    nodes = Nodes()
    nodes.say("a", phase="whole", records=parked())
    nodes.say("b", phase="whole", records=parked(5))
    return nodes


def test_what_one_node_forgot_is_gone_at_all_and_the_others_are_told():
    nodes = both()
    answer = nodes.say("b", tombstones=(STONE,))
    assert nodes.found() is None
    assert nodes.shard.summary().tenants == {}
    assert answer.forget == ()
    assert nodes.say("a").forget == (STONE,)
    assert nodes.say("a").forget == (STONE,)
    assert nodes.say("a", tombstones=(STONE,)).over == (STONE.id,)
    assert nodes.say("b").over == (STONE.id,)
    assert nodes.shard.summary().tombstones == 0


def test_a_node_that_was_away_cannot_bring_it_back():
    nodes = both()
    nodes.shard.lost("a", 1)
    nodes.say("b", tombstones=(STONE,))
    for _ in range(5):
        assert nodes.say("b").over == ()
    answer = nodes.say("a", epoch=2, phase="whole", records=parked(9))
    assert nodes.found() is None
    assert answer.forget == (STONE,)
    nodes.say("a", epoch=2, tombstones=(STONE,))
    nodes.say("a", epoch=2, records=parked(1, after=(STONE.id,)))
    assert nodes.found().versions == {"a": 1}


def test_forgetting_it_again_after_its_tombstone_was_over_spares_what_was_parked_since():
    nodes = both()
    nodes.say("b", tombstones=(STONE,))
    nodes.say("a", tombstones=(STONE,))
    nodes.say("a", records=parked(1, after=(STONE.id,)))
    # The answer that said 'over' was lost, so the node's next snapshot names it again.
    nodes.say("b", epoch=2, phase="whole", tombstones=(STONE,))
    assert nodes.found() is not None


def test_a_node_that_did_not_hear_that_it_is_over_kills_nothing_that_was_parked_since():
    nodes = both()
    nodes.say("b", tombstones=(STONE,))
    assert nodes.say("a", tombstones=(STONE,)).over == (STONE.id,)
    # 'a' keeps it no longer, so what is parked there now does not name it; the answer to 'b' is lost.
    nodes.say("a", records=parked(1))
    assert nodes.say("b").over == (STONE.id,)
    again = nodes.say("b", epoch=2, phase="whole", tombstones=(STONE,))
    assert again.over == (STONE.id,)
    assert nodes.found() is not None
    assert nodes.say("a").forget == ()
    assert nodes.say("b", epoch=2).over == ()


def told_by_two(last_nodes):
    """Node 'b' forgot, and knew of 'c' alone, as did the shard; 'c' knows of these. What 'c' is answered."""
    nodes = Nodes()
    first, last = (Tombstone(STONE.id, "acme", "chat", 100.0, names) for names in (("b", "c"), last_nodes))
    nodes.say("b", phase="whole", tombstones=(first,))
    answer = nodes.say("c", phase="whole", tombstones=(last,))
    return nodes, answer


def test_a_node_that_only_another_one_knows_of_is_waited_for_too():
    nodes, answer = told_by_two(("a", "b", "c"))
    assert answer.over == ()
    back = nodes.say("a", phase="whole", records=parked())
    assert [stone.id for stone in back.forget] == [STONE.id]
    assert nodes.found() is None
    assert nodes.say("a", tombstones=(STONE,)).over == (STONE.id,)


def test_the_control_a_node_that_nobody_knows_of_brings_it_back():
    nodes, answer = told_by_two(("b", "c"))
    assert answer.over == (STONE.id,)
    nodes.say("a", phase="whole", records=parked())
    assert nodes.found() is not None


def test_a_node_that_was_retired_is_not_waited_for_again_by_who_still_knows_of_it():
    stone = Tombstone(STONE.id, "acme", "chat", 100.0, ("a", "b", "c"))
    tombstones = Tombstones(1000.0)
    tombstones.carried_out("b", stone, ())
    tombstones.retire("a")
    tombstones.carried_out("c", stone, ())
    assert tombstones.over_for("c", 1, 1, 9) == (STONE.id,)
    assert not len(tombstones)


def test_a_shard_that_lost_everything_learns_tombstones_from_those_who_keep_them():
    nodes = Nodes()
    nodes.say("a", epoch=2, phase="whole", records=parked())
    assert nodes.found() is not None
    nodes.say("b", epoch=1, phase="whole", tombstones=(STONE,))
    assert nodes.found() is None
    assert nodes.say("a", epoch=2).forget == (STONE,)


def test_only_a_long_bound_or_retirement_ends_the_wait():
    nodes = both()
    nodes.say("b", tombstones=(STONE,))
    nodes.shard.retire("a")
    assert nodes.say("b").over == (STONE.id,)
    bounded = Tombstones(keep_s=10.0)
    bounded.carried_out("b", STONE, ("c",))
    bounded.expire(109.0)
    assert bounded.of("acme", "chat") == {STONE.id}
    assert bounded.for_node("c", 9) == (STONE,)
    bounded.expire(111.0)
    assert not bounded.of("acme", "chat")
    assert not len(bounded)
    assert bounded.for_node("a", 9) == ()
    assert bounded.over_for("b", 1, 4, 9) == (STONE.id,)
    assert bounded.over_for("b", 1, 4, 9) == (STONE.id,)
    assert bounded.over_for("b", 2, 0, 9) == (STONE.id,)
    assert bounded.over_for("b", 2, 1, 9) == ()


def test_a_directory_that_waits_for_nobody_is_seen(monkeypatch):
    def hasty(self, node, stone, known):
        self._by_name.pop((stone.tenant, stone.conversation), None)

    monkeypatch.setattr(Tombstones, "carried_out", hasty)
    with pytest.raises(AssertionError):
        test_a_node_that_was_away_cannot_bring_it_back()


# --- between releases ---------------------------------------------------------------------------------------


def said_by(call, change):
    """A call as a peer of another release sends it: its fields, changed by hand, on the wire."""
    fields = msgpack.unpackb(calls.pack(call))
    change(fields)
    return calls.unpack_call(msgpack.packb(fields))


def test_an_asker_that_knows_no_field_after_is_answered_by_what_the_shard_knows():
    nodes = both()
    full = calls.GetConversation(0, "acme", "chat", (STONE.id,))
    older = said_by(full, lambda fields: fields.pop("after"))
    assert older == calls.GetConversation(0, "acme", "chat")
    assert nodes.shard.conversation(older.tenant, older.conversation, older.after) is not None
    # The same question with the field: what did not come after that tombstone does not count.
    assert nodes.shard.conversation(full.tenant, full.conversation, full.after) is None
    nodes.say("b", tombstones=(STONE,))
    assert nodes.shard.conversation(older.tenant, older.conversation, older.after) is None


def test_what_a_newer_asker_says_beside_it_is_passed_over():
    asked = calls.GetConversation(0, "acme", "chat", (STONE.id,))
    assert said_by(asked, lambda fields: fields.update(before=["x"], more={"y": 1})) == asked


def told(change):
    """A record as a node of another release announces it, after STONE was carried out."""
    record = parked(2, after=(STONE.id,))[0]
    said = Announcement(
        node="a", epoch=1, number=0, shard=0, shards=1, phase="whole", records=(record,), tombstones=()
    )

    def changed(fields):
        fields["announcement"]["records"][0] = change(fields["announcement"]["records"][0])

    return said_by(calls.Tell(said, "10.0.0.1:7200"), changed).announcement


@pytest.mark.parametrize(
    ("change", "after"),
    [
        (lambda fields: fields[:4], ()),
        (lambda fields: [*fields, "a field of later", 7], (STONE.id,)),
    ],
    ids=["older", "newer"],
)
def test_a_record_of_another_release_is_killed_unless_it_says_what_it_came_after(change, after):
    shard = Shard(ShardSettings())
    said = told(change)
    assert said.records[0].after == after
    shard.apply(said, 100.0)
    assert shard.conversation("acme", "chat") is not None
    # By a tombstone that it does not name, whoever told of it: rather a miss than what was forgotten.
    assert (shard.conversation("acme", "chat", (STONE.id,)) is not None) == bool(after)
