"""Numbers as people read them."""

from __future__ import annotations

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def seconds(value: float | None) -> str:
    """0.0042 -> '4.2 ms', 5400 -> '1.5 h', None -> '-'."""
    if value is None:
        return "-"
    for bound, length_s, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if abs(value) < bound:
            return f"{_short(value / length_s)} {unit}"
    return f"{_short(value / 86400)} d"


def size(value: float) -> str:
    """Bytes by powers of 1000."""
    for unit in _BYTES[:-1]:
        if abs(value) < 1000:
            return f"{_short(value)} {unit}"
        value /= 1000
    return f"{_short(value)} {_BYTES[-1]}"


def money(value: float) -> str:
    """US dollars."""
    return f"${value:,.0f}" if abs(value) >= 100 else f"${value:,.2f}"


def percent(value: float | None) -> str:
    """With one digit; None -> '-'."""
    return "-" if value is None else f"{value:.1f} %"


def count(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"


def years(value: float | None) -> str:
    """None -> 'never'."""
    if value is None:
        return "never"
    return f"{value:,.1f} years" if value < 1000 else "over 1,000 years"


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 10 else f"{value:.2g}"
