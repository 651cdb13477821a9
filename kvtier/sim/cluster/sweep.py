"""Sizes of host memory and disk, side by side: which of them nothing beats, and where more stops paying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

from kvtier.config.units import format_bytes
from kvtier.errors import ConfigError
from kvtier.sim.cluster.deciders import NONE, UNBOUNDED, policies_of
from kvtier.sim.cluster.result import PolicyResult
from kvtier.sim.cluster.scenario import Scenario, changed
from kvtier.sim.cluster.simulate import Progress, simulate_one

Aim = Literal["ttft", "gpu_seconds"]
AIMS: Final[tuple[Aim, ...]] = ("ttft", "gpu_seconds")


@dataclass(frozen=True, slots=True)
class Offer:
    """What each node would have, and what a day of the cluster would then be.

    cost: US dollars a day: host memory and disk as bought, GPU time as spent, drive wear.  reached: what is
    to be small: the p90 of the time to first token of resumed requests, in seconds, or GPU-seconds of prefill
    a day.  pareto: no other offer is better in one and as good in the other.  knee: where the front bends.
    """

    policy: str
    host_bytes: int
    disk_bytes: int
    cost: float
    reached: float
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    gpu_seconds_per_day: float
    hit_percent: float
    wear_years: float | None
    pareto: bool = False
    knee: bool = False


def sweep(
    scenario: Scenario,
    host_bytes: Sequence[int],
    disk_bytes: Sequence[int],
    aim: Aim = "ttft",
    progress: Progress | None = None,
) -> list[Offer]:
    """Every policy of the scenario at every size, in the order of the arguments.

    The policy 'none' has one size only, and 'unbounded' has no price: it is left out.  Raises as `simulate`.
    """
    policies = [policy for policy in scenario.policies if policy != UNBOUNDED]
    for policy in policies:
        policies_of(policy)
    if not policies or not host_bytes or not disk_bytes:
        raise ConfigError("sweep", "has nothing to compare", fix="name policies and sizes")
    offers: list[Offer] = []
    for policy in policies:
        sizes = [(0, 0)] if policy == NONE else list(product(host_bytes, disk_bytes))
        for host, disk in sizes:
            tried = changed(
                scenario,
                host=changed(scenario.host, capacity_bytes=host),
                disk=changed(scenario.disk, capacity_bytes=disk),
            )
            name = f"{policy}, {format_bytes(host)} host, {format_bytes(disk)} disk"
            result, _ = simulate_one(tried, policy, progress, name)
            offers.append(_offer(result, host, disk, aim))
    return marked(offers)


def marked(offers: Sequence[Offer]) -> list[Offer]:
    """The same offers, with the front and its knee marked.

    The knee is the point of the front that lies farthest below the line between its ends, both axes scaled
    to the front (Satopaa et al., "Finding a Kneedle in a Haystack", 2011); of one or two, the cheapest.
    """
    front = [o for o in offers if not any(_beats(other, o) for other in offers)]
    front.sort(key=lambda o: (o.cost, o.reached))
    knee = _knee(front)
    return [changed_offer(o, pareto=any(o is f for f in front), knee=o is knee) for o in offers]


def changed_offer(offer: Offer, *, pareto: bool, knee: bool) -> Offer:
    """A copy with its marks."""
    values = {name: getattr(offer, name) for name in Offer.__slots__}
    return Offer(**values | {"pareto": pareto, "knee": knee})


def _beats(one: Offer, other: Offer) -> bool:
    no_worse = one.cost <= other.cost and one.reached <= other.reached
    return no_worse and (one.cost, one.reached) != (other.cost, other.reached)


def _knee(front: Sequence[Offer]) -> Offer:
    first, last = front[0], front[-1]
    wide, high = last.cost - first.cost, first.reached - last.reached
    if len(front) < 3 or not wide or not high:
        return first
    return max(front, key=lambda o: (first.reached - o.reached) / high - (o.cost - first.cost) / wide)


def _offer(result: PolicyResult, host: int, disk: int, aim: Aim) -> Offer:
    per_day = 86400 / result.measured_s
    gpu_seconds = result.gpu_seconds.prefill * per_day
    ttft_s = result.resumed.p90_s
    money = result.money
    return Offer(
        policy=result.policy,
        host_bytes=host,
        disk_bytes=disk,
        cost=money.gpu + (0.0 if result.policy == NONE else money.provisioned) + money.wear,
        reached=gpu_seconds if aim == "gpu_seconds" else ttft_s or 0.0,
        ttft_p50_s=result.resumed.p50_s,
        ttft_p90_s=ttft_s,
        gpu_seconds_per_day=gpu_seconds,
        hit_percent=result.hits.total,
        wear_years=result.traffic.wear_years,
    )
