"""The node's numbers for Prometheus, whether it is alive and ready, and where a conversation is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from kvtier import paths
from kvtier.config.checks import is_loopback
from kvtier.config.credentials import read_token
from kvtier.config.load import Config
from kvtier.daemon.http import HealthServer
from kvtier.daemon.locating import Locating
from kvtier.daemon.metrics import (
    DiskMetrics,
    EtaMetrics,
    Histogram,
    NodeMetrics,
    ReturnMetrics,
    TierMetrics,
    make_registry,
)
from kvtier.messages.tiers import DiskUsage
from kvtier.node.core import NodeCore
from kvtier.node.counters import BUCKETS_S
from kvtier.node.eta import ERROR_BOUNDS

Answer = TypeVar("Answer")


# A loop that stands still so long hangs. What it does at once takes a small part of this: a node that takes
# over a large store must not be ended for it.
STILL_MOST_S = 10.0


class Ask(Protocol):
    """NodeService.ask."""

    def __call__(self, question: Callable[[NodeCore], Answer], /) -> Answer | None: ...


def serve_endpoints(config: Config, ask: Ask, still_s: Callable[[], float]) -> HealthServer:
    """Start /metrics, /healthz, /readyz and /locate. Raises ConfigError.

    still_s: Loop.still_s. It needs no answer of the loop, so a node that is at work counts as alive.
    """

    def snapshot() -> NodeMetrics:
        answer = ask(node_metrics)
        return answer or NodeMetrics(node=config.node.name, version="", ready=False)

    def alive() -> Sequence[str]:
        still = still_s()
        return () if still < STILL_MOST_S else (f"the node's loop stands still for {still:.0f} s",)

    def ready() -> Sequence[str]:
        reasons = ask(unready)
        return alive() or ("the node's loop does not answer",) if reasons is None else reasons

    locating = Locating(
        paths.node_socket(config.node.runtime_dir),
        token=read_token(config.access.token_file) if config.access.token_file else "",
        open_to_all=is_loopback(config.metrics.host),
    )
    server = HealthServer(
        config.metrics.host,
        config.metrics.port,
        registry=make_registry(snapshot),
        alive=alive,
        ready=ready,
        posts={"/locate": locating},
        on_close=locating.close,
        allow_remote=config.metrics.allow_remote,
    )
    server.start()
    return server


def unready(core: NodeCore) -> Sequence[str]:
    """Why the node does not serve; nothing when it does."""
    report = core.status()
    if report.ready:
        return ()
    waiting = [f"the {tier.name} tier is {tier.state}" for tier in report.tiers if tier.state != "ready"]
    return (*report.warnings, *waiting)


def node_metrics(core: NodeCore) -> NodeMetrics:
    """A snapshot for the collector."""
    report, counters = core.status(), core.state.counters
    return NodeMetrics(
        node=report.node,
        version=report.version,
        ready=report.ready,
        tiers=tuple(
            TierMetrics(
                name=tier.name,
                ready=tier.state == "ready",
                capacity_bytes=tier.capacity_bytes,
                used_bytes=tier.used_bytes,
                limbo_bytes=tier.limbo_bytes,
                objects=tier.objects,
                quarantined=tier.quarantined,
            )
            for tier in report.tiers
        ),
        parks=dict(counters.parks),
        restores=dict(counters.restores),
        misses=dict(counters.misses),
        errors=dict(counters.errors),
        restore_s=Histogram(BUCKETS_S, tuple(counters.restore_s.counts), counters.restore_s.sum_s),
        backpressure_s=counters.backpressure_s,
        eta=EtaMetrics(
            outcomes=dict(counters.eta.outcomes),
            errors=Histogram(ERROR_BOUNDS, tuple(counters.eta.errors), counters.eta.errors_sum),
            ways=dict(counters.eta.ways),
            prefills=counters.eta.prefills,
        ),
        returns={
            name: ReturnMetrics(seen.waits, seen.expected, seen.came)
            for name, seen in core.state.policies.usage.forecasts().items()
        },
        evicts_by_last_use=core.state.policies.usage.by_last_use(),
        disk=_disk(core.state.disk.said),
        spilled_bytes=counters.spilled_bytes,
        prefetched_bytes={
            "read": counters.prefetched_bytes,
            "used": counters.prefetch_used_bytes,
            "wasted": counters.prefetch_wasted_bytes,
        },
        peer_bytes={
            "kv": counters.peer_received_bytes,
            "coded": counters.peer_coded_bytes,
            "wire": counters.peer_wire_bytes,
            "relayed": counters.peer_relayed_bytes,
            "lent": counters.peer_lent_bytes,
        },
        host_dirty_bytes=core.state.dirty_bytes,
        log_lost=core.state.log_lost,
        workers=len(report.workers),
        conversations=report.conversations,
        waiting_parks=report.waiting_parks,
        late_workers=len(core.state.gpu_said.late),
    )


def _disk(said: DiskUsage) -> DiskMetrics:
    return DiskMetrics(
        written_bytes=said.written_bytes,
        user_bytes=said.user_bytes,
        flushes=said.flushes,
        direct_io=said.direct_io,
        scrub_bytes=said.scrub_bytes,
        scrub_bad=said.scrub_bad,
        scrub_passes=said.scrub_passes,
        wear_limit_bytes=said.wear_limit_bytes,
        wear_left_bytes=said.wear_left_bytes,
        crowded=said.crowded,
    )
