"""Return times as a live node learns them: `ReturnTimes` over whole arrays, and callers' hints.

A node has no compiler, so that a wait is scored with a few operations on arrays. What a wait that passed
several classes of age teaches is one step of learning, together with what others taught shortly before. A
hint says when the return is expected: it is mixed in with the share of this tenant's hints that came true.
"""

from __future__ import annotations

import base64
import json
from array import array as plain_array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.errors import ConfigError
from kvtier.policy import learned_state as read
from kvtier.policy.baselines.interfaces import IntArray
from kvtier.policy.return_time import (
    _BASE_RATE,
    _FEATURE_RATE,
    _HALF_TRUSTED_RETURNS,
    _KEPT,
    _ZONE_OF,
    LearnedWeights,
    ReturnTimes,
)
from kvtier.policy.survival import CLASSES, EDGES_S, WIDTHS_S, CurveArray, FloatArray, SurvivalCurve

VERSION: Final = 1
_MOST_BYTES: Final = 4 << 20
_MOST_TENANTS: Final = 1024
_ZONES: Final = int(_ZONE_OF[-1]) + 1
# A hint came true when the return was within this factor of it. Before any did or did not, one in two does.
HINT_FACTOR: Final = 1.5
_HINT_PRIOR: Final = 2.0
# How much of what hints did is left after each further one.
_HINTS_KEPT: Final = 0.99
_LEAST_AHEAD_S: Final = 1e-3
# What is left of a wait that nobody was expected to let last so long.
_LEAST_LEFT: Final = 1e-30
_BOUND: Final = 1e9
# As a list: a search in an array costs ten times as much.
_EDGES_S: Final[list[float]] = EDGES_S.tolist()
# No horizon ends before it begins: what is held until then takes for ever.
_NEVER_EARLIER: Final = np.where(np.triu(np.ones((CLASSES, CLASSES), np.bool_)), 0.0, inf)
_LEAST_HELD_S: Final = 1e-300
_HALF_WIDTHS_S: Final = WIDTHS_S * 0.5
# So much that waits told is learned in one step, as a step over arrays costs hardly more for all of it than
# for one. At first each is learned at once; one more goes together for each so many that were told.
_TOGETHER: Final = 64
_ONE_MORE_AFTER: Final = 256
# What is left of evidence after so many more observations.
_KEPT_AFTER: Final = _KEPT ** np.arange(_TOGETHER * CLASSES + 1)


class Curve:
    """survival, rates: what makes them; see the properties."""

    __slots__ = ("_rates", "_reckon", "_survival")

    def __init__(self, survival: Callable[[], CurveArray], rates: Callable[[], CurveArray]) -> None:
        self._survival: CurveArray | Callable[[], CurveArray] = survival
        self._reckon: Callable[[], CurveArray] | None = rates
        self._rates = plain_array("f")

    @property
    def survival(self) -> CurveArray:
        """At EDGES_S, float32, 1 at age 0; reckoned when it is asked for first."""
        if not isinstance(self._survival, np.ndarray):
            self._survival = self._survival()
        return self._survival

    @property
    def rates(self) -> plain_array[float]:
        """The best rate of return from each edge on, 1/s; reckoned when it is asked for first."""
        if self._reckon is not None:
            # An element of numpy's arrays costs more, and a list takes eight times the room.
            self._rates, self._reckon = plain_array("f", self._reckon().tobytes()), None
        return self._rates

    @property
    def whole(self) -> SurvivalCurve:
        """For questions about horizons."""
        return SurvivalCurve(self.survival)

    def rate(self, age_s: float) -> float:
        """The best rate of return at any age >= 0, 1/s."""
        rates = self._rates or self.rates
        if age_s >= _EDGES_S[-2]:
            return rates[-1]
        k = bisect_right(_EDGES_S, age_s) - 1
        part = (age_s - _EDGES_S[k]) / (_EDGES_S[k + 1] - _EDGES_S[k])
        return rates[k] * (1.0 - part) + rates[k + 1] * part


@dataclass(slots=True)
class _Hints:
    """Of one tenant: how many came true, and how many did not; both fade."""

    true: float = 0.0
    false: float = 0.0

    def trust(self) -> float:
        """The chance that the next one comes true."""
        return (self.true + _HINT_PRIOR) / (self.true + self.false + 2 * _HINT_PRIOR)


_NO_HINTS: Final = _Hints()


class Arithmetic(NamedTuple):
    """What curves are made and taught with. Over whole arrays (ARRAYS), or in loops (`returns_loops`).

    survive(weights, codes): at each edge, float64.  learn(weights, codes, first, upto, came): one step
    over what several waits told, in place; codes (waits, features), the others (waits,): each lasted through
    the classes of age [first, upto), or, where it came, ended in the last of them.  best_rates(survival): at
    each edge, float32.
    """

    survive: Callable[[LearnedWeights, IntArray], FloatArray]
    learn: Callable[[LearnedWeights, IntArray, IntArray, IntArray, npt.NDArray[np.bool_]], None]
    best_rates: Callable[[FloatArray], CurveArray]


class _Told(NamedTuple):
    """See Arithmetic.learn, for one wait."""

    codes: IntArray
    first: int
    upto: int
    came: bool


class Returns:
    """Curves of waits, and what teaches them. codes: as `codes_of` has them."""

    def __init__(self, arithmetic: Arithmetic | None = None) -> None:
        self._arithmetic = ARRAYS if arithmetic is None else arithmetic
        self._times = ReturnTimes()
        self._hints: dict[str, _Hints] = {}
        self.waits_seen = 0
        # What is yet to be learned, and how much was told.
        self._told: list[_Told] = []
        self._heard = 0

    def curve(self, codes: IntArray, tenant: str, hint_s: float | None = None, said_s: float = 0.0) -> Curve:
        """Of what is left of a wait that has lasted for said_s.

        hint_s: after how long the caller expects the return, as was said then; counted like the wait itself.
        """
        survival = self._arithmetic.survive(self._times.weights, codes)
        if hint_s is not None and 0 < hint_s < _BOUND:
            trust = self.hint_trust(tenant)
            if said_s:
                left = np.interp(EDGES_S + said_s, EDGES_S, survival)
                survival = left / max(float(left[0]), _LEAST_LEFT)
            ends = np.array(hinted_ages(hint_s, said_s)) - said_s
            survival = (1.0 - trust) * survival + trust * np.interp(EDGES_S, ends, (1.0, 0.0))
        rates = partial(self._arithmetic.best_rates, survival)
        return Curve(partial(survival.astype, np.float32), rates)

    def lasted(self, codes: IntArray, first: int, upto: int) -> None:
        """A wait went on past the classes of age [first, upto)."""
        if upto > first:
            self._tell(_Told(codes, first, upto, False))

    def ended(self, codes: IntArray, first: int, gap_s: float) -> None:
        """A wait ended with a return after gap_s >= 0; `lasted` told the classes before `first`."""
        self.waits_seen += 1
        last = class_of(gap_s)
        self._tell(_Told(codes, min(first, last), last + 1, True))

    def _tell(self, told: _Told) -> None:
        self._told.append(told)
        self._heard += 1
        waiting = len(self._told)
        if waiting >= _TOGETHER or waiting > self._heard // _ONE_MORE_AFTER:
            self._learn(self._times.weights)
            self._told.clear()

    def _learn(self, weights: LearnedWeights) -> None:
        """Take in what was told, in place."""
        if self._told:
            codes, first, upto, came = zip(*self._told, strict=True)
            args = (np.array(codes), np.array(first), np.array(upto), np.array(came))
            self._arithmetic.learn(weights, *args)

    def hint_came(self, tenant: str, true: bool) -> None:
        """A conversation came back for which a hint had been given."""
        known = self._hints.pop(tenant, None) or _Hints()
        self._hints[tenant] = known
        known.true = known.true * _HINTS_KEPT + true
        known.false = known.false * _HINTS_KEPT + (not true)
        if len(self._hints) > _MOST_TENANTS:
            # The one that was seen longest ago.
            del self._hints[next(iter(self._hints))]

    def hint_trust(self, tenant: str) -> float:
        """The chance that this tenant's next hint comes true."""
        return self._hints.get(tenant, _NO_HINTS).trust()

    # --- across restarts --------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All that was learned, as JSON in UTF-8."""
        hints = {name: [known.true, known.false] for name, known in self._hints.items()}
        # What was written changes nothing of what is decided: the step itself is taken when it is due.
        learned = LearnedWeights(*(array.copy() for array in self._times.weights))
        self._learn(learned)
        weights = {name: _packed(array) for name, array in learned._asdict().items()}
        state = {"version": VERSION, "waits": self.waits_seen, "weights": weights, "hints": hints}
        return json.dumps(state, allow_nan=False, separators=(",", ":")).encode()

    def take_over(self, data: bytes) -> None:
        """Go on from what `to_bytes` wrote once.

        Raises ConfigError, naming the field, for another version and for what it did not write; nothing is
        changed then.
        """
        read.require(len(data) <= _MOST_BYTES, "returns", f"is longer than {_MOST_BYTES} bytes")
        try:
            state = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError("returns", f"is not JSON: {error}") from error
        table = read.mapping(state, "returns")
        if table.get("version") != VERSION:
            raise ConfigError(
                "returns.version", f"is {table.get('version')!r}, not {VERSION}", fix="remove the file"
            )
        read.only(table, "returns", "version", "waits", "weights", "hints")
        waits = int(read.number(table["waits"], "returns.waits", 0))
        weights = _read_weights(table["weights"], self._times.weights)
        hints = _read_hints(table["hints"])
        self._times.weights, self._hints, self.waits_seen = weights, hints, waits
        self._told.clear()


def hinted_ages(hint_s: float, said_s: float) -> tuple[float, float]:
    """From when to when a hint comes true that was given after said_s of a wait."""
    ahead_s = max(hint_s - said_s, _LEAST_AHEAD_S)
    return said_s + ahead_s / HINT_FACTOR, said_s + ahead_s * HINT_FACTOR


def class_of(age_s: float) -> int:
    """The class of an age; the last one is open."""
    return min(bisect_right(_EDGES_S, age_s) - 1, CLASSES - 1)


def _survive(of: LearnedWeights, codes: IntArray) -> FloatArray:
    """At each edge, with chances by class of age as the kernels of ReturnTimes have them."""
    trust = of.returns / (of.returns + _HALF_TRUSTED_RETURNS)
    by_zone = trust * np.add.reduce(of.weight[codes]) + np.add.accumulate(of.step)
    chances = 1.0 / (1.0 + np.exp(-(of.height + by_zone[_ZONE_OF])))
    survival = np.empty(CLASSES + 1)
    survival[0] = 1.0
    np.multiply.accumulate(1.0 - chances, out=survival[1:])
    return survival


def _learn(
    of: LearnedWeights, codes: IntArray, first: IntArray, upto: IntArray, came: npt.NDArray[np.bool_]
) -> None:
    """One step over all that is told; the step of ReturnTimes where it is one class of age of one wait."""
    # A row for each class of age that a wait told of: mostly two of a wait.
    classes = upto - first
    wait = np.repeat(np.arange(len(codes)), classes)
    age = np.arange(len(wait)) + np.repeat(first - np.cumsum(classes) + classes, classes)
    zone, returned = _ZONE_OF[age], came[wait] & (age + 1 == upto[wait])
    trust = of.returns / (of.returns + _HALF_TRUSTED_RETURNS)
    apart = np.add.reduce(of.weight[codes[wait].T, zone])
    total = of.height[age] + (trust[zone] * apart + np.add.accumulate(of.step)[zone])
    slopes = 1.0 / (1.0 + np.exp(-total)) - returned
    squares = slopes * slopes
    by_age = [_binned(age, each, CLASSES) for each in (slopes, squares, np.ones(len(age)))]
    _step(of.height, of.height_seen, by_age[0], by_age[1], by_age[2], _BASE_RATE)
    at = wait * _ZONES + zone
    slope, square, seen, returns = (
        _binned(at, each, len(codes) * _ZONES)
        for each in (slopes, squares, np.ones(len(at)), returned.astype(np.float64))
    )
    by_zone = [np.add.reduce(each.reshape(-1, _ZONES)) for each in (slope, square, seen, returns)]
    # A step counts in its zone and all after it.
    from_here = [_from_here(each) for each in by_zone[:3]]
    _step(of.step, of.step_seen, from_here[0], from_here[1], from_here[2], _BASE_RATE)
    told = np.flatnonzero(seen)
    _learn_apart(of, codes, told, trust[told % _ZONES], slope[told], square[told], seen[told])
    of.returns[:] = 1.0 + (of.returns - 1.0) * _kept_after(by_zone[2]) + by_zone[3]


def _learn_apart(
    of: LearnedWeights,
    codes: IntArray,
    told: npt.NDArray[np.intp],
    trust: FloatArray,
    slope: FloatArray,
    square: FloatArray,
    seen: FloatArray,
) -> None:
    """What tells contexts apart. told: wait * zones + zone, of what the others are."""
    at = (codes[told // _ZONES] * _ZONES + (told % _ZONES)[:, None]).ravel()
    by_code = [
        _binned(at, np.repeat(each, codes.shape[1]), of.weight.size)
        for each in (trust * slope, trust * trust * square, seen)
    ]
    touched = np.flatnonzero(by_code[2])
    slope, square, seen = (each[touched] for each in by_code)
    weights, weights_seen = of.weight.reshape(-1), of.weight_seen.reshape(-1)
    weight, weight_seen = weights[touched], weights_seen[touched]
    _step(weight, weight_seen, slope, square, seen, _FEATURE_RATE)
    weights[touched], weights_seen[touched] = weight, weight_seen


def _binned(at: IntArray, each: FloatArray, bins: int) -> FloatArray:
    """The sum for each number in `at`."""
    result: FloatArray = np.bincount(at, each, bins).astype(np.float64, copy=False)
    return result


def _step(
    of: FloatArray, of_seen: FloatArray, slope: FloatArray, square: FloatArray, seen: Any, rate: float
) -> None:
    """AdaGrad with evidence that fades, in place. seen: how many observations there are in `slope`."""
    of_seen[...] = 1.0 + (of_seen - 1.0) * _kept_after(seen) + square
    of -= rate * slope / np.sqrt(of_seen)


def _kept_after(seen: Any) -> FloatArray:
    result: FloatArray = _KEPT_AFTER[seen.astype(np.intp)]
    return result


def _from_here(by_zone: Any) -> FloatArray:
    """For each zone, the sum over it and all after it."""
    result: FloatArray = by_zone[::-1].cumsum()[::-1]
    return result


def _best_rates(survival: FloatArray) -> CurveArray:
    """At each edge, the most of (what returns by a later edge) / (time held until then)."""
    area = np.zeros(CLASSES + 1)
    # The functions themselves: their wrappers cost as much as they do, on so little.
    np.add.accumulate(_HALF_WIDTHS_S * (survival[:-1] + survival[1:]), out=area[1:])
    held_s = area[1:] - area[:-1, None]
    np.maximum(held_s, _LEAST_HELD_S, out=held_s)
    held_s += _NEVER_EARLIER
    rates = survival[:-1, None] - survival[1:]
    rates /= held_s
    result = np.empty(CLASSES + 1, np.float32)
    np.maximum.reduce(rates, axis=1, out=result[:-1])
    result[-1] = result[-2]
    return result


ARRAYS: Final = Arithmetic(_survive, _learn, _best_rates)


def _packed(array: FloatArray) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode()


def _read_weights(value: object, like: LearnedWeights) -> LearnedWeights:
    table = read.mapping(value, "returns.weights")
    read.only(table, "returns.weights", *like._fields)
    arrays = {
        name: _unpacked(table[name], f"returns.weights.{name}", old) for name, old in like._asdict().items()
    }
    return LearnedWeights(**arrays)


def _unpacked(value: object, where: str, like: FloatArray) -> FloatArray:
    """An array of the shape of `like`; sums of squares and counts are 1 at least."""
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError as error:
        raise ConfigError(where, f"is not base64: {error}") from error
    read.require(len(data) == like.nbytes, where, f"has {len(data)} bytes, not {like.nbytes}")
    array: FloatArray = np.frombuffer(data, "<f8").astype(np.float64).reshape(like.shape)
    read.require(bool((np.abs(array) < _BOUND).all()), where, "holds what is no number")
    if where.endswith(("_seen", ".returns")):
        read.require(float(array.min()) >= 1.0, where, "holds what is below 1")
    return array


def _read_hints(value: object) -> dict[str, _Hints]:
    table = read.mapping(value, "returns.hints")
    read.require(len(table) <= _MOST_TENANTS, "returns.hints", f"are of more than {_MOST_TENANTS} tenants")
    return {
        tenant: _Hints(*read.numbers(entry, f"returns.hints.{tenant}", 0.0, _BOUND, most=2, least=2))
        for tenant, entry in table.items()
    }
