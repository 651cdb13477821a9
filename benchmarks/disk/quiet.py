"""Restores from host memory while the disk is kept as busy as it gets: spills and the scrub flat out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kvtier.bench.lines import Line, micros_line, seconds
from kvtier.bench.llama import BLOCK_BYTES, BLOCK_TOKENS, HEADS, LAYERS, scattered_pool
from kvtier.bench.memory import faulted
from kvtier.client.client import Client, connect
from kvtier.client.worker import Worker
from kvtier.model.fingerprint import Fingerprint
from kvtier.objects import Shard
from kvtier.testing.service_processes import ServiceProcesses

MiB = 1 << 20
_BLOCKS = 2
_RESTORES = 300
# As much is on the drive beforehand: what the scrub goes through.
_SCRUBBED_BYTES = 5120 * MiB
_SETTINGS = {
    "host.capacity_bytes": 1024 * MiB,
    "disk.capacity_bytes": 6144 * MiB,
    "disk.segment_bytes": 256 * MiB,
    "disk.scrub_bytes_per_s": 1 << 40,
}


def quiet(folder: Path, rounds: int) -> Iterator[Line]:
    """p99 of restores of 64 MiB: alone, beside a worker that parks without a disk, and with all of it.

    The second says what two processes that copy cost each other; the third is what the disk tier is held to.
    """
    with (
        ServiceProcesses(folder / "node", _SETTINGS) as services,
        connect(services.socket_path) as client,
        attached(client, _BLOCKS, seed=1) as (worker, pages),
    ):
        services.wait_faulted(client)
        tokens = np.random.default_rng(1).integers(0, 1 << 20, _BLOCKS * BLOCK_TOKENS, np.uint32)
        assert worker.park("kept", tokens, pages).result(timeout_s=60).ok
        one = _One(client, worker, tokens, pages)
        with _Neighbour(services.socket_path):
            one.restore_until("spilled_bytes", _SCRUBBED_BYTES)
        idle, parks, busy, scrubbed, spilled = [], [], [], 0.0, 0.0
        for _ in range(max(1, rounds // 2)):
            services.kill("disk")
            idle += one.restores()
            with _Neighbour(services.socket_path):
                one.restore_until("parked_bytes", 2048 * MiB)
                parks += one.restores()
            # Its scrub begins where the last one stood, and goes through everything once.
            services.start_all()
            with _Neighbour(services.socket_path):
                one.restore_until("spilled_bytes", 256 * MiB)
                before = client.status().counters
                busy += one.restores()
                after = client.status().counters
            spilled += after["spilled_bytes"] - before["spilled_bytes"]
            scrubbed += after["disk_scrub_bytes"] - before["disk_scrub_bytes"]
    yield micros_line("host restore of 64 MiB, idle", idle)
    yield _beside("host restore of 64 MiB, beside parks without a disk, p99", idle, parks)
    detail = {"spill_gb_per_s": spilled / sum(busy) / 1e9, "scrub_gb_per_s": scrubbed / sum(busy) / 1e9}
    name = "host restore of 64 MiB, spill and scrub flat out, p99"
    yield _beside(name, idle, busy, **{key: round(value, 2) for key, value in detail.items()})


def _beside(name: str, idle: list[float], busy: list[float], **detail: float) -> Line:
    """The p99 against that of the idle machine."""
    quick, slow = _p99(idle), _p99(busy)
    p50_us = round(sorted(busy)[len(busy) // 2] * 1e6, 1)
    return Line(
        name,
        round(slow * 1e6),
        "us",
        round(quick * 1e6),
        round(slow / quick, 2),
        {"p50_us": p50_us, **detail},
    )


@dataclass(frozen=True, slots=True)
class _One:
    """The worker whose restores are measured."""

    client: Client
    worker: Worker
    tokens: np.ndarray
    pages: list[int]

    def restore_until(self, counter: str, more: float) -> None:
        """Without use its blocks would be among what is spilled."""
        until = self.client.status().counters[counter] + more
        while self.client.status().counters[counter] < until:
            self.worker.restore(self.worker.plan("kept", self.tokens), self.pages, deadline_s=60)

    def restores(self) -> list[float]:
        """Seconds of each."""
        took = []
        for _ in range(_RESTORES):
            plan = self.worker.plan("kept", self.tokens)
            assert {r.source for r in plan.ranges} == {"host"}, plan
            took.append(seconds(partial(self.worker.restore, plan, self.pages, deadline_s=60)))
        return took


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
