"""Nodes of the chaos run that are real: Ray with its actors in network namespaces, joined by a link.

The reconciler starts again what dies; `up` is called again where a node died as a whole, as systemd would.
Ray's head keeps its state in a folder, and is started again by the same command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

from chaos_damage import Excuses
from chaos_nodes import Broken
from chaos_wires import State
from test_cluster_netns import Side, ip

from benchmarks.head_loss import Gcs
from kvtier import paths
from kvtier.client.client import Client, connect
from kvtier.cluster.down import kill_all
from kvtier.cluster.procs import alive, session_members
from kvtier.receipts import StatusReport
from kvtier.testing.node_bench import status
from kvtier.waiting import wait_until

# The process of Ray's head, as one more thing that can be killed and stopped.
HEAD = "gcs_server"
_ACTORS = {"node": "HostActor", "disk": "DiskActor", "gpu": "GpuActor", "directory": "DirectoryActor"}
_HEALED_S = 120.0
_SLOW = ("tbf", "rate", "2mbit", "burst", "16kb", "latency", "400ms")


class RayNode:
    """One node. All methods from any thread."""

    def __init__(self, side: Side, name: str, *, head: bool) -> None:
        self.side, self.name, self.head = side, name, head
        self.names = ["node", "disk", "gpu", *(["directory", HEAD] if head else [])]
        self.path = str(paths.node_socket(side.folders[1]))
        self._lock = threading.Lock()
        self._stopped: set[int] = set()
        self._client: Client | None = None
        self._gcs: Gcs | None = None
        # What the last `up` that failed said.
        self._why = ""
        self.harmed_s = 0.0
        self.excuses = Excuses()

    @property
    def client(self) -> Client:
        """For the driver's own questions."""
        if self._client is None:
            self._client = connect(self.path, required=False, timeout_s=5.0)
        return self._client

    def processes(self) -> dict[str, int]:
        """Pid of each of its actors, by service, and of Ray's head."""
        record = self.side.record()
        if record is None or record.leader is None:
            return {}
        found = {name: one.pid for name, one in record.processes if name == HEAD and alive(one)}
        for process in session_members(record.leader, record.marker):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                for service, actor in _ACTORS.items():
                    if title.startswith(f"ray::{actor}".encode()):
                        found[service] = process.pid
        return found

    def kill(self, *services: str) -> None:
        """SIGKILL actors; none named: everything that runs on the node, unless it is Ray's head."""
        with self._lock:
            record = self.side.record()
            if not services and record is not None and not self.head:
                kill_all(record)
            running = self.processes()
            if HEAD in services and HEAD in running:
                self._lose_head()
            for service in services or _ACTORS:
                if service in running and service != HEAD:
                    self._send(running[service], signal.SIGKILL)
            if not services or "node" in services:
                self.harmed_s = time.monotonic()

    def stop(self, service: str) -> None:
        """SIGSTOP, if it runs."""
        with self._lock:
            pid = self.processes().get(service)
            if pid is not None:
                self._stopped.add(pid)
                self._send(pid, signal.SIGSTOP)

    def go_on(self, service: str) -> None:
        """SIGCONT for all that was stopped."""
        with self._lock:
            for pid in self._stopped:
                self._send(pid, signal.SIGCONT)
            self._stopped.clear()

    def out_of_service(self) -> None:
        """`leave` does all of it."""

    def leave(self) -> None:
        """`kvtier drain`; the head stays."""
        if self.head:
            return
        with self._lock, contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            # Behind a cut, or half dead, it cannot: it is started again when everything heals.
            try:
                self.side.run("drain", self.name)
            finally:
                self.harmed_s = time.monotonic()
            self._up()

    def end(self) -> None:
        """`kvtier down`. Raises Broken where something is left."""
        held = self.side.record()
        self.side.run("down")
        left = held.running() if held is not None else []
        if left:
            raise Broken(f"node {self.name}: {left} run still")

    def back(self) -> None:
        """Nothing for an actor, which the reconciler starts again; `up` for a node that died as a whole."""
        with self._lock:
            record = self.side.record()
            if self._gcs is not None and record is not None and not alive(self._gcs.process):
                self._gcs.start(record)
            if not self._lives():
                # Behind a cut it cannot join; it is tried again when everything heals.
                try:
                    self._up()
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    self._why = str(error)[-2000:]

    def heal(self) -> None:
        """Go on, start, and wait until it is ready. Raises Broken."""
        self.go_on("")

        def healed() -> bool:
            if not self._lives():
                self.back()
            return self.well()

        if not wait_until(healed, _HEALED_S):
            raise Broken(
                f"node {self.name} is not ready after {_HEALED_S:.0f} s: {self.status()}, "
                f"{self.processes()}; `up` last said: {self._why}"
            )

    def well(self) -> bool:
        """Whether it runs and is ready."""
        report = self.status()
        return report is not None and report.ready and set(self.names) <= set(self.processes())

    def status(self) -> StatusReport | None:
        """Its report; None while it is away."""
        return status(self.client)

    def check_alive(self) -> None:
        """Actors end with their node, and the reconciler starts them: `heal` has seen to it."""

    def tracebacks(self) -> list[str]:
        """Ray keeps the logs."""
        return []

    def close(self) -> None:
        """End everything."""
        self.go_on("")
        if self._client is not None:
            self._client.close()
        self.side.kill()
        if self._gcs is not None:
            self._gcs.end()

    def _lose_head(self) -> None:
        record = self.side.record()
        if self._gcs is None and record is not None:
            self._gcs = Gcs(record, ["ip", "netns", "exec", self.side.name])
        if self._gcs is not None:
            self._gcs.kill()

    def _up(self) -> None:
        self.side.run("up-real")

    def _lives(self) -> bool:
        record = self.side.record()
        known = dict(record.processes) if record is not None else {}
        return record is not None and all(name in known and alive(known[name]) for name in record.vital)

    @staticmethod
    def _send(pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class RayNodes:
    """Two of them, like chaos_nodes.Nodes; the first one has Ray's head and the directory."""

    def __init__(self, sides: tuple[Side, Side]) -> None:
        self.all = {
            name: RayNode(side, name, head=not at)
            for at, (name, side) in enumerate(zip(("a", "b"), sides, strict=True))
        }
        self.links = {("a", "b"): None, ("b", "a"): None}

    def __enter__(self) -> RayNodes:
        for node in self.all.values():
            node.side.run("up-real")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(list(self.all.values())):
            node.close()

    def check_links(self) -> None:
        """There is no way beside them."""

    def put(self, source: str, target: str, state: State, **how: float) -> None:
        """The link is there, slow from one side, or down: then for both."""
        side = self.all[source].side
        tc = ["tc", "-n", side.name, "qdisc"]
        if state == "open":
            ip("-n", side.name, "link", "set", side.link, "up", check=False)
            subprocess.run(
                [*tc, "del", "dev", side.link, "root"], capture_output=True, check=False, timeout=20
            )
        elif state == "slow":
            subprocess.run(
                [*tc, "replace", "dev", side.link, "root", *_SLOW],
                capture_output=True,
                check=False,
                timeout=20,
            )
        else:
            ip("-n", side.name, "link", "set", side.link, "down", check=False)
