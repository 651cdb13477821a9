"""The policies by the names that the configuration uses."""

from __future__ import annotations

from kvtier.errors import ConfigError
from kvtier.policy.always_load import AlwaysLoad, AlwaysStore
from kvtier.policy.cost_restore import CostRestore
from kvtier.policy.interfaces import Policies
from kvtier.policy.lru import LeafLru


def make_policies(eviction: str = "lru", restore: str = "load") -> Policies:
    """The named policies. Raises ConfigError for an unknown name."""
    if eviction != "lru":
        raise ConfigError("policy.eviction", f"'{eviction}' is not known", fix="use 'lru'")
    if restore not in ("load", "cost"):
        raise ConfigError("policy.restore", f"'{restore}' is not known", fix="use 'load' or 'cost'")
    chosen = CostRestore() if restore == "cost" else AlwaysLoad()
    return Policies(LeafLru(), LeafLru(), chosen, AlwaysStore())
