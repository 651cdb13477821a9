"""Restores from host memory while the disk is kept as busy as it gets: spills and the scrub flat out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.lines import Line, micros_line, seconds
from benchmarks.llama import BLOCK_BYTES, BLOCK_TOKENS, HEADS, LAYERS, scattered_pool
from benchmarks.memory import faulted
from kvtier.client import Client, connect
from kvtier.fingerprint import Fingerprint
from kvtier.objects import Shard
from kvtier.testing.service_processes import ServiceProcesses
from kvtier.worker import Worker

MiB = 1 << 20
_BLOCKS = 2
_RESTORES = 300
_SETTINGS = {
    "host.capacity_bytes": 1024 * MiB,
    "disk.capacity_bytes": 6144 * MiB,
    "disk.segment_bytes": 256 * MiB,
    "disk.scrub_bytes_per_s": 1 << 40,
}


def quiet(folder: Path, rounds: int) -> Iterator[Line]:
    """p99 of restores of 64 MiB, alone and beside another worker that parks more than memory holds."""
    with (
        ServiceProcesses(folder / "node", _SETTINGS) as services,
        connect(services.socket_path) as client,
        attached(client, _BLOCKS, seed=1) as (worker, pages),
    ):
        services.wait_faulted(client)
        tokens = np.random.default_rng(1).integers(0, 1 << 20, _BLOCKS * BLOCK_TOKENS, np.uint32)
        assert worker.park("kept", tokens, pages).result(timeout_s=60).ok
        idle, busy, spilled = [], [], 0.0
        for _ in range(max(1, rounds // 2)):
            idle += _restores(worker, tokens, pages)
            before = client.status().counters["spilled_bytes"]
            with _Neighbour(services.socket_path):
                while client.status().counters["spilled_bytes"] < before + 256 * MiB:
                    # Without use it would be among what is spilled.
                    worker.restore(worker.plan("kept", tokens), pages, deadline_s=60)
                busy += _restores(worker, tokens, pages)
            spilled += client.status().counters["spilled_bytes"] - before
    yield micros_line("host restore of 64 MiB, idle", idle)
    quick, slow = _p99(idle), _p99(busy)
    detail = {"p50_us": round(sorted(busy)[len(busy) // 2] * 1e6, 1), "spilled_bytes": spilled}
    name = "host restore of 64 MiB, spill and scrub flat out, p99"
    yield Line(name, round(slow * 1e6), "us", round(quick * 1e6), round(slow / quick, 2), detail)


@contextmanager
def attached(client: Client, blocks: int, seed: int) -> Iterator[tuple[Worker, list[int]]]:
    """A worker with a scattered pool of so many blocks, and its pages."""
    memory = faulted(blocks * BLOCK_BYTES)
    memory.view(np.uint64)[:] = np.random.default_rng(seed).integers(
        0, 1 << 63, memory.nbytes // 8, np.uint64
    )
    pool, pages = scattered_pool(memory, blocks)
    layout = pool.layout.layout_id
    model = Fingerprint.of_revision("bench@1", {"model_type": "llama"}, kv_dtype="bfloat16", layout=layout)
    with client.attach(model, pool, shard=Shard(0, LAYERS, 0, HEADS)) as worker:
        yield worker, pages


def _restores(worker: Worker, tokens: np.ndarray, pages: list[int]) -> list[float]:  # type: ignore[type-arg]
    took = []
    for _ in range(_RESTORES):
        plan = worker.plan("kept", tokens)
        assert {r.source for r in plan.ranges} == {"host"}, plan
        took.append(seconds(lambda plan=plan: worker.restore(plan, pages, deadline_s=60)))  # type: ignore[misc]
    return took


def _p99(samples: list[float]) -> float:
    return sorted(samples)[int(len(samples) * 0.99)]


class _Neighbour:
    """A process that parks new conversations as fast as it can."""

    def __init__(self, socket_path: str) -> None:
        self._command = [sys.executable, "-m", "benchmarks.disk.quiet", socket_path]

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def _park_for_ever(socket_path: str) -> None:
    draw = np.random.default_rng(os.getpid())
    with connect(socket_path) as client, attached(client, 4, seed=2) as (worker, pages):
        for number in range(1 << 30):
            tokens = draw.integers(0, 1 << 20, 4 * BLOCK_TOKENS, np.uint32)
            worker.park(f"{os.getpid()}-{number}", tokens, pages, level="host").result(timeout_s=60)


if __name__ == "__main__":
    _park_for_ever(sys.argv[1])
