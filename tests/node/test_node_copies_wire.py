"""Messages that grew: older nodes ignore what they do not know, and what they do not say has a default."""

from __future__ import annotations

import msgspec

from kvtier.directory import calls
from kvtier.messages import cluster as c
from kvtier.messages.calls import ParkDone
from kvtier.messages.protocol import LENGTH, decode, encode
from kvtier.node.events import Received
from kvtier.receipts import LEVELS, ParkReceipt, copies_level
from kvtier.testing.rig_cluster import RigCluster


class OldLoad(msgspec.Struct, frozen=True, array_like=True):
    """As nodes said it that knew of no copies."""

    host: c.Speed
    disk: c.Speed
    peer: c.Speed
    wait_s: float = 0.0
    accepts: bool = True


class OldNode(msgspec.Struct, frozen=True):
    """As a directory said it then."""

    node: str
    epoch: int
    address: str
    here: bool


SPEED = c.Speed(0.001, 1e9)


def test_loads_travel_both_ways() -> None:
    new = c.Load(SPEED, SPEED, SPEED, 0.5, True, 1 << 30, "rack 1", 1 << 20)
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=OldLoad)
    assert (old.wait_s, old.accepts) == (0.5, True)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=c.Load)
    assert (back.wait_s, back.room_bytes, back.domain, back.takes_bytes) == (0.5, 0, "", 0)


def test_nodes_travel_both_ways() -> None:
    load = c.Load(SPEED, SPEED, SPEED)
    new = calls.pack(calls.Nodes([calls.Node("a", 1, "a:1", True, load)]))
    assert msgspec.msgpack.decode(new)["nodes"][0]["here"]
    old = msgspec.msgpack.encode({"nodes": [OldNode("a", 1, "a:1", True)]})
    assert calls.unpack_answer(old, calls.Nodes).nodes == [calls.Node("a", 1, "a:1", True)]


def test_reads_graves_and_drains_of_older_nodes() -> None:
    for message in (
        c.PeerRead(job="x1", node="a", epoch=1, object_keys=[], slots=[], timeout_s=1.0),
        c.PeerReadDone(job="x1"),
        c.Graves(stones=()),
        c.Drain(),
    ):
        fields = msgspec.to_builtins(message)
        assert not fields.keys() & {"behind", "item_bytes", "past", "within_s"}
        assert decode(encode(message)[LENGTH.size :]) == message


def test_a_receipt_with_copies_and_one_without_travel() -> None:
    for copies in ({}, {"b": "host", "d": "disk"}):
        receipt = ParkReceipt("chat", "acme", "copies=3", "copies=3", True, copies=copies)
        message = ParkDone(request=1, receipt=receipt)
        assert decode(encode(message)[LENGTH.size :]) == message
        assert receipt.ok


def test_levels_are_in_order() -> None:
    assert [copies_level(nodes) for nodes in range(1, 7)] == ["host", *LEVELS[3:], "copies=4", "copies=4"]
    short = ParkReceipt("chat", "acme", "disk", "copies=2", True)
    assert not short.ok
    assert ParkReceipt("chat", "acme", "copies=2", "copies=2", True).ok
    assert not ParkReceipt("chat", "acme", "copies=2", "copies=3", True).ok


class OldKept(msgspec.Struct, tag="kept"):
    job: str = ""
    tier: str = ""


def test_an_answer_with_its_nodes_epoch_and_one_without_travel() -> None:
    said = encode(c.Kept(job="k1", tier="host", epoch=7))[LENGTH.size :]
    assert msgspec.msgpack.decode(said, type=OldKept).tier == "host"
    heard = decode(msgspec.msgpack.encode(OldKept("k1", "host")))
    assert isinstance(heard, c.Kept) and heard.epoch == 0


def test_a_node_that_does_not_say_its_epoch_is_counted_like_before() -> None:
    cluster = RigCluster("a", "b", "d")
    cluster.announce()
    a = cluster.rigs["a"]
    park = a.park(a.attach(), "chat", range(10), level="copies=3")
    a.run_copies()
    for job in list(a.core.cluster.replicas._asked):
        a.tell(Received(c.PEERS, c.Kept(job=job, tier="host")))
    assert park.receipt.level == "copies=3"
