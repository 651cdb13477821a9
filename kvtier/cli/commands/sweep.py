"""`kvtier sweep`: which sizes of host memory and disk pay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from kvtier.cli import options
from kvtier.cli.commands.simulate import progress_bar, read_scenario
from kvtier.config.units import parse_bytes

if TYPE_CHECKING:
    from kvtier.sim.cluster.sweep import Offer

_PATH = click.Path(exists=True, dir_okay=False, path_type=Path)


def _sizes(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    try:
        return [parse_bytes(item) for item in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("load", type=_PATH, metavar="SCENARIO.toml|TRACE")
@click.option(
    "--host", default="128GiB,256GiB,512GiB,1TiB", show_default=True, callback=_sizes, metavar="SIZES"
)
@click.option("--disk", default="0B,2TiB,4TiB,8TiB", show_default=True, callback=_sizes, metavar="SIZES")
@click.option("--policy", metavar="NAMES", help="Policies to compare, such as none,lru,cost.")
@click.option(
    "--by",
    type=click.Choice(("ttft", "gpu_seconds")),
    default="ttft",
    show_default=True,
    help="What money is to buy: a short time to first token, or few GPU-seconds.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of a generated load; wins over the scenario's.")
@click.option("--html", type=click.File("w", lazy=True), help="Write one self-contained report.")
@options.json_option
def sweep(
    load: Path,
    host: list[int],
    disk: list[int],
    policy: str | None,
    by: str,
    seed: int | None,
    html: TextIO | None,
    as_json: bool,
) -> None:
    """Simulate a load at every size of host memory and disk per node, and say what to buy."""
    from kvtier.cli import output
    from kvtier.sim.cluster import sweep as sweeper
    from kvtier.sim.report import sweep as told

    scenario = read_scenario(load, policy, seed)
    aim: sweeper.Aim = "ttft" if by == "ttft" else "gpu_seconds"
    with progress_bar(scenario) as progress:
        offers: list[Offer] = sweeper.sweep(scenario, host, disk, aim, progress)
    if as_json:
        for offer in offers:
            output.print_json(offer)
    else:
        columns = [column.upper() for column in told.COLUMNS]
        output.print_table(columns, told.rows(offers), numbers=columns[1:-1])
        output.print_line(f"seed {scenario.seed}")
        output.print_line(told.advice(offers, scenario))
    if html is not None:
        html.write(told.report(offers, scenario, aim))
