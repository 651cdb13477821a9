"""How the demo starts, kills and ends a daemon of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from kvtier.cli.demo.scenario import DISK_BYTES, HOST_BYTES
from kvtier.config.load import load
from kvtier.errors import KvtierError
from kvtier.paths import node_socket


class DaemonControl(Protocol):
    """socket: where processes connect to; '' when each serving process has the daemon inside."""

    socket: str

    def start(self) -> None:
        """Start it and wait until it is ready. Raises KvtierError."""

    def kill(self) -> None:
        """End all of it with SIGKILL. Raises KvtierError when nothing of it was alive."""

    def stop(self) -> None:
        """End it, if it runs, and leave no process behind."""


def daemon_settings(work: Path, runtime: Path) -> dict[str, str | int]:
    """The demo's daemon: an arena that is much smaller than the conversations, and everything in folders."""
    return {
        "node.name": "demo",
        "node.runtime_dir": str(runtime),
        "node.state_dir": str(work / "state"),
        "node.grace_s": 2,
        "host.capacity_bytes": HOST_BYTES,
        "host.headroom_bytes": 0,
        "disk.directory": str(work / "disk"),
        "disk.capacity_bytes": DISK_BYTES,
        "disk.segment_bytes": 64 << 20,
        # The demo proves what is restored; for a model as small as its own, computing may be as soon.
        "policy.restore": "load",
    }


class RayDaemon:
    """What `kvtier up` starts: actors in a Ray cluster of their own."""

    def __init__(self, settings: dict[str, str | int]) -> None:
        self._config = load(None, settings)
        self.socket = str(node_socket(self._config.node.runtime_dir))

    def start(self) -> None:
        """See DaemonControl."""
        from kvtier.cluster.up import up

        up(self._config, detach=True, address=None)

    def kill(self) -> None:
        """See DaemonControl."""
        from kvtier.cluster import record
        from kvtier.cluster.down import kill_all

        known = record.load(self._config.node.state_dir)
        if known is None or not kill_all(known):
            raise KvtierError("there was no daemon to kill: it ended by itself")

    def stop(self) -> None:
        """See DaemonControl."""
        from kvtier.cluster.down import down

        down(self._config)


class InProcessDaemon:
    """The daemon inside each serving process, which dies with it: a killed process kills both."""

    socket = ""

    def start(self) -> None:
        """See DaemonControl."""

    def kill(self) -> None:
        """See DaemonControl."""

    def stop(self) -> None:
        """See DaemonControl."""
