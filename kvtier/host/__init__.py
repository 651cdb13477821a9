"""The host tier: KV objects in one shared, prefaulted, sealed arena of memory."""

from kvtier.host.arena import ArenaView
from kvtier.host.limits import MemoryLimit, auto_capacity, check_capacity, memory_limit
from kvtier.host.slots import HostSlots
from kvtier.host.tier import HostTier

__all__ = [
    "ArenaView",
    "HostSlots",
    "HostTier",
    "MemoryLimit",
    "auto_capacity",
    "check_capacity",
    "memory_limit",
]
