"""Who there is outlives the directory's memory: what was forgotten meanwhile is told to all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.config.load import load
from kvtier.daemon import peer_book
from kvtier.daemon.directory_service import DirectoryService
from kvtier.daemon.peer_book import PeerBook
from kvtier.daemon.peer_directory import PeerDirectory
from kvtier.peers.handshake import Identity
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import until
from kvtier.testing.node_cluster import NodeCluster, cluster_settings

TOKENS = 190
PAGES = pages_for(TOKENS)
DAY_S = 86400.0


def test_what_was_learned_is_there_after_the_next_start(tmp_path: Path) -> None:
    book = PeerBook(tmp_path, DAY_S)
    book.learn({"b": "10.0.0.2:1", "c": "10.0.0.3:1"})
    book.learn({"c": "10.0.0.4:1"})
    assert PeerBook(tmp_path, DAY_S).addresses() == {"b": "10.0.0.2:1", "c": "10.0.0.4:1"}


def test_who_was_not_heard_of_for_long_is_not_there_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1e9
    monkeypatch.setattr(peer_book.time, "time", lambda: now_s)
    book = PeerBook(tmp_path, DAY_S)
    book.learn({"b": "10.0.0.2:1", "c": "10.0.0.3:1"})
    now_s += 0.9 * DAY_S
    book.learn({"c": "10.0.0.3:1"})
    now_s += 0.2 * DAY_S
    assert PeerBook(tmp_path, DAY_S).addresses() == {"c": "10.0.0.3:1"}


@pytest.mark.parametrize("data", [b"\xc1", b"\x93\x01\x02\x03", b"\x81\xa1b\x01", b"\x81\xa1b"])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "nodes").write_bytes(data)
    book = PeerBook(tmp_path, DAY_S)
    assert book.addresses() == {}
    book.learn({"b": "10.0.0.2:1"})
    assert PeerBook(tmp_path, DAY_S).addresses() == {"b": "10.0.0.2:1"}


def test_a_directory_that_knows_nobody_yet_is_not_believed(tmp_path: Path) -> None:
    config = load(None, cluster_settings(tmp_path, ("a",))["a"])
    service = DirectoryService(config)
    service.start()
    book = PeerBook(tmp_path / "state", DAY_S)
    book.learn({"b": "10.0.0.2:1"})
    directory = PeerDirectory(
        config.cluster,
        Identity("a", 1, b"token of a test's cluster"),
        None,
        snapshot=lambda: None,
        forget=lambda stone: None,
        over=lambda ids: None,
        heard=lambda: None,
        book=book,
    )
    assert list(directory.nodes()) == ["b"]
    directory.close()
    service.stop(5.0)


@pytest.mark.timeout(120)
def test_who_is_away_is_told_though_the_directory_never_heard_of_it(tmp_path: Path) -> None:
    with NodeCluster(tmp_path) as cluster:
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        receipt = b.worker.result(b.worker.park(1, PAGES, TOKENS, level="disk"))
        assert receipt["level"] == "disk"
        state = a.services.config.node.state_dir
        until(lambda: "b" in PeerBook(state, DAY_S).addresses(), "a knows that b is there")
        b.kill("all")
        a.kill("all")
        # With an empty directory, and nobody who speaks to it but its own node.
        a.recover()
        forgotten = a.client.forget("chat-1")
        assert forgotten.durable and "b" in forgotten.detail
        b.recover()
        until(lambda: b.client.show("chat-1") is None, "the returned node has erased it")
        b.worker.do("poison", pages=PAGES)
        assert b.worker.do("planned", seed=1, count=TOKENS)["tokens"] == 0
