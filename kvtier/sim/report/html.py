"""A simulation as one HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from kvtier.policy.prices import prices_from
from kvtier.sim.cluster.deciders import NONE
from kvtier.sim.cluster.result import IDLE_CLASSES, PolicyResult
from kvtier.sim.cluster.simulate import Simulation
from kvtier.sim.report import page, tables, words
from kvtier.sim.report.svg import Series, bars


def report(simulation: Simulation) -> str:
    """The whole file. The same simulation gives the same text."""
    return page.page(f"KV cache tiers: {simulation.scenario.name}", _parts(simulation))


def lead(simulation: Simulation) -> str:
    """What matters, in a sentence or two."""
    results = simulation.results
    plain = next((r for r in results if r.policy == NONE), None)
    others = [r for r in results if r is not plain]
    if plain is None or not others:
        return f"{_requests(results[0])}, seed {results[0].seed}."
    best = min(others, key=lambda r: (r.money.total, r.policy))
    return (
        f"{_requests(best)}. With '{best.policy}', a resumed conversation has its first token after "
        f"{words.seconds(best.resumed.p50_s)} (9 in 10: {words.seconds(best.resumed.p90_s)}) in place of "
        f"{words.seconds(plain.resumed.p50_s)} ({words.seconds(plain.resumed.p90_s)}), and a day costs "
        f"{words.money(best.money.total)} in place of {words.money(plain.money.total)}, for GPU time, memory "
        f"while it is held, and drive wear."
    )


def _requests(result: PolicyResult) -> str:
    return f"{words.count(result.requests)} requests over {words.seconds(result.measured_s)}"


def _parts(simulation: Simulation) -> Iterator[str]:
    results = simulation.results
    names = [r.policy for r in results]
    yield page.paragraph(lead(simulation), "lead")
    yield page.paragraph(f"Seed {simulation.scenario.seed}. Simulated, not measured.", "small")
    yield page.heading("Policies side by side")
    yield page.table(tables.POLICY_COLUMNS, tables.policies(results))
    yield page.heading("Time to first token when a conversation goes on")
    for name in ("p50_s", "p90_s", "p99_s"):
        times = [Series(r.policy, tuple(getattr(c.ttft, name) for c in r.by_idle)) for r in results]
        title = f"{name[:3]} by how long the conversation was idle"
        yield bars(title, [c for c, _ in IDLE_CLASSES], times, words.seconds, log=True)
    yield page.table(tables.IDLE_COLUMNS, tables.idle(results))
    yield page.heading("Hits")
    yield bars(
        "Prompt tokens by where they came from; dashed: all that was ever computed before",
        names,
        [Series(name, tuple(getattr(r.hits, name) for r in results)) for name in _SOURCES],
        words.percent,
        stacked=True,
        marks=[r.hits.bound for r in results],
    )
    yield page.table(tables.HIT_COLUMNS, tables.hits(results))
    yield page.heading("GPU time")
    yield bars(
        "GPU-seconds of prefill, and what was spared",
        names,
        [
            Series("computed", tuple(r.gpu_seconds.prefill for r in results)),
            Series("spared by the engines' pools", tuple(r.gpu_seconds.saved_by_pool for r in results)),
            Series("spared by loads", tuple(r.gpu_seconds.saved_by_tiers for r in results)),
        ],
        words.count,
        stacked=True,
    )
    yield from _costs(results, names, prices_from(simulation.scenario.prices).currency)
    yield page.heading("Forecasts")
    yield page.paragraph("How often a restore ended inside the interval that its plan had named.")
    yield page.table(tables.FORECAST_COLUMNS, tables.forecasts(results))
    if simulation.distances:
        yield page.heading("The load, beside what is published about real ones")
        yield page.table(tables.DISTANCE_COLUMNS, tables.distances(simulation.distances))
    yield page.heading("Scenario")
    text = msgspec.json.format(msgspec.json.encode(simulation.scenario), indent=2).decode()
    yield page.preformatted(text)


_SOURCES = ("gpu", "host", "disk", "peer")


def _costs(results: Iterable[PolicyResult], names: list[str], currency: str) -> Iterator[str]:
    results = tuple(results)
    yield page.heading("Money")
    yield bars(
        f"{currency} a day",
        names,
        [
            Series(name, tuple(getattr(r.money, name) for r in results))
            for name in ("gpu", "host", "disk", "wear")
        ],
        words.money,
        stacked=True,
    )
    yield page.table(tables.MONEY_COLUMNS, tables.money(results))
    yield page.table(tables.TENANT_COLUMNS, tables.tenants(results))
    yield page.heading("Bytes and wear")
    yield page.table(tables.TRAFFIC_COLUMNS, tables.traffic(results))
