"""When a conversation comes back: survival curves learned one wait at a time.

The chance to return within a class of age, given that the wait lasted to its start, is a logistic
regression: a height for each class of age, a step at each of a few zones of age, and for each feature of the
context a weight in each zone (discrete-time survival: Cox, "Regression models and life-tables", 1972;
Brown, "On the use of indicator variables for studying the time-dependence of parameters", 1975). Weights
start from published waits and move by stochastic gradient with AdaGrad's rates (Duchi, Hazan and Singer,
2011), so a context that was seen rarely stays near what all contexts have in common. The evidence that
makes a weight firm fades, so that no weight gets too firm to follow a change of habits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.interfaces import IntArray, Jit, plain
from kvtier.policy.return_time_context import CODES, Context, codes_of, stop_code
from kvtier.policy.survival import CLASSES, EDGES_S, FloatArray, SurvivalCurve, survival_kernels

# Starts of the zones of age, s; weights of a feature are equal within one.
_ZONES_S: Final = (0, 2, 6, 15, 40, 100, 300, 1000, 4000, 15000, 60000)
_ZONE_OF: Final = (np.searchsorted(_ZONES_S, EDGES_S[:-1], side="right") - 1).astype(np.int64)
_BASE_RATE: Final = 0.1
_FEATURE_RATE: Final = 0.1
# After so many returns within a zone of age, what tells contexts apart there counts half.
_HALF_TRUSTED_RETURNS: Final = 20
# After so many more observations that touch a weight, what was seen before them counts half.
_HALF_FORGOTTEN: Final = 5000
_KEPT: Final = 0.5 ** (1 / _HALF_FORGOTTEN)
# What has returned by an age in s. People: coding sessions, median 86 s, three quarters within 5 min, p90
# 21 min, 95.5 % within an hour, p99 14 h (TraceLab, arXiv 2606.30560). Tools: 86 % of agents' steps within
# 1 s, 95 % within 10 s (vLLM router, issue 285). What never returns is no part of either.
PEOPLE: Final = ((1.0, 0.0), (86.0, 0.5), (300.0, 0.75), (1260.0, 0.9), (3600.0, 0.955), (50400.0, 0.99))
TOOLS: Final = ((0.1, 0.0), (1.0, 0.86), (10.0, 0.95), (600.0, 0.99))
# How many waits ever end; nobody publishes it. One end in ten requests is what sessions of 9.2 requests have.
_EVER_RETURNS: Final = 0.9


class LearnedWeights(NamedTuple):
    """height: by class of age; step and returns: by zone; weight: by code and zone.

    *_seen: one more than the sum of squared gradients.  returns: waits that ended, one more than there were.
    Both fade with what is seen after.
    """

    height: FloatArray
    height_seen: FloatArray
    step: FloatArray
    step_seen: FloatArray
    weight: FloatArray
    weight_seen: FloatArray
    returns: FloatArray


class _Kernels(NamedTuple):
    hazards: Callable[..., None]
    learn: Callable[..., float]


@cache
def _kernels(jit: Jit, kept: float) -> _Kernels:
    zone_of = _ZONE_OF

    @jit
    def trust(of: LearnedWeights, zone: int) -> float:
        return float(of.returns[zone] / (of.returns[zone] + _HALF_TRUSTED_RETURNS))

    @jit
    def score(of: LearnedWeights, codes: IntArray, k: int) -> float:
        zone = zone_of[k]
        apart = 0.0
        for code in codes:
            apart += of.weight[code, zone]
        total = of.height[k] + trust(of, zone) * apart
        for j in range(zone + 1):
            total += of.step[j]
        return float(1.0 / (1.0 + math.exp(-total)))

    @jit
    def hazards(of: LearnedWeights, codes: IntArray, out: FloatArray) -> None:
        for k in range(CLASSES):
            out[k] = score(of, codes, k)

    @jit
    def faded(seen: float) -> float:
        return float(1.0 + (seen - 1.0) * kept)

    @jit
    def learn(of: LearnedWeights, codes: IntArray, k: int, returned: float) -> float:
        zone = zone_of[k]
        chance = score(of, codes, k)
        slope = chance - returned
        square = slope * slope
        of.height_seen[k] = faded(of.height_seen[k]) + square
        of.height[k] -= _BASE_RATE * slope / math.sqrt(of.height_seen[k])
        for j in range(zone + 1):
            of.step_seen[j] = faded(of.step_seen[j]) + square
            of.step[j] -= _BASE_RATE * slope / math.sqrt(of.step_seen[j])
        slope *= trust(of, zone)
        square = slope * slope
        for code in codes:
            of.weight_seen[code, zone] = faded(of.weight_seen[code, zone]) + square
            of.weight[code, zone] -= _FEATURE_RATE * slope / math.sqrt(of.weight_seen[code, zone])
        of.returns[zone] = faded(of.returns[zone]) + returned
        return -math.log(chance if returned > 0.5 else 1.0 - chance)

    return _Kernels(hazards, learn)


class ReturnTimes:
    """Curves by context. Codes are those of `codes_of`; a wait is told in pieces or as a whole.

    kept: how much of the evidence for a weight is left after each further one.
    """

    def __init__(self, jit: Jit = plain, kept: float = _KEPT) -> None:
        self.weights = _prior()
        self.loss = 0.0
        self._kernels = _kernels(jit, kept)
        self._survival = survival_kernels(jit)
        self._hazards = np.zeros(CLASSES)

    def hazards(self, codes: IntArray) -> FloatArray:
        """By class of age, the chance to return within it; good until the next call."""
        self._kernels.hazards(self.weights, codes, self._hazards)
        return self._hazards

    def curve(self, context: Context) -> SurvivalCurve:
        """The survival curve of a wait."""
        return SurvivalCurve.of_hazards(self.hazards(codes_of(context)))

    def lasted(self, codes: IntArray, age_class: int) -> None:
        """A wait went on past a class of age."""
        self.loss += self._kernels.learn(self.weights, codes, age_class, 0.0)

    def ended(self, codes: IntArray, gap_s: float) -> None:
        """A wait ended with a return after gap_s >= 0, for which `lasted` told all classes before."""
        self.loss += self._kernels.learn(self.weights, codes, self._survival.class_of(gap_s), 1.0)

    def observe(self, context: Context, gap_s: float, *, returned: bool) -> None:
        """A whole wait: it ended with a return after gap_s, or was given up then (censored)."""
        codes = codes_of(context)
        for age_class in range(self._survival.class_of(gap_s)):
            self.lasted(codes, age_class)
        if returned:
            self.ended(codes, gap_s)


def _prior() -> LearnedWeights:
    people, tools = _log_odds(PEOPLE), _log_odds(TOOLS)
    zones = len(_ZONES_S)
    weight = np.zeros((CODES, zones))
    for zone in range(zones):
        inside = zone == _ZONE_OF
        for clock in ("end", "arrival"):
            weight[stop_code("tool_use", clock), zone] = float(np.mean((tools - people)[inside]))
    return LearnedWeights(
        height=people,
        height_seen=np.ones(CLASSES),
        step=np.zeros(zones),
        step_seen=np.ones(zones),
        weight=weight,
        weight_seen=np.ones((CODES, zones)),
        returns=np.ones(zones),
    )


def _log_odds(law: tuple[tuple[float, float], ...]) -> npt.NDArray[np.float64]:
    """Log odds of returning by class of age, where what has returned is given at a few ages."""
    ages, parts = np.array(law).T
    gone = _EVER_RETURNS * np.interp(np.log(np.maximum(EDGES_S, 1e-3)), np.log(ages), parts)
    chance = np.clip(np.diff(gone) / (1.0 - gone[:-1]), 0.005, 0.95)
    result: npt.NDArray[np.float64] = np.log(chance / (1.0 - chance))
    return result
