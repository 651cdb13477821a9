"""Whether people come back as often as it was expected: counts to hold expectations against."""

from __future__ import annotations

from typing import Final

from kvtier.policy.returns import Curve, class_of
from kvtier.policy.survival import EDGES_S, WIDTHS_S
from kvtier.policy.usage import Forecast

# The longest horizon first: what is judged last.
_HORIZONS: Final[dict[str, float]] = {"1d": 86400.0, "1h": 3600.0, "5min": 300.0}
_SECONDS: Final = tuple(_HORIZONS.values())


# The edge before each horizon, and which part of the way to the next one it lies.
_PLACES: Final = tuple((k, float((s - EDGES_S[k]) / WIDTHS_S[k])) for s in _SECONDS for k in (class_of(s),))


def expected_of(curve: Curve) -> tuple[float, ...]:
    """The chance of a return within each horizon, the longest first."""
    at = curve.survival.item
    return tuple([1.0 - (at(k) * (1.0 - part) + at(k + 1) * part) for k, part in _PLACES])


class Forecasts:
    """By horizon, for all waits together."""

    def __init__(self) -> None:
        self.found = {name: Forecast() for name in _HORIZONS}

    def returned(self, expected: tuple[float, ...], gap_s: float) -> None:
        """A wait ended after gap_s, of which these horizons were not judged."""
        for forecast, horizon_s, chance in zip(self.found.values(), _SECONDS, expected, strict=False):
            _judge(forecast, chance, came=gap_s <= horizon_s)

    def lasted(self, expected: tuple[float, ...], age_s: float) -> tuple[float, ...]:
        """A wait is as old as that; answers what is still to be judged."""
        while expected and _SECONDS[len(expected) - 1] < age_s:
            *rest, chance = expected
            _judge(self.found[tuple(_HORIZONS)[len(rest)]], chance, came=False)
            expected = tuple(rest)
        return expected


def _judge(forecast: Forecast, chance: float, *, came: bool) -> None:
    forecast.waits += 1
    forecast.expected += chance
    forecast.came += came
