"""The arithmetic of `returns` as loops, for who has a compiler: the same numbers, but for rounding.

A node has none, and works on whole arrays; a simulator of a million requests compiles these.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

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
BoolArray = npt.NDArray[np.bool_]


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
        of: LearnedWeights, codes: IntArray, first: int, upto: int, came: bool, by_class: FloatArray
    ) -> FloatArray:
        """What one wait told, by zone and added to by_class: slopes, their squares, observations, returns."""
        zones, sums = np.empty(_ZONES), np.zeros((4, _ZONES))
        by_zone(of, codes, zones)
        for k in range(first, upto):
            zone = zone_of[k]
            returned = 1.0 if came and k == upto - 1 else 0.0
            slope = 1.0 / (1.0 + math.exp(-(of.height[k] + zones[zone]))) - returned
            for at, value in enumerate((slope, slope * slope, 1.0, returned)):
                sums[at, zone] += value
                by_class[at, k] += value
        return sums

    @jit
    def step(
        of: FloatArray,
        seen: FloatArray,
        i: int,
        j: int,
        slope: float,
        square: float,
        told: float,
        rate: float,
    ) -> None:
        seen[i, j] = 1.0 + (seen[i, j] - 1.0) * _KEPT**told + square
        of[i, j] -= rate * slope / math.sqrt(seen[i, j])

    @jit
    def learn_shared(of: LearnedWeights, by_class: FloatArray, sums: FloatArray) -> None:
        """What all contexts have in common."""
        height, height_seen = of.height.reshape(1, -1), of.height_seen.reshape(1, -1)
        for k in range(CLASSES):
            slope, square, told = by_class[0, k], by_class[1, k], by_class[2, k]
            step(height, height_seen, 0, k, slope, square, told, _BASE_RATE)
        steps, steps_seen = of.step.reshape(1, -1), of.step_seen.reshape(1, -1)
        slope = square = told = 0.0
        # A step counts in its zone and all after it.
        for back in range(_ZONES):
            zone = _ZONES - 1 - back
            slope += sums[0, zone]
            square += sums[1, zone]
            told += sums[2, zone]
            step(steps, steps_seen, 0, zone, slope, square, told, _BASE_RATE)

    @jit
    def learn(of: LearnedWeights, codes: IntArray, first: IntArray, upto: IntArray, came: BoolArray) -> None:
        by_class, sums = np.zeros((4, CLASSES)), np.zeros((4, _ZONES))
        by_code = np.zeros((3, len(of.weight), _ZONES))
        for wait in range(len(codes)):
            told = slopes_of(of, codes[wait], first[wait], upto[wait], came[wait], by_class)
            sums += told
            for code in codes[wait]:
                by_code[:, code] += told[:3]
        learn_shared(of, by_class, sums)
        for zone in range(_ZONES):
            if sums[2, zone] == 0.0:
                continue
            trust = of.returns[zone] / (of.returns[zone] + _HALF_TRUSTED_RETURNS)
            for code in np.unique(codes):
                slope, square, seen = by_code[0, code, zone], by_code[1, code, zone], by_code[2, code, zone]
                if seen > 0.0:
                    args = (trust * slope, trust * trust * square, seen, _FEATURE_RATE)
                    step(of.weight, of.weight_seen, code, zone, *args)
            of.returns[zone] = 1.0 + (of.returns[zone] - 1.0) * _KEPT ** sums[2, zone] + sums[3, zone]

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
