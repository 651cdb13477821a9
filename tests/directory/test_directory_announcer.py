"""What a node sends: bounded messages, the same one until it is answered, whole snapshots."""

import hashlib

import msgspec

from kvtier.directory import announcer, saying
from kvtier.directory.announcements import (
    MOST_PARTS,
    Announcement,
    Answer,
    End,
    Layout,
    Part,
    Record,
    Tombstone,
)
from kvtier.directory.announcer import Announcer, Holding, Sender
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.messages.cluster import Held

LAYOUT = Layout(256, tuple(Part(g, "full", f"L0+32.H{h}+8", 4096) for g in range(3) for h in range(8)))


def hint(number):
    return hashlib.sha256(b"%d" % number).digest()[:16]


def holding(number):
    return Holding("tenant", LAYOUT, 256, (1 << 24) - 1, number % 3)


def record(number):
    end = End(hint(number), 4096, 1e9, (100, b"s" * 32), b"f" * 8)
    return Record("tenant", f"conversation-{number:040}", 3, (end, end), ("node.1.2",))


def drain(sender, shard):
    sent = []
    while (message := sender.next()) is not None:
        wire = msgspec.msgpack.encode(message)
        assert len(wire) < 100_000
        assert sender.next() is message
        sent.append(message)
        sender.answered(shard.apply(msgspec.msgpack.decode(wire, type=Announcement), 0.0))
    return sent


def test_a_large_snapshot_goes_in_parts_under_100_kb():
    sender, shard = Sender("a", 1, 0, 1), Shard()
    assert sender.next() is None
    sender.snapshot({hint(n): holding(n) for n in range(9000)}, [record(n) for n in range(300)], ())
    sent = drain(sender, shard)
    assert [m.phase for m in sent] == ["begin", *["more"] * (len(sent) - 2), "end"]
    assert [m.number for m in sent] == list(range(len(sent)))
    assert shard.summary().rows == 9000
    assert shard.summary().conversations == 300


def test_an_empty_node_says_so():
    sender, shard = Sender("a", 1, 0, 1), Shard()
    sender.snapshot({}, (), ())
    assert [m.phase for m in drain(sender, shard)] == ["whole"]
    assert shard.summary().epochs == {"a": 1}
    assert sender.next() is None
    sender.probe()
    assert [m.phase for m in drain(sender, shard)] == ["change"]


def test_changes_of_one_block_become_one():
    sender, shard = Sender("a", 1, 0, 1), Shard()
    sender.snapshot({}, (), ())
    drain(sender, shard)
    for number in range(5):
        sender.block(hint(7), holding(number))
    (message,) = drain(sender, shard)
    assert [(r.disk, len(r.keys)) for r in message.runs] == [(4 % 3, 16)]


def test_what_changes_during_a_snapshot_is_said_behind_it():
    sender, shard = Sender("a", 1, 0, 1), Shard()
    sender.snapshot({hint(n): holding(0) for n in range(5000)}, (), ())
    first = sender.next()
    gone = Holding("tenant", LAYOUT, 256, 0, 0)
    for number in range(5000):
        sender.block(hint(number), gone)
    sender.answered(shard.apply(first, 0.0))
    drain(sender, shard)
    assert shard.summary().rows == 0


def test_a_fenced_node_is_silent_and_an_asked_one_begins_anew():
    sender = Sender("a", 1, 0, 1)
    sender.snapshot({}, (), ())
    sender.answered(Answer(number=-1, snapshot=True))
    assert sender.wants_snapshot
    assert sender.next() is None
    sender.snapshot({}, (), ())
    message = sender.next()
    assert message is not None
    assert message.phase == "whole"
    sender.answered(Answer(number=-1, fenced=True))
    sender.probe()
    assert sender.fenced
    assert sender.next() is None


def test_an_announcer_gives_each_shard_its_own():
    announcer = Announcer("a", 1, 4)
    announcer.snapshot({hint(n): holding(0) for n in range(400)}, [record(n) for n in range(40)], ())
    messages = [sender.next() for sender in announcer.senders]
    assert sum(len(r.keys) for m in messages for r in m.runs) == 400 * 16
    assert all(len(r.keys) > 16 for m in messages for r in m.runs)
    assert sorted(r.conversation for m in messages for r in m.records) == sorted(
        record(n).conversation for n in range(40)
    )


def test_changes_that_nobody_takes_are_bounded_and_said_as_a_whole(monkeypatch):
    monkeypatch.setattr(announcer, "_MOST_CHANGES", 100)
    sender, shard = Sender("a", 1, 0, 1), Shard()
    sender.snapshot({}, (), ())
    drain(sender, shard)
    stone = Tombstone("a.1", "tenant", "gone", 0.0, ("a", "b"))
    sender.tombstone(stone)
    for number in range(1000):
        sender.block(hint(number), holding(number))
        sender.record(record(number))
        assert len(sender._changes.blocks) + len(sender._changes.records) <= 101
    assert sender.wants_snapshot and sender.next() is None
    sender.snapshot({hint(n): holding(n) for n in range(950, 1000)}, [record(999)], [stone])
    drain(sender, shard)
    assert (shard.summary().rows, shard.summary().conversations, shard.summary().tombstones) == (50, 1, 1)


def test_a_tombstone_that_comes_while_a_snapshot_is_made_is_said_with_it():
    sender, shard = Sender("a", 1, 0, 1), Shard()
    sender.tombstone(Tombstone("a.1", "tenant", "gone", 0.0, ("a", "b")))
    sender.snapshot({}, (), ())
    drain(sender, shard)
    assert shard.summary().tombstones == 1


def test_a_block_in_more_parts_than_a_message_has_bits_for_is_said_as_far_as_they_go():
    """A shard takes nothing of a message with more, and asks for all of it again for ever."""
    every = tuple((0, f"L0+1.H{n}+1", 8, True, n % 2 == 0) for n in range(MOST_PARTS + 6))
    said = saying.holding(Held(hint(0) * 2, "tenant", 16, every))
    assert len(said.layout.parts) == MOST_PARTS
    assert said.host == (1 << MOST_PARTS) - 1
    announcer, shard = Announcer("a", 1, 1), Shard()
    announcer.snapshot({hint(0): said}, (), ())
    drain(announcer.senders[0], shard)
    assert shard.summary().rows == 1


def test_a_snapshot_in_parts_is_of_what_was_true_last():
    announcer, shard = Announcer("a", 1, 2), [Shard(ShardSettings(n, 2)) for n in range(2)]
    gone = Holding("tenant", LAYOUT, 256, 0, 0)
    first, second = ({hint(n): holding(0) for n in numbers} for numbers in (range(50), range(50, 100)))
    announcer.begin()
    announcer.add(first, [record(1)])
    announcer.block(hint(3), gone)
    announcer.block(hint(60), gone)
    announcer.record(record(2))
    announcer.add(second, [record(3)])
    announcer.block(hint(70), gone)
    assert all(sender.next() is None for sender in announcer.senders)
    announcer.end(())
    for sender, one in zip(announcer.senders, shard, strict=True):
        drain(sender, one)
    # Block 60 was gone when it was said, and was there when its part was made.
    assert sum(one.summary().rows for one in shard) == 98
    assert sum(one.summary().conversations for one in shard) == 3


def test_a_stream_that_has_its_snapshot_takes_no_part_in_the_next():
    announcer, shards = Announcer("a", 1, 2), [Shard(ShardSettings(n, 2)) for n in range(2)]
    announcer.snapshot({hint(n): holding(0) for n in range(20)}, (), ())
    for sender, shard in zip(announcer.senders, shards, strict=True):
        drain(sender, shard)
    announcer.senders[0].wants_snapshot = True
    announcer.snapshot({hint(n): holding(0) for n in range(20)}, (), ())
    assert announcer.senders[0].next() is not None
    assert announcer.senders[1].next() is None
