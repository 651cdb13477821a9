"""A node of real processes for fault tests: it can be hurt, healed, and asked what is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtier.breaker import Backoff
from kvtier.client.client import Client, connect
from kvtier.client.worker import Worker
from kvtier.errors import DaemonNotFound
from kvtier.receipts import StatusReport, TierInfo
from kvtier.testing.gates import Gate
from kvtier.testing.kv_memory import BLOCK_BYTES, KvMemory, pages_for, tokens_of
from kvtier.testing.service_processes import ServiceProcesses
from kvtier.testing.worker_process import WorkerProcess
from kvtier.waiting import wait_until

WAIT_S = 30.0
FAST = Backoff(first_s=0.01, limit_s=0.1)
ARENA_BYTES = 1 << 20
# Two objects a batch: enough batches for something to be in the middle.
SETTINGS = {
    "host.capacity_bytes": ARENA_BYTES,
    "disk.capacity_bytes": 32 << 20,
    "disk.segment_bytes": 4 << 20,
    "gpu.batch_bytes": 2 * BLOCK_BYTES,
    # So that what is parked last pushes out what was parked first.
    "policy.eviction": "lru",
}
GATES = ("copy", "write", "read", "sync")


def until(happened: Callable[[], Any], what: str) -> None:
    """Poll; fail after WAIT_S."""
    assert wait_until(lambda: bool(happened()), WAIT_S), f"waited in vain until {what}"


def status(client: Client) -> StatusReport | None:
    """The node's report; None while it is away."""
    try:
        return client.status()
    except DaemonNotFound:
        return None


def host(client: Client) -> TierInfo:
    """Host memory now."""
    return next(tier for tier in client.status().tiers if tier.name == "host")


def is_clean(client: Client) -> bool:
    """Whether host memory is empty to the byte."""
    found = host(client)
    return (found.used_bytes, found.limbo_bytes, found.objects) == (0, 0, 0)


def forget_all(client: Client) -> None:
    """Erase every conversation, and see every byte of host memory come back."""
    for info in list(client.conversations()):
        assert client.forget(info.conversation, tenant=info.tenant).durable
    until(lambda: is_clean(client), f"host memory is free: {host(client)}")


@dataclasses.dataclass
class LocalWorker:
    """A worker in the test's process, whose engine stops at the gate 'copy'."""

    kv: KvMemory
    worker: Worker

    def park(self, seed: int, pages: list[int], count: int, **options: Any) -> Any:
        """Put the right content into the pages and park it."""
        self.kv.put(seed, pages, count)
        return self.worker.park(f"chat-{seed}", tokens_of(seed, count), pages, **options)

    def restore(self, seed: int, pages: list[int], count: int, deadline_s: float = 20.0) -> Any:
        """Poison the pages and restore into them; checks that what the receipt says is there, is right."""
        self.kv.poison(pages)
        plan = self.worker.plan(f"chat-{seed}", tokens_of(seed, count))
        receipt = self.worker.restore(plan, pages, deadline_s=deadline_s)
        assert self.kv.front(seed, pages, count) >= receipt.tokens
        return receipt


class Bench:
    """A node of three processes, a worker process, and a client; whatever was killed can be started again."""

    def __init__(self, folder: Path, settings: dict[str, Any], mode: str = "worker") -> None:
        self.gates = folder / "gates"
        self.gates.mkdir(parents=True)
        self.services = ServiceProcesses(folder / "node", {**SETTINGS, **settings}, gates=self.gates)
        self.services.__enter__()
        self.client = connect(self.services.socket_path, backoff=FAST, required=False)
        self._worker: WorkerProcess | None = None
        self.mode = mode

    @property
    def worker(self) -> WorkerProcess:
        """The worker process; a new one after it was killed."""
        if self._worker is None:
            self._worker = WorkerProcess(self.services.socket_path, self.gates, mode=self.mode)
        return self._worker

    def gate(self, name: str) -> Gate:
        """One of GATES."""
        return Gate(self.gates / name)

    def open_gates(self) -> None:
        """All of them."""
        for name in GATES:
            self.gate(name).open()

    def kill(self, victim: str) -> None:
        """SIGKILL a service, 'worker', or 'all'."""
        if victim in ("worker", "all") and self._worker is not None:
            self._worker.kill()
            self._worker = None
        if victim == "all":
            self.services.kill_all()
        elif victim != "worker":
            self.services.kill(victim)

    def recover(self) -> None:
        """Start again what was killed, and wait until the node is ready and the worker is attached."""
        self.services.start_all()
        until(lambda: (report := status(self.client)) is not None and report.ready, "the node is ready")
        until(lambda: self.worker.do("attached"), "the worker has attached again")

    def push_out(self, seed: int) -> None:
        """Have a conversation leave host memory for the disk alone, by parking others."""
        for filler in range(900, 916):
            self.worker.result(self.worker.park(filler, pages_for(192, 32), 192))
            info = self.client.show(f"chat-{seed}")
            if info is not None and info.host_tokens == 0 and info.disk_tokens == info.tokens:
                return
        raise AssertionError(f"conversation {seed} did not leave host memory: {info}")

    def close(self) -> None:
        """End everything."""
        self.open_gates()
        if self._worker is not None:
            self._worker.kill()
        self.client.close()
        self.services.stop_all()
