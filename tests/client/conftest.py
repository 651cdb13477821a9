"""A node and a GPU service that follow a script, and an engine whose batches end on command."""

from __future__ import annotations

import array
import contextlib
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.breaker import Backoff
from kvtier.client import client as client_module
from kvtier.gpu import describe
from kvtier.gpu.engine import CLOSE_S, CopyBatch, CopyEngine, CopyResult, Done
from kvtier.gpu.pool import Pool
from kvtier.host.arena import Arena
from kvtier.messages import protocol
from kvtier.messages.calls import (
    Attach,
    Attached,
    CopiesEnded,
    Detach,
    DropPlan,
    Hello,
    MakePlan,
    Message,
    Park,
    ParkStarted,
    Ping,
    Planned,
    Pong,
    Restore,
    RestoreStarted,
    Welcome,
)
from kvtier.messages.calls import Done as DoneMessage
from kvtier.messages.tiers import Copy, WireItem
from kvtier.objects import Shard
from kvtier.receipts import Plan, TokenRange

WAIT_S = 10.0
PAGE_TOKENS = 16
BLOCK_TOKENS = 32
ROW_BYTES = 2 * 8 * 2
FAST = Backoff(first_s=0.001, limit_s=0.02)


def until(condition: Callable[[], Any], what: str) -> None:
    """Poll a condition; fail after WAIT_S."""
    end_s = time.monotonic() + WAIT_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < end_s, f"waited in vain until {what}"
        tick.wait(0.001)


class Peer:
    """One accepted connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.role = ""
        self.worker = ""
        self.received: queue.Queue[Message] = queue.Queue()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        frame = protocol.encode(message)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([frame], ancillary)
        if sent < len(frame):
            self.socket.sendall(frame[sent:])

    def read(self) -> Message | None:
        prefix = self._exactly(4)
        if prefix is None:
            return None
        body = self._exactly(protocol.body_length(prefix))
        return None if body is None else protocol.decode(body)

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            try:
                more = self.socket.recv(count - len(data))
            except OSError:
                return None
            if not more:
                return None
            data += more
        return data

    def next(self, kind: type[Any]) -> Any:
        """The next message of this kind; others before it are skipped."""
        end_s = time.monotonic() + WAIT_S
        while True:
            message = self.received.get(timeout=max(0.01, end_s - time.monotonic()))
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class FakeNode:
    """answers: by the class of a request, what to say; None says nothing. hung: says nothing at all."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-client-"))
        self.path = str(self.folder / "node.sock")
        self.gpu_path = str(self.folder / "gpu.sock")
        self.arena = Arena([1 << 20], max_slots=64)
        self.answers: dict[type[Message], Callable[[Peer, Any], Message | None]] = {}
        self.hung = False
        self.mode = "worker"
        self.with_gpu = True
        self.joined: queue.Queue[Peer] = queue.Queue()
        self.peers: list[Peer] = []
        self.attached = 0
        self.jobs = 0
        self._listeners: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.start()

    def start(self) -> None:
        for path in (self.path, self.gpu_path) if self.with_gpu else (self.path,):
            Path(path).unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(16)
            self._listeners.append(listener)
            self._spawn(lambda listener=listener: self._accept(listener))

    def stop(self) -> None:
        """Like a daemon that ends: sockets close, paths stay."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._listeners.clear()
        self.drop()
        for thread in self._threads:
            thread.join(WAIT_S)
        self._threads.clear()

    def drop(self, role: str = "") -> None:
        """Close the connections of a role, or all."""
        for peer in list(self.peers):
            if role in ("", peer.role):
                peer.close()

    def close(self) -> None:
        self.stop()
        self.arena.close()
        shutil.rmtree(self.folder)

    def peer(self, role: str) -> Peer:
        """The next connection of this role that has shaken hands."""
        end_s = time.monotonic() + WAIT_S
        while True:
            peer = self.joined.get(timeout=max(0.01, end_s - time.monotonic()))
            if peer.role == role:
                return peer

    def _spawn(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            peer = Peer(connection)
            self.peers.append(peer)
            self._spawn(lambda peer=peer: self._serve(peer))

    def _serve(self, peer: Peer) -> None:
        try:
            while (message := peer.read()) is not None:
                peer.received.put(message)
                if not self.hung:
                    with contextlib.suppress(OSError):
                        self._answer(peer, message)
        finally:
            self.peers.remove(peer)
            peer.socket.close()

    def _answer(self, peer: Peer, message: Message) -> None:
        script = self.answers.get(type(message))
        if script is not None:
            answer = script(peer, message)
        elif isinstance(message, Attach):
            self.attached += 1
            name = f"worker:{self.attached}"
            answer = Attached(
                id=message.id,
                worker=name,
                arena_bytes=[1 << 20],
                generation_slots=64,
                gpu_socket=self.gpu_path,
                mode=self.mode,
            )
            peer.send(answer, self.arena.fds)
            return
        else:
            answer = self._usual(peer, message)
        if isinstance(message, Hello) and isinstance(answer, Welcome):
            # Before the answer: the worker's next connection only begins after it, so the order is certain.
            peer.role, peer.worker = message.role, message.worker
            self.joined.put(peer)
        if answer is not None:
            peer.send(answer)

    def _usual(self, peer: Peer, message: Message) -> Message | None:
        self.jobs += 1
        if isinstance(message, Hello):
            return Welcome(id=message.id, version=1, node="fake", epoch=1)
        if isinstance(message, Ping):
            return Pong(id=message.id)
        if isinstance(message, Park):
            return ParkStarted(id=message.id, job=f"j{self.jobs}")
        if isinstance(message, Restore):
            return RestoreStarted(id=message.id, job=f"j{self.jobs}")
        if isinstance(message, MakePlan):
            count = message.after_tokens + len(message.tokens) // 4
            ranges = (TokenRange(0, count, "host"),)
            plan = Plan(f"p{self.jobs}", message.conversation, message.tenant, count, ranges)
            return Planned(id=message.id, plan=plan, front_key=b"f" * 32, front_tokens=count)
        if isinstance(message, Detach | CopiesEnded | DropPlan):
            return DoneMessage(id=message.id)
        return None


class StepEngine(CopyEngine):
    """Batches run from submit until `finish`; cancel ends only those that were `held` in the queue."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running: dict[tuple[str, int], tuple[CopyBatch, Done]] = {}
        self.queued: dict[tuple[str, int], tuple[CopyBatch, Done]] = {}
        self.hold = False
        self.cancelled: list[str] = []
        self.closed = False

    def submit(self, batch: CopyBatch, on_done: Done) -> None:
        with self.lock:
            (self.queued if self.hold else self.running)[batch.job, batch.batch] = (batch, on_done)

    def finish(self, job: str, batch: int = 0) -> None:
        with self.lock:
            found, on_done = self.running.pop((job, batch))
        sums = tuple(7 for _ in found.items)
        on_done(CopyResult(job, batch, True, sums, (), sum(i.nbytes for i in found.items), 0.001))

    def cancel(self, job: str) -> None:
        with self.lock:
            self.cancelled.append(job)
            gone = [key for key in self.queued if key[0] == job]
            ended = [self.queued.pop(key) for key in gone]
        for batch, on_done in ended:
            failed = tuple((i, "cancelled") for i in range(len(batch.items)))
            on_done(CopyResult(batch.job, batch.batch, False, (None,) * len(failed), failed, 0, 0.0))

    def wait_idle(self, timeout_s: float) -> bool:
        end_s = time.monotonic() + timeout_s
        tick = threading.Event()
        while self.busy_jobs() and time.monotonic() < end_s:
            tick.wait(0.001)
        return not self.busy_jobs()

    def busy_jobs(self) -> frozenset[str]:
        with self.lock:
            return frozenset(job for job, _ in [*self.running, *self.queued])

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        assert not self.running, "closed while a copy runs"
        self.closed = True
        return True


@dataclass(frozen=True)
class Model:
    digest: bytes = b"w" * 32
    describe: str = "tiny"


@dataclass
class Wires:
    """The node's ends of one worker's connections."""

    worker: Any
    control: Peer
    events: Peer
    copy: Peer

    def park(self, **options: Any) -> tuple[Any, Park]:
        """Park 40 tokens; (handle, what the node got)."""
        handle = self.worker.park("chat", list(range(40)), [2, 5, 7], tenant="acme", **options)
        return handle, self.control.next(Park)

    def restore(self, deadline_s: float = 30.0) -> tuple[Any, Restore]:
        """Plan and restore 40 tokens; (handle, what the node got)."""
        plan = self.worker.plan("chat", list(range(40)), tenant="acme")
        handle = self.worker.restore_async(plan, [2, 5, 7], deadline_s=deadline_s)
        return handle, self.control.next(Restore)


@dataclass
class Kit:
    """Everything that a test of a worker needs."""

    node: FakeNode
    engines: list[StepEngine]
    pool: Pool
    shard: Shard
    model: Any = Model()

    @property
    def engine(self) -> StepEngine:
        return self.engines[-1]

    def make_engine(self, slots: Any) -> StepEngine:
        self.engines.append(StepEngine())
        return self.engines[-1]

    def connect(self, **options: Any) -> client_module.Client:
        return client_module.connect(self.node.path, **{"backoff": FAST, **options})

    def wires(self, worker: Any) -> Wires:
        """The node's ends of a worker's three connections, which were made last."""
        return Wires(worker, *(self.node.peer(role) for role in ("client", "events", "copy")))

    def runs(self, job: str, batch: int = 0) -> None:
        """Wait until the engine runs this batch."""
        until(lambda: (job, batch) in self.engine.running, f"{job} runs")

    def copy(self, use: Park | Restore, job: str, batch: int = 0, **changes: Any) -> Copy:
        """A batch of one block for the request of this message."""
        direction = "gather" if isinstance(use, Park) else "scatter"
        item = WireItem(0, 0, BLOCK_TOKENS, 0, 0, 1, 0, 0, BLOCK_TOKENS * 2 * ROW_BYTES, 7)
        fields = {"job": job, "batch": batch, "worker": use.worker, "request": use.request}
        return Copy(**{**fields, "direction": direction, "items": [item], **changes})

    @staticmethod
    def open_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    until = staticmethod(until)


def make_pool(pages: int = 8) -> Pool:
    """One layer, K and V, 2 heads of 8 elements of 2 bytes."""
    tensors = [np.zeros((pages, PAGE_TOKENS, 2, 8), np.float16) for _ in range(2)]
    return Pool(describe.paged([tensors], "page token head dim", block_tokens=BLOCK_TOKENS), tensors)


@pytest.fixture
def node() -> Iterator[FakeNode]:
    fake = FakeNode()
    yield fake
    fake.close()


@pytest.fixture
def kit(node: FakeNode) -> Kit:
    return Kit(node, [], make_pool(), Shard(0, 1, 0, 2))


@pytest.fixture
def attached(kit: Kit) -> Iterator[tuple[Kit, Any]]:
    """(kit, worker): attached, with the step engine."""
    with kit.connect() as kv:
        worker = kv.attach(kit.model, kit.pool, shard=kit.shard, make_engine=kit.make_engine)
        yield kit, worker
        for engine in kit.engines:
            for job, batch in list(engine.running):
                engine.finish(job, batch)
        worker.close(wait_s=0)


@pytest.fixture
def wired(attached: tuple[Kit, Any]) -> tuple[Kit, Any, Wires]:
    """(kit, worker, the node's ends of its connections)."""
    kit, worker = attached
    kit.node.peer("client")
    return kit, worker, kit.wires(worker)
