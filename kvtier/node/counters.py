"""What a node has done since its start: numbers for status and metrics."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TypeVar

from kvtier.node.eta import EtaCounters

_Key = TypeVar("_Key", str, bytes)

# Upper bounds of the histogram's buckets, in seconds; the last bucket has none.
BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(slots=True)
class Histogram:
    """Times in seconds by bucket; each value is in one bucket only."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True)
class Counters:
    """What metrics and status report; only ever grows."""

    parks: dict[str, int] = field(default_factory=dict)
    restores: dict[str, int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    backpressure_s: float = 0.0
    evicted_objects: int = 0
    spilled_bytes: int = 0
    parked_bytes: int = 0
    restored_bytes: int = 0
    restored_tokens: int = 0
    pulled_bytes: int = 0
    kept_bytes: int = 0
    prefetched_bytes: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    peer_received_bytes: int = 0
    peer_coded_bytes: int = 0
    peer_wire_bytes: int = 0
    peer_relayed_bytes: int = 0
    peer_lent_bytes: int = 0
    damaged_records: int = 0
    restore_s: Histogram = field(default_factory=Histogram)
    eta: EtaCounters = field(default_factory=EtaCounters)


def count(counter: dict[_Key, int], name: _Key, by: int = 1) -> None:
    """Add to one of the named counters."""
    counter[name] = counter.get(name, 0) + by
