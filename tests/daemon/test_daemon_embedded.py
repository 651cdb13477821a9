"""connect('embedded:') and the daemon in one process: many workers at once, and nothing left afterwards."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvtier.client.client import Client, connect
from kvtier.daemon.embedded import Embedded
from kvtier.errors import KvtierError
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for, tokens_of
from kvtier.testing.node_bench import SETTINGS, LocalWorker, forget_all, host, until

TOKENS = 190
PAGES = pages_for(TOKENS)


def left_behind() -> tuple[set[str], int, int, set[str]]:
    """Threads, descriptors, mappings of shared memory, and folders of kvtier's."""
    threads = {t.name for t in threading.enumerate() if t.name.startswith("kvtier")}
    mapped = sum("memfd:kvtier" in line for line in Path("/proc/self/maps").read_text().splitlines())
    folders = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("kvtier-")}
    return threads, len(os.listdir("/proc/self/fd")), mapped, folders


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert tmp_path.exists()
    # Others use the system's folder at the same time, and tmp_path is too long for the sockets of Ray.
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        before = left_behind()
        yield
        until(lambda: left_behind() == before, f"nothing is left of {left_behind()} but {before}")


def attach(client: Client, revision: str = "org/model@1") -> LocalWorker:
    kv = KvMemory(64, revision=revision)
    return LocalWorker(kv, client.attach(kv.model, kv.pool, shard=SHARD))


@pytest.mark.usefixtures("nothing_left")
def test_connect_embedded() -> None:
    with connect("embedded:") as client:
        local = attach(client)
        with local.worker:
            assert local.park(1, PAGES, TOKENS, level="disk").result().raise_for_level().level == "disk"
            assert [worker.pid for worker in client.status().workers] == [os.getpid()]
            assert local.restore(1, PAGES, TOKENS).tokens == TOKENS
            longer = local.worker.plan("chat-1", tokens_of(1, TOKENS + 40))
            assert longer.load_tokens == TOKENS
            local.worker.drop(longer)
            (info,) = client.conversations()
            assert (info.tokens, info.host_tokens, info.disk_tokens) == (TOKENS, TOKENS, TOKENS)
            assert client.locate("chat-1")[0][:2] == ("embedded", TOKENS)
            client.hint("chat-1", returns_in_s=5)
            shown = client.show("chat-1")
            assert shown is not None
            assert shown.returns_at_s is not None
            assert [model.conversations for model in client.models()] == [1]
            assert client.forget("chat-1").erased_objects == info.tokens // 32 + 1
            assert client.show("chat-1") is None


@pytest.mark.usefixtures("nothing_left")
def test_a_worker_that_comes_and_goes_leaves_nothing() -> None:
    daemon = Embedded({**SETTINGS, "disk.enabled": False})
    daemon.start()
    try:
        with connect(daemon.socket_path) as client:
            with attach(client).worker:
                pass
            until(lambda: not client.status().workers, "it is gone")
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(5):
                local = attach(client)
                with local.worker:
                    assert local.park(1, PAGES, TOKENS).result().ok
                until(lambda: len(os.listdir("/proc/self/fd")) == before, "descriptors are closed")
            assert local.kv.front(1, PAGES, TOKENS) == TOKENS
            assert host(client).objects == TOKENS // 32 + 1
    finally:
        daemon.close()


def chats(local: LocalWorker, tenant: str, seeds: range) -> None:
    """Park and restore some chats, twice each; every byte is compared."""
    for turn, count in ((1, 100), (2, TOKENS)):
        for seed in seeds:
            chat, tokens = f"chat-{seed % 3}", tokens_of(seed, count)
            local.kv.put(seed, PAGES, count)
            parked = local.worker.park(chat, tokens, PAGES, tenant=tenant, level="disk")
            assert parked.result().ok, (turn, parked.result())
            local.kv.poison(PAGES)
            plan = local.worker.plan(chat, tokens, tenant=tenant)
            receipt = local.worker.restore(plan, PAGES, deadline_s=20)
            assert receipt.tokens == count, receipt
            assert local.kv.front(seed, PAGES, count) == count


@pytest.mark.usefixtures("nothing_left")
def test_tenants_models_and_workers_at_once() -> None:
    """Equal tokens and names, other bytes: nobody ever sees another one's."""
    daemon = Embedded(SETTINGS)
    daemon.start()
    try:
        with connect(daemon.socket_path) as client:
            locals_ = [attach(client, f"org/model@{n % 2}") for n in range(4)]
            with ThreadPoolExecutor(4) as pool:
                # Workers of one model and tenant have chats of their own; tokens of all begin alike.
                jobs = [
                    pool.submit(chats, local, f"tenant-{n // 2}", range(n * 10, n * 10 + 4))
                    for n, local in enumerate(locals_)
                ]
                for job in jobs:
                    job.result()
            for local in locals_:
                local.worker.close()
            assert {info.tenant for info in client.conversations()} == {"tenant-0", "tenant-1"}
            assert len(client.models()) == 2
            forget_all(client)
    finally:
        daemon.close()


def test_one_models_bytes_are_not_anothers(make_daemon: Callable[..., Embedded]) -> None:
    daemon = make_daemon()
    with connect(daemon.socket_path) as client:
        one, other = attach(client, "org/model@1"), attach(client, "org/model@2")
        with one.worker, other.worker:
            assert one.park(1, PAGES, TOKENS).result().ok
            for worker, tenant in ((other.worker, "default"), (one.worker, "acme")):
                plan = worker.plan("chat-1", tokens_of(1, TOKENS), tenant=tenant)
                assert plan.load_tokens == 0
                assert plan.reason in ("no_match", "unknown_conversation")


@pytest.mark.usefixtures("nothing_left")
def test_two_daemons_in_one_process() -> None:
    with connect("embedded:") as first, connect("embedded:") as second:
        assert first.path != second.path
        here, there = attach(first), attach(second)
        with here.worker, there.worker:
            assert here.park(1, PAGES, TOKENS).result().ok
            assert there.restore(1, PAGES, TOKENS).tokens == 0
            assert here.restore(1, PAGES, TOKENS).tokens == TOKENS


@pytest.mark.usefixtures("nothing_left")
def test_a_daemon_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(KvtierError):
        Embedded({**SETTINGS, "disk.directory": str(tmp_path / "store")}).start()
    with pytest.raises(KvtierError):
        Embedded({**SETTINGS, "host.capacity_bytes": 1 << 50}).start()


@pytest.mark.usefixtures("nothing_left")
def test_a_second_daemon_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    place = {**SETTINGS, "node.runtime_dir": str(tmp_path / "run"), "disk.enabled": False}
    daemon = Embedded(place)
    daemon.start()
    try:
        with pytest.raises(KvtierError, match="cannot listen"):
            Embedded(place).start()
        with connect(daemon.socket_path) as client:
            client.ping()
    finally:
        daemon.close()
