"""Policies side by side on one scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import ConfigError
from kvtier.sim.cluster.cluster import Cluster
from kvtier.sim.cluster.costs import FlopsCost
from kvtier.sim.cluster.deciders import policies_of
from kvtier.sim.cluster.result import PolicyResult, result_of
from kvtier.sim.cluster.scenario import Scenario
from kvtier.sim.workload.distance import Distance, distances
from kvtier.sim.workload.generate import Generator
from kvtier.sim.workload.recorded import recorded_turns
from kvtier.sim.workload.turns import TurnStream

# Told the name of a run, and how many rows of it were taken in.
Progress = Callable[[str, int], object]


@dataclass(frozen=True, slots=True)
class Simulation:
    """All policies of a scenario. distances: of a generated load to published figures."""

    scenario: Scenario
    results: tuple[PolicyResult, ...]
    distances: tuple[Distance, ...]


def simulate(scenario: Scenario, progress: Progress | None = None) -> Simulation:
    """Run every policy over the same load. Raises ConfigError and TraceError; OSError for a file."""
    for policy in scenario.policies:
        policies_of(policy)
    results: list[PolicyResult] = []
    found: list[Distance] = []
    for policy in scenario.policies:
        result, found = simulate_one(scenario, policy, progress)
        results.append(result)
    return Simulation(scenario, tuple(results), tuple(found))


def simulate_one(
    scenario: Scenario, policy: str, progress: Progress | None = None, name: str = ""
) -> tuple[PolicyResult, list[Distance]]:
    """One policy over the load, which is read or generated again for each. name: of the run; the policy's."""

    def report(rows: int) -> None:
        if progress is not None:
            progress(name or policy, rows)

    cost = FlopsCost(scenario.model, scenario.worker)
    with load_of(scenario) as stream:
        cluster = Cluster(scenario, policy, cost, stream.block_tokens)
        cluster.run(stream, report)
    found = distances(stream.draws) if stream.draws is not None else []
    return result_of(cluster, scenario, policy), found


@contextmanager
def load_of(scenario: Scenario) -> Iterator[TurnStream]:
    """The load, from its beginning; a file is open as long. Raises ConfigError and TraceError."""
    if not scenario.trace:
        yield Generator(scenario.synthetic, scenario.seed).stream()
        return
    if not Path(scenario.trace).is_file():
        raise ConfigError("trace", f"there is no file '{scenario.trace}'")
    with open(scenario.trace, "rb") as file:
        yield recorded_turns(file)
