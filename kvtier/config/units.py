"""Sizes and durations as people write them, in TOML and on the command line: "8GiB", "500ms", "2d"."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")

SIZES: Final[dict[str, int]] = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}

DURATIONS: Final[dict[str, Decimal]] = {
    "us": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
    "w": Decimal(604800),
}


def parse_bytes(text: str) -> int:
    """Bytes in `text`: a whole number, or a number with one of `SIZES`. Raises ValueError."""
    number, unit = _split(text, "size", SIZES)
    value = number * SIZES[unit or "B"]
    if value != value.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(value)


def parse_seconds(text: str) -> float:
    """Seconds in `text`: a number, or a number with one of `DURATIONS`. Raises ValueError."""
    number, unit = _split(text, "duration", DURATIONS)
    return float(number * DURATIONS[unit or "s"])


def format_bytes(value: int) -> str:
    """The shortest text that parse_bytes gives back exactly: 8589934592 -> '8GiB', 1000 -> '1000B'."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value and value % SIZES[unit] == 0:
            return f"{value // SIZES[unit]}{unit}"
    return f"{value}B"


def _split(text: str, what: str, units: dict[str, int] | dict[str, Decimal]) -> tuple[Decimal, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a {what}")
    number, unit = match.groups()
    if unit and unit not in units:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; known are {', '.join(units)}")
    return Decimal(number), unit
