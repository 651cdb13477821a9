"""The node's own service: owns host memory, the core and the node's socket."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvtier import __version__, paths
from kvtier.carriage import Bytes, Carrier, Passing
from kvtier.config.load import Config
from kvtier.config.secrets import tenant_secret
from kvtier.daemon.connection import Connection, Listener, Peer, access_of, failed, welcome
from kvtier.daemon.host_memory import make_host
from kvtier.daemon.loop import Loop, LoopThread
from kvtier.daemon.policies import configured_policies
from kvtier.daemon.policy_state import PolicyState
from kvtier.daemon.question import Question
from kvtier.daemon.stimulus_log import StimulusLog
from kvtier.errors import GeometryError, KvtierError, ProtocolError
from kvtier.messages.calls import Attach, Attached, Hello, Message
from kvtier.messages.cluster import DIRECTORY, SERVICE, Drain
from kvtier.messages.tiers import PoolJoined, pool_descriptors
from kvtier.messages.wire import close_all
from kvtier.node.core import NodeCore
from kvtier.node.events import (
    ArenaGrew,
    EventsJoined,
    Left,
    ProcessEnded,
    Received,
    Remembered,
    Send,
    Stimulus,
    Tick,
)
from kvtier.node.journal import JournaledCore, Origin
from kvtier.node.settings import NodeSettings

if TYPE_CHECKING:
    from kvtier.daemon.http import HealthServer
    from kvtier.daemon.peer_desk import PeerDesk

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

# Leases and deadlines are looked at this often.
_TICK_S = 0.02
_SERVICES = ("disk", "gpu")
# Events that wait for a worker that has attached and has not opened its connection for them yet.
_UNSENT_MOST = 10_000
# What waits to be logged has this long at the end.
_LOG_GRACE_S = 10.0


@dataclass(slots=True)
class _Link:
    """A connection that has joined. service: of a tier.  gone: closed, but its process may live."""

    name: str
    connection: Connection
    peer: Peer
    service: bool
    gone: bool = False


class NodeService:
    """Serves workers, clients and tier services at `<runtime_dir>/node.sock`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._links: dict[str, _Link] = {}
        self._events: dict[str, Connection] = {}
        self._unsent: dict[str, deque[Message]] = {}
        self._pool_fds: dict[str, list[int]] = {}
        self._arriving_fds: list[int] = []
        self._serial = 0
        self._log: StimulusLog | None = None
        self._endpoints: HealthServer | None = None
        self._turn_asked = False
        self._desk: PeerDesk | None = None
        self._carrier: Carrier | None = None

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take memory, listen, and return. Raises KvtierError when the settings do not work here."""
        config = self._config
        secret = tenant_secret(config)
        self._make_runtime_dir()
        self._loop = Loop(_TICK_S, self._tick)
        # Milliseconds: greater than at any earlier start, also after kill -9.
        self._epoch = time.time_ns() // 1_000_000
        with contextlib.ExitStack() as undo:
            undo.callback(self._loop.close)
            self._host = make_host(config, self._epoch, self._grew)
            undo.callback(self._host.close)
            self._make_core(secret, undo)
            self._kept = PolicyState(Path(config.node.state_dir), config.policy.keep_learned_s)
            self._tell(time.time(), Remembered(self._kept.read()))
            self._join_cluster(undo)
            self._listener = Listener(
                self._loop, paths.node_socket(config.node.runtime_dir), access_of(config), self._join
            )
            undo.callback(self._listener.close)
            if config.metrics.enabled:
                # Only here: what serves metrics is not installed where the daemon is embedded.
                from kvtier.daemon.endpoints import serve_endpoints

                self._endpoints = serve_endpoints(config, self.ask, self._loop.still_s)
                self._core.state.metrics_url = self._endpoints.url
            undo.pop_all()
        self._thread = LoopThread(self._loop, "kvtier-node", self._close)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """End; workers see misses from now on."""
        self._thread.stop(grace_s)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the service ended within the time."""
        return self._thread.wait(timeout_s)

    def health(self) -> dict[str, Any]:
        """Alive, ready, and where it serves."""
        failure = self._thread.failure
        report = self.ask(NodeCore.status)
        return {
            "alive": not self._thread.wait(0),
            "ready": report is not None and report.ready,
            "failure": repr(failure) if failure else "",
            "metrics_url": self._endpoints.url if self._endpoints else "",
        }

    def drain(self, within_s: float) -> dict[str, Any]:
        """Go out of service; see cluster.actors.Drains. Any thread."""
        self._tell_soon(SERVICE, Drain(within_s=within_s))
        progress = self.ask(lambda core: core.cluster.draining.progress())
        if progress is None:
            raise KvtierError("the node's loop does not answer")
        return asdict(progress)

    def carry_by(self, carrier: Carrier) -> None:
        """See cluster.actors.Calls."""
        self._carrier = carrier

    def carried(self, call: Passing) -> Bytes | None:
        """See cluster.actors.Called. Any thread."""
        return self._desk.carried(call) if self._desk is not None else None

    def ask(self, question: Callable[[NodeCore], Answer]) -> Answer | None:
        """Have the loop's thread put a question to the core; None when it does not answer. Any thread."""
        return Question(question).put(self._loop, self._core)

    def _make_runtime_dir(self) -> None:
        access = self._config.access
        open_to_others = bool(access.allowed_uids or access.token_file)
        folder = Path(self._config.node.runtime_dir)
        try:
            folder.mkdir(mode=0o755 if open_to_others else 0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise KvtierError(
                f"cannot make {folder}: {error.strerror}", fix="choose another node.runtime_dir"
            ) from error

    def _make_core(self, secret: bytes, undo: contextlib.ExitStack) -> None:
        """The core, and `_tell`, which gives it stimuli and keeps the journal if one is wanted."""
        config = self._config
        seed = int.from_bytes(os.urandom(8), "little")
        sizes = list(self._host.sizes[:-1])
        settings = NodeSettings(
            node=config.node.name,
            batch_bytes=config.gpu.batch_bytes,
            batches_in_flight=config.gpu.batches_in_flight,
            plan_lease_s=config.leases.plan_s,
            copy_lease_s=config.leases.copy_s,
            verify=config.host.verify == "always",
            software=__version__,
            disk_expected=config.disk.enabled,
            spill_above=config.host.spill_above,
            host_pages=self._host.pages,
            ask_elsewhere_s=config.cluster.ask_s if config.cluster.listen else 0.0,
            tenant_codecs=tuple((name, t.codec) for name, t in sorted(config.tenants.items()) if t.codec),
            retire_after_s=config.policy.retire_after_s,
            prefetch_s=config.policy.prefetch_s,
            failure_domain=config.cluster.failure_domain or platform.node(),
            move_bytes_per_s=config.cluster.move_bytes_per_s,
            rebalance_bytes_per_s=config.cluster.rebalance_bytes_per_s,
            transport=config.cluster.transport,
        )
        self._core = NodeCore(
            settings,
            self._host,
            configured_policies(config),
            secret,
            random.Random(seed),
            epoch=self._epoch,
            arena_bytes=sizes,
            generation_slots=self._host.generation_slots,
        )
        self._tell: Callable[[float, Stimulus], list[Send]] = self._core.handle
        if config.log.stimulus_log == "off":
            return
        self._log = StimulusLog(Path(config.log.stimulus_log))
        self._log.open()
        undo.callback(self._log.close, _LOG_GRACE_S)
        digest = hashlib.sha256(secret).hexdigest()
        origin = Origin(settings, digest, seed, self._epoch, tuple(sizes), self._host.generation_slots)
        self._tell = JournaledCore(self._core, origin, self._log.write).handle

    def _join_cluster(self, undo: contextlib.ExitStack) -> None:
        """Other nodes find this one from here on, if it is to be found."""
        if not self._config.cluster.listen:
            return
        # Only here: a node that is alone needs nothing of it.
        from kvtier.daemon.peer_desk import PeerDesk

        desk = PeerDesk(self._config, self._epoch, self._host, self._tell_soon, self._look, self._carrier)
        undo.callback(desk.close)
        self._tell(time.time(), Received(DIRECTORY, desk.graves()))
        desk.start()
        self._desk = desk

    def _tell_soon(self, peer: str, message: Message) -> None:
        """From any thread."""
        self._loop.call(lambda: self._handle(Received(peer, message)))

    def _look(self, look: Callable[[NodeCore], None]) -> None:
        """From any other thread: have the loop's thread look at the core, and wait until it did."""
        Question(look).put(self._loop, self._core)

    def _close(self) -> None:
        """In the loop's thread, after its end."""
        if self._desk is not None:
            self._desk.close()
        if self._endpoints is not None:
            self._endpoints.close()
        for link in self._links.values():
            # The core is told of no end any more: nobody carries out what it would answer.
            link.connection.on_close = lambda: None
        self._listener.close()
        for link in self._links.values():
            os.close(link.peer.pidfd)
        for fds in self._pool_fds.values():
            close_all(fds)
        self._host.close()
        self._kept.close(self._core.learned())
        if self._log is not None:
            self._log.close(_LOG_GRACE_S)

    # --- connections ------------------------------------------------------------------------------------

    def _join(self, connection: Connection, peer: Peer, hello: Hello) -> None:
        refusal = self._refusal(hello)
        if refusal is not None:
            os.close(peer.pidfd)
            connection.send(failed(refusal, hello.id))
            connection.close()
            return
        self._serial += 1
        name = f"{hello.role}:{self._serial}"
        link = _Link(name, connection, peer, service=hello.role in _SERVICES)
        self._links[name] = link
        connection.on_close = lambda: self._left(link)
        connection.on_message = lambda message, fds: self._message(link, message, fds)
        self._loop.watch(peer.pidfd, lambda: self._ended(link))
        # From here on: whoever greets and leaves at once closes the connection in the middle of a send.
        connection.send(welcome(hello, self._config.node.name, self._epoch, __version__))
        if hello.role == "events" and not connection.closed:
            self._events[hello.worker] = connection
            for message in self._unsent.pop(hello.worker, ()):
                connection.send(message)
            self._handle(EventsJoined(hello.worker, peer.pid))

    def _refusal(self, hello: Hello) -> KvtierError | None:
        if hello.role == "copy":
            return ProtocolError(
                "copies are not carried over this socket", fix="connect to what Attached.gpu_socket names"
            )
        if hello.role == "events" and not self._attached(hello.worker):
            return ProtocolError(f"worker '{hello.worker}' is not attached", fix="attach first")
        return None

    def _message(self, link: _Link, message: Message, fds: list[int]) -> None:
        if isinstance(message, Attach) and len(fds) != pool_descriptors(message.mode, message.pool):
            close_all(fds)
            error = GeometryError(
                f"{len(fds)} descriptors came with a pool in mode '{message.mode}'",
                fix="attach with a SharedPool for mode 'shared', which comes with one",
            )
            link.connection.send(failed(error, message.id))
            return
        self._arriving_fds = fds
        self._handle(Received(link.name, message))
        close_all(self._arriving_fds)
        self._arriving_fds = []

    def _left(self, link: _Link) -> None:
        link.gone = True
        self._events = {worker: c for worker, c in self._events.items() if c is not link.connection}
        self._handle(Left(link.name))
        if not self._may_copy(link):
            self._forget(link)

    def _ended(self, link: _Link) -> None:
        """The process behind a connection is gone."""
        if not link.gone:
            link.connection.close()
        self._forget(link)
        self._handle(ProcessEnded(link.name))

    def _may_copy(self, link: _Link) -> bool:
        """Whether slots wait for the end of the process behind a connection that is closed."""
        workers = self._core.state.workers.values()
        return link.service or any(w.peer == link.name and w.jobs for w in workers)

    def _tick(self) -> None:
        self._handle(Tick())
        if self._log is not None and self._log.ended:
            # From here on nothing is logged, so that no replay has to know of it.
            self._core.state.log_ended, self._core.state.log_lost = self._log.ended, self._log.lost
        self._kept.tend(time.monotonic(), self._core.learned)
        for link in [link for link in self._links.values() if link.gone]:
            if not self._may_copy(link):
                self._forget(link)

    def _forget(self, link: _Link) -> None:
        if self._links.pop(link.name, None) is not None:
            self._loop.unwatch(link.peer.pidfd)
            os.close(link.peer.pidfd)

    # --- the core ---------------------------------------------------------------------------------------

    def _grew(self, sub_arena: int, ready_bytes: int) -> None:
        """From the prefault thread."""
        self._loop.call(lambda: self._handle(ArenaGrew(sub_arena, ready_bytes)))

    def _handle(self, stimulus: Stimulus) -> None:
        for send in self._tell(time.time(), stimulus):
            self._carry_out(send)
        if not isinstance(stimulus, Tick):
            self._drop_pools()
        if self._core.has_more() and not self._turn_asked:
            self._turn_asked = True
            self._loop.call(self._turn)

    def _turn(self) -> None:
        """The core goes on with what it does in parts; between them sockets have their turn."""
        self._turn_asked = False
        self._handle(Tick())

    def _attached(self, worker: str) -> bool:
        found = self._core.state.workers.get(worker)
        return found is not None and found.connected

    def _drop_pools(self) -> None:
        """Workers that left: the core tells the GPU service of them, if there is one just then."""
        for worker in [worker for worker in self._pool_fds if not self._attached(worker)]:
            close_all(self._pool_fds.pop(worker))
            self._unsent.pop(worker, None)

    def _carry_out(self, send: Send) -> None:
        message = send.message
        if self._desk is not None and self._desk.takes(send.peer):
            self._desk.carry_out(send)
            return
        if isinstance(message, Attached):
            self._pool_fds[message.worker], self._arriving_fds = self._arriving_fds, []
        if send.peer.startswith("worker:"):
            self._to_worker(send.peer, message)
        else:
            link = self._links.get(send.peer)
            if link is not None and not link.gone:
                link.connection.send(message, self._fds_for(send))

    def _to_worker(self, worker: str, message: Message) -> None:
        connection = self._events.get(worker)
        if connection is not None:
            connection.send(message)
        elif worker in self._pool_fds:
            waiting = self._unsent.setdefault(worker, deque())
            waiting.append(message)
            if len(waiting) == _UNSENT_MOST:
                log.warning("%s does not listen to its events, and is let go", worker)
                self._loop.call(partial(self._let_go, worker))

    def _let_go(self, worker: str) -> None:
        """End the connection that a worker attached with, and with it the worker."""
        found = self._core.state.workers.get(worker)
        link = self._links.get(found.peer) if found is not None else None
        if link is not None and not link.gone:
            link.connection.close()

    def _fds_for(self, send: Send) -> list[int]:
        if send.fds == "arenas":
            return list(self._host.fds)
        if send.fds == "pool" and isinstance(send.message, PoolJoined):
            return self._pool_fds.get(send.message.worker, [])
        return []
