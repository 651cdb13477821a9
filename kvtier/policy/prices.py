"""What keeping, writing and computing cost in money, from a TOML text.

    currency = "USD"
    [gpu_hour]                       # of one device, by its short name
    h100 = 3.0
    [host]
    per_gb_month = 0.10              # or: per_tb and lifetime_years
    [disk]
    per_tb = 125                     # price of a drive for each TB, and how long it is used
    lifetime_years = 5
    endurance_tb_per_tb = 1825       # TB that may be written for each TB of the drive; or: per_tb_written

GB and TB are powers of ten, as drives are sold; a month is a twelfth of 365 days.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from kvtier.errors import ConfigError

Tier = Literal["host", "disk"]
TIERS: Final[tuple[Tier, ...]] = ("host", "disk")

_GB, _TB = 1e9, 1e12
_YEAR_S = 365 * 86400.0
_MONTH_S = _YEAR_S / 12
_TIER_KEYS: Final[dict[Tier, frozenset[str]]] = {
    "host": frozenset({"per_gb_month", "per_tb", "lifetime_years"}),
    "disk": frozenset({"per_gb_month", "per_tb", "lifetime_years", "per_tb_written", "endurance_tb_per_tb"}),
}


@dataclass(frozen=True, slots=True)
class TierPrice:
    """Money to keep a byte for a second, and to write one."""

    per_byte_second: float
    per_byte_written: float = 0.0

    def keeping(self, nbytes: float, seconds: float) -> float:
        """Money to keep so much for so long."""
        return nbytes * seconds * self.per_byte_second

    def writing(self, nbytes: float) -> float:
        """Money to write so much once."""
        return nbytes * self.per_byte_written


@dataclass(frozen=True, slots=True)
class Prices:
    """All prices that are known. gpu_hour: by a device's short name."""

    currency: str
    gpu_hour: Mapping[str, float] = field(default_factory=dict)
    tiers: Mapping[Tier, TierPrice] = field(default_factory=dict)

    def gpu_second(self, device: str) -> float:
        """Money for a second of one device. Raises ConfigError naming the price that is missing."""
        if device not in self.gpu_hour:
            raise ConfigError(
                f"prices.gpu_hour.{device}", "is missing", fix=f"add {device} = PRICE to [gpu_hour]"
            )
        return self.gpu_hour[device] / 3600

    def tier(self, name: Tier) -> TierPrice:
        """Of a tier. Raises ConfigError naming the table that is missing."""
        if name not in self.tiers:
            raise ConfigError(f"prices.{name}", "is missing", fix=f"add a table [{name}] with per_gb_month")
        return self.tiers[name]


@dataclass(frozen=True, slots=True)
class Money:
    """Prices as a node knows them. device: whose seconds are saved, '' where not known."""

    prices: Prices | None = None
    device: str = ""

    def gpu_second(self) -> float | None:
        """Of one device; None where not known."""
        return self.prices.gpu_second(self.device) if self.prices is not None and self.device else None

    def tier(self, name: Tier) -> TierPrice | None:
        """Of a tier; None where not known."""
        return self.prices.tiers.get(name) if self.prices is not None else None

    def per_hour(self, nbytes: Mapping[Tier, int]) -> float | None:
        """Money to keep so much in each tier for an hour; None where a price is missing that counts."""
        if self.prices is None or any(
            count and tier not in self.prices.tiers for tier, count in nbytes.items()
        ):
            return None
        return math.fsum(self.prices.tier(tier).keeping(n, 3600.0) for tier, n in nbytes.items() if n)


def money_of(text: str, device: str = "") -> Money:
    """From a TOML text; device: by whose price seconds are paid, '' where the text names only one.

    Raises ConfigError as `parse_prices`, and for a device without a price.
    """
    prices = parse_prices(text)
    if not device and len(prices.gpu_hour) != 1:
        fix = f"set policy.device to one of {', '.join(prices.gpu_hour) or 'those in [gpu_hour]'}"
        raise ConfigError("policy.device", "is empty, and the prices do not name one device", fix=fix)
    device = device or next(iter(prices.gpu_hour))
    prices.gpu_second(device)
    return Money(prices, device)


def parse_prices(text: str) -> Prices:
    """Prices from a TOML text.

    Raises ConfigError naming the field that is missing, unknown or out of bounds.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("prices", f"is no TOML: {error}") from error
    return prices_from(table)


def prices_from(table: Mapping[str, Any]) -> Prices:
    """Prices from what such a text holds. Raises as `parse_prices`."""
    _only(table, "prices", {"currency", "gpu_hour", *TIERS})
    currency = table.get("currency", "USD")
    if not isinstance(currency, str) or not currency:
        raise ConfigError("prices.currency", f"is {currency!r}", fix='give a name such as "USD"')
    gpu_hour = _table(table, "gpu_hour")
    hours = {name: _amount(gpu_hour, "gpu_hour", name) for name in gpu_hour}
    tiers = {name: _tier(name, _table(table, name)) for name in TIERS if name in table}
    return Prices(currency, hours, tiers)


def _tier(name: Tier, table: Mapping[str, Any]) -> TierPrice:
    _only(table, f"prices.{name}", _TIER_KEYS[name])
    if "per_gb_month" in table:
        if "lifetime_years" in table:
            problem = "contradicts per_gb_month"
            raise ConfigError(f"prices.{name}.lifetime_years", problem, fix="give one of the two")
        keeping = _amount(table, name, "per_gb_month") / _GB / _MONTH_S
    else:
        keeping = _amount(table, name, "per_tb", "per_gb_month") / _TB
        keeping /= _amount(table, name, "lifetime_years", above_zero=True) * _YEAR_S
    return TierPrice(keeping, _writing(table) if name == "disk" else 0.0)


def _writing(table: Mapping[str, Any]) -> float:
    if "per_tb_written" in table:
        if "endurance_tb_per_tb" in table:
            problem = "contradicts per_tb_written"
            raise ConfigError("prices.disk.endurance_tb_per_tb", problem, fix="give one of the two")
        return _amount(table, "disk", "per_tb_written") / _TB
    endurance = _amount(table, "disk", "endurance_tb_per_tb", "per_tb_written", above_zero=True)
    return _amount(table, "disk", "per_tb") / endurance / _TB


def _table(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = table.get(name, {})
    if not isinstance(value, dict):
        raise ConfigError(f"prices.{name}", "is not a table", fix=f"write [{name}] on a line of its own")
    return value


def _only(table: Mapping[str, Any], where: str, known: frozenset[str] | set[str]) -> None:
    for name in table:
        if name not in known:
            raise ConfigError(
                f"{where}.{name}", "is not known", fix=f"give one of {', '.join(sorted(known))}"
            )


def _amount(
    table: Mapping[str, Any], where: str, name: str, instead: str = "", *, above_zero: bool = False
) -> float:
    """A price or an amount that must be there. instead: what could have been given in its place."""
    path = f"prices.{where}.{name}"
    if name not in table:
        fix = f"add {name}, or {instead}," if instead else f"add {name}"
        raise ConfigError(path, "is missing", fix=f"{fix} to [{where}]")
    value = table[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(path, f"is {value!r}, not a number")
    if value < 0 or (above_zero and not value):
        raise ConfigError(
            path, f"is {value}", fix="give a number above 0" if above_zero else "it cannot be negative"
        )
    return float(value)
