"""Whether people come back as often as it was expected: counts to hold expectations against."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtier.policy.returns import Curve
from kvtier.policy.survival import EDGES_S
from kvtier.policy.usage import Forecast

# The longest horizon first: what is judged last.
_HORIZONS: Final[dict[str, float]] = {"1d": 86400.0, "1h": 3600.0, "5min": 300.0}
_SECONDS: Final = tuple(_HORIZONS.values())


def _weights() -> np.ndarray:
    """What of the survival at each edge makes the survival at each horizon."""
    return np.array([[np.interp(s, EDGES_S, row) for row in np.eye(len(EDGES_S))] for s in _SECONDS])


_WEIGHTS: Final = _weights()


def expected_of(curve: Curve) -> tuple[float, ...]:
    """The chance of a return within each horizon, the longest first."""
    chances: list[float] = (1.0 - _WEIGHTS @ curve.survival).tolist()
    return tuple(chances)


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
