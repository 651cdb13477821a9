"""The arithmetic of `returns` as loops, for who has a compiler: the same numbers, but for rounding.

A node has none, and works on whole arrays; a simulator of a million requests compiles these.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from kvtier.policy.baselines.interfaces import IntArray, Jit
from kvtier.policy.return_time import (
    _BASE_RATE,
    _FEATURE_RATE,
    _HALF_TRUSTED_RETURNS,
    _KEPT,
    _ZONE_OF,
    LearnedWeights,
)
from kvtier.policy.returns import Arithmetic
from kvtier.policy.survival import CLASSES, WIDTHS_S, CurveArray, FloatArray

_ZONES = int(_ZONE_OF[-1]) + 1


@cache
def loops(jit: Jit) -> Arithmetic:
    """See Arithmetic. Uncompiled, these take some hundred times as long as the arrays."""
    zone_of, widths_s = _ZONE_OF, WIDTHS_S

    @jit
    def by_zone(of: LearnedWeights, codes: IntArray, out: FloatArray) -> None:
        steps = 0.0
        for zone in range(_ZONES):
            apart = 0.0
            for code in codes:
                apart += of.weight[code, zone]
            steps += of.step[zone]
            out[zone] = of.returns[zone] / (of.returns[zone] + _HALF_TRUSTED_RETURNS) * apart + steps

    @jit
    def hazards(of: LearnedWeights, codes: IntArray) -> FloatArray:
        zones = np.empty(_ZONES)
        by_zone(of, codes, zones)
        chances = np.empty(CLASSES)
        for k in range(CLASSES):
            chances[k] = 1.0 / (1.0 + math.exp(-(of.height[k] + zones[zone_of[k]])))
        return chances

    @jit
    def slopes_of(
        of: LearnedWeights, codes: IntArray, first: int, returned: FloatArray, sums: FloatArray
    ) -> None:
        """sums: by zone, of slopes, their squares, observations and returns."""
        zones = np.empty(_ZONES)
        by_zone(of, codes, zones)
        for number in range(len(returned)):
            k = first + number
            zone = zone_of[k]
            slope = 1.0 / (1.0 + math.exp(-(of.height[k] + zones[zone]))) - returned[number]
            sums[0, zone] += slope
            sums[1, zone] += slope * slope
            sums[2, zone] += 1.0
            sums[3, zone] += returned[number]
            of.height_seen[k] = 1.0 + (of.height_seen[k] - 1.0) * _KEPT + slope * slope
            of.height[k] -= _BASE_RATE * slope / math.sqrt(of.height_seen[k])

    @jit
    def learn(of: LearnedWeights, codes: IntArray, first: int, returned: FloatArray) -> None:
        sums = np.zeros((4, _ZONES))
        slopes_of(of, codes, first, returned, sums)
        slope = square = seen = 0.0
        # A step counts in its zone and all after it.
        for back in range(_ZONES):
            zone = _ZONES - 1 - back
            slope += sums[0, zone]
            square += sums[1, zone]
            seen += sums[2, zone]
            of.step_seen[zone] = 1.0 + (of.step_seen[zone] - 1.0) * _KEPT**seen + square
            of.step[zone] -= _BASE_RATE * slope / math.sqrt(of.step_seen[zone])
            if sums[2, zone] == 0.0:
                continue
            kept = _KEPT ** sums[2, zone]
            trust = of.returns[zone] / (of.returns[zone] + _HALF_TRUSTED_RETURNS)
            for code in codes:
                of.weight_seen[code, zone] = (
                    1.0 + (of.weight_seen[code, zone] - 1.0) * kept + trust * trust * sums[1, zone]
                )
                of.weight[code, zone] -= (
                    _FEATURE_RATE * trust * sums[0, zone] / math.sqrt(of.weight_seen[code, zone])
                )
            of.returns[zone] = 1.0 + (of.returns[zone] - 1.0) * kept + sums[3, zone]

    @jit
    def best_rates(survival: FloatArray) -> CurveArray:
        rates = np.zeros(CLASSES + 1, np.float32)
        for start in range(CLASSES):
            held_s = best = 0.0
            for k in range(start, CLASSES):
                held_s += widths_s[k] * 0.5 * (survival[k] + survival[k + 1])
                if held_s > 0.0:
                    best = max(best, (survival[start] - survival[k + 1]) / held_s)
            rates[start] = best
        rates[CLASSES] = rates[CLASSES - 1]
        return rates

    return Arithmetic(hazards, learn, best_rates)
