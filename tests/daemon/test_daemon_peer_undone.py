"""What no thread can carry out, for want of threads or at the end: the core is answered all the same."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kvtier.config.load import load
from kvtier.daemon import peer_lender
from kvtier.daemon.peer_desk import PeerDesk
from kvtier.daemon.peer_directory import PeerDirectory
from kvtier.errors import ProtocolError
from kvtier.host.tier import HostTier
from kvtier.messages import cluster as cluster_messages
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Message
from kvtier.messages.cluster import (
    DIRECTORY,
    KEEP_MOST_S,
    PEERS,
    Branches,
    Buried,
    Bury,
    FindBranches,
    FindNodes,
    PeerRead,
    PeerReadDone,
    Stone,
)
from kvtier.messages.tiers import WireItem
from kvtier.node.events import Send
from kvtier.testing.node_bench import until
from kvtier.testing.node_cluster import cluster_settings
from kvtier.testing.rig_uses import PLAIN

STONE = Stone("a.1", "acme", "chat", 1.0)
READ = PeerRead(
    job="r1",
    node="b",
    epoch=1,
    object_keys=[(bytes(32), 0, "s")],
    slots=[WireItem(0, 0, 4, 0, 0, 1, 0, 0, 100, 7)],
    timeout_s=5.0,
    item_bytes=(2,),
)
KEEP = cluster_messages.Keep(
    owner="a", epoch=1, tenant="acme", conversation="chat", tokens=1, roots=[], metas=[], timeout_s=5.0
)
UNDONE: list[tuple[str, Message, Message]] = [
    (DIRECTORY, FindBranches(job="j", tenant="acme", conversation="chat"), Branches(job="j")),
    (
        DIRECTORY,
        cluster_messages.FindHolders(job="j", tenant="acme", chains=[], geometry=PLAIN, shard="s"),
        cluster_messages.Holders(job="j"),
    ),
    (
        DIRECTORY,
        cluster_messages.FindConversations(job="j", tenant="acme"),
        cluster_messages.Known(job="j"),
    ),
    (DIRECTORY, FindNodes(job="j"), cluster_messages.NodesThere(job="j")),
    (DIRECTORY, Bury(job="j", stone=STONE), Buried(job="j", kept=False)),
    (
        PEERS,
        cluster_messages.AskHolder(job="j", node="b", epoch=1, keys=b"", shard="s"),
        cluster_messages.TheseAre(job="j"),
    ),
    (
        PEERS,
        cluster_messages.AskKeep(job="j", node="b", epoch=1, keep=KEEP),
        cluster_messages.Kept(job="j", reason="busy"),
    ),
    (PEERS, READ, PeerReadDone(job="r1", failed=((0, "peer_lost"),))),
]


class Undone:
    """A desk that gets no thread for its work before `relieve`, and what the core is told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[str, Message]] = []
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("kvtier-"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        self.relieve: Callable[[], None] = lambda: monkeypatch.setattr(threading.Thread, "start", start)
        self.desk = PeerDesk(
            load(None, {**cluster_settings(folder, ("a",))["a"], "node.state_dir": str(folder / "state")}),
            1,
            cast(HostTier, None),
            lambda peer, message: self.told.append((peer, message)),
            lambda look: None,
        )


@pytest.fixture
def undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Undone]:
    made = Undone(tmp_path, monkeypatch)
    yield made
    made.desk.close()


def test_what_no_thread_can_carry_out_is_answered_as_failed(undone: Undone) -> None:
    for peer, message, _ in UNDONE:
        undone.desk.carry_out(Send(peer, message))
    assert undone.told == [(peer, answer) for peer, _, answer in UNDONE]
    wishes = {type(message) for _, message, _ in UNDONE}
    assert wishes | {cluster_messages.Erased} == undone.desk._works.keys()


def test_and_is_not_carried_out_later(undone: Undone) -> None:
    """The slots of a read that failed are somebody else's by then; its message may be in a queue still."""
    done: list[Message] = []
    pool, _ = undone.desk._works[PeerRead]
    undone.desk._works[PeerRead] = (pool, done.append)
    undone.desk.carry_out(Send(PEERS, READ))
    undone.relieve()
    later = msgspec.structs.replace(READ, job="r2")
    undone.desk.carry_out(Send(PEERS, later))
    until(lambda: later in done, "a later one is carried out")
    assert done == [later]


def test_an_erasure_that_nobody_could_tell_of_is_told_again(undone: Undone) -> None:
    undone.desk._forget(STONE)
    undone.desk._forget(STONE)
    assert len(undone.told) == 1
    undone.desk.carry_out(Send(DIRECTORY, cluster_messages.Erased(stone=STONE)))
    undone.desk._forget(STONE)
    assert undone.told == [(DIRECTORY, cluster_messages.Erase(stone=STONE))] * 2


def test_after_its_end_a_desk_answers_as_failed_too(undone: Undone) -> None:
    undone.relieve()
    undone.desk.close()
    for peer, message, _ in UNDONE:
        undone.desk.carry_out(Send(peer, message))
    assert undone.told == [(peer, answer) for peer, _, answer in UNDONE]


def test_work_that_goes_wrong_is_answered_as_failed_but_for_a_read_that_was_begun(
    undone: Undone, caplog: pytest.LogCaptureFixture
) -> None:
    undone.relieve()

    def no_thread(message: Message) -> None:
        raise RuntimeError("can't start new thread")

    for kind in (PeerRead, FindNodes):
        pool, _ = undone.desk._works[kind]
        undone.desk._works[kind] = (pool, no_thread)
    undone.desk.carry_out(Send(PEERS, READ))
    until(lambda: "PeerRead was not carried out" in caplog.text, "it is seen")
    assert not undone.told, "nobody knows what it writes into its slots yet"
    undone.desk.carry_out(Send(DIRECTORY, FindNodes(job="j")))
    until(lambda: undone.told, "it is answered")
    assert undone.told == [(DIRECTORY, cluster_messages.NodesThere(job="j"))]
    assert "FindNodes was not carried out" in caplog.text


def test_what_the_core_cannot_use_is_said_once_and_ends_nothing(
    undone: Undone, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer to a mistake of those who are not waiting for one."""
    for peer in (PEERS, DIRECTORY, PEERS):
        undone.desk.carry_out(Send(peer, Failed(error="MalformedMessage", message="x" * 10_000)))
    assert undone.told == []
    (record,) = [one for one in caplog.records if "of no use" in one.message]
    assert len(record.getMessage()) < 500


@pytest.mark.parametrize("timeout_s", [math.inf, -math.inf, math.nan])
def test_a_keep_for_no_time_that_a_clock_has_is_refused_unasked(undone: Undone, timeout_s: float) -> None:
    keep = msgspec.structs.replace(KEEP, timeout_s=timeout_s)
    with pytest.raises(ProtocolError):
        undone.desk._lender.answer(protocol.encode(keep), KEEP.owner)
    assert undone.told == []


def test_nobody_waits_for_longer_than_a_keep_may_take() -> None:
    for timeout_s, longest_s in ((1e300, KEEP_MOST_S + 1), (-5.0, 1.0), (2.0, 3.0)):
        assert peer_lender._longest_s(msgspec.structs.replace(KEEP, timeout_s=timeout_s)) == longest_s


@pytest.mark.parametrize(
    "said",
    [
        "",
        "nowhere",
        "host:",
        "host:seven",
        "host:65536",
        f"host:{'9' * 5000}",
        ":7200",
        "a\0b:1",
        f"{'x' * 64}:1",
        "a..b:1",
        "h\u00f6st:1",
    ],
)
def test_a_node_that_says_no_address_is_away(
    undone: Undone, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(PeerDirectory, "address_of", lambda self, node: said)
    monkeypatch.setattr(PeerDirectory, "nodes", lambda self: {"b": True})
    assert undone.desk._client("b", 0) is None


@pytest.mark.parametrize("said", ["10.0.0.2:7200", "[::1]:7200", "node-7.rack.:1"])
def test_and_one_that_does_can_be_called(undone: Undone, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(PeerDirectory, "address_of", lambda self, node: said)
    assert undone.desk._client("b", 0) is not None
