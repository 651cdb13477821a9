"""The stimulus log of a real run with faults, replayed to the identical instructions."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvtier.config.secrets import tenant_secret
from kvtier.errors import KvtierError
from kvtier.host.slots import HostSlots
from kvtier.node import journal
from kvtier.policy.defaults import make_policies
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import Bench, until

TOKENS = 190
PAGES = pages_for(TOKENS)


def make_host(origin: journal.Origin) -> HostSlots:
    """The slots of the logged node, without memory."""
    sizes = list(origin.arena_bytes)
    return HostSlots(
        sizes,
        ready_bytes=[0] * len(sizes),
        max_slots=origin.generation_slots,
        first_generation=origin.epoch,
    )


def run_with_faults(bench: Bench) -> None:
    """Parks and restores from everywhere, with the worker, the GPU and the disk service lost on the way."""
    worker = bench.worker
    for seed in range(5):
        assert worker.result(worker.park(seed, PAGES, TOKENS, level="disk"))["ok"]
    bench.push_out(0)
    for seed in (0, 1):
        assert worker.result(worker.restore(seed, PAGES, TOKENS)["handle"])["tokens"] == TOKENS
    for victim, seed in (("gpu", 6), ("worker", 7), ("disk", 8)):
        gate = bench.gate("copy")
        gate.shut(after=1)
        handle = bench.worker.park(seed, PAGES, TOKENS, level="disk")
        gate.wait_held()
        bench.kill(victim)
        gate.open()
        if victim != "worker":
            bench.worker.result(handle)
        bench.recover()
    bench.services.signal("gpu", signal.SIGSTOP)
    late = bench.worker.result(bench.worker.restore(1, PAGES, TOKENS, deadline_s=0.1)["handle"])
    bench.services.signal("gpu", signal.SIGCONT)
    assert late["reason"] == "deadline"
    bench.client.hint("chat-1", returns_in_s=3)
    assert bench.client.forget("chat-2").found
    until(lambda: not any(w.running_jobs for w in bench.client.status().workers), "all is quiet")


@pytest.fixture(scope="module")
def logged(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """(the log, the node's secret) of a run."""
    path: Path = tmp_path_factory.mktemp("log") / "stimuli"
    bench = make_bench(log__stimulus_log=str(path))
    run_with_faults(bench)
    secret = tenant_secret(bench.services.config)
    bench.close()
    return path.read_bytes(), secret


def replayed(log: bytes, secret: bytes) -> int:
    return journal.replay(
        journal.read(io.BytesIO(log)), make_host, lambda: make_policies("lru", "load"), secret
    )


def test_a_replay_gives_the_identical_instructions(logged: tuple[bytes, bytes]) -> None:
    log, secret = logged
    entries = list(journal.read(io.BytesIO(log)))
    kinds = {entry.get("kind") for entry in entries}
    assert kinds >= {"Received", "Left", "ProcessEnded", "EventsJoined", "ArenaGrew", "Tick"}
    assert replayed(log, secret) == len(entries) - 1


def test_a_log_that_a_crash_cut_short_is_replayed_to_its_end(logged: tuple[bytes, bytes]) -> None:
    log, secret = logged
    whole = replayed(log, secret)
    assert replayed(log[:-3], secret) == whole - 1


def test_a_core_that_decides_otherwise_is_noticed(logged: tuple[bytes, bytes]) -> None:
    """The control: one stimulus less, another time, another secret."""
    log, secret = logged
    entries: list[dict[str, Any]] = list(journal.read(io.BytesIO(log)))
    parks = [n for n, entry in enumerate(entries) if b"park" in entry.get("message", b"")]
    without = b"".join(msgpack.packb(entry) for n, entry in enumerate(entries) if n != parks[0])
    with pytest.raises(KvtierError):
        replayed(without, secret)
    with pytest.raises(KvtierError):
        replayed(log, b"x" * 32)
