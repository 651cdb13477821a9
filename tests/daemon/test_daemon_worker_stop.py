"""SIGSTOP of a worker past its lease, then SIGCONT, in a park and in a restore."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.client.client import Client, connect
from kvtier.daemon.embedded import Embedded
from kvtier.host.tier import HostTier
from kvtier.testing.gates import Gate
from kvtier.testing.kv_memory import BLOCK_BYTES, pages_for
from kvtier.testing.node_bench import FAST, LocalWorker, forget_all, host, until
from kvtier.testing.service_processes import is_stopped
from kvtier.testing.worker_process import WorkerProcess

STOPPED = 1
TOKENS = 192
PAGES = pages_for(TOKENS)


@pytest.fixture
def daemon(make_daemon: Callable[..., Embedded]) -> Embedded:
    """Short leases; bytes in host memory are not checked again, so a foreign write would be delivered."""
    return make_daemon(leases__copy_s=1.5, host__verify="arrival", disk__enabled=False)


@pytest.fixture
def client(daemon: Embedded) -> Iterator[Client]:
    with connect(daemon.socket_path, backoff=FAST) as made:
        yield made


@pytest.fixture
def process(daemon: Embedded, tmp_path: Path) -> Iterator[WorkerProcess]:
    (tmp_path / "stopped").mkdir()
    with WorkerProcess(daemon.socket_path, tmp_path / "stopped") as made:
        yield made


def fill_arena(local: LocalWorker) -> list[int]:
    """Park conversations until host memory holds no more; answers those that are still there."""
    seeds = list(range(100, 110))
    for seed in seeds:
        assert local.park(seed, PAGES, TOKENS).result().ok
    return seeds


def check_all(local: LocalWorker, seeds: list[int]) -> int:
    """Restore all; answers how many tokens were found. LocalWorker.restore compares the bytes."""
    return sum(local.restore(seed, PAGES, TOKENS).tokens for seed in seeds)


def stop_in_a_park(process: WorkerProcess, gate: Gate, client: Client) -> int:
    """The worker looked at the generation of its second slot, and copies into it only after all this."""
    gate.shut(after=1)
    handle = process.park(STOPPED, PAGES, TOKENS)
    gate.wait_held()
    stop(process)
    until(lambda: host(client).limbo_bytes >= 2 * BLOCK_BYTES, "the lease has ended")
    return handle


def stop(process: WorkerProcess) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    until(lambda: is_stopped(process.pid), "every thread has stopped")


def go_on(process: WorkerProcess, gate: Gate) -> None:
    gate.open()
    os.kill(process.pid, signal.SIGCONT)


def test_a_stopped_park_loses_its_slots_and_nobody_gets_them_before_it_is_quiet(
    client: Client,
    process: WorkerProcess,
    tmp_path: Path,
    daemon: Embedded,
    make_local: Callable[..., LocalWorker],
) -> None:
    gate, local = Gate(tmp_path / "stopped" / "copy"), make_local(daemon.socket_path)
    handle = stop_in_a_park(process, gate, client)
    limbo_bytes = host(client).limbo_bytes
    seeds = fill_arena(local)
    full = host(client)
    assert full.limbo_bytes == limbo_bytes
    assert full.capacity_bytes - full.used_bytes < BLOCK_BYTES
    go_on(process, gate)
    receipt = process.result(handle)
    assert (receipt["level"], receipt["reason"]) == ("none", "lease_expired")
    assert receipt["released"]
    until(lambda: host(client).limbo_bytes == 0, "the late copy has ended")
    assert check_all(local, seeds) > 0
    assert process.restore(STOPPED, PAGES, TOKENS)["tokens"] == 0
    assert process.result(process.park(STOPPED, PAGES, TOKENS))["ok"]
    forget_all(client)


def test_slots_that_are_given_away_too_early_are_noticed(
    client: Client,
    process: WorkerProcess,
    tmp_path: Path,
    daemon: Embedded,
    make_local: Callable[..., LocalWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: without limbo, the late copy is found in somebody else's conversation."""
    abort = HostTier.abort
    monkeypatch.setattr(HostTier, "abort", lambda tier, slot, *, quiet: abort(tier, slot, quiet=True))
    gate, local = Gate(tmp_path / "stopped" / "copy"), make_local(daemon.socket_path)
    gate.shut(after=1)
    process.park(STOPPED, PAGES, TOKENS)
    gate.wait_held()
    stop(process)
    until(lambda: host(client).used_bytes == 0, "the lease has ended")
    seeds = fill_arena(local)
    go_on(process, gate)
    # The copy is over once its process takes orders and has none running.
    process.result(0)
    with pytest.raises(AssertionError):
        check_all(local, seeds)


def test_a_stopped_restore_claims_nothing_that_came_late(
    client: Client,
    process: WorkerProcess,
    tmp_path: Path,
    daemon: Embedded,
    make_local: Callable[..., LocalWorker],
) -> None:
    gate, local = Gate(tmp_path / "stopped" / "copy"), make_local(daemon.socket_path)
    assert process.result(process.park(STOPPED, PAGES, TOKENS))["ok"]
    gate.shut(after=1)
    found = process.restore(STOPPED, PAGES, TOKENS, deadline_s=1.5)
    assert found["tokens"] == TOKENS
    gate.wait_held()
    stop(process)
    misses: Any = ("misses.deadline", "misses.lease_expired")
    until(lambda: any(client.status().counters.get(m) for m in misses), "the node gave the restore up")
    seeds = fill_arena(local)
    go_on(process, gate)
    receipt = process.result(found["handle"])
    assert receipt["reason"] in ("deadline", "lease_expired")
    assert receipt["busy"] in ((), [])
    seen = process.look(STOPPED, PAGES, TOKENS)
    assert seen["front"] >= receipt["tokens"]
    assert seen["strange"] == 0
    assert check_all(local, seeds) > 0
    assert process.result(process.park(STOPPED, PAGES, TOKENS))["ok"]
    forget_all(client)
