"""Pages of conversations, and what is left of those whose nodes are gone."""

from kvtier.directory.announcements import Announcement, End, Record
from kvtier.directory.shard import Shard


def say(shard, node, epoch, number, names, *, phase="change", tenant="acme"):
    records = tuple(Record(tenant, name, 1, (End(name.encode(), 16, 1.0),)) for name in names)
    stream = {"node": node, "epoch": epoch, "number": number, "shard": 0, "shards": 1}
    shard.apply(Announcement(**stream, phase=phase, records=records), 0.0)


def pages(shard, tenant, at_most):
    first, found = 0, []
    while first is not None:
        page, first = shard.conversations(tenant, first, at_most)
        found.append([c.name for c in page])
    return found


def test_pages_list_each_once():
    shard = Shard()
    say(shard, "a", 1, 0, [f"chat-{n}" for n in range(300)], phase="whole")
    say(shard, "b", 1, 0, [f"chat-{n}" for n in range(0, 300, 2)], phase="whole")
    say(shard, "b", 1, 1, ["other"], tenant="umbrella")
    listed = pages(shard, "acme", 20)
    assert sorted(n for page in listed for n in page) == sorted(f"chat-{n}" for n in range(300))
    assert max(map(len, listed)) < 30
    assert pages(shard, "umbrella", 20)[0] == ["other"]
    assert sum(map(len, pages(shard, None, 50))) == 301


def test_what_is_added_meanwhile_does_not_repeat_or_lose_the_others():
    shard = Shard()
    say(shard, "a", 1, 0, [f"chat-{n}" for n in range(200)], phase="whole")
    first, number, found = 0, 0, []
    while first is not None:
        page, first = shard.conversations("acme", first, 10)
        found += [c.name for c in page]
        number += 1
        say(shard, "a", 1, number, [f"new-{number}-{n}" for n in range(5)])
    old = [name for name in found if name.startswith("chat")]
    assert sorted(old) == sorted(f"chat-{n}" for n in range(200))


def test_names_of_lost_nodes_leave_the_listing_at_once_and_memory_in_time():
    shard = Shard()
    say(shard, "a", 1, 0, ["one", "two"], phase="whole")
    say(shard, "b", 1, 0, ["two"], phase="whole")
    shard.lost("a", 1)
    assert pages(shard, None, 9) == [["two"]]
    assert shard.conversation("acme", "one") is None
    assert shard.summary().conversations == 2
    for _ in range(5000):
        shard.tidy(0.0)
    assert shard.summary().conversations == 1


def test_names_cannot_be_taken_apart_otherwise():
    shard = Shard()
    say(shard, "a", 1, 0, ["b2:x"], phase="whole", tenant="a")
    assert shard.conversation("a", "b2:x") is not None
    assert shard.conversation("ab", "2:x") is None
