"""`kvtier hitratio`: what cache policies would have reached on a recorded trace."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO, TextIO

import click

from kvtier.cli import options

if TYPE_CHECKING:
    from kvtier.sim.hitratio import HitRatio, Size
    from kvtier.sim.trace import Trace

_COLUMNS = ("POLICY", "SHARE %", "BLOCKS", "TOKEN HIT %", "COST HIT %", "SLOW WRITES/BLOCK", "SECONDS")


def _numbers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        numbers = [float(item) for item in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 1,2,5") from error
    if not all(0 < number <= 100 and math.isfinite(number) for number in numbers):
        raise click.BadParameter("percentages lie above 0 and at most at 100")
    return numbers


def _counts(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    if not all(item.strip().isdecimal() for item in value.split(",")):
        raise click.BadParameter(f"{value!r} is no list of numbers such as 1000,2000")
    return [int(item) for item in value.split(",")]


@click.command()
@click.argument("trace", type=click.File("rb"))
@click.option(
    "--shares", metavar="PERCENTS", callback=_numbers, help="Sizes, as shares of the unique blocks."
)
@click.option(
    "--lru-points", metavar="PERCENTS", callback=_numbers, help="Sizes where LRU has so much of it all."
)
@click.option("--blocks", metavar="COUNTS", callback=_counts, help="Sizes, in blocks.")
@click.option("--policies", default="lru,arc,s3fifo,sieve,gdsf,clairvoyant", show_default=True)
@click.option(
    "--objective", type=click.Choice(("tokens", "gpu_seconds")), default="tokens", show_default=True
)
@click.option("--causal", is_flag=True, help="Tell a policy how a request ended when it ends, not before.")
@click.option(
    "--fast-share",
    type=click.FloatRange(0, 100, max_open=True),
    default=10.0,
    show_default=True,
    metavar="PERCENT",
    help="Part of the size that is the fast tier in the two-tier run; 0 for no such run.",
)
@click.option(
    "--ttl", default="5min", show_default=True, callback=options.seconds, help="Of the policy 'ttl'."
)
@click.option("--decisions", type=click.File("w", lazy=True), help="Write what was done for each request.")
@options.json_option
def hitratio(
    trace: BinaryIO,
    shares: list[float] | None,
    lru_points: list[float] | None,
    blocks: list[int] | None,
    policies: str,
    objective: str,
    causal: bool,
    fast_share: float,
    ttl: float,
    decisions: TextIO | None,
    as_json: bool,
) -> None:
    """Replay a recorded trace against cache policies.

    TRACE is a kvtrace/1 or Mooncake file, zstd or plain, or - for standard input. Needs no daemon.
    """
    from kvtier.sim import registry
    from kvtier.sim.hitratio import decisions_to, measure
    from kvtier.sim.read_trace import read_trace

    names = [name.strip() for name in policies.split(",")]
    for name in names:
        registry.entry_of(name)
    if sum(sizes is not None for sizes in (shares, lru_points, blocks)) != 1:
        raise click.UsageError("name the sizes by one of --shares, --lru-points and --blocks")
    if decisions is not None and len(names) * len(shares or lru_points or blocks or ()) != 1:
        raise click.UsageError("--decisions takes one policy and one size")
    recorded = read_trace(trace)
    rows: list[HitRatio] = []
    for size in _sizes(recorded, shares, lru_points, blocks):
        setup = registry.Setup(
            size.blocks, recorded.block_tokens, "tokens" if objective == "tokens" else "gpu_seconds", ttl
        )
        for name in names:
            with ExitStack() as open_files:
                write = None if decisions is None else decisions_to(open_files.enter_context(decisions))
                rows.append(
                    measure(
                        recorded,
                        name,
                        setup,
                        share_percent=size.share_percent,
                        causal=causal,
                        fast_share_percent=fast_share,
                        on_served=write,
                    )
                )
            if as_json:
                _print_one(rows[-1])
    if not as_json:
        _print_all(rows)


def _sizes(
    recorded: Trace, shares: list[float] | None, lru_points: list[float] | None, blocks: list[int] | None
) -> list[Size]:
    from kvtier.sim import hitratio as sizes

    if shares is not None:
        return sizes.sizes_of_shares(recorded, shares)
    if lru_points is not None:
        return sizes.sizes_of_lru_points(recorded, lru_points)
    return sizes.sizes_of_blocks(recorded, blocks or ())


def _print_one(row: HitRatio) -> None:
    from kvtier.cli import output

    output.print_json(row)


def _print_all(rows: list[HitRatio]) -> None:
    from kvtier.cli import output

    output.print_table(
        _COLUMNS,
        (
            (
                row.policy,
                f"{row.share_percent:.2f}",
                f"{row.capacity_blocks:,}",
                f"{row.token_hit_percent:.2f}",
                f"{row.cost_hit_percent:.2f}",
                "-" if row.slow_writes_per_block is None else f"{row.slow_writes_per_block:.2f}",
                f"{row.seconds:.1f}",
            )
            for row in rows
        ),
        numbers=_COLUMNS[1:],
    )
