"""Survival curves over idle time, in classes of age that widen by half: how likely a return is, and how soon.

Within a class of age the survival falls on a straight line. What is conditioned on the idle time so far is
found from the same numbers: P(T <= t + tau | T > t) = 1 - S(t + tau) / S(t), and the expected wait
E[min(T - t, tau) | T > t] is the area under S from t to t + tau, divided by S(t).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.interfaces import Jit

FloatArray = npt.NDArray[np.float64]
CurveArray = npt.NDArray[np.float32]

CLASSES: Final = 40
_FIRST_EDGE_S: Final = 0.5
_RATIO: Final = 1.5
_LOG_RATIO: Final = math.log(_RATIO)
# Ends of the classes of age, s: 0, half a second, then half as much again each time, up to 43 days.
EDGES_S: Final[FloatArray] = np.concatenate(([0.0], _FIRST_EDGE_S * _RATIO ** np.arange(CLASSES)))
WIDTHS_S: Final[FloatArray] = np.diff(EDGES_S)


class SurvivalKernels(NamedTuple):
    """Compiled functions.

    class_of(age_s): the class of an age; the last one is open.
    survive(hazards, survival): fills survival at each edge, 1 at age 0.
    rank(survival, rates): fills, at each edge, the best rate of return from there on.
    rate(survival, rates, age_s): the best rate at any age; a negative age is a wait that has to pass first.
    rate_after(survival, age_s, cost): the same where keeping costs so much of one use at once; 0 at least.
    """

    class_of: Callable[[float], int]
    survive: Callable[..., None]
    rank: Callable[..., None]
    rate: Callable[..., float]
    rate_after: Callable[..., float]


@cache
def survival_kernels(jit: Jit) -> SurvivalKernels:
    """The best rate is max over tau of P(T <= t + tau | T > t) / E[min(T - t, tau) | T > t].

    It is the price for each second at which holding something for one use just pays, when holding may be
    given up at any time: Gittins' index of a job with one reward (Gittins, "Bandit processes and dynamic
    allocation indices", 1979). tau runs over the edges of the classes.  With a cost that is paid at once,
    such as a write, it is max over tau of (P(T <= t + tau | T > t) - cost) / E[min(T - t, tau) | T > t].
    """
    edges_s, widths_s = EDGES_S, WIDTHS_S

    @jit
    def class_of(age_s: float) -> int:
        if age_s < _FIRST_EDGE_S:
            return 0
        return min(int(math.log(age_s / _FIRST_EDGE_S) / _LOG_RATIO) + 1, CLASSES - 1)

    @jit
    def survive(hazards: FloatArray, survival: CurveArray) -> None:
        left = 1.0
        survival[0] = left
        for k in range(CLASSES):
            left *= 1.0 - hazards[k]
            survival[k + 1] = left

    @jit
    def best(survival: CurveArray, start: int, held_s: float, cost: float) -> float:
        found = 0.0
        alive = survival[start]
        if alive <= 0.0:
            return float(found)
        wait_s = held_s * alive
        for k in range(start, CLASSES):
            wait_s += widths_s[k] * 0.5 * (survival[k] + survival[k + 1])
            found = max(found, (alive * (1.0 - cost) - survival[k + 1]) / wait_s)
        return float(found)

    @jit
    def rank(survival: CurveArray, rates: CurveArray) -> None:
        for k in range(CLASSES):
            rates[k] = best(survival, k, 0.0, 0.0)
        rates[CLASSES] = rates[CLASSES - 1]

    @jit
    def rate(survival: CurveArray, rates: CurveArray, age_s: float) -> float:
        if age_s < 0.0:
            return float(best(survival, 0, -age_s, 0.0))
        k = class_of(age_s)
        if k == CLASSES - 1:
            return float(rates[k])
        part = (age_s - edges_s[k]) / widths_s[k]
        return float(rates[k] * (1.0 - part) + rates[k + 1] * part)

    @jit
    def rate_after(survival: CurveArray, age_s: float, cost: float) -> float:
        if age_s < 0.0:
            return float(best(survival, 0, -age_s, cost))
        k = class_of(age_s)
        if k == CLASSES - 1:
            return float(best(survival, k, 0.0, cost))
        part = (age_s - edges_s[k]) / widths_s[k]
        return float(best(survival, k, 0.0, cost) * (1.0 - part) + best(survival, k + 1, 0.0, cost) * part)

    return SurvivalKernels(class_of, survive, rank, rate, rate_after)


@dataclass(frozen=True, slots=True, eq=False)
class SurvivalCurve:
    """survival: float32, CLASSES + 1: the part that has not returned by each edge of EDGES_S."""

    survival: CurveArray

    @classmethod
    def of_hazards(cls, hazards: FloatArray) -> SurvivalCurve:
        """hazards: by class, the chance to return within it for what lasted to its start."""
        return cls(np.concatenate(([1.0], np.cumprod(1.0 - hazards))).astype(np.float32))

    def alive(self, age_s: npt.ArrayLike) -> FloatArray:
        """P(T > age); past the last edge nothing more returns."""
        return np.interp(np.asarray(age_s, np.float64), EDGES_S, self.survival)

    def returns_within(self, tau_s: npt.ArrayLike, idle_s: float = 0.0) -> FloatArray:
        """P(T <= idle + tau | T > idle)."""
        alive = float(self.alive(idle_s))
        if alive <= 0.0:
            return np.zeros(np.shape(tau_s))
        return 1.0 - self.alive(idle_s + np.asarray(tau_s, np.float64)) / alive

    def expected_wait_s(self, tau_s: npt.ArrayLike, idle_s: float = 0.0) -> FloatArray:
        """E[min(T - idle, tau) | T > idle], s."""
        tau = np.asarray(tau_s, np.float64)
        alive = float(self.alive(idle_s))
        if alive <= 0.0:
            return tau.copy()
        return (self._area(idle_s + tau) - self._area(np.asarray(idle_s, np.float64))) / alive

    def _area(self, age_s: FloatArray) -> FloatArray:
        """The integral of the survival from 0 on."""
        whole = np.concatenate(([0.0], np.cumsum(WIDTHS_S * 0.5 * (self.survival[:-1] + self.survival[1:]))))
        k = np.clip(np.searchsorted(EDGES_S, age_s, side="right") - 1, 0, CLASSES - 1)
        inside_s = np.minimum(age_s, EDGES_S[-1]) - EDGES_S[k]
        last = np.maximum(age_s - EDGES_S[-1], 0.0) * self.survival[-1]
        result: FloatArray = whole[k] + inside_s * 0.5 * (self.survival[k] + self.alive(age_s)) + last
        return result
