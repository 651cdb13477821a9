"""A sweep in words, as a table, and as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from kvtier.config.units import format_bytes
from kvtier.sim.cluster.deciders import NONE
from kvtier.sim.cluster.scenario import Scenario
from kvtier.sim.cluster.sweep import Aim, Offer
from kvtier.sim.report import page, words
from kvtier.sim.report.svg import Point, scatter

COLUMNS: Final = (
    "offer per node", "$/day", "resume p50", "p90", "GPU-s/day", "hit", "drives last", "nothing beats it"
)  # fmt: skip
_AXIS: Final[dict[Aim, str]] = {
    "ttft": "p90 of time to first token, resumed",
    "gpu_seconds": "GPU-seconds a day",
}


def rows(offers: Sequence[Offer]) -> Iterator[tuple[str, ...]]:
    """A line for each offer."""
    for o in offers:
        yield (
            name(o),
            words.money(o.cost),
            words.seconds(o.ttft_p50_s),
            words.seconds(o.ttft_p90_s),
            words.count(o.gpu_seconds_per_day),
            words.percent(o.hit_percent),
            words.years(o.wear_years),
            "buy this" if o.knee else "yes" if o.pareto else "",
        )


def name(offer: Offer) -> str:
    """Sizes and policy."""
    if offer.policy == NONE:
        return "no tiers"
    return f"{format_bytes(offer.host_bytes)} host, {format_bytes(offer.disk_bytes)} disk, {offer.policy}"


def advice(offers: Sequence[Offer], scenario: Scenario) -> str:
    """What to buy, and why not less or more."""
    front = sorted((o for o in offers if o.pareto), key=lambda o: o.cost)
    knee = next(o for o in offers if o.knee)
    nodes = f"{scenario.nodes.count} node{'s' if scenario.nodes.count > 1 else ''}"
    if knee.policy == NONE:
        said = f"Buy nothing: without tiers a day of {nodes} costs {words.money(knee.cost)}."
    else:
        said = (
            f"Buy this for each of {nodes}: {format_bytes(knee.host_bytes)} of host memory and "
            f"{format_bytes(knee.disk_bytes)} of disk, under the policy '{knee.policy}'. A day costs "
            f"{words.money(knee.cost)}, and 9 in 10 resumed requests have their first token within "
            f"{words.seconds(knee.ttft_p90_s)}."
        )
    index = next(i for i, o in enumerate(front) if o is knee)
    if index:
        less = front[index - 1]
        said += f" The next cheaper one, {name(less)}, saves {words.money(knee.cost - less.cost)} a day"
        said += f" and takes {words.seconds(less.ttft_p90_s)}, {words.count(less.gpu_seconds_per_day)} GPU-s."
    if index + 1 < len(front):
        more = front[index + 1]
        said += f" The next better one, {name(more)}, costs {words.money(more.cost - knee.cost)} a day more"
        said += f" for {words.seconds(more.ttft_p90_s)}, {words.count(more.gpu_seconds_per_day)} GPU-s."
    return said


def report(offers: Sequence[Offer], scenario: Scenario, aim: Aim) -> str:
    """The whole file. Equal arguments give equal text."""
    points = [
        Point(o.cost, o.reached, f"buy this: {name(o)}" if o.knee else name(o), o.pareto, o.knee)
        for o in offers
    ]
    reached = words.seconds if aim == "ttft" else words.count
    text = msgspec.json.format(msgspec.json.encode(scenario), indent=2).decode()
    return page.page(
        f"Sizes of KV cache tiers: {scenario.name}",
        [
            page.paragraph(advice(offers, scenario), "lead"),
            page.paragraph(f"Seed {scenario.seed}. Simulated, not measured.", "small"),
            scatter(
                "Cost against what it buys; the ring is what to buy",
                points,
                "US dollars a day: memory and drives as bought, GPU time as spent, wear",
                _AXIS[aim],
                words.money,
                reached,
                on_line="nothing beats it",
                off_line="another is as cheap and better",
            ),
            page.table(COLUMNS, rows(offers)),
            page.heading("Scenario"),
            page.preformatted(text),
        ],
    )
