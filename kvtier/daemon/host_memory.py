"""Host memory as the settings want it."""

from __future__ import annotations

from collections.abc import Callable

from kvtier.config.load import Config
from kvtier.host.limits import auto_capacity, memory_limit
from kvtier.host.tier import HostTier


def make_host(config: Config, epoch: int, on_ready: Callable[[int, int], None]) -> HostTier:
    """The arena; on_ready(sub_arena, ready_bytes) comes from the thread that faults it in.

    epoch: greater than that of any earlier start, so that no slot of an earlier arena passes for one of this.
    Raises ConfigError when it would not fit into what this machine or container has.
    """
    settings = config.host
    limit = memory_limit()
    capacity_bytes = settings.capacity_bytes
    if capacity_bytes == "auto":
        capacity_bytes = auto_capacity(settings.headroom_bytes, limit)
    return HostTier(
        capacity_bytes,
        headroom_bytes=settings.headroom_bytes,
        limit=limit,
        numa_nodes=None if settings.numa == "auto" else [],
        on_ready=on_ready,
        first_generation=epoch,
        fault_in=settings.prefault,
        huge_pages=settings.huge_pages == "auto",
    )
