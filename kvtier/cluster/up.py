"""Start the daemon of this node, wait until it is ready, and in the foreground stay until it is to end."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from kvtier import paths
from kvtier.cluster import record as records
from kvtier.cluster.down import Report, clear_stale, end
from kvtier.cluster.launch import LOG, Starter, environment_of, make_token
from kvtier.cluster.orders import Event, Order, RaySettings
from kvtier.cluster.procs import Process, alive, boot_id, identify
from kvtier.cluster.readiness import not_ready
from kvtier.cluster.reconciler import TierRole
from kvtier.cluster.record import Record, with_process
from kvtier.cluster.services import services_for
from kvtier.cluster.state import lock, prepare_dirs, ray_folder
from kvtier.config.schema import Config
from kvtier.errors import KvtierError

NAMESPACE = "kvtier"
CONTROLLER = "controller"
_FAILED_LOGS = "failed-logs"
_PROBE_S = 0.05
_CONNECT_S = 15.0

Probe = Callable[[Config], str]


@dataclass(frozen=True, slots=True)
class UpResult:
    """A daemon that is ready. pids: by name, as they were then.  ready_s: from the call to ready.

    kind: 'private', 'joined' or 'guest' (record.py).
    """

    address: str
    node_id: str
    socket: str
    pids: dict[str, int]
    ready_s: float
    kind: str


def up(
    config: Config,
    *,
    detach: bool,
    address: str | None = None,
    report: Report = lambda line: None,
    timeout_s: float = 60.0,
    services: Mapping[TierRole, str] | None = None,
    probe: Probe = not_ready,
) -> UpResult:
    """Start the daemon of this node and return when it is ready.

    address: of a Ray cluster to join, a private one of kvtier's or as a guest; None takes
    config.ray.address, and '' there begins a private cluster.  With detach=False the call first returns after
    SIGINT, SIGTERM or the daemon's end, when all of it has been ended; only the main thread may ask for that.
    Raises KvtierError, and then nothing that was started is left.
    """
    began_s = time.monotonic()
    prepare_dirs(config)
    with lock(config):
        running = clear_stale(config, report)
        if running is not None:
            run = _Run(config, running.address, services, report)
            return run.resume(running, began_s, timeout_s, probe)
        with _signals(detach) as wakeup:
            run = _Run(config, config.ray.address if address is None else address, services, report)
            try:
                result = run.start(began_s, timeout_s, probe, foreground=not detach)
                if wakeup is not None:
                    report("ready; Ctrl-C ends it")
                    run.hold(wakeup)
            except BaseException:
                _keep_logs(run.record, report)
                end(run.record, config, report)
                raise
            if wakeup is not None:
                end(run.record, config, report)
    return result


class _Run:
    """One `up` on its way: the record grows with what is known."""

    def __init__(
        self, config: Config, address: str, services: Mapping[TierRole, str] | None, report: Report
    ) -> None:
        self.config = config
        self._report = report
        self._services = dict(services or services_for(config))
        # Whether a cluster that runs is one of kvtier's is known once it was asked.
        self._may_start_ray = not address or bool(config.ray.token_file)
        self.record = Record(
            kind="guest" if address else "private",
            boot=boot_id(),
            state_dir=config.node.state_dir,
            runtime_dir=config.node.runtime_dir,
            temp_dir=config.ray_temp_dir if self._may_start_ray else "",
            address=address,
            namespace=NAMESPACE,
            config_text=msgspec.json.encode(config).decode(),
        )

    def start(self, began_s: float, timeout_s: float, probe: Probe, *, foreground: bool) -> UpResult:
        """From nothing to ready."""
        if foreground:
            self._note(replace(self.record, owner=identify(os.getpid())))
        if self._may_start_ray:
            self._make_temp_dir()
            make_token(self.config, self.record.token_path)
        private = self.record.kind == "private"
        where = f"joining the Ray cluster at {self.record.address}"
        self._report("starting a private Ray cluster" if private else where)
        log = Path(self.record.state_dir) / LOG
        with Starter(environment_of(self.config, self.record), log) as starter:
            if self._may_start_ray:
                self._note(replace(self.record, leader=starter.process))
            starter.order(self._order(timeout_s))
            for event in starter.events(timeout_s + _CONNECT_S):
                self._hear(event)
        return self._result(probe, began_s, timeout_s)

    def _result(self, probe: Probe, began_s: float, timeout_s: float) -> UpResult:
        self._wait_probe(probe, began_s + timeout_s)
        self._note(replace(self.record, ready=True))
        return UpResult(
            address=self.record.address,
            node_id=self.record.node_id,
            socket=str(paths.node_socket(self.config.node.runtime_dir)),
            pids={name: process.pid for name, process in self.record.processes},
            ready_s=time.monotonic() - began_s,
            kind=self.record.kind,
        )

    def resume(self, running: Record, began_s: float, timeout_s: float, probe: Probe) -> UpResult:
        """Take a drained node back into service. Raises KvtierError for one that is in service."""
        self.record = replace(running, config_text=self.record.config_text)
        log = Path(running.state_dir) / LOG
        order = msgspec.structs.replace(self._order(timeout_s), ray=None)
        self._report(
            "kvtier runs already" + "".join(f", {name} pid {p.pid}" for name, p in running.processes)
        )
        with Starter(environment_of(self.config, running), log) as starter:
            starter.order(order)
            for event in starter.events(timeout_s + _CONNECT_S):
                self._hear(event)
        return self._result(probe, began_s, timeout_s)

    def hold(self, wakeup: socket.socket) -> None:
        """Wait for a signal, or for the end of one of Ray's own processes, which leaves a half daemon."""
        vital = [p for name, p in self.record.processes if name in self.record.vital]
        handles: dict[int, Process] = {}
        try:
            for process in vital:
                with contextlib.suppress(ProcessLookupError):
                    handles[os.pidfd_open(process.pid)] = process
            lost = [process for process in vital if not alive(process)]
            if not lost:
                woken, _, _ = select.select([wakeup.fileno(), *handles], [], [])
                lost = [handles[entry] for entry in woken if entry in handles]
            if lost:
                raise KvtierError(f"Ray's process {lost[0].pid} ended", fix="see Ray's logs")
        finally:
            for handle in handles:
                os.close(handle)

    def _order(self, timeout_s: float) -> Order:
        ray = self.config.ray
        return Order(
            task="start",
            namespace=NAMESPACE,
            controller=CONTROLLER,
            address=self.record.address,
            name=self.config.node.name,
            ray=RaySettings(
                temp_dir=ray_folder(self.record.temp_dir),
                object_store_bytes=ray.object_store_bytes,
                listen=ray.listen,
                port_first=ray.port_first,
                port_count=ray.port_count,
            )
            if self._may_start_ray
            else None,
            node=self.record.node_id,
            services=tuple(self._services.items()),
            config_text=self.record.config_text.encode(),
            grace_s=self.config.node.grace_s,
            timeout_s=timeout_s,
        )

    def _hear(self, event: Event) -> None:
        record = self.record
        for name, pid in event.pids.items():
            process = identify(pid)
            if process is not None:
                record = with_process(record, name, process)
        if event.kind in ("head", "joined"):
            kind = "private" if event.kind == "head" else "joined"
            record = replace(record, kind=kind, address=event.address, session_dir=event.session_dir)
            self._report(f"Ray runs at {event.address}" + (", with this node" if kind == "joined" else ""))
        elif event.kind == "connected":
            record = replace(record, node_id=event.node_id, controller=event.controller)
        elif event.kind == "actor":
            self._report(event.text)
        if record != self.record:
            self._note(record)

    def _wait_probe(self, probe: Probe, deadline_s: float) -> None:
        told = ""
        while lacking := probe(self.config):
            if lacking != told:
                told = lacking
                self._report(f"waiting: {lacking}")
            if time.monotonic() >= deadline_s:
                raise KvtierError(f"not ready in time: {lacking}", fix="see the logs of Ray's workers")
            time.sleep(_PROBE_S)

    def _make_temp_dir(self) -> None:
        made = not os.path.isdir(self.record.temp_dir)
        self._note(replace(self.record, made_temp_dir=made))
        os.makedirs(self.record.temp_dir, mode=0o700, exist_ok=True)

    def _note(self, record: Record) -> None:
        self.record = record
        records.save(record)


def _keep_logs(record: Record, report: Report) -> None:
    """Ray's folder is about to go, and with it what explains the failure."""
    logs = Path(record.session_dir, "logs")
    if not record.session_dir or not logs.is_dir():
        return
    kept = Path(record.state_dir, _FAILED_LOGS)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(logs, kept, symlinks=True)
    report(f"Ray's logs are kept in {kept}")


@contextlib.contextmanager
def _signals(detach: bool) -> Iterator[socket.socket | None]:
    """In the foreground: a socket that gets readable with SIGINT or SIGTERM, instead of what they did."""
    if detach:
        yield None
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handlers = {
        number: signal.signal(number, lambda number, frame: None)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
