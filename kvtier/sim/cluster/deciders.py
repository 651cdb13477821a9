"""Policies by name: the daemon's own, and two ends of the scale."""

from __future__ import annotations

from typing import Final

from kvtier.policy.defaults import make_policies
from kvtier.policy.interfaces import Policies
from kvtier.policy.returns import ARRAYS, Arithmetic
from kvtier.policy.returns_loops import loops

# No tiers at all, so that only the engines' own pools keep anything; tiers that never are full.
NONE: Final = "none"
UNBOUNDED: Final = "unbounded"
_ENDLESS_BYTES: Final = 1 << 62


def policies_of(name: str, arithmetic: Arithmetic = ARRAYS) -> Policies:
    """New policy objects for one node. Raises ConfigError for an unknown name.

    name: 'none', 'unbounded', or what the daemon's `policy.eviction` may be; '+' and a `policy.restore` may
    follow, such as 'lru+cost'.
    """
    eviction, _, restore = name.partition("+")
    eviction = "lru" if eviction in (NONE, UNBOUNDED) else eviction
    return make_policies(eviction, restore or "load", arithmetic=arithmetic)


def compiled_policies_of(name: str) -> Policies:
    """The same with return times that are compiled where the policy asks for any: some seconds, once."""
    if name.partition("+")[0] != "cost":
        return policies_of(name)
    from kvtier.sim.compiled import compiled

    return policies_of(name, loops(compiled))


def capacity_of(name: str, capacity_bytes: int) -> int:
    """What a tier of this size holds under the policy."""
    return {NONE: 0, UNBOUNDED: _ENDLESS_BYTES}.get(name.partition("+")[0], capacity_bytes)
