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
    def by_zone(
        step: FloatArray, weight: FloatArray, returns: FloatArray, codes: IntArray, out: FloatArray
    ) -> None:
        steps = 0.0
        for zone in range(_ZONES):
            apart = 0.0
            for code in codes:
                apart += weight[code, zone]
            steps += step[zone]
            out[zone] = returns[zone] / (returns[zone] + _HALF_TRUSTED_RETURNS) * apart + steps

    @jit
    def survival_of(
        height: FloatArray, step: FloatArray, weight: FloatArray, returns: FloatArray, codes: IntArray
    ) -> FloatArray:
        zones = np.empty(_ZONES)
        by_zone(step, weight, returns, codes, zones)
        survival = np.empty(CLASSES + 1)
        survival[0] = 1.0
        for k in range(CLASSES):
            chance = 1.0 / (1.0 + math.exp(-(height[k] + zones[zone_of[k]])))
            survival[k + 1] = survival[k] * (1.0 - chance)
        return survival

    def survive(of: LearnedWeights, codes: IntArray) -> FloatArray:
        # Handing over all that is learned costs as much as the loop.
        survival: FloatArray = survival_of(of.height, of.step, of.weight, of.returns, codes)
        return survival

    @jit
    def slopes_of(
        of: LearnedWeights, codes: IntArray, first: int, upto: int, came: bool, by_class: FloatArray
    ) -> FloatArray:
        """What one wait told, by zone and added to by_class: slopes, their squares, observations, returns."""
        zones, sums = np.empty(_ZONES), np.zeros((4, _ZONES))
        by_zone(of.step, of.weight, of.returns, codes, zones)
        for k in range(first, upto):
            zone = zone_of[k]
            returned = 1.0 if came and k == upto - 1 else 0.0
            slope = 1.0 / (1.0 + math.exp(-(of.height[k] + zones[zone]))) - returned
            square = slope * slope
            sums[0, zone] += slope
            sums[1, zone] += square
            sums[2, zone] += 1.0
            sums[3, zone] += returned
            by_class[0, k] += slope
            by_class[1, k] += square
            by_class[2, k] += 1.0
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
        by_class, sums = np.zeros((3, CLASSES)), np.zeros((4, _ZONES))
        by_code = np.zeros((len(of.weight), 3, _ZONES))
        for wait in range(len(codes)):
            told = slopes_of(of, codes[wait], first[wait], upto[wait], came[wait], by_class)
            for at in range(4):
                for zone in range(_ZONES):
                    sums[at, zone] += told[at, zone]
            for code in codes[wait]:
                for at in range(3):
                    for zone in range(_ZONES):
                        by_code[code, at, zone] += told[at, zone]
        learn_shared(of, by_class, sums)
        for code in range(len(by_code)):
            for zone in range(_ZONES):
                slope, square, seen = by_code[code, 0, zone], by_code[code, 1, zone], by_code[code, 2, zone]
                if seen > 0.0:
                    trust = of.returns[zone] / (of.returns[zone] + _HALF_TRUSTED_RETURNS)
                    args = (trust * slope, trust * trust * square, seen, _FEATURE_RATE)
                    step(of.weight, of.weight_seen, code, zone, *args)
        for zone in range(_ZONES):
            if sums[2, zone] > 0.0:
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

    return Arithmetic(survive, learn, best_rates)
