"""What a node tells Prometheus: a plain snapshot of numbers, and the collector that turns it into metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvtier.node.eta import OUTCOMES, WAYS
from kvtier.receipts import LEVELS, Reason

SOURCES: Final = ("host", "disk", "peer")
# Series exist from the first scrape on, so that the first event shows in a rate.
REASONS: Final[tuple[str, ...]] = tuple(reason for reason in get_args(Reason) if reason)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of durations. counts[i]: up to bounds_s[i] and over the bound before; the last one: the rest."""

    bounds_s: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    sum_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TierMetrics:
    """One tier at one instant."""

    name: str
    ready: bool
    capacity_bytes: int
    used_bytes: int
    limbo_bytes: int = 0
    objects: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class DiskMetrics:
    """The disk service's own counts, since it started. wear_limit_bytes: 0 without a bound."""

    written_bytes: int = 0
    user_bytes: int = 0
    flushes: int = 0
    direct_io: bool = False
    scrub_bytes: int = 0
    scrub_bad: int = 0
    scrub_passes: int = 0
    wear_limit_bytes: int = 0
    wear_left_bytes: int = 0
    crowded: bool = False


@dataclass(frozen=True, slots=True)
class EtaMetrics:
    """Plans' expectations against what restores took.

    outcomes: restores by (slowest source, 'inside' | 'early' | 'late').  errors: |taken - expected| over
    taken, without a unit.  ways: plans by what they do with what is stored.  prefills: that workers reported.
    """

    outcomes: Mapping[tuple[str, str], float] = field(default_factory=dict)
    errors: Histogram = Histogram()
    ways: Mapping[str, float] = field(default_factory=dict)
    prefills: float = 0.0


@dataclass(frozen=True, slots=True)
class ReturnMetrics:
    """Waits that were judged at one horizon: returns expected by then, and those that came."""

    waits: float = 0.0
    expected: float = 0.0
    came: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeMetrics:
    """A node at one instant; counts are since its start.

    parks: by the level reached.  restores: restores that loaded anything, by source; one that loaded from
    both counts in both.  misses: parks and restores that fell short, by receipts.Reason.  errors: by kind.
    backpressure_s: time that parks waited for room.  returns: by horizon.  peer_bytes: from other nodes, as
    they are and as they travelled.
    """

    node: str
    version: str
    ready: bool
    tiers: tuple[TierMetrics, ...] = ()
    parks: Mapping[str, float] = field(default_factory=dict)
    restores: Mapping[str, float] = field(default_factory=dict)
    misses: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    restore_s: Histogram = Histogram()
    backpressure_s: float = 0.0
    disk: DiskMetrics = DiskMetrics()
    eta: EtaMetrics = EtaMetrics()
    returns: Mapping[str, ReturnMetrics] = field(default_factory=dict)
    evicts_by_last_use: bool = True
    spilled_bytes: float = 0.0
    prefetched_bytes: Mapping[str, float] = field(default_factory=dict)
    peer_bytes: Mapping[str, float] = field(default_factory=dict)
    host_dirty_bytes: int = 0
    log_lost: int = 0
    workers: int = 0
    conversations: int = 0
    waiting_parks: int = 0
    late_workers: int = 0


class NodeCollector(Collector):
    """Asks for a snapshot at each scrape. snapshot is called in the thread of the HTTP request."""

    def __init__(self, snapshot: Callable[[], NodeMetrics]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Nothing: asking at registration would need a node that runs already."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All metrics of this instant."""
        now = self._snapshot()
        yield InfoMetricFamily("kvtier_node", "This node.", {"node": now.node, "version": now.version})
        yield GaugeMetricFamily("kvtier_ready", "1 when the node serves.", float(now.ready))
        yield from _tiers(now.tiers)
        yield _counter("kvtier_parks", "Parks by the level reached.", "level", _with(LEVELS, now.parks))
        yield _counter("kvtier_restores", "Restores by source.", "source", _with(SOURCES, now.restores))
        yield _counter(
            "kvtier_misses", "Parks and restores that fell short.", "reason", _with(REASONS, now.misses)
        )
        yield _counter("kvtier_errors", "Errors by kind.", "kind", now.errors)
        yield _histogram("kvtier_restore_seconds", "Time from restore to its receipt.", now.restore_s)
        yield CounterMetricFamily(
            "kvtier_backpressure_seconds", "Time that parks waited for room.", now.backpressure_s
        )
        yield from _eta(now.eta)
        yield from _returns(now.returns)
        yield GaugeMetricFamily(
            "kvtier_evicts_by_last_use",
            "1 when what was used longest ago goes first.",
            float(now.evicts_by_last_use),
        )
        yield from _disk(now.disk)
        yield CounterMetricFamily(
            "kvtier_spilled_bytes", "KV that host memory wrote to disk.", now.spilled_bytes
        )
        yield _counter(
            "kvtier_prefetched_bytes",
            "KV read from disk ahead of a return (read), restored then (used), or gone before (wasted).",
            "what",
            dict.fromkeys(("read", "used", "wasted"), 0.0) | dict(now.prefetched_bytes),
        )
        yield _counter(
            "kvtier_peer_bytes",
            "KV from other nodes (kv), what of it came encoded (coded), all of it on its way (wire), what "
            "no TCP brought (relayed), what was read in their memory (lent).",
            "form",
            dict.fromkeys(("kv", "coded", "wire", "relayed", "lent"), 0.0) | dict(now.peer_bytes),
        )
        yield GaugeMetricFamily(
            "kvtier_host_dirty_bytes", "Bytes in host memory that the disk lacks.", now.host_dirty_bytes
        )
        yield CounterMetricFamily(
            "kvtier_stimulus_log_lost_entries", "Entries that the stimulus log lacks.", now.log_lost
        )
        yield GaugeMetricFamily("kvtier_workers", "Attached workers.", now.workers)
        yield GaugeMetricFamily(
            "kvtier_late_workers", "Workers with a copy that does not end.", now.late_workers
        )
        yield GaugeMetricFamily("kvtier_conversations", "Parked conversations.", now.conversations)
        yield GaugeMetricFamily("kvtier_waiting_parks", "Parks that wait for room now.", now.waiting_parks)


def make_registry(snapshot: Callable[[], NodeMetrics]) -> CollectorRegistry:
    """A registry with the node's metrics alone: several nodes of one process do not meet."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(snapshot))
    return registry


def _tiers(tiers: tuple[TierMetrics, ...]) -> Iterator[Metric]:
    for name, text, values in (
        ("kvtier_tier_ready", "1 when the tier works.", [float(t.ready) for t in tiers]),
        ("kvtier_tier_capacity_bytes", "Hard bound of the tier.", [t.capacity_bytes for t in tiers]),
        ("kvtier_tier_used_bytes", "Bytes in use.", [t.used_bytes for t in tiers]),
        ("kvtier_tier_limbo_bytes", "Bytes that a copy may still touch.", [t.limbo_bytes for t in tiers]),
        ("kvtier_tier_objects", "Objects held.", [t.objects for t in tiers]),
        ("kvtier_tier_quarantined_objects", "Objects whose check failed.", [t.quarantined for t in tiers]),
    ):
        family = GaugeMetricFamily(name, text, labels=["tier"])
        for tier, value in zip(tiers, values, strict=True):
            family.add_metric([tier.name], value)
        yield family


def _eta(eta: EtaMetrics) -> Iterator[Metric]:
    restores = CounterMetricFamily(
        "kvtier_eta_restores",
        "Restores by their slowest source, and whether they took as long as planned.",
        labels=["source", "outcome"],
    )
    known = {(source, outcome): 0.0 for source in SOURCES for outcome in OUTCOMES}
    for (source, outcome), count in (known | dict(eta.outcomes)).items():
        restores.add_metric([source, outcome], count)
    yield restores
    yield _histogram(
        "kvtier_eta_relative_error", "Time taken less the expected median, over the time taken.", eta.errors
    )
    yield _counter("kvtier_plans", "Plans by what they do with what is stored.", "way", _with(WAYS, eta.ways))
    yield CounterMetricFamily("kvtier_prefills", "Prefills that workers reported.", eta.prefills)


def _returns(returns: Mapping[str, ReturnMetrics]) -> Iterator[Metric]:
    """Expectations against what came; nothing where nobody reckons with returns."""
    for name, text in (
        ("waits", "Waits of conversations that were judged at this horizon."),
        ("expected", "Returns that were expected of them by then, as the sum of their chances."),
        ("came", "Those of them that came back by then."),
    ):
        if returns:
            values = {horizon: getattr(seen, name) for horizon, seen in returns.items()}
            yield _counter(f"kvtier_returns_{name}", text, "within", values)


def _disk(disk: DiskMetrics) -> Iterator[Metric]:
    for name, text, value in (
        ("written_bytes", "Bytes written to the drive, headers and padding included.", disk.written_bytes),
        ("user_bytes", "KV that was written to the drive.", disk.user_bytes),
        ("flushes", "Flushes of the store's files.", disk.flushes),
        ("scrub_bytes", "Bytes that the background check read.", disk.scrub_bytes),
        ("scrub_bad", "Objects that the background check found bad.", disk.scrub_bad),
        ("scrub_passes", "How often the background check came to the end.", disk.scrub_passes),
    ):
        yield CounterMetricFamily(f"kvtier_disk_{name}", text, value)
    for name, text, level in (
        ("direct_io", "1 when the page cache is bypassed.", float(disk.direct_io)),
        ("crowded", "1 when others have filled the file system.", float(disk.crowded)),
        (
            "wear_limit_bytes",
            "Bytes that may be written in 24 hours; 0: no bound.",
            disk.wear_limit_bytes,
        ),
        ("wear_left_bytes", "Bytes of them that may be written now.", disk.wear_left_bytes),
    ):
        yield GaugeMetricFamily(f"kvtier_disk_{name}", text, level)


def _with(known: tuple[str, ...], counts: Mapping[str, float]) -> dict[str, float]:
    return dict.fromkeys(known, 0.0) | dict(counts)


def _counter(name: str, text: str, label: str, counts: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text)
    below = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, histogram.bounds_s), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, below))
    family.add_metric([], buckets, histogram.sum_s)
    return family
