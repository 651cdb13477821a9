"""`kvtier simulate`: what a cluster would have done with a recorded or generated load."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from kvtier.cli import options

if TYPE_CHECKING:
    from kvtier.sim.cluster.scenario import Scenario
    from kvtier.sim.cluster.simulate import Simulation

_PATH = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("load", type=_PATH, metavar="SCENARIO.toml|TRACE")
@click.option("--policy", metavar="NAMES", help="Policies to compare, such as none,lru,cost,unbounded.")
@click.option("--seed", type=click.IntRange(min=0), help="Of a generated load; wins over the scenario's.")
@click.option("--html", type=click.File("w", lazy=True), help="Write one self-contained report.")
@click.option("--trace", type=click.File("w", lazy=True), help="Only write the load as kvtrace/1.")
@click.option("--fit", is_flag=True, help="Only print the load's waits as tables for a scenario.")
@options.json_option
def simulate(
    load: Path,
    policy: str | None,
    seed: int | None,
    html: TextIO | None,
    trace: TextIO | None,
    fit: bool,
    as_json: bool,
) -> None:
    """Ask "what if" of a day: serving workers, host memory, drives and the daemon's policies in virtual time.

    A scenario is a TOML file; a trace (kvtrace/1, Mooncake, Azure, BurstGPT) runs in the scenario that has
    all defaults. The same input and seed give the same output to the byte.
    """
    from kvtier.cli import output
    from kvtier.sim.cluster import simulate as simulator

    scenario = read_scenario(load, policy, seed)
    if trace is not None:
        from kvtier.sim.workload.write import kvtrace_lines

        with simulator.load_of(scenario) as turns:
            trace.writelines(kvtrace_lines(turns))
        return
    if fit:
        from kvtier.sim.workload import fit as fitter

        with simulator.load_of(scenario) as turns:
            sys.stdout.write(fitter.to_toml(fitter.fit(turns.turns)))
        return
    with progress_bar(scenario) as progress:
        simulation = simulator.simulate(scenario, progress)
    if as_json:
        for result in simulation.results:
            output.print_json(result)
        for distance in simulation.distances:
            output.print_json(distance)
    else:
        _print(simulation)
    if html is not None:
        from kvtier.sim.report.html import report

        html.write(report(simulation))


def read_scenario(load: Path, policy: str | None, seed: int | None) -> Scenario:
    """A scenario from its file, or with all defaults around a trace."""
    from kvtier.sim.cluster.scenario import Scenario, changed, load_scenario

    scenario = load_scenario(load) if load.suffix == ".toml" else Scenario(name=load.name, trace=str(load))
    if policy is not None:
        scenario = changed(scenario, policies=tuple(name.strip() for name in policy.split(",")))
    return scenario if seed is None else changed(scenario, seed=seed)


@contextmanager
def progress_bar(scenario: Scenario) -> Iterator[Callable[[str, int], object] | None]:
    """For a person at a terminal: a bar for each run, on stderr."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    total = scenario.synthetic.requests if not scenario.trace else 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def report(run: str, rows: int) -> None:
            if run not in tasks:
                tasks[run] = bar.add_task(run, total=total or None)
            bar.update(tasks[run], completed=rows)

        yield report


def _print(simulation: Simulation) -> None:
    from kvtier.cli import output
    from kvtier.sim.report import html, tables

    results = simulation.results
    output.print_line(html.lead(simulation))
    output.print_line(f"seed {simulation.scenario.seed}")
    for columns, rows in (
        (tables.POLICY_COLUMNS, tables.policies(results)),
        (tables.IDLE_COLUMNS, tables.idle(results)),
        (tables.HIT_COLUMNS, tables.hits(results)),
        (tables.MONEY_COLUMNS, tables.money(results)),
        (tables.TENANT_COLUMNS, tables.tenants(results)),
        (tables.TRAFFIC_COLUMNS, tables.traffic(results)),
        (tables.FORECAST_COLUMNS, tables.forecasts(results)),
        (tables.DISTANCE_COLUMNS, tables.distances(simulation.distances)),
    ):
        lines = list(rows)
        if lines:
            print()
            output.print_table([column.upper() for column in columns], lines, numbers=_upper(columns[1:]))


def _upper(columns: tuple[str, ...]) -> list[str]:
    return [column.upper() for column in columns]
