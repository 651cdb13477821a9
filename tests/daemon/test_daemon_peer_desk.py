"""What a node's service asks of others: nothing that waits for one of them holds up the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from kvtier.config.load import load
from kvtier.config.schema import Config
from kvtier.daemon.peer_desk import PeerDesk
from kvtier.daemon.peer_directory import PeerDirectory
from kvtier.directory.announcer import Announcer
from kvtier.directory.routing import shards_of
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.host.tier import HostTier
from kvtier.messages import cluster as cluster_messages
from kvtier.messages.calls import Forget, Message
from kvtier.messages.cluster import (
    DIRECTORY,
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
from kvtier.node import announcing
from kvtier.node.announcing import Announcing
from kvtier.node.events import Send
from kvtier.peers.fetch import Came, Wanted
from kvtier.peers.lending import Read
from kvtier.testing.node_bench import until
from kvtier.testing.node_cluster import cluster_settings
from kvtier.testing.rig_cluster import RigCluster


def config_of(folder: Path, **more: str) -> Config:
    """A node's that is alone in its cluster."""
    own = cluster_settings(folder, ("a",))["a"]
    return load(None, {**own, "node.state_dir": str(folder / "state"), **more})


def test_plans_do_not_wait_for_forgettings_that_a_hanging_node_holds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    told: list[Message] = []
    hangs = threading.Event()
    monkeypatch.setattr(PeerDirectory, "nodes", lambda self: {"b": True})
    monkeypatch.setattr(PeerDirectory, "conversation", lambda self, *name: [])
    monkeypatch.setattr(PeerDesk, "_erase_at", lambda self, node, stone: hangs.wait(20))
    desk = PeerDesk(
        config, 1, cast(HostTier, None), lambda peer, message: told.append(message), _nobody_looks
    )

    def kinds(kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in list(told))

    try:
        for number in range(20):
            stone = Stone(f"a.{number}", "acme", f"chat-{number}", 1.0)
            desk.carry_out(Send(DIRECTORY, Bury(job=stone.id, stone=stone)))
        desk.carry_out(Send(DIRECTORY, FindBranches(job="e1", tenant="acme", conversation="chat")))
        until(lambda: kinds(Branches), "a plan's question is answered")
        assert not kinds(Buried)
        hangs.set()
        until(lambda: kinds(Buried) == 20, "all are forgotten")
    finally:
        hangs.set()
        desk.close()


def _nobody_looks(look: Any) -> None:
    """There is no core."""


def test_nodes_that_are_away_are_not_asked_to_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    told: list[Message] = []
    asked: list[str] = []
    monkeypatch.setattr(PeerDirectory, "nodes", lambda self: {"b": True, "gone": False})
    monkeypatch.setattr(PeerDesk, "_erase_at", lambda self, node, stone: asked.append(node) or True)
    desk = PeerDesk(
        config, 1, cast(HostTier, None), lambda peer, message: told.append(message), _nobody_looks
    )
    try:
        stone = Stone("a.1", "acme", "chat", 1.0)
        desk.carry_out(Send(DIRECTORY, Bury(job=stone.id, stone=stone)))
        until(lambda: told, "it is forgotten")
    finally:
        desk.close()
    assert asked == ["b"]
    assert told == [Buried(job="a.1", done=("b",), absent=("gone",))]


def test_what_a_node_has_erased_is_waited_for_at_all_nodes_that_it_knows_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever forgot may have started just now, and know of fewer."""
    config = config_of(tmp_path)
    said: list[Stone] = []
    monkeypatch.setattr(PeerDirectory, "named", lambda self: ["b", "gone"])
    monkeypatch.setattr(PeerDirectory, "say_buried", lambda self, stone: said.append(stone))
    desk = PeerDesk(config, 1, cast(HostTier, None), lambda peer, message: None, _nobody_looks)
    try:
        stone = Stone("b.1", "acme", "chat", 1.0, ("a", "b"))
        desk.carry_out(Send(DIRECTORY, cluster_messages.Erased(stone=stone)))
        until(lambda: said, "the directory hears of it")
    finally:
        desk.close()
    assert [one.nodes for one in said] == [("a", "b", "gone")]


def test_every_wish_of_the_core_has_somebody_who_carries_it_out(tmp_path: Path) -> None:
    """A wish that nobody carries out would never be answered."""
    config = config_of(tmp_path)
    desk = PeerDesk(config, 1, cast(HostTier, None), lambda peer, message: None, _nobody_looks)
    try:
        wishes = {
            cluster_messages.FindBranches,
            cluster_messages.FindHolders,
            cluster_messages.FindConversations,
            cluster_messages.FindNodes,
            cluster_messages.AskHolder,
            cluster_messages.AskKeep,
            cluster_messages.PeerRead,
            cluster_messages.Bury,
            cluster_messages.Erased,
        }
        assert desk._works.keys() == wishes
    finally:
        desk.close()


class _Fetched:
    """A client that has received something; `wanted` is what it was asked for."""

    way = "ray"

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []

    def fetch(self, wanted: list[Wanted], timeout_s: float, came: Came, late: list[Read]) -> list[str]:
        self.wanted = wanted
        came.bytes, came.coded_bytes, came.wire_bytes = 150, 100, 120
        return ["", "corrupt"]

    def close(self) -> None:
        """Nothing is open."""


def test_a_read_says_how_its_bytes_travelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    told: list[Message] = []
    fetched = _Fetched()
    monkeypatch.setattr(PeerDesk, "_client", lambda self, node, epoch: fetched)
    monkeypatch.setattr(PeerDesk, "_room", lambda self, item: np.zeros(item.nbytes, np.uint8))
    desk = PeerDesk(
        config, 1, cast(HostTier, None), lambda peer, message: told.append(message), _nobody_looks
    )
    slots = [WireItem(0, 0, 4, 0, number, 1, 0, 0, 100, 7) for number in range(2)]
    read = PeerRead(
        job="r1",
        node="b",
        epoch=1,
        object_keys=[(bytes(32), 0, "s"), (bytes(32), 1, "s")],
        slots=slots,
        timeout_s=5.0,
        item_bytes=(2, 1),
    )
    try:
        desk.carry_out(Send(PEERS, read))
        until(lambda: told, "it is read")
    finally:
        desk.close()
    assert [(each.item_bytes, each.checksum) for each in fetched.wanted] == [(2, 7), (1, 7)]
    done = cast(PeerReadDone, told[0])
    assert (done.failed, done.bytes) == (((1, "corrupt"),), 100)
    assert (done.received_bytes, done.coded_bytes, done.wire_bytes) == (150, 100, 120)
    assert (done.node, done.way) == ("b", "ray")


@pytest.mark.parametrize(("setting", "some"), [("auto", True), ("raw", False)])
def test_a_node_that_shall_not_encode_offers_nothing(tmp_path: Path, setting: str, some: bool) -> None:
    pytest.importorskip("zstandard")
    config = config_of(tmp_path, **{"cluster.wire_codec": setting})
    desk = PeerDesk(config, 1, cast(HostTier, None), lambda peer, message: None, _nobody_looks)
    desk.close()
    assert ("planes-zstd" in desk._codecs) is some


# --- everything that a node has, in steps -------------------------------------------------------------------

MOST = 4


class Stepped:
    """A core whose desk says everything, and what happens to the core behind each step."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(announcing, "_MOST_AT_ONCE", MOST)
        config = config_of(folder)
        self.cluster = RigCluster("a", disk=None)
        self.rig = self.cluster.rigs["a"]
        for number in range(6):
            self.park(number)
        self.desk = PeerDesk(config, 1, cast(HostTier, None), lambda peer, message: None, self.look)
        self.cluster.at_directory = self.said  # type: ignore[method-assign]
        self.steps: list[int] = []
        self.between: list[Callable[[], object]] = []

    def park(self, number: int) -> None:
        first = 100 * number
        self.rig.park(self.rig.attach(), f"chat-{number}", range(first, first + 20))
        self.rig.run()

    def tell(self) -> None:
        """All that changed so far."""
        state = self.rig.core.state
        while state.changed_blocks or state.changed_names:
            self.rig.tick()

    def said(self, rig: Any, message: Message) -> None:
        """What the core tells the directory."""
        if isinstance(message, cluster_messages.Holdings):
            self.desk.carry_out(Send(DIRECTORY, message))

    def look(self, step: Callable[[Any], None]) -> None:
        """One step of the loop's thread; then something else has its turn."""
        described, seen = Announcing._held, []

        def seen_held(announcing: Announcing, key: bytes) -> Any:
            seen.append(key)
            return described(announcing, key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Announcing, "_held", seen_held)
            step(self.rig.core)
        self.steps.append(len(seen))
        if self.between:
            self.between.pop(0)()

    def known(self) -> tuple[set[bytes], set[str]]:
        """What the directory knows of the node, once it was told: keys and names."""
        announcer = self.desk._directory._announcer
        shards = [Shard(ShardSettings(n, len(announcer.senders))) for n in range(len(announcer.senders))]
        for sender, shard in zip(announcer.senders, shards, strict=True):
            while (message := sender.next()) is not None:
                sender.answered(shard.apply(message, 0.0))
                assert not sender.wants_snapshot
        every = {block.key for block in self.rig.core.state.tree} | set(self.gone)
        keys = {
            key for key in every if any(shard.find("acme", key[:16]).of for shard in shards if of(key, shard))
        }
        pages = [shard.conversations_after("acme", None, 100) for shard in shards]
        return keys, {one.name for page in pages for one in page}

    def run(self) -> None:
        """Say everything, while a conversation is forgotten, and another one is parked."""
        first = next(iter(self.rig.core.state.conversations))
        self.gone = [block.key for block in self.rig.core.state.tree if first in block.names]

        def forget() -> None:
            self.rig.ask(Forget(conversation=first[1], tenant="acme"))
            self.tell()

        def late() -> None:
            self.park(6)
            self.tell()

        self.between = [lambda: None, forget, late]
        self.desk._say_everything()
        self.tell()


def of(key: bytes, shard: Shard) -> bool:
    """Whether a block is that shard's."""
    return int(shards_of(key[:16], shard.settings.count)[0]) == shard.settings.index


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stepped]:
    made = Stepped(tmp_path, monkeypatch)
    yield made
    made.desk.close()


def test_everything_is_said_in_bounded_steps_and_what_changes_meanwhile_counts(stepped: Stepped) -> None:
    stepped.run()
    assert len(stepped.steps) > 6
    assert max(stepped.steps) <= MOST
    keys, names = stepped.known()
    assert keys == {block.key for block in stepped.rig.core.state.tree}
    assert names == {name for _, name in stepped.rig.core.state.conversations}
    assert "chat-6" in names and len(names) == 6


def test_and_without_minding_what_changes_it_would_be_lost(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Announcer.begin

    def begun_and_deaf(self: Announcer) -> None:
        begin(self)
        parts, self._parts = self._parts, {}
        end = self.end

        def end_with_all(tombstones: Any) -> None:
            self._parts = parts
            end(tombstones)

        add = self.add

        def add_to_all(blocks: Any, records: Any) -> None:
            self._parts = parts
            add(blocks, records)
            self._parts = {}

        monkeypatch.setattr(self, "end", end_with_all)
        monkeypatch.setattr(self, "add", add_to_all)

    monkeypatch.setattr(Announcer, "begin", begun_and_deaf)
    stepped.run()
    keys, _ = stepped.known()
    assert keys != {block.key for block in stepped.rig.core.state.tree}


def closed_amid_a_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> str:
    """A question of the directory goes on once the desk has begun to close: what is logged."""
    config = config_of(folder)
    asked, cut = threading.Event(), threading.Event()
    nodes_there, end = PeerDirectory.nodes_there, PeerDirectory.cut

    def slowly(self: PeerDirectory, message: FindNodes) -> Any:
        asked.set()
        cut.wait(20)
        return nodes_there(self, message)

    def then_on(self: PeerDirectory) -> None:
        end(self)
        cut.set()

    monkeypatch.setattr(PeerDirectory, "nodes_there", slowly)
    monkeypatch.setattr(PeerDirectory, "cut", then_on)
    desk = PeerDesk(config, 1, cast(HostTier, None), lambda peer, message: None, _nobody_looks)
    desk.carry_out(Send(DIRECTORY, FindNodes(job="e1")))
    assert asked.wait(20)
    desk.close()
    return log.text


def test_a_question_amid_which_the_node_ends_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "was not carried out" not in closed_amid_a_question(tmp_path, monkeypatch, caplog)


def test_and_would_be_if_the_directory_ended_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end = PeerDirectory.cut

    def hasty(self: PeerDirectory) -> None:
        end(self)
        self._pool.shutdown()

    monkeypatch.setattr(PeerDirectory, "cut", hasty)
    assert "FindNodes was not carried out" in closed_amid_a_question(tmp_path, monkeypatch, caplog)


def test_who_announces_does_not_wait_until_everything_is_said(stepped: Stepped) -> None:
    """Its other shards of the directory would take the node for lost."""
    loop_goes_on, asked = threading.Event(), threading.Event()
    look = stepped.desk._look

    def stands_still(step: Callable[[Any], None]) -> None:
        asked.set()
        loop_goes_on.wait(20)
        look(step)

    stepped.desk._look = stands_still
    stepped.desk._directory._want_snapshot()
    until(asked.is_set, "the first step is asked for")
    assert stepped.desk._directory._being_made
    loop_goes_on.set()
    until(lambda: not stepped.desk._directory._being_made, "all is said")


def test_a_desk_without_a_thread_for_everything_says_so_and_ends(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            stepped.desk._begin_to_say_everything()
    stepped.desk._begin_to_say_everything()
    until(lambda: bool(stepped.steps), "a later one begins")
