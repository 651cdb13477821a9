"""The GPU tier's service: keeps the schedule of copies between pools and host memory.

In mode 'worker' it tells the worker's process what to copy when; in mode 'shared' it maps the worker's pool
and copies itself.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

from kvtier import __version__, paths
from kvtier.breaker import CHANCE, Backoff
from kvtier.config.load import Config
from kvtier.daemon.connection import Connection, Listener, Peer, access_of, failed, welcome
from kvtier.daemon.copy_desk import CopyDesk
from kvtier.daemon.gpu_copies import LATE_S, GpuCopies, on_a_gpu
from kvtier.daemon.gpu_maps import Closing, GpuMaps
from kvtier.daemon.joining import join_node
from kvtier.daemon.loop import Loop, LoopThread
from kvtier.errors import GeometryError, KvtierError, ProtocolError
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.cuda.ipc import EventRings
from kvtier.gpu.cuda.make import device_of
from kvtier.gpu.engine import CLOSE_S, CopyEngine, CopyResult, SlotMemory
from kvtier.gpu.schedule import Bounds
from kvtier.host.arena import ArenaView
from kvtier.messages.calls import Hello, Message
from kvtier.messages.tiers import (
    CancelCopies,
    Copied,
    Copy,
    GpuUsage,
    PoolJoined,
    PoolLeft,
    PoolProbed,
    PoolProven,
    ProbePool,
    TierHello,
)
from kvtier.messages.wire import Channel, close_all

log = logging.getLogger(__name__)

_TICK_S = 0.05
_CALL_S = 2.0
_RECONNECT = Backoff(first_s=0.02, limit_s=0.5)
# Copies are cut off at their end by then, and memory is freed.
_QUIET_S = 1.0
# Jobs whose batches a worker may have at once: a restore does not wait for a park's to end.
_JOBS = 2


MakeEngine: TypeAlias = Callable[[SlotMemory], CopyEngine]


@dataclass(slots=True)
class _Node:
    """One connection to the node, its host memory, and what is copied here between that and pools."""

    channel: Channel
    arena: ArenaView
    copies: GpuCopies
    takes_usage: bool

    def close(self) -> bool:
        """Give back what it holds, once no copy touches it; False when one does after CLOSE_S."""
        if not self.copies.close():
            return False
        self.arena.close()
        return True


class GpuService:
    """Serves the node of the same runtime_dir, and workers at `<runtime_dir>/gpu.sock`."""

    def __init__(
        self,
        config: Config,
        make_engine: MakeEngine | None = None,
        make_maps: Callable[[SlotMemory], GpuMaps] | None = None,
    ) -> None:
        """make_engine: makes the engine that copies pools in host memory in mode 'shared'; by default the
        CPU's.  make_maps: makes what copies those on GPUs there; by default on this machine's."""
        self._config = config
        self._make_engine = make_engine or self._cpu_engine
        # A device is made once: making it again would load its kernels again, and find its context there.
        self._make_maps = make_maps or partial(GpuMaps, find=cache(device_of), rings=EventRings())
        self._probes: dict[str, ProbePool] = {}
        self._node: _Node | None = None
        self._modes: dict[str, str] = {}
        self._workers: dict[str, Connection] = {}
        self._lost: list[Closing] = []
        self._said = GpuUsage()
        self._due_s = 0.0
        self._attempts = 0
        self._failure = ""
        self._desk = self._new_desk()

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen for workers and return; the node is looked for from now on. Raises KvtierError."""
        self._loop = Loop(_TICK_S, self._tick)
        self._path = paths.gpu_socket(self._config.node.runtime_dir)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._listener = Listener(self._loop, self._path, access_of(self._config), self._join)
        except BaseException:
            self._loop.close()
            raise
        self._thread = LoopThread(self._loop, "kvtier-gpu", self._close)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """End; running copies end first, within the time."""
        self._thread.stop(grace_s)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the service ended within the time."""
        return self._thread.wait(timeout_s)

    def health(self) -> dict[str, Any]:
        """Alive, and serving a node."""
        failure = repr(self._thread.failure) if self._thread.failure else self._failure
        return {"alive": not self._thread.wait(0), "ready": self._node is not None, "failure": failure}

    def _close(self) -> None:
        self._lose_node("the service ends")
        end_s = time.monotonic() + CLOSE_S
        for closing in self._lost:
            closing.over(max(0.0, end_s - time.monotonic()))
        self._listener.close()

    # --- the node ---------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._node is not None:
            self._say_usage(self._node)
            return
        self._lost = [closing for closing in self._lost if not closing.over()]
        # That it connects again tells the node that no copy of the connection before runs.
        if self._lost:
            self._say_lost(self._lost[0])
            return
        if time.monotonic() < self._due_s:
            return
        try:
            self._find_node()
        except (KvtierError, OSError) as error:
            self._failure = str(error)
            self._attempts += 1
            self._due_s = time.monotonic() + _RECONNECT.delay_s(self._attempts, CHANCE())

    def _find_node(self) -> None:
        path = str(paths.node_socket(self._config.node.runtime_dir))
        greeting = TierHello(pid=os.getpid(), address=str(self._path))
        channel, arena, said = join_node(path, "gpu", greeting, _CALL_S)
        try:
            engine, maps = self._make_engine(arena), self._make_maps(arena)
        except BaseException:
            channel.close()
            arena.close()
            raise
        copies = GpuCopies(engine, maps, self._ended, self._tell_worker)
        self._node = _Node(channel, arena, copies, said.takes_gpu_usage)
        self._said = GpuUsage()
        self._failure, self._attempts = "", 0
        self._loop.watch(channel.fileno(), self._hear)
        self._hear()

    def _hear(self) -> None:
        node = self._node
        if node is None:
            return
        try:
            for message, fds in node.channel.recv_ready():
                self._told(message, fds)
        except KvtierError as error:
            self._lose_node(str(error))

    def _told(self, message: Message, fds: list[int]) -> None:
        now_s = time.monotonic()
        if isinstance(message, PoolJoined):
            self._pool_joined(message, fds)
            return
        close_all(fds)
        if isinstance(message, Copy) and self._node is not None:
            self._node.copies.heard(message)
        if isinstance(message, Copy) and self._modes.get(message.worker) == "unmapped":
            self._tell_node(_failed(message, "the worker's pool could not be mapped"))
        elif isinstance(message, Copy):
            self._desk.asked(message, now_s)
        elif isinstance(message, CancelCopies):
            self._desk.cancelled(message.job, now_s)
        elif isinstance(message, PoolLeft):
            self._pool_left(message.worker)
        else:
            raise ProtocolError(f"the GPU service does not take {type(message).__name__}")

    def _lose_node(self, why: str) -> None:
        """Without the node nothing that is queued has a meaning: workers attach again when it is back."""
        node, self._node = self._node, None
        if node is None:
            return
        self._failure = why
        if node.channel.fileno() >= 0:
            self._loop.unwatch(node.channel.fileno())
        for connection in list(self._workers.values()):
            connection.close()
        self._desk = self._new_desk()
        self._modes.clear()
        self._probes.clear()
        node.channel.close()
        self._lost.append(Closing("kvtier-gpu-end", node.close))

    def _say_lost(self, closing: Closing) -> None:
        why = "copies of a lost node do not end: the streams of a worker may stand still, or a device hang"
        if self._failure != why and time.monotonic() - closing.since_s > _QUIET_S:
            self._failure = why
            log.error("%s; nothing is unmapped, and no node joined, until they do", why)

    def _say_usage(self, node: _Node) -> None:
        """Tell the node what copying takes here, and log who is late, when it changes."""
        now_s, before = time.monotonic(), self._said
        late, mapping = node.copies.late(now_s), node.copies.mapping(now_s)
        stuck = node.copies.stuck(now_s)
        for worker in sorted(set(stuck) - set(before.unmapping)):
            log.error("unmapping the pool of %s takes more than %g s: its device may hang", worker, LATE_S)
        for worker in sorted(set(mapping) - set(before.late)):
            log.error("mapping the pool of %s takes more than %g s: its device may hang", worker, LATE_S)
        for worker in sorted(set(late) - set(before.late)):
            log.error(
                "a copy of %s has run for more than %g s: the stream of the worker's process that it waits "
                "for may stand still; others' copies go on",
                worker,
                LATE_S,
            )
        maps = node.copies.maps
        said = GpuUsage(
            workers=maps.device_bytes,
            context_bytes=maps.context_bytes,
            late=sorted({*late, *mapping}),
            unmapping=stuck,
        )
        if said != self._said:
            self._said = said
            if node.takes_usage:
                self._tell_node(said)

    def _tell_node(self, message: Message) -> None:
        if self._node is None:
            return
        try:
            self._node.channel.send(message, time.monotonic() + _CALL_S)
        except KvtierError as error:
            self._loop.call(partial(self._lose_node, str(error)))

    # --- workers ----------------------------------------------------------------------------------------

    def _join(self, connection: Connection, peer: Peer, greeting: Hello) -> None:
        os.close(peer.pidfd)
        if greeting.role != "copy" or not greeting.worker:
            error = ProtocolError("only workers connect here, to copy", fix=f"connect to {paths.NODE_SOCKET}")
            connection.send(failed(error, greeting.id))
            connection.close()
            return
        worker = greeting.worker
        connection.on_message = partial(self._worker_said, worker)
        # Later, since a send may close a connection in the middle of the desk's work.
        connection.on_close = lambda: self._loop.call(partial(self._worker_closed, worker, connection))
        connection.send(welcome(greeting, self._config.node.name, 0, __version__))
        before, self._workers[worker] = self._workers.get(worker), connection
        if before is not None:
            before.close()
        # It probes again over this one, into the same pages.
        self._probes.pop(worker, None)
        if self._node is not None:
            self._node.copies.maps.outdate(worker)
        self._meet(worker)

    def _meet(self, worker: str) -> None:
        """A worker can copy once both it and the node have spoken of it."""
        if self._modes.get(worker) == "worker" and worker in self._workers:
            self._desk.joined(worker, time.monotonic())

    def _worker_said(self, worker: str, message: Message, fds: list[int]) -> None:
        close_all(fds)
        if isinstance(message, Copied) and self._modes.get(worker) == "worker":
            self._desk.copied(message, time.monotonic(), worker)
        elif isinstance(message, ProbePool):
            self._probes[worker] = message
            self._probe(worker)
        elif isinstance(message, PoolProven) and self._modes.get(worker) == "mapping":
            self._proven(worker, message.ok)
        elif isinstance(message, PoolProven) and self._modes.get(worker) == "shared" and not message.ok:
            # A probe that came again, over a new connection.
            self._proven(worker, False)

    def _probe(self, worker: str) -> None:
        """A pool is mapped once both its worker and the node have spoken of it."""
        node, connection = self._node, self._workers.get(worker)
        if node is None or connection is None or worker not in node.copies.maps or worker not in self._probes:
            return

        def answered(answer: PoolProbed) -> None:
            self._loop.call(partial(self._probed, node, connection, worker, answer))

        node.copies.maps.probe(worker, self._probes.pop(worker), answered)

    def _probed(self, node: _Node, connection: Connection, worker: str, answer: PoolProbed) -> None:
        """A probe's outcome, unless worker or node are gone, or a new connection brings another."""
        if self._node is not node or self._workers.get(worker) is not connection or worker not in self._modes:
            return
        if not answer.ok:
            self._proven(worker, False, answer.detail)
        connection.send(answer)

    def _proven(self, worker: str, ok: bool, why: str = "the worker sees other memory in it") -> None:
        """From now on a mapped pool is used; or never again, and unmapped once no copy runs in it."""
        self._modes[worker] = "shared" if ok else "unmapped"
        if ok:
            self._desk.joined(worker, time.monotonic())
            return
        log.warning("the pool of %s is not mapped, and its process has to copy: %s", worker, why)
        self._desk.gone(worker, time.monotonic())
        if self._node is not None:
            self._node.copies.leave(worker, lambda: None)

    def _tell_worker(self, worker: str, message: Message) -> None:
        """Called from any thread."""
        self._loop.call(partial(self._say_to, worker, message))

    def _say_to(self, worker: str, message: Message) -> None:
        if worker in self._workers:
            self._workers[worker].send(message)

    def _worker_closed(self, worker: str, connection: Connection) -> None:
        if self._workers.get(worker) is connection:
            del self._workers[worker]
            if self._modes.get(worker) == "worker":
                self._desk.gone(worker, time.monotonic())

    def _pool_joined(self, message: PoolJoined, fds: list[int]) -> None:
        if self._node is not None and on_a_gpu(message):
            close_all(fds)
            self._node.copies.maps.said(message.worker, message.pool)
            self._modes[message.worker] = "mapping"
            self._probe(message.worker)
            return
        if self._node is not None and message.mode == "shared":
            try:
                self._node.copies.attach(message, fds)
            except (GeometryError, OSError) as error:
                log.warning("the pool of %s cannot be mapped: %s", message.worker, error)
                self._modes[message.worker] = "unmapped"
                return
            self._modes[message.worker] = "shared"
            self._desk.joined(message.worker, time.monotonic())
            return
        close_all(fds)
        self._modes[message.worker] = "worker"
        self._meet(message.worker)

    def _pool_left(self, worker: str) -> None:
        self._modes.pop(worker, None)
        self._probes.pop(worker, None)
        self._desk.gone(worker, time.monotonic())
        if self._node is not None:
            self._node.copies.leave(worker, partial(self._drop, worker))

    def _drop(self, worker: str) -> None:
        connection = self._workers.pop(worker, None)
        if connection is not None:
            connection.close()

    # --- copies -----------------------------------------------------------------------------------------

    def _new_desk(self) -> CopyDesk:
        batches = _JOBS * self._config.gpu.batches_in_flight
        bounds = Bounds(max_batches=batches, max_bytes=batches * self._config.gpu.batch_bytes)
        return CopyDesk(self._carry_out, self._cancel, self._tell_node, bounds)

    def _carry_out(self, copy: Copy) -> None:
        if self._modes.get(copy.worker) == "worker":
            self._workers[copy.worker].send(copy)
            return
        node = self._node
        assert node is not None, "copies are only asked for by a node"
        try:
            node.copies.begin(copy)
        except KvtierError as error:
            self._loop.call(partial(self._finish, _failed(copy, str(error))))

    def _ended(self, copies: GpuCopies, worker: str, result: CopyResult) -> None:
        """Called from an engine's thread."""
        self._loop.call(partial(self._over, copies, worker, result))

    def _over(self, copies: GpuCopies, worker: str, result: CopyResult) -> None:
        if self._node is not None and copies is self._node.copies:
            self._finish(copies.over(worker, result))

    def _finish(self, answer: Copied) -> None:
        # A worker that left is not on the desk any more, but its node waits for the end of this copy.
        if not self._desk.copied(answer, time.monotonic()):
            self._tell_node(answer)

    def _cancel(self, worker: str, message: CancelCopies) -> None:
        if self._modes.get(worker) == "worker":
            if worker in self._workers:
                self._workers[worker].send(message)
        elif self._node is not None:
            self._node.copies.cancel(worker, message.job)

    def _cpu_engine(self, slots: SlotMemory) -> CopyEngine:
        return CpuCopyEngine(slots, threads=self._config.gpu.copy_threads)


def _failed(copy: Copy, why: str) -> Copied:
    failed = [(index, f"error: {why}") for index in range(len(copy.items))]
    return Copied(job=copy.job, batch=copy.batch, ok=False, failed=failed)
