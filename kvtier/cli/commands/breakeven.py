"""`kvtier breakeven`: how long an idle conversation is worth keeping, for each tier and context length."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtier.cli import options
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.policy.breakeven import BreakEven

_COLUMNS = (
    "TIER",
    "CONTEXT",
    "KV",
    "RECOMPUTE",
    "LOAD",
    "SOONER",
    "COST",
    "ALWAYS",
    "HALF",
    "1 IN 10",
    "NEEDS",
)
# Until measured: reads from one NVMe drive of the fourth PCIe generation.
_DISK_RATE = "6GB"


def _contexts(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    found = []
    for item in value.split(","):
        match = re.fullmatch(r"([0-9]+)([kKmM]?)", item.strip())
        if match is None or not 0 < int(match[1]) < 1 << 30:
            raise click.BadParameter(f"{item!r} is no context length such as 4096 or 32k")
        found.append(int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()])
    return found


def _rate(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    from kvtier.config.units import parse_bytes

    if value is None:
        return None
    try:
        return float(parse_bytes(value))
    except ValueError as error:
        raise click.BadParameter(f"{error}; give bytes a second, such as 6GB") from error


@click.command()
@click.option(
    "--model", required=True, type=click.Path(exists=True), help="A config.json or the folder that holds it."
)
@click.option("--gpu", required=True, help="Short name of the device, such as h100.")
@click.option("--gpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="For one model.")
@click.option(
    "--prices", "prices_file", required=True, type=click.Path(exists=True, dir_okay=False), help="TOML file."
)
@click.option(
    "--contexts", default="2k,8k,32k,128k", show_default=True, callback=_contexts, help="In tokens."
)
@click.option(
    "--host-rate", callback=_rate, metavar="SIZE", help="Bytes a second from host memory to all GPUs."
)
@click.option(
    "--disk-rate",
    default=_DISK_RATE,
    show_default=True,
    callback=_rate,
    metavar="SIZE",
    help="From the disk.",
)
@click.option("--kv-dtype", help="Of the KV cache where it is not the model's, such as fp8_e4m3.")
@options.json_option
def breakeven(
    model: str,
    gpu: str,
    gpus: int,
    prices_file: str,
    contexts: list[int],
    host_rate: float | None,
    disk_rate: float,
    kv_dtype: str | None,
    as_json: bool,
) -> None:
    """Tell how long an idle conversation is worth keeping.

    Compares the GPU time of computing a conversation again with the price of keeping it, and with the time to
    load it. Speeds are the device's on paper, at a usual utilization. Needs no daemon.
    """
    from kvtier.model.config_json import load_config
    from kvtier.model.spec import ModelSpec
    from kvtier.policy.achieved_rate import AchievedRate
    from kvtier.policy.breakeven import break_even
    from kvtier.policy.devices import device_named
    from kvtier.policy.load_cost import LoadLine
    from kvtier.policy.prices import parse_prices
    from kvtier.policy.recompute import ComputeSpec

    device = device_named(gpu)
    config, _ = load_config(model)
    prices = parse_prices(_text(prices_file))
    rate = AchievedRate(ComputeSpec.from_config(config), device, gpus)
    host = device.link_bytes_per_s * gpus if host_rate is None else host_rate
    rows = list(
        break_even(
            ModelSpec.from_config(config, kv_dtype=kv_dtype),
            rate,
            device.name,
            gpus,
            prices,
            # What comes from the disk passes host memory on its way, piece by piece.
            {"host": LoadLine(0.0005, host), "disk": LoadLine(0.002, min(disk_rate, host))},
            contexts,
        )
    )
    if as_json:
        _print_json(rows, device.name, gpus, prices.currency)
    else:
        _print_table(rows, prices.currency)


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prices", f"{path} cannot be read: {error}") from error


def _print_json(rows: list[BreakEven], device: str, devices: int, currency: str) -> None:
    from dataclasses import asdict

    from kvtier.cli import output

    for row in rows:
        values: dict[str, Any] = asdict(row)
        values["keep_s"] = {p: _finite(seconds) for p, seconds in row.keep_s.items()}
        values["bytes_per_s"] = _finite(row.bytes_per_s)
        facts = {"gpu": device, "gpus": devices, "currency": currency, "load_is_sooner": row.load_is_sooner}
        output.print_json(facts | values)


def _finite(value: float) -> float | None:
    """null where there is no bound: JSON has no infinity."""
    return value if math.isfinite(value) else None


def _print_table(rows: list[BreakEven], currency: str) -> None:
    from kvtier.cli import output

    output.print_table(
        _COLUMNS,
        (
            (
                row.tier,
                f"{row.tokens:,}",
                output.size(row.kv_bytes),
                output.duration(row.recompute_s),
                output.duration(row.load_s),
                "load" if row.load_is_sooner else "recompute",
                f"{row.recompute_cost:.2g}",
                *(_keep(seconds) for seconds in row.keep_s.values()),
                f"{row.bytes_per_s / 1e9:.2f} GB/s" if math.isfinite(row.bytes_per_s) else "-",
            )
            for row in rows
        ),
        numbers=_COLUMNS[1:5] + _COLUMNS[6:],
    )
    output.print_line(" ")
    output.print_line(
        f"COST: of recomputing, in {currency}. NEEDS: below this bandwidth recomputing is sooner."
    )
    output.print_line(
        "ALWAYS, HALF, 1 IN 10: how long to keep an idle conversation that returns for sure, every other "
        "time, one time in ten."
    )


def _keep(seconds: float) -> str:
    from kvtier.cli import output

    if not seconds:
        return "not at all"
    return output.duration(seconds) if math.isfinite(seconds) else "for ever"
