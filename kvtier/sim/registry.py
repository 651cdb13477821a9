"""The policies that a trace can be replayed against, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from kvtier.errors import ConfigError
from kvtier.policy.baselines.arc import ArcCache
from kvtier.policy.baselines.clairvoyant import ClairvoyantCache
from kvtier.policy.baselines.endless import NeverCache, UnboundedCache
from kvtier.policy.baselines.flat import FlatCache
from kvtier.policy.baselines.gdsf import GdsfCache
from kvtier.policy.baselines.interfaces import BlockPolicy, TwoTierPolicy
from kvtier.policy.baselines.lru import LruCache, TtlCache
from kvtier.policy.baselines.s3fifo import S3FifoCache
from kvtier.policy.baselines.sieve import SieveCache
from kvtier.policy.baselines.tlru import TlruCache
from kvtier.policy.baselines.two_tiers import TwoTiers
from kvtier.policy.cost_cache import CostCache, CostTwoTiers
from kvtier.sim.compiled import compiled
from kvtier.sim.future import future_of
from kvtier.sim.trace import Trace

Objective = Literal["tokens", "gpu_seconds"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a policy may know beforehand: nothing of the requests to come. capacity: blocks, at least 1.

    ttl_s: of 'ttl'.  threshold_tokens: of 'tlru', assumed: what a GPU computes in some tenths of a second.
    """

    capacity: int
    block_tokens: int
    objective: Objective = "tokens"
    ttl_s: float = 300.0
    threshold_tokens: float = 4096.0

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError("capacity", f"{self.capacity} blocks are no cache", fix="ask for more")


@dataclass(frozen=True, slots=True)
class Entry:
    """How a policy is made: for one tier; for two, given the fast tier's capacity (None: no such form).

    oracle: makes the one-tier policy of those that are shown the whole trace.
    """

    one: Callable[[Setup], BlockPolicy] | None = None
    two: Callable[[Setup, int], TwoTierPolicy] | None = None
    oracle: Callable[[Setup, Trace], BlockPolicy] | None = None


def _flat(cache: Callable[[Setup, int], FlatCache]) -> Entry:
    def one(setup: Setup) -> BlockPolicy:
        return cache(setup, setup.capacity)

    def two(setup: Setup, fast: int) -> TwoTierPolicy:
        return TwoTiers(cache(setup, fast), cache(setup, setup.capacity - fast))

    return Entry(one, two)


def _by_cost(setup: Setup) -> bool:
    return setup.objective == "gpu_seconds"


POLICIES: Final[dict[str, Entry]] = {
    "lru": _flat(lambda setup, capacity: LruCache(capacity, compiled)),
    "arc": _flat(lambda setup, capacity: ArcCache(capacity, compiled)),
    "s3fifo": _flat(lambda setup, capacity: S3FifoCache(capacity, compiled)),
    "sieve": _flat(lambda setup, capacity: SieveCache(capacity, compiled)),
    "gdsf": _flat(lambda setup, capacity: GdsfCache(capacity, setup.block_tokens, compiled)),
    "tlru": Entry(
        lambda setup: TlruCache(setup.capacity, setup.block_tokens, setup.threshold_tokens, compiled)
    ),
    "ttl": Entry(lambda setup: TtlCache(setup.capacity, setup.ttl_s, compiled)),
    "cost": Entry(
        lambda setup: CostCache(setup.capacity, setup.block_tokens, _by_cost(setup), compiled),
        lambda setup, fast: CostTwoTiers(
            fast, setup.capacity - fast, setup.block_tokens, _by_cost(setup), compiled
        ),
    ),
    "never": Entry(lambda setup: NeverCache()),
    "unbounded": Entry(lambda setup: UnboundedCache(compiled)),
    "clairvoyant": Entry(
        oracle=lambda setup, trace: ClairvoyantCache(setup.capacity, future_of(trace), compiled)
    ),
}


def entry_of(name: str) -> Entry:
    """Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError("policies", f"'{name}' is not known", fix=f"use some of {', '.join(POLICIES)}")
    return POLICIES[name]


def make_policy(name: str, setup: Setup, trace: Trace) -> BlockPolicy:
    """The policy for one tier. Only those that are the offline bound are shown the trace."""
    entry = entry_of(name)
    if entry.oracle is not None:
        return entry.oracle(setup, trace)
    assert entry.one is not None
    return entry.one(setup)
