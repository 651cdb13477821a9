"""Forgetting, with the disk service killed in the middle of it, and after the index was lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtier.disk.fsck import fsck
from kvtier.node.disk_side import DiskSide
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import Bench, until

TOKENS = 190
PAGES = pages_for(TOKENS)
GONE, KEPT = 1, 2


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    bench = make_bench(disk__scrub_bytes_per_s=0)
    for seed in (GONE, KEPT):
        receipt = bench.worker.result(bench.worker.park(seed, PAGES, TOKENS, level="disk"))
        assert receipt["level"] == "disk"
    return bench


def forget_and_kill(bench: Bench) -> Any:
    """The receipt of a forget whose disk service was killed while it made it durable."""
    gate = bench.gate("sync")
    gate.shut()
    receipts: list[Any] = []
    asking = threading.Thread(target=lambda: receipts.append(bench.client.forget(f"chat-{GONE}")))
    asking.start()
    gate.wait_held()
    bench.kill("disk")
    gate.open()
    asking.join()
    return receipts[0]


def restored(bench: Bench, seed: int) -> int:
    found = bench.worker.restore(seed, PAGES, TOKENS)
    tokens: int = bench.worker.result(found["handle"])["tokens"]
    assert bench.worker.look(seed, PAGES, TOKENS)["strange"] == 0
    return tokens


def only_kept(bench: Bench) -> None:
    """After the loss of all processes: the one is there, of the other nothing."""
    bench.kill("all")
    bench.recover()
    until(lambda: len(list(bench.client.conversations())) == 1, "the one is known again")
    assert (restored(bench, GONE), restored(bench, KEPT)) == (0, TOKENS)


def test_a_kill_in_the_middle_is_said_and_forgetting_comes_true(bench: Bench) -> None:
    receipt = forget_and_kill(bench)
    assert (receipt.found, receipt.durable, receipt.reason) == (True, False, "disk_error")
    bench.recover()
    again = bench.client.forget(f"chat-{GONE}")
    assert again.durable
    only_kept(bench)


def test_nothing_comes_back_with_an_index_made_from_the_segments(bench: Bench) -> None:
    forget_and_kill(bench)
    bench.recover()
    assert bench.client.forget(f"chat-{GONE}").durable
    bench.kill("all")
    folder = Path(bench.services.config.disk_directory)
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    report = fsck(folder, repair=True)
    assert report.repaired
    bench.recover()
    # Without the index nobody knows the names: what nobody names is not kept, and nothing is wrong.
    assert restored(bench, GONE) == 0
    assert all(info.conversation != f"chat-{GONE}" for info in bench.client.conversations())


def test_a_node_that_answers_too_early_is_caught(
    make_daemon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The control: erased is said, and the files still say otherwise."""

    def too_early(self: DiskSide, objects: Any, name: Any, done: Any, stone: str = "") -> None:
        done(True, "")

    monkeypatch.setattr(DiskSide, "erase", too_early)
    assert _left_after_forget(make_daemon, tmp_path) > 0
    monkeypatch.undo()
    assert _left_after_forget(make_daemon, tmp_path / "other") == 0


def _left_after_forget(make_daemon: Callable[..., Any], tmp_path: Path) -> int:
    """Objects in the index when a park to disk was forgotten and the service was ended at once."""
    from kvtier.client.client import connect
    from kvtier.disk.index import Index
    from kvtier.testing.kv_memory import SHARD, KvMemory, tokens_of

    folder = tmp_path / "d"
    folder.mkdir(parents=True)
    daemon = make_daemon(disk__directory=str(folder))
    kv = KvMemory()
    with connect(daemon.socket_path) as client:
        worker = client.attach(kv.model, kv.pool, shard=SHARD)
        kv.put(GONE, PAGES, TOKENS)
        assert worker.park("chat", tokens_of(GONE, TOKENS), PAGES, level="disk").result().level == "disk"
        assert client.forget("chat").durable
        worker.close()
    kv.close()
    daemon.disk.stop(10.0)
    index = Index(folder / "index.sqlite")
    try:
        return len(list(index.objects()))
    finally:
        index.close()
