"""A node goes out of service while it runs: what only memory held is on disk afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtier.cluster.actors import Drains
from kvtier.cluster.drain import Progress
from kvtier.daemon.directory_service import DirectoryService
from kvtier.daemon.embedded import Embedded
from kvtier.messages.cluster import DIRECTORY, FindNodes
from kvtier.node.events import Left, Send, Stimulus
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import LocalWorker, until
from kvtier.testing.node_cluster import cluster_settings

TOKENS = 190
PAGES = pages_for(TOKENS)


def test_parks_in_memory_outlive_the_node(
    make_daemon: Callable[..., Embedded], make_local: Callable[..., LocalWorker], tmp_path: Any
) -> None:
    settings = {"disk__directory": str(tmp_path / "disk"), "access__tenant_secret_file": secret(tmp_path)}
    daemon = make_daemon(**settings)
    local = make_local(daemon.socket_path)
    for seed in (1, 2):
        assert local.park(seed, PAGES, TOKENS).result().level == "host"
    assert isinstance(daemon.node, Drains)
    first = Progress.of(daemon.node.drain(10.0))
    assert first.dirty_bytes + first.flushed_bytes > 0
    until(lambda: Progress.of(daemon.node.drain(10.0)).done, "all is written")
    last = Progress.of(daemon.node.drain(10.0))
    assert last.dirty_bytes == 0 and last.flushed_bytes > 0
    late = local.park(3, PAGES, TOKENS).result()
    assert (late.level, late.detail) == ("none", "this node goes out of service")
    daemon.close()
    again = make_local(make_daemon(**settings).socket_path)
    for seed in (1, 2):
        assert again.restore(seed, PAGES, TOKENS).tokens == TOKENS
    assert again.restore(3, PAGES, TOKENS).tokens == 0


def test_what_it_had_in_memory_goes_on_at_another_node(
    make_daemon: Callable[..., Embedded], make_local: Callable[..., LocalWorker], tmp_path: Any
) -> None:
    own = cluster_settings(tmp_path, ("a", "b"))
    plain = {node: {key.replace(".", "__"): value for key, value in of.items()} for node, of in own.items()}
    # Without a disk it is in memory or nowhere.
    daemons = {node: make_daemon(disk__enabled=False, **of) for node, of in plain.items()}
    directory = DirectoryService(daemons["a"].config)
    directory.start()
    try:
        a, b = (make_local(daemon.socket_path) for daemon in daemons.values())
        for seed in (1, 2):
            assert a.park(seed, PAGES, TOKENS).result().level == "host"
        # Each node is asked once the directory has heard of it, and of its room.
        until(lambda: a.park(3, PAGES, TOKENS, level="copies=2").result().ok, "the other node takes copies")
        node = daemons["a"].node
        until(lambda: Progress.of(node.drain(20.0)).done, "all is given away")
        last = Progress.of(node.drain(20.0))
        assert last.dirty_bytes == 0 and last.moved_bytes > 0
        daemons["a"].close()
        for seed in (1, 2, 3):
            assert b.restore(seed, PAGES, TOKENS).tokens == TOKENS
            assert b.kv.front(seed, PAGES, TOKENS) == TOKENS
    finally:
        directory.stop(5.0)


def secret(folder: Any) -> str:
    path = folder / "secret"
    path.touch(mode=0o600)
    path.write_text("secret of a node, 32 bytes or more")
    return str(path)


def test_a_node_closes_everything_whatever_its_core_wishes_last(
    make_daemon: Callable[..., Embedded],
    make_local: Callable[..., LocalWorker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = make_daemon(disk__enabled=False, **cluster_settings(tmp_path, ("a",))["a"])
    node, tell = daemon.node, daemon.node._tell
    make_local(daemon.socket_path)

    def wishing(now_s: float, stimulus: Stimulus) -> list[Send]:
        asks = isinstance(stimulus, Left)
        return [*tell(now_s, stimulus), *([Send(DIRECTORY, FindNodes(job="k1"))] if asks else [])]

    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    monkeypatch.setattr(node, "_tell", wishing)
    node.stop(20.0)
    assert node.wait(0) and not failures and not Path(daemon.socket_path).exists()
