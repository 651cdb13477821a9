"""The whole daemon in this process, without Ray: the same services, as threads, in a folder of their own."""

from __future__ import annotations

import tempfile
from typing import Any

from kvtier import paths
from kvtier.config.load import load
from kvtier.daemon.disk_service import DiskService
from kvtier.daemon.gpu_service import GpuService
from kvtier.daemon.node_service import NodeService
from kvtier.errors import DaemonNotFound
from kvtier.waiting import wait_until

# Small enough for any machine; who needs more says so.
_HOST_BYTES, _DISK_BYTES, _SEGMENT_BYTES = 256 << 20, 1 << 30, 64 << 20
_READY_S = 30.0
_GRACE_S = 10.0


class Embedded:
    """A daemon of three services in this process. Ends, with all that it holds, at `close`."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvtier-")
        settings = {
            "node.name": "embedded",
            "node.runtime_dir": f"{self._folder.name}/run",
            "node.state_dir": f"{self._folder.name}/state",
            "host.capacity_bytes": _HOST_BYTES,
            "disk.capacity_bytes": _DISK_BYTES,
            "disk.segment_bytes": _SEGMENT_BYTES,
            "metrics.enabled": False,
            **overrides,
        }
        try:
            self.config = load(None, settings)
        except BaseException:
            self._folder.cleanup()
            raise
        self.socket_path = str(paths.node_socket(self.config.node.runtime_dir))
        self.node = NodeService(self.config)
        self.gpu = GpuService(self.config)
        self.disk = DiskService(self.config) if self.config.disk.enabled else None
        self._started: list[NodeService | GpuService | DiskService] = []

    def start(self) -> None:
        """Start all services and wait until they serve. Raises KvtierError."""
        try:
            for service in (self.node, self.gpu, self.disk):
                if service is not None:
                    service.start()
                    self._started.append(service)
            if not wait_until(lambda: bool(self.node.health()["ready"]), _READY_S):
                raise DaemonNotFound("the embedded daemon did not become ready", fix="see the log")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the services and remove their folder."""
        for service in reversed(self._started):
            service.stop(_GRACE_S)
        self._started.clear()
        self._folder.cleanup()


def start(**overrides: Any) -> Embedded:
    """Start a daemon in this process. overrides: settings by dotted name, as for `config.load`."""
    daemon = Embedded(overrides)
    daemon.start()
    return daemon
