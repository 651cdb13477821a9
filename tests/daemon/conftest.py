"""Daemons and workers for the tests of this folder; all of them are ended here, also when a test fails."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvtier.client.client import Client, connect
from kvtier.daemon import embedded
from kvtier.daemon.disk_service import DiskService
from kvtier.daemon.embedded import Embedded
from kvtier.disk.fileops import OsFileOps
from kvtier.messages.wire import Channel, hello
from kvtier.testing.gates import Gate, gated_engine
from kvtier.testing.kv_memory import SHARD, KvMemory
from kvtier.testing.node_bench import FAST, SETTINGS, Bench, LocalWorker, is_clean, until
from kvtier.testing.raw_socket import WAIT_S


@pytest.fixture(scope="module")
def make_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Bench]]:
    """Make nodes that last as long as the module's tests."""
    made: list[Bench] = []

    def make(mode: str = "worker", **settings: Any) -> Bench:
        folder = tmp_path_factory.mktemp("n")
        made.append(Bench(folder, {name.replace("__", "."): value for name, value in settings.items()}, mode))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def make_daemon() -> Iterator[Callable[..., Embedded]]:
    """Start daemons inside the test's process."""
    made: list[Embedded] = []

    def make(**settings: Any) -> Embedded:
        overrides = {name.replace("__", "."): value for name, value in settings.items()}
        daemon = Embedded({**SETTINGS, **overrides})
        made.append(daemon)
        daemon.start()
        return daemon

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture
def make_local(tmp_path: Path) -> Iterator[Callable[..., LocalWorker]]:
    """Attach workers in the test's process; their gate is tmp_path/'copy'."""
    made: list[tuple[Client, LocalWorker]] = []
    gate = Gate(tmp_path / "copy")

    def make(
        path: str, *, pages: int = 128, shared: bool = False, revision: str = "org/model@1", **options: Any
    ) -> LocalWorker:
        kv = KvMemory(pages, shared=shared, revision=revision)
        client = connect(path, backoff=FAST)
        worker = client.attach(
            kv.model, kv.pool, shard=SHARD, make_engine=lambda slots: gated_engine(slots, gate), **options
        )
        made.append((client, LocalWorker(kv, worker)))
        return made[-1][1]

    yield make
    gate.open()
    for client, local in made:
        local.worker.close(wait_s=1.0)
        client.close()
        local.kv.close()


@pytest.fixture
def with_ops(monkeypatch: pytest.MonkeyPatch) -> Callable[[OsFileOps], None]:
    """Daemons of this test use these system calls."""

    def use(ops: OsFileOps) -> None:
        monkeypatch.setattr(embedded, "DiskService", partial(DiskService, ops=ops))

    return use


@pytest.fixture
def client_of() -> Iterator[Callable[[Embedded], Client]]:
    made: list[Client] = []

    def make(daemon: Embedded) -> Client:
        made.append(connect(daemon.socket_path, backoff=FAST))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "gates"
    folder.mkdir()
    yield folder
    for name in ("write", "read", "sync"):
        Gate(folder / name).open()


def _descriptors(bench: Bench) -> tuple[int, int]:
    """Open descriptors of the node's and the GPU service's process."""
    counts = [len(os.listdir(f"/proc/{bench.services.pid(name)}/fd")) for name in ("node", "gpu")]
    return counts[0], counts[1]


@pytest.fixture
def unharmed(bench: Bench) -> Iterator[None]:
    """After each test both services answer, no descriptor is left, and host memory is as it was."""
    bench.client.ping()
    until(lambda: not bench.client.status().workers, "no worker is attached")
    before = _descriptors(bench)
    yield
    bench.client.ping()
    # Fewer, where the end of an earlier connection had not been noticed when they were counted.
    until(lambda: all(map(operator.le, _descriptors(bench), before)), f"no more than {before} are open")
    until(lambda: is_clean(bench.client), "host memory is free")
    _with_copies(bench)


def _with_copies(bench: Bench) -> None:
    """The GPU service shakes hands still."""
    path = Path(bench.services.socket_path).with_name("gpu.sock")
    Channel.open(str(path), hello("copy", worker="nobody"), time.monotonic() + WAIT_S).close()
