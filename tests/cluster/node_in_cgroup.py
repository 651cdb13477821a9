"""What the test of a full arena runs inside of a memory cgroup: COMMAND STATE RUN ARENA_BYTES [monitor]

up, down: as the commands of `kvtier`.  monitor: with Ray's memory monitor at its own settings.
"""

from __future__ import annotations

import json
import os
import sys

from kvtier.cluster import launch
from kvtier.cluster.down import down
from kvtier.cluster.up import up
from kvtier.config.load import load
from kvtier.config.schema import Config

# In steps of a quarter of a second, as by default; a threshold of 0.95 is Ray's default too.
RAYS_OWN = {"RAY_memory_monitor_refresh_ms": "250", "RAY_memory_usage_threshold": "0.95"}


def with_monitor() -> None:
    """Take back what kvtier says of Ray's memory monitor."""
    ours = launch.private_environment

    def theirs(config: Config, token_path: str) -> dict[str, str]:
        return ours(config, token_path) | RAYS_OWN

    launch.private_environment = theirs


def main(command: str, state: str, run: str, arena_bytes: str, *rest: str) -> None:
    # Whatever starts from here on is in the cgroup, and sees it at the place where a container does.
    settings = {
        "node.name": "full",
        "node.state_dir": state,
        "node.runtime_dir": run,
        "node.grace_s": 3.0,
        "host.capacity_bytes": int(arena_bytes),
        "host.headroom_bytes": 64 << 20,
        "disk.enabled": False,
        "metrics.enabled": False,
        "ray.object_store_bytes": 80 << 20,
    }
    config = load(None, settings)
    if command == "down":
        ended = down(config)
        print(json.dumps({"graceful": ended.graceful, "detail": ended.detail}))
        return
    if rest:
        with_monitor()
    result = up(config, detach=True)
    print(json.dumps({"socket": result.socket, "pids": result.pids, "own": os.getpid()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
