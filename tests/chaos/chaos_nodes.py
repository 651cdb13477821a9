"""The nodes of the chaos run: services as processes of their own, a link between each two, and who starts
again what died, as the reconciler would.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from chaos_damage import Excuses, Kind, damage
from chaos_features import NO_FEATURES, Features
from chaos_wires import State, Wire, Wires

from kvtier.client.client import Client, connect
from kvtier.errors import DaemonNotFound
from kvtier.receipts import StatusReport
from kvtier.testing.certificates import make_authority, make_certificate
from kvtier.testing.node_bench import status
from kvtier.testing.service_processes import ServiceProcesses
from kvtier.waiting import wait_until

NAMES = ("a", "b", "c")
_DIRECTORIES = ("a", "b")
_PEERS_PORT, _DIRECTORY_PORT = 7200, 7201
_START_S, _HEALED_S = 180.0, 180.0
SETTINGS: dict[str, Any] = {
    "host.capacity_bytes": 2 << 20,
    "disk.capacity_bytes": 512 << 20,
    "disk.segment_bytes": 4 << 20,
    "disk.scrub_bytes_per_s": 0,
    "gpu.batch_bytes": 64 << 10,
    "leases.copy_s": 2.0,
    "leases.plan_s": 5.0,
    "cluster.shards": 4,
    "cluster.ask_s": 0.5,
    "cluster.lost_after_s": 3.0,
    "node.grace_s": 5.0,
}


class Broken(AssertionError):
    """The daemon did what it must not do."""


class Node:
    """One node. All methods from any thread, one at a time."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], runner: Sequence[str]) -> None:
        self.name, self.folder = name, folder
        self.services = ServiceProcesses(folder, settings, runner=runner)
        self._lock = threading.Lock()
        self._stopped: set[int] = set()
        self._client: Client | None = None
        # By time.monotonic(): when it last had lost what only its memory held.
        self.harmed_s = 0.0
        self.excuses = Excuses()

    @property
    def path(self) -> str:
        """Of its socket."""
        return self.services.socket_path

    @property
    def names(self) -> list[str]:
        """Its services."""
        return self.services.names

    def processes(self) -> dict[str, int]:
        """Pid by service, of those that run."""
        with self._lock:
            return {
                name: self.services.pid(name) for name, end in self.services.running().items() if end is None
            }

    @property
    def client(self) -> Client:
        """For the driver's own questions."""
        if self._client is None:
            self._client = connect(self.path, required=False, timeout_s=5.0)
        return self._client

    def begin(self) -> None:
        """Start everything for the first time."""
        self.services.__enter__()

    def kill(self, *services: str) -> None:
        """SIGKILL those that run, all at once; none named: all. Raises Broken where one ended by itself."""
        with self._lock:
            self._raise_ended()
            running = self.services.running()
            chosen = [name for name in services or running if name in running]
            for name in chosen:
                os.kill(self.services.pid(name), signal.SIGKILL)
            for name in chosen:
                self.services.kill(name)
            if "node" in chosen:
                self.harmed_s = time.monotonic()

    def damage(self, kind: Kind, seed: float) -> None:
        """Of its store; what is not done to a running service is done to one that was killed for it."""
        with self._lock:
            self._raise_ended()
            if kind != "live flip" and "disk" in self.services.running():
                self.services.kill("disk")
            store = Path(self.services.config.disk_directory)
            self.excuses.more(damage(store, kind, random.Random(seed)))

    def stop(self, service: str) -> None:
        """SIGSTOP, if it runs."""
        with self._lock:
            if self.services.running().get(service, 0) is None:
                self._stopped.add(self.services.pid(service))
                os.kill(self.services.pid(service), signal.SIGSTOP)

    def go_on(self, service: str) -> None:
        """SIGCONT, if it was stopped."""
        with self._lock:
            if service in self.services.running():
                self._go_on(self.services.pid(service))

    def out_of_service(self) -> None:
        """No new parks; what only memory holds is being written."""
        with self._lock:
            if self.services.running().get("node", 0) is None:
                os.kill(self.services.pid("node"), signal.SIGUSR2)

    def leave(self) -> None:
        """End politely. Raises Broken where one of them does not end."""
        with self._lock:
            try:
                self.services.stop_all()
            except DaemonNotFound as error:
                raise Broken(f"node {self.name}: {error}") from error
            finally:
                self.harmed_s = time.monotonic()

    def end(self) -> None:
        """At the end of the run: the same."""
        self.leave()

    def back(self) -> None:
        """Start what does not run, again and again until it does. Raises Broken."""
        errors: list[str] = []

        def started() -> bool:
            with self._lock:
                try:
                    for name in self.services.names:
                        if name not in self.services.running():
                            self.services.start(name)
                except DaemonNotFound as error:
                    errors.append(str(error)[-2000:])
                    return False
                return True

        if not wait_until(started, _START_S):
            raise Broken(f"node {self.name} does not start again: {errors[-1]}")

    def well(self) -> bool:
        """Whether it runs and is ready."""
        report = self.status()
        return report is not None and report.ready

    def status(self) -> StatusReport | None:
        """Its report; None while it is away."""
        return status(self.client)

    def heal(self) -> None:
        """Go on, start, and wait until it is ready. Raises Broken."""
        self.check_alive()
        with self._lock:
            for pid in list(self._stopped):
                self._go_on(pid)
        self.back()
        if not wait_until(self.well, _HEALED_S):
            raise Broken(
                f"node {self.name} is not ready {_HEALED_S:.0f} s after it was started: {self.status()}"
            )

    def check_alive(self) -> None:
        """Raises Broken where a service ended by itself."""
        with self._lock:
            self._raise_ended()

    def tail(self, *services: str) -> str:
        """The last of their logs."""
        return "\n".join((self.folder / f"{name}.log").read_text()[-3000:] for name in services)

    def tracebacks(self) -> list[str]:
        """Of its services, from their logs."""
        found = []
        for name in self.services.names:
            text = (self.folder / f"{name}.log").read_text()
            at = text.find("Traceback")
            if at >= 0:
                found.append(f"{self.name}/{name}: {text[max(0, at - 300) : at + 2500]}")
        return found

    def close(self) -> None:
        """End everything."""
        if self._client is not None:
            self._client.close()
        with self._lock:
            for pid in list(self._stopped):
                self._go_on(pid)
            self.services.kill_all()

    def _raise_ended(self) -> None:
        ended = {name: status for name, status in self.services.running().items() if status is not None}
        if ended:
            raise Broken(f"services of node {self.name} ended by themselves: {ended}; {self.tail(*ended)}")

    def _go_on(self, pid: int) -> None:
        self._stopped.discard(pid)
        if pid in {self.services.pid(name) for name in self.services.running()}:
            os.kill(pid, signal.SIGCONT)


class Nodes:
    """All nodes and their links; ended, with all that they hold, at the end of a `with`."""

    def __init__(
        self,
        folder: Path,
        *,
        faults: Sequence[str] = (),
        features: Features = NO_FEATURES,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.wires = Wires()
        self._tls = features.tls
        self.links: dict[tuple[str, str], list[Wire]] = {}
        self._net = f"127.{1 + os.getpid() % 250}.{1 + os.getpid() // 250 % 250}"
        self.all: dict[str, Node] = {}
        for name, text in (
            ("token", "token of a chaos run"),
            ("secret", "secret of a chaos run, of 32 bytes and more"),
        ):
            path = folder / name
            path.touch(mode=0o600)
            path.write_text(text)
        ca = make_authority(folder / "certificates", "ca") if features.tls else None
        for name in NAMES:
            plan = folder / f"{name}.json"
            said = {"routes": self._routes(name), "faults": list(faults), "coded": features.coded}
            plan.write_text(json.dumps(said))
            runner = [sys.executable, str(Path(__file__).with_name("chaos_service.py")), str(plan)]
            own = {**SETTINGS, **self._own(name, folder), **features.settings(name), **(settings or {})}
            if ca is not None:
                own |= self._sealed(name, ca)
            self.all[name] = Node(name, folder / name, own, runner)

    def __enter__(self) -> Nodes:
        try:
            with ThreadPoolExecutor(len(self.all)) as pool:
                list(pool.map(Node.begin, self.all.values()))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def put(self, source: str, target: str, state: State, **how: float) -> None:
        """The state of all that goes from one node to another."""
        for wire in self.links[source, target]:
            self.wires.put(wire, state, **how)

    def check_links(self) -> None:
        """All nodes speak over their links; with TLS nothing goes in clear. Raises Broken."""
        for (source, target), wires in self.links.items():
            clear, sealed = sum(wire.clear for wire in wires), sum(wire.sealed for wire in wires)
            if not (clear or sealed):
                raise Broken(f"BESIDE THE LINK: nothing that {source} says to {target} passes it")
            if self._tls and clear:
                raise Broken(f"IN CLEAR: {clear} connections from {source} to {target}")

    def close(self) -> None:
        """End everything."""
        for node in self.all.values():
            node.close()
        self.wires.close()

    def _sealed(self, name: str, ca: Path) -> dict[str, str]:
        """With a certificate for the node's own address and those of the links that lead to it."""
        through = [self._through(source, name) for source in NAMES if source != name]
        files = make_certificate(ca, name, ",IP:".join([self._address(name), *through]))
        return {f"cluster.tls_{end}_file": path for end, path in files._asdict().items()}

    def _through(self, source: str, target: str) -> str:
        return f"{self._net}.{100 + 10 * NAMES.index(source) + NAMES.index(target)}"

    def _address(self, name: str) -> str:
        return f"{self._net}.{1 + NAMES.index(name)}"

    def _own(self, name: str, folder: Path) -> dict[str, Any]:
        own = {
            "node.name": name,
            "cluster.failure_domain": name,
            "cluster.listen": f"{self._address(name)}:{_PEERS_PORT}",
            "cluster.directory": ",".join(f"{self._address(n)}:{_DIRECTORY_PORT}" for n in _DIRECTORIES),
            "cluster.token_file": str(folder / "token"),
            "access.tenant_secret_file": str(folder / "secret"),
        }
        if name in _DIRECTORIES:
            own["cluster.directory_listen"] = f"{self._address(name)}:{_DIRECTORY_PORT}"
        return own

    def _routes(self, source: str) -> dict[str, str]:
        """Links from this node to all others. Between them and their nodes the address decides."""
        routes: dict[str, str] = {}
        for target in NAMES:
            if target == source:
                continue
            ports = [_PEERS_PORT, *([_DIRECTORY_PORT] if target in _DIRECTORIES else [])]
            through = self._through(source, target)
            self.links[source, target] = [
                self.wires.add((through, port), (self._address(target), port)) for port in ports
            ]
            routes |= {f"{self._address(target)}:{port}": f"{through}:{port}" for port in ports}
        return routes
