"""What a simulation came to, in numbers that a report shows and a program reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.policy.prices import prices_from
from kvtier.sim.cluster.cluster import Cluster, Usage
from kvtier.sim.cluster.forecasts import Forecast, summed
from kvtier.sim.cluster.scenario import Scenario
from kvtier.sim.cluster.tally import Counts

_DAY_S: Final = 86400.0
# Upper ends of the classes of idle time, in seconds.
IDLE_CLASSES: Final = (
    ("under 10 s", 10.0),
    ("10 s to 1 min", 60.0),
    ("1 to 5 min", 300.0),
    ("5 min to 1 h", 3600.0),
    ("1 to 8 h", 28800.0),
    ("over 8 h", float("inf")),
)
_Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Quantile:
    """Seconds to the first token of some requests; all None without any."""

    requests: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class IdleClass:
    """Resumed requests by how long their conversation was idle. reused_percent: mean of what each could."""

    name: str
    ttft: Quantile
    reused_percent: float | None


@dataclass(frozen=True, slots=True)
class Hits:
    """Percent of all prompt tokens, by where they came from; bound: all that any earlier row had computed."""

    gpu: float
    host: float
    disk: float
    peer: float
    total: float
    bound: float


@dataclass(frozen=True, slots=True)
class GpuSeconds:
    """GPUs times seconds. prefill and decode: spent.  saved_by_pool: by the engines' own prefix caches;
    saved_by_tiers: by loads; could_save: by both, had everything known been found.
    """

    prefill: float
    decode: float
    saved_by_pool: float
    saved_by_tiers: float
    could_save: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes over all nodes. wear_years: until a node's drives are worn out, None where nothing is written.

    dropped: runs that host memory pushed out and nobody wrote.
    """

    to_gpu: int
    from_gpu: int
    disk_read: int
    disk_written: int
    peers: int
    dropped: int
    drive_busy_percent: float
    wear_years: float | None


@dataclass(frozen=True, slots=True)
class Money:
    """In the currency of the prices, a day.

    gpu: for the seconds that were computed; host and disk: for bytes while they were held; wear: for bytes
    written.  provisioned: for host memory and disk of the whole cluster, used or not.
    """

    gpu: float
    host: float
    disk: float
    wear: float
    total: float
    provisioned: float


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant's part. host_gb and disk_gb: 10^9 bytes held on average."""

    tenant: int
    requests: int
    hit_percent: float
    host_gb: float
    disk_gb: float
    money: Money


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy in one scenario. refused: requests that no worker's pool could hold.  late: restores that
    would have passed their deadline.  moved: requests that another node took over.
    """

    policy: str
    seed: int
    requests: int
    refused: int
    late: int
    moved: int
    measured_s: float
    ttft: Quantile
    resumed: Quantile
    by_idle: tuple[IdleClass, ...]
    hits: Hits
    gpu_seconds: GpuSeconds
    traffic: Traffic
    money: Money
    tenants: tuple[Tenant, ...]
    forecasts: tuple[Forecast, ...]


def result_of(cluster: Cluster, scenario: Scenario, policy: str) -> PolicyResult:
    """The numbers of a cluster that has run."""
    tally = cluster.tally
    total = tally.total()
    start, end = cluster.usages
    spent = _Spent(scenario, start, end, total.tokens_out)
    ttft_s = np.array(tally.ttft_s, np.float64)
    return PolicyResult(
        policy=policy,
        seed=scenario.seed,
        requests=total.requests,
        refused=tally.refused,
        late=total.late,
        moved=tally.moved,
        measured_s=spent.seconds,
        ttft=_quantile(ttft_s),
        resumed=_quantile(np.array(tally.resumed_ttft_s, np.float64)),
        by_idle=_by_idle(cluster),
        hits=_hits(total),
        gpu_seconds=GpuSeconds(
            prefill=total.prefill_s * spent.gpus,
            decode=spent.decode_s * spent.gpus,
            saved_by_pool=total.pool_saved_s * spent.gpus,
            saved_by_tiers=total.load_saved_s * spent.gpus,
            could_save=total.could_save_s * spent.gpus,
        ),
        traffic=spent.traffic(),
        money=spent.money(total, None),
        tenants=tuple(spent.tenant(tenant, counts) for tenant, counts in sorted(tally.tenants.items())),
        forecasts=summed([node.forecasts for node in cluster.nodes]),
    )


class _Spent:
    """What lies between two usages, and what it costs."""

    def __init__(self, scenario: Scenario, start: Usage, end: Usage, output_tokens: int) -> None:
        self._scenario, self._start, self._end = scenario, start, end
        self._output_tokens = output_tokens
        # A load that comes all at once still has a length.
        self.seconds = max(end.at_s - start.at_s, 1.0)
        self.gpus = scenario.worker.gpus
        self.decode_s = end.decode_s - start.decode_s

    def traffic(self) -> Traffic:
        """Bytes of all nodes."""
        start, end, nodes = self._start, self._end, self._scenario.nodes.count
        written = int(self._written(None))
        a_year = written / nodes / self.seconds * 365 * _DAY_S
        return Traffic(
            to_gpu=end.to_gpu_bytes - start.to_gpu_bytes,
            from_gpu=end.from_gpu_bytes - start.from_gpu_bytes,
            disk_read=end.disk_read_bytes - start.disk_read_bytes,
            disk_written=written,
            peers=end.peer_bytes - start.peer_bytes,
            dropped=end.dropped - start.dropped,
            drive_busy_percent=100 * (end.drive_busy_s - start.drive_busy_s) / self.seconds / nodes,
            wear_years=self._scenario.disk.endurance_bytes / a_year if a_year else None,
        )

    def money(self, counts: Counts, tenant: int | None) -> Money:
        """A day's, of one tenant or of all. Decoding is shared by output tokens."""
        prices, per_day = prices_from(self._scenario.prices), _DAY_S / self.seconds
        host_price, disk_price = prices.tier("host"), prices.tier("disk")
        decode_s = self.decode_s * self._share_of_output(counts)
        gpu_second = prices.gpu_second(self._scenario.worker.device)
        gpu = (counts.prefill_s + decode_s) * self.gpus * gpu_second * per_day
        host = self._byte_s("host_byte_s", tenant) * host_price.per_byte_second * per_day
        disk = self._byte_s("disk_byte_s", tenant) * disk_price.per_byte_second * per_day
        wear = disk_price.writing(self._written(tenant)) * per_day
        bought = 0.0 if tenant is not None else provisioned_per_day(self._scenario)
        return Money(gpu, host, disk, wear, gpu + host + disk + wear, bought)

    def tenant(self, tenant: int, counts: Counts) -> Tenant:
        """One tenant's part."""
        found = counts.gpu + counts.host + counts.disk + counts.peer
        return Tenant(
            tenant=tenant,
            requests=counts.requests,
            hit_percent=_percent(found, counts.tokens_in),
            host_gb=self._byte_s("host_byte_s", tenant) / self.seconds / 1e9,
            disk_gb=self._byte_s("disk_byte_s", tenant) / self.seconds / 1e9,
            money=self.money(counts, tenant),
        )

    def _share_of_output(self, counts: Counts) -> float:
        return counts.tokens_out / self._output_tokens if self._output_tokens else 0.0

    def _written(self, tenant: int | None) -> float:
        return _between(self._start.written, self._end.written, tenant)

    def _byte_s(self, name: str, tenant: int | None) -> float:
        return _between(getattr(self._start, name), getattr(self._end, name), tenant)


def provisioned_per_day(scenario: Scenario) -> float:
    """What host memory and disk of the whole cluster cost a day, used or not."""
    prices = prices_from(scenario.prices)
    host = prices.tier("host").keeping(scenario.host.capacity_bytes, _DAY_S)
    disk = prices.tier("disk").keeping(scenario.disk.capacity_bytes, _DAY_S)
    return scenario.nodes.count * (host + disk)


def _between(start: dict[int, float], end: dict[int, float], tenant: int | None) -> float:
    if tenant is not None:
        return end.get(tenant, 0.0) - start.get(tenant, 0.0)
    return sum(end.values()) - sum(start.values())


def _by_idle(cluster: Cluster) -> tuple[IdleClass, ...]:
    ttft_s = np.array(cluster.tally.resumed_ttft_s, np.float64)
    idle_s = np.array(cluster.tally.resumed_idle_s, np.float64)
    reused = np.array(cluster.tally.resumed_hit, np.float64)
    classes: list[IdleClass] = []
    low_s = 0.0
    for name, high_s in IDLE_CLASSES:
        inside = (idle_s >= np.float64(low_s)) & (idle_s < np.float64(high_s))
        share = 100 * float(reused[inside].mean()) if inside.any() else None
        classes.append(IdleClass(name, _quantile(ttft_s[inside]), share))
        low_s = high_s
    return tuple(classes)


def _hits(total: Counts) -> Hits:
    found = total.gpu + total.host + total.disk + total.peer
    gpu, host, disk, peer, whole, bound = (
        _percent(tokens, total.tokens_in)
        for tokens in (total.gpu, total.host, total.disk, total.peer, found, total.known)
    )
    return Hits(gpu, host, disk, peer, whole, bound)


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def _quantile(seconds: _Values) -> Quantile:
    if not len(seconds):
        return Quantile(0, None, None, None)
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Quantile(len(seconds), p50, p90, p99)
