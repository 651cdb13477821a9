"""One service of a node as a process of its own, without Ray: `python -m kvtier.testing.run_service`.

For tests and benchmarks that need to end, stop or measure a service by itself.  Arguments: the service's name
and the file with its settings.  Says 'ready' on its standard output when it runs, ends on SIGTERM.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading

from kvtier.config import load
from kvtier.daemon.disk_service import DiskService
from kvtier.daemon.gpu_service import GpuService
from kvtier.daemon.node_service import NodeService

SERVICES = {"node": NodeService, "disk": DiskService, "gpu": GpuService}
_GRACE_S = 10.0


def main(name: str, settings: str) -> int:
    """Run until SIGTERM, or until the service ends by itself."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(message)s")
    wanted = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: wanted.set())
    service = SERVICES[name](load(settings))
    service.start()
    print("ready", flush=True)
    while not wanted.wait(0.1):
        if service.wait(0):
            return 1
    service.stop(_GRACE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
