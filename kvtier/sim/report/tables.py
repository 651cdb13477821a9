"""The tables of a simulation, for the terminal and for the report alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from kvtier.sim.cluster.result import PolicyResult
from kvtier.sim.report import words
from kvtier.sim.workload.distance import Distance

POLICY_COLUMNS: Final = (
    "policy", "resume p50", "p90", "p99", "hit", "bound", "GPU-s computed", "saved by tiers", "$/day",
    "written", "late",
)  # fmt: skip
HIT_COLUMNS: Final = ("policy", "GPU pool", "host", "disk", "peer", "all", "bound")
IDLE_COLUMNS: Final = ("policy, idle", "requests", "p50", "p90", "p99", "reused")
MONEY_COLUMNS: Final = ("policy", "GPU", "host", "disk", "wear", "all", "bought host and disk")
TENANT_COLUMNS: Final = (
    "policy, tenant", "requests", "hit", "host", "disk", "GPU $/day", "host $", "disk $", "wear $",
    "all $/day",
)  # fmt: skip
TRAFFIC_COLUMNS: Final = (
    "policy", "to GPU", "from GPU", "read", "written", "dropped runs", "drive busy", "drives last"
)  # fmt: skip
FORECAST_COLUMNS: Final = ("policy, source", "restores", "inside interval", "slower")
DISTANCE_COLUMNS: Final = ("quantity", "source", "published", "generated", "off", "draws")


def policies(results: Sequence[PolicyResult]) -> Iterator[tuple[str, ...]]:
    """Side by side."""
    for r in results:
        yield (
            r.policy,
            words.seconds(r.resumed.p50_s),
            words.seconds(r.resumed.p90_s),
            words.seconds(r.resumed.p99_s),
            words.percent(r.hits.total),
            words.percent(r.hits.bound),
            words.count(r.gpu_seconds.prefill),
            words.count(r.gpu_seconds.saved_by_tiers),
            words.money(r.money.total),
            words.size(r.traffic.disk_written),
            words.count(r.late),
        )


def hits(results: Sequence[PolicyResult]) -> Iterator[tuple[str, ...]]:
    """Where prompt tokens came from."""
    for r in results:
        parts = (r.hits.gpu, r.hits.host, r.hits.disk, r.hits.peer, r.hits.total, r.hits.bound)
        yield (r.policy, *(words.percent(part) for part in parts))


def idle(results: Sequence[PolicyResult]) -> Iterator[tuple[str, ...]]:
    """Time to first token by how long the conversation was idle."""
    for r in results:
        for c in r.by_idle:
            times = (words.seconds(value) for value in (c.ttft.p50_s, c.ttft.p90_s, c.ttft.p99_s))
            yield (
                f"{r.policy}, {c.name}",
                words.count(c.ttft.requests),
                *times,
                words.percent(c.reused_percent),
            )


def money(results: Sequence[PolicyResult]) -> Iterator[tuple[str, ...]]:
    """A day's cost by tier."""
    for r in results:
        m = r.money
        parts = (m.gpu, m.host, m.disk, m.wear, m.total, m.provisioned)
        yield (r.policy, *(words.money(part) for part in parts))


def tenants(results: Sequence[PolicyResult]) -> Iterator[tuple[str, ...]]:
    """A day's cost by tenant."""
    for r in results:
        for t in r.tenants:
            parts = (t.money.gpu, t.money.host, t.money.disk, t.money.wear, t.money.total)
            yield (
                f"{r.policy}, {t.tenant}",
                words.count(t.requests),
                words.percent(t.hit_percent),
                words.size(t.host_gb * 1e9),
                words.size(t.disk_gb * 1e9),
                *(words.money(part) for part in parts),
            )


def traffic(results: Sequence[PolicyResult]) -> Iterator[tuple[str, ...]]:
    """Bytes and wear."""
    for r in results:
        t = r.traffic
        moved = (words.size(value) for value in (t.to_gpu, t.from_gpu, t.disk_read, t.disk_written))
        yield (
            r.policy,
            *moved,
            words.count(t.dropped),
            words.percent(t.drive_busy_percent),
            words.years(t.wear_years),
        )


def forecasts(results: Sequence[PolicyResult]) -> Iterator[tuple[str, ...]]:
    """How often a restore ended within its plan's interval."""
    for r in results:
        for f in r.forecasts:
            slower = 100 * f.too_slow / f.restores if f.restores else None
            name = f"{r.policy}, {f.source}, {f.state}"
            yield (name, words.count(f.restores), words.percent(f.inside_percent), words.percent(slower))


def distances(found: Sequence[Distance]) -> Iterator[tuple[str, ...]]:
    """A generated load beside what was published."""
    for d in found:
        published = _value(d.low, d.unit)
        if d.high != d.low:
            published = f"{d.low:g} to {_value(d.high, d.unit)}"
        off = f"{d.off_percent:+.1f} %"
        yield (d.quantity, d.source, published, _value(d.generated, d.unit), off, words.count(d.samples))


def _value(value: float, unit: str) -> str:
    if unit == "s":
        return words.seconds(value)
    return f"{value:.1f} {unit}".rstrip()
