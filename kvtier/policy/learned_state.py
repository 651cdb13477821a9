"""Reading learned state back: every number is checked, so that a damaged file is refused and not believed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvtier.errors import ConfigError


def mapping(value: object, field: str) -> Mapping[str, Any]:
    """A mapping with text keys. Raises ConfigError naming `field`."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(field, "is not a table")
    return value


def number(value: object, field: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]. Raises ConfigError naming `field`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(field, f"is {value!r}, not a number")
    try:
        found = float(value)
    except OverflowError as error:
        raise ConfigError(field, "is longer than any number that is kept") from error
    if not math.isfinite(found) or not low <= found <= high:
        raise ConfigError(field, f"is {value!r}, not between {low:g} and {high:g}")
    return found


def numbers(
    value: object, field: str, low: float = -math.inf, high: float = math.inf, *, most: int, least: int = 0
) -> list[float]:
    """A list of least to most such numbers. Raises ConfigError naming `field`."""
    if not isinstance(value, list | tuple) or not least <= len(value) <= most:
        raise ConfigError(field, f"is not a list of {least} to {most} numbers")
    return [number(item, field, low, high) for item in value]


def only(value: Mapping[str, Any], field: str, *keys: str) -> None:
    """Exactly these keys. Raises ConfigError naming `field`."""
    if set(value) != set(keys):
        odd = sorted(set(value) ^ set(keys))
        raise ConfigError(field, f"lacks or has too much: {', '.join(odd)}")


def items(value: object, field: str, *, most: int) -> Sequence[object]:
    """A list of at most `most` things. Raises ConfigError naming `field`."""
    if not isinstance(value, list | tuple) or len(value) > most:
        raise ConfigError(field, f"is not a list of at most {most}")
    return value


def require(holds: bool, field: str, problem: str) -> None:
    """Raise ConfigError naming `field` unless `holds`."""
    if not holds:
        raise ConfigError(field, problem)
