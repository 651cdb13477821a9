"""The directory's service, and what a node keeps of it on its drive."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.config.load import Config, load
from kvtier.daemon import peer_directory
from kvtier.daemon.directory_service import DirectoryService, directory_name, shards_at, split
from kvtier.daemon.peer_directory import PeerDirectory
from kvtier.daemon.peer_graves import PeerGraves
from kvtier.directory import calls
from kvtier.directory.announcements import Announcement
from kvtier.errors import AuthError, ConfigError, KvtierError
from kvtier.messages.cluster import (
    FindConversations,
    Holdings,
    Load,
    Speed,
    Stone,
)
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.handshake import Identity
from kvtier.peers.stream import StreamLost
from kvtier.testing.directory_node import TOKEN, Say
from kvtier.testing.node_bench import until
from kvtier.testing.node_cluster import cluster_settings


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(None, {**cluster_settings(tmp_path, ("a",))["a"], "cluster.lost_after_s": 1.0})


@pytest.fixture
def service(config: Config) -> Iterator[DirectoryService]:
    made = DirectoryService(config)
    made.start()
    yield made
    made.stop(5.0)


@pytest.fixture
def nodes(config: Config) -> Iterator[list[Say]]:
    made = [Say(config, "a"), Say(config, "b")]
    yield made
    for node in made:
        node.directory.close()


def test_what_one_says_the_other_finds(service: DirectoryService, nodes: list[Say]) -> None:
    a, b = nodes
    for number in range(40):
        a.names(f"chat-{number:02}")
    until(lambda: all(b.ends(f"chat-{number:02}") for number in range(40)), "all are known")
    until(lambda: "heard" in a.told and "heard" in b.told, "every shard has answered")
    page = b.directory.known(FindConversations(job="", tenant="acme", after=("acme", "chat-30"), limit=5))
    assert [one.conversation for one in page.conversations] == [f"chat-{n}" for n in range(31, 36)]
    assert page.conversations[0].held == (("a", 10),)
    assert b.directory.nodes() == {"a": True}
    assert service.health()["nodes"] == 2


def test_what_a_node_says_of_its_load_comes_with_the_answers(
    service: DirectoryService, nodes: list[Say]
) -> None:
    a, b = nodes
    question = FindConversations(job="", tenant="acme", conversation="chat")
    said = [Load(Speed(0.001, 1e9), Speed(0.01, 1e8), Speed(0.002, 5e8), wait_s) for wait_s in (0.5, 2.0)]
    a.directory.say(Holdings(load=said[0]))
    a.names("chat")
    until(lambda: b.directory.known(question).loads == {"a": said[0]}, "b knows a's load")
    # With nothing else to say, it goes with the next probe.
    a.directory.say(Holdings(load=said[1]))
    until(lambda: b.directory.known(question).loads == {"a": said[1]}, "b knows a's new load")


def test_silence_is_a_loss_and_the_next_word_a_return(
    service: DirectoryService, config: Config, nodes: list[Say], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = nodes
    a.names("chat")
    until(lambda: b.ends("chat"), "it is known")
    a.directory.close()
    until(lambda: not b.ends("chat"), "the silent node's word counts no more")
    assert b.directory.nodes() == {"a": False}
    later = Say(config, "a", epoch=2)
    later.names("chat")
    until(lambda: b.ends("chat"), "it is back")
    later.directory.close()


def test_a_service_that_starts_again_is_told_everything(config: Config, nodes: list[Say]) -> None:
    a, b = nodes
    first = DirectoryService(config)
    first.start()
    a.names("chat")
    until(lambda: b.ends("chat"), "it is known")
    first.stop(5.0)
    assert b.ends("chat") == 0
    second = DirectoryService(config)
    second.start()
    try:
        until(lambda: b.ends("chat"), "it is known again")
    finally:
        second.stop(5.0)


def test_tombstones_reach_a_node_that_was_away(
    service: DirectoryService, config: Config, nodes: list[Say]
) -> None:
    a, b = nodes
    b.names("chat")
    until(lambda: a.ends("chat"), "it is known")
    b.directory.close()
    stone = Stone("a.1", "acme", "chat", 1e12, ("a", "b"))
    a.stones.append(stone)
    a.directory.say_buried(stone)
    until(lambda: not a.ends("chat"), "it is gone")
    returned = Say(config, "b", epoch=2)
    returned.names("chat")
    until(lambda: stone in returned.told, "it is told to forget")
    assert returned.told.index(stone) < len(returned.told)
    assert not a.ends("chat")
    returned.directory.say_buried(stone)
    until(lambda: ("a.1",) in a.told, "nobody waits for it any more")
    returned.directory.close()


@pytest.fixture
def raw(service: DirectoryService, config: Config) -> Iterator[PeerClient]:
    address = config.cluster.directory_listen
    made = PeerClient(
        Identity("a", 1, TOKEN), directory_name(address), split(address), ClientSettings(streams=1)
    )
    yield made
    made.close()


def test_what_makes_no_sense_is_refused_and_the_connection_lives(raw: PeerClient) -> None:
    announcement = Announcement(node="b", epoch=1, number=0, shard=0, shards=4, phase="whole")
    for body, why in (
        (b"\x00nonsense", "not a call"),
        (calls.pack(calls.Tell(announcement, "")), "speaks for 'b'"),
        (calls.pack(calls.GetConversation(99, "acme", "chat")), "settings differ"),
        (calls.pack(calls.Find("acme", [(0, b"half a hint")])), "hints"),
    ):
        with pytest.raises(KvtierError, match=why):
            raw.ask(body, 5.0)
    assert calls.unpack_answer(raw.ask(calls.pack(calls.GetNodes()), 5.0), calls.Nodes).nodes == []


def test_a_stranger_is_not_let_in(service: DirectoryService, config: Config) -> None:
    address = config.cluster.directory_listen
    stranger = PeerClient(
        Identity("a", 1, b"another token than theirs"),
        directory_name(address),
        split(address),
        ClientSettings(),
    )
    with pytest.raises(AuthError):
        stranger.ask(calls.pack(calls.GetNodes()), 5.0)


def test_a_directory_that_is_away_is_not_asked_at_once_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def lost(self: PeerClient, body: bytes, timeout_s: float) -> bytes:
        asked.append(body)
        raise StreamLost("nobody there")

    monkeypatch.setattr(PeerClient, "ask", lost)
    node = Say(config, "a")
    try:
        node.directory._services[0].down_until_s = 0.0
        for _ in range(5):
            assert node.ends("chat") == 0
        finds = [body for body in asked if isinstance(calls.unpack_call(body), calls.GetConversation)]
        assert len(finds) == 1
    finally:
        node.directory.close()
    assert peer_directory._PAUSE_S > 0


def test_shards_go_round_and_none_is_left_out() -> None:
    directory = ("x:1", "y:2", "z:3")
    every = [index for address in directory for index in shards_at(directory, address, 16)]
    assert sorted(every) == list(range(16))


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
        ("cluster.listen", "nowhere", "cluster.listen"),
        ("cluster.directory_listen", "127.0.0.1:1", "cluster.directory_listen"),
        ("cluster.directory", "", "cluster.directory"),
        ("cluster.token_file", "", "cluster.token_file"),
        ("access.tenant_secret_file", "", "access.tenant_secret_file"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, setting: str, value: str, field: str) -> None:
    settings = cluster_settings(tmp_path, ("a", "b"))["b"]
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        load(None, {**settings, setting: value})


# --- tombstones on the drive --------------------------------------------------------------------------------


def test_tombstones_outlive_the_node_and_a_torn_end(tmp_path: Path) -> None:
    graves = PeerGraves(tmp_path)
    stones = [Stone(f"a.{number}", "acme", f"chat-{number}", 1.0, ("a", "b")) for number in range(3)]
    assert all(graves.add(stone) for stone in stones)
    assert graves.add(stones[0])
    graves.over(["a.1", "unknown"])
    graves.close()
    path = tmp_path / "tombstones"
    with path.open("ab") as file:
        file.write(path.read_bytes()[:10])
    again = PeerGraves(tmp_path)
    assert again.stones() == (stones[0], stones[2])
    assert again.add(stones[1])
    again.close()
    last = PeerGraves(tmp_path)
    assert set(last.stones()) == set(stones)
    last.close()


@pytest.mark.parametrize("damage", [b"\x00" * 64, b"\xc1" * 8, b"\x91\x01", b"\x95\xff"])
def test_a_damaged_end_costs_what_follows_it_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    graves = PeerGraves(tmp_path)
    stone = Stone("a.1", "acme", "chat", 1.0)
    assert graves.add(stone)
    graves.close()
    with (tmp_path / "tombstones").open("ab") as file:
        file.write(damage)
    again = PeerGraves(tmp_path)
    assert again.stones() == (stone,)
    again.close()
    assert ("is damaged" in caplog.text) == (damage != b"\x95\xff")


def test_a_drive_that_is_full_is_said_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graves = PeerGraves(tmp_path)
    stone = Stone("a.1", "acme", "chat", 1.0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert not graves.add(stone)
    assert graves.stones() == ()
    assert graves.add(stone)
    graves.close()
    again = PeerGraves(tmp_path)
    assert again.stones() == (stone,)
    again.close()


# --- faults -------------------------------------------------------------------------------------------------


def fail_once(monkeypatch: pytest.MonkeyPatch) -> list[ValueError]:
    """The next time that anything is told to a service, its thread fails; the faults that are to come."""
    tell_all, faults = PeerDirectory._tell_all, [ValueError("a fault of ours")]

    def failing(self: PeerDirectory, service: Any) -> bool:
        if faults:
            raise faults.pop()
        return tell_all(self, service)

    monkeypatch.setattr(PeerDirectory, "_tell_all", failing)
    return faults


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_while_announcing_is_seen_and_the_next_thread_goes_on(
    config: Config,
    service: DirectoryService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_once(monkeypatch)
    monkeypatch.setattr(peer_directory, "_PAUSE_S", 0.01)
    node = Say(config, "a")
    try:
        node.names("chat")
        until(lambda: node.ends("chat"), "what it says arrives all the same")
    finally:
        node.directory.close()
    assert "a fault of ours" in caplog.text


def test_a_snapshot_that_takes_long_is_made_once(config: Config, service: DirectoryService) -> None:
    node = Say(config, "a")
    directory, made = node.directory, []
    try:
        until(lambda: "heard" in node.told, "all shards have one")
        directory._snapshot = lambda: made.append("asked")  # type: ignore[method-assign]
        for _ in range(5):
            directory._want_snapshot()
        assert made == ["asked"]
        directory.begin_everything()
        directory.end_everything(())
        directory._want_snapshot()
        assert made == ["asked", "asked"]
    finally:
        directory.close()


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_everything_is_told_once_a_thread_can_be_started_for_it(
    config: Config,
    service: DirectoryService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(peer_directory, "_MOST_SILENT_S", 0.01)
    snapshot = Say._snapshot
    refused: list[bool] = []

    def refused_once(self: Say) -> None:
        if not refused:
            refused.append(True)
            no_thread(threading.current_thread())
        snapshot(self)

    monkeypatch.setattr(Say, "_snapshot", refused_once)
    node = Say(config, "a")
    try:
        until(lambda: "heard" in node.told, "all shards have one")
    finally:
        node.directory.close()
    assert "can't start new thread" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_announces_goes_on_after_a_fault_once_a_thread_can_be_started(
    config: Config, service: DirectoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_directory, "_PAUSE_S", 0.01)
    faults, begin, refused = fail_once(monkeypatch), PeerDirectory._begin, threading.Event()

    def refused_once(self: PeerDirectory, service: Any) -> None:
        if not faults and not refused.is_set():
            refused.set()
            no_thread(threading.current_thread())
        begin(self, service)

    monkeypatch.setattr(PeerDirectory, "_begin", refused_once)
    node = Say(config, "a")
    try:
        node.names("chat")
        until(lambda: node.ends("chat"), "what it says arrives all the same")
    finally:
        node.directory.close()
    assert refused.is_set()


def test_names_of_tombstones_that_are_over_stay(tmp_path: Path) -> None:
    graves = PeerGraves(tmp_path)
    stones = [Stone(f"a.{n}", "acme", "chat", 1.0, ("a", "b")) for n in range(3)]
    assert all(graves.add(stone) for stone in stones)
    graves.over(["a.1", "a.0"])
    bare = Stone("a.2", "acme", "chat", 1.0)
    assert graves.of(bare) == stones[2]
    graves.close()
    for _ in range(2):
        again = PeerGraves(tmp_path)
        assert (again.past(), again.stones()) == (("a.1", "a.0"), (stones[2],))
        again.close()
