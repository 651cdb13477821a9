"""Intervals around estimates that hold as often as they say, whatever the noise looks like.

Adaptive conformal inference (Gibbs and Candes, "Adaptive Conformal Inference Under Distribution Shift",
NeurIPS 2021): an interval's end is an empirical quantile of recent residuals at level alpha_t, and after
each outcome

    alpha_{t+1} = alpha_t + gamma * (alpha - err_t),      err_t = 1 when the outcome lay outside

Left to itself that keeps the share of misses over T outcomes within (max(alpha_1, 1 - alpha_1) + gamma) /
(gamma * T) of alpha for any sequence (their proposition 4.1).  Here both ends have a level of their own
with alpha = 0.1, and the levels are bounded: outcomes of a burst come late and together, and no few misses
may blow an interval up.

The residual is ln(seconds / expected): noise of loads and prefills is skewed, and grows with what is
expected, but not in proportion: a short load may well take twice as long.  So the quantiles are those of
the recent residuals whose estimates were nearest to the one at hand (in the spirit of localized conformal
prediction: Guan, Biometrika 2023), the newest where many are equally near.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.policy import learned_state as read

_ALPHA, _GAMMA, _LEAST_ALPHA, _MOST_ALPHA = 0.1, 0.01, 0.02, 0.5
# Residuals that are remembered, and how many of them count for one estimate.
_WINDOW, _NEAR = 400, 30
# Before there are residuals of its own, a class has these quantile-like ones: up to a factor of 2 off.
_FIRST = tuple(math.log(2) * x for x in (-1.0, -0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0))
_MOST = math.log(1e12)

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """Seconds: low and high hold 80 % of outcomes, mid is expected."""

    low_s: float
    mid_s: float
    high_s: float


class ResidualTracker:
    """Quantiles of the recent residuals of one class of estimates, with levels that learn from misses."""

    def __init__(self) -> None:
        # Oldest first, with ln(expected) of each.  The first ones are invented, and near to every estimate.
        self._residuals = np.asarray(_FIRST)
        self._at = np.zeros(len(_FIRST))
        self._invented = len(_FIRST)
        self._alpha_low = self._alpha_high = _ALPHA
        self.seen = 0
        # What was answered last, until another outcome is seen: it is asked again when the load is done.
        self._asked_s = -1.0
        self._answer = (Interval(0.0, 0.0, 0.0), 0.0)

    def around(self, expected_s: float) -> Interval:
        """The interval around an estimate."""
        return self.spread(expected_s)[0]

    def spread(self, expected_s: float) -> tuple[Interval, float]:
        """The interval around an estimate, and the median of its outcomes, which lies within."""
        if expected_s == self._asked_s:
            return self._answer
        near = self._near(expected_s)
        ends = _quantile(near, self._alpha_low), -_quantile(-near[::-1], self._alpha_high)
        # Levels up to a half each: the ends meet at the median, but for rounding.
        low, high = min(ends), max(ends)
        median = min(max(_quantile(near, 0.5), low), high)
        around = Interval(expected_s * math.exp(low), expected_s, expected_s * math.exp(high))
        self._asked_s, self._answer = expected_s, (around, expected_s * math.exp(median))
        return self._answer

    def outcome(self, interval: Interval, seconds: float) -> None:
        """What became of an estimate for which `around` gave this interval.

        Raises ValueError unless seconds > 0.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"an outcome takes time, not {seconds} s")
        self._alpha_low = _moved(self._alpha_low, seconds < interval.low_s)
        self._alpha_high = _moved(self._alpha_high, seconds > interval.high_s)
        at = _bounded(math.log(interval.mid_s))
        drop = int(bool(self._invented) or len(self._at) == _WINDOW)
        self._invented = max(self._invented - 1, 0)
        self._at = np.append(self._at[drop:], at)
        self._residuals = np.append(self._residuals[drop:], _bounded(math.log(seconds) - at))
        self.seen += 1
        self._asked_s = -1.0

    def _near(self, expected_s: float) -> _Array:
        """The residuals that count for an estimate, ascending."""
        if len(self._residuals) <= _NEAR:
            return np.sort(self._residuals)
        distance = np.abs(self._at - math.log(max(expected_s, 1e-12)))
        distance[: self._invented] = 0.0
        furthest = np.partition(distance, _NEAR - 1)[_NEAR - 1]
        near = np.flatnonzero(distance <= furthest)
        if len(near) > _NEAR:
            # Of those equally far the newest.
            nearer, equal = near[distance[near] < furthest], near[distance[near] == furthest]
            near = np.concatenate((nearer, equal[len(nearer) - _NEAR :]))
        return np.sort(self._residuals[near])

    def state(self) -> dict[str, Any]:
        """What was learned, as plain numbers and lists."""
        return {
            "residuals": self._residuals.tolist(),
            "at": self._at.tolist(),
            "invented": self._invented,
            "alpha_low": self._alpha_low,
            "alpha_high": self._alpha_high,
            "seen": self.seen,
        }

    @classmethod
    def from_state(cls, state: object, field: str) -> ResidualTracker:
        """The tracker whose `state` this is. Raises ConfigError naming the field."""
        table = read.mapping(state, field)
        read.only(table, field, "residuals", "at", "invented", "alpha_low", "alpha_high", "seen")
        residuals, at = (
            read.numbers(table[name], f"{field}.{name}", -_MOST, _MOST, most=_WINDOW, least=len(_FIRST))
            for name in ("residuals", "at")
        )
        read.require(len(residuals) == len(at), f"{field}.at", "has another length than residuals")
        tracker = cls()
        tracker._residuals, tracker._at = np.asarray(residuals), np.asarray(at)
        tracker._invented = int(read.number(table["invented"], f"{field}.invented", 0, len(_FIRST)))
        bounds = (_LEAST_ALPHA, _MOST_ALPHA)
        tracker._alpha_low = read.number(table["alpha_low"], f"{field}.alpha_low", *bounds)
        tracker._alpha_high = read.number(table["alpha_high"], f"{field}.alpha_high", *bounds)
        tracker.seen = int(read.number(table["seen"], f"{field}.seen", 0))
        return tracker


def _moved(alpha: float, missed: bool) -> float:
    return min(max(alpha + _GAMMA * (_ALPHA - missed), _LEAST_ALPHA), _MOST_ALPHA)


def _bounded(value: float) -> float:
    return min(max(value, -_MOST), _MOST)


def _quantile(ordered: _Array, level: float) -> float:
    """The empirical quantile of at least two values, interpolated; the least value below all of them."""
    position = level * (len(ordered) + 1) - 1
    if position <= 0:
        return float(ordered[0])
    below = min(int(position), len(ordered) - 2)
    at, after = float(ordered[below]), float(ordered[below + 1])
    return at + (position - below) * (after - at)
