"""One service of a node as a process of its own, without Ray: `python -m kvtier.testing.run_service`.

For tests and benchmarks that need to end, stop or measure a service by itself.  Arguments: the service's
name, the file with its settings, and, for services that stop at gates, the folder of those.  Says 'ready' on
its standard output when it runs, ends on SIGTERM.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
import threading
from pathlib import Path

from kvtier.config.load import Config, load
from kvtier.daemon.directory_service import DirectoryService
from kvtier.daemon.disk_service import DiskService
from kvtier.daemon.gpu_service import GpuService
from kvtier.daemon.node_service import NodeService
from kvtier.testing.gates import Gate, GatedFileOps, gated_engine

_GRACE_S = 10.0


def make_service(
    name: str, config: Config, gates: str
) -> NodeService | DiskService | GpuService | DirectoryService:
    """The service of this name. gates: where its writes, reads and copies stop; '' for nowhere."""
    if name == "disk":
        return DiskService(config, GatedFileOps(Path(gates)) if gates else None)
    if name == "directory":
        return DirectoryService(config)
    if name == "gpu":
        gate = Gate(Path(gates) / "copy")
        return GpuService(config, (lambda slots: gated_engine(slots, gate)) if gates else None)
    return NodeService(config)


def main(name: str, settings: str, gates: str = "") -> int:
    """Run until SIGTERM, or until the service ends by itself."""
    # What a service that crashes or does not end is doing, in its log.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(message)s")
    wanted = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: wanted.set())
    service = make_service(name, load(settings), gates)
    service.start()
    print("ready", flush=True)
    while not wanted.wait(0.1):
        if service.wait(0):
            return 1
    service.stop(_GRACE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
