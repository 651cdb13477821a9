"""Return times as a live node learns them: `ReturnTimes` over whole arrays, and callers' hints.

A node has no compiler, so that a wait is scored and learned with a few operations on arrays; what a wait that
passed several classes of age teaches is one step of learning. A hint says when the return is expected: it is
mixed in with the share of this tenant's hints that came true.
"""

from __future__ import annotations

import base64
import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

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
_BOUND: Final = 1e9
# As a list: a search in an array costs ten times as much.
_EDGES_S: Final[list[float]] = EDGES_S.tolist()
_LATER: Final = np.triu(np.ones((CLASSES, CLASSES), np.bool_))


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """survival: at EDGES_S, 1 at age 0.  rates: the best rate of return from each edge on, 1/s."""

    survival: CurveArray
    rates: CurveArray

    @property
    def whole(self) -> SurvivalCurve:
        """For questions about horizons."""
        return SurvivalCurve(self.survival)

    def rate(self, age_s: float) -> float:
        """The best rate of return at any age >= 0, 1/s."""
        if age_s >= _EDGES_S[-2]:
            return float(self.rates[-1])
        k = class_of(age_s)
        part = (age_s - _EDGES_S[k]) / (_EDGES_S[k + 1] - _EDGES_S[k])
        return float(self.rates[k]) * (1.0 - part) + float(self.rates[k + 1]) * part


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

    hazards(weights, codes): by class of age, float64.  learn(weights, codes, first, returned): one step over
    neighbouring classes of age, in place.  best_rates(survival): at each edge, float32.
    """

    hazards: Callable[[LearnedWeights, IntArray], FloatArray]
    learn: Callable[[LearnedWeights, IntArray, int, FloatArray], None]
    best_rates: Callable[[FloatArray], CurveArray]


class Returns:
    """Curves of waits, and what teaches them. codes: as `codes_of` has them."""

    def __init__(self, arithmetic: Arithmetic | None = None) -> None:
        self._arithmetic = ARRAYS if arithmetic is None else arithmetic
        self._times = ReturnTimes()
        self._hints: dict[str, _Hints] = {}
        self.waits_seen = 0

    def curve(self, codes: IntArray, tenant: str, hint_s: float | None = None) -> Curve:
        """Of a wait. hint_s: after how long the caller expects the return, counted like the wait itself."""
        survival = np.concatenate(
            ([1.0], np.cumprod(1.0 - self._arithmetic.hazards(self._times.weights, codes)))
        )
        if hint_s is not None and 0 < hint_s < _BOUND:
            trust = self.hint_trust(tenant)
            ends = (hint_s / HINT_FACTOR, hint_s * HINT_FACTOR)
            survival = (1.0 - trust) * survival + trust * np.interp(EDGES_S, ends, (1.0, 0.0))
        return Curve(survival.astype(np.float32), self._arithmetic.best_rates(survival))

    def lasted(self, codes: IntArray, first: int, upto: int) -> None:
        """A wait went on past the classes of age [first, upto)."""
        if upto > first:
            self._arithmetic.learn(self._times.weights, codes, first, np.zeros(upto - first))

    def ended(self, codes: IntArray, first: int, gap_s: float) -> None:
        """A wait ended with a return after gap_s >= 0; `lasted` told the classes before `first`."""
        self.waits_seen += 1
        last = class_of(gap_s)
        returned = np.zeros(max(last - first, 0) + 1)
        returned[-1] = 1.0
        self._arithmetic.learn(self._times.weights, codes, min(first, last), returned)

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
        weights = {name: _packed(array) for name, array in self._times.weights._asdict().items()}
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


def class_of(age_s: float) -> int:
    """The class of an age; the last one is open."""
    return min(bisect_right(_EDGES_S, age_s) - 1, CLASSES - 1)


def _hazards(of: LearnedWeights, codes: IntArray) -> FloatArray:
    """By class of age, as the kernels of ReturnTimes have it."""
    trust = of.returns / (of.returns + _HALF_TRUSTED_RETURNS)
    by_zone = trust * of.weight[codes].sum(axis=0) + np.cumsum(of.step)
    result: FloatArray = 1.0 / (1.0 + np.exp(-(of.height + by_zone[_ZONE_OF])))
    return result


def _learn(of: LearnedWeights, codes: IntArray, first: int, returned: FloatArray) -> None:
    """One step over neighbouring classes of age; the step of ReturnTimes where there is only one.

    returned: by class from `first` on, 1 where the return was.
    """
    at = slice(first, first + len(returned))
    trust = of.returns / (of.returns + _HALF_TRUSTED_RETURNS)
    by_zone = trust * of.weight[codes].sum(axis=0) + np.cumsum(of.step)
    zones = _ZONE_OF[at]
    slopes = 1.0 / (1.0 + np.exp(-(of.height[at] + by_zone[zones]))) - returned
    slope, square = np.bincount(zones, slopes, _ZONES), np.bincount(zones, slopes * slopes, _ZONES)
    seen = np.bincount(zones, minlength=_ZONES)
    _step(of.height[at], of.height_seen[at], slopes, slopes * slopes, 1, _BASE_RATE)
    # A step counts in its zone and all after it.
    _step(of.step, of.step_seen, _from_here(slope), _from_here(square), _from_here(seen), _BASE_RATE)
    weight, weight_seen = of.weight[codes], of.weight_seen[codes]
    _step(weight, weight_seen, trust * slope, trust * trust * square, seen, _FEATURE_RATE)
    of.weight[codes], of.weight_seen[codes] = weight, weight_seen
    of.returns[:] = 1.0 + (of.returns - 1.0) * _KEPT**seen + np.bincount(zones, returned, _ZONES)


def _step(
    of: FloatArray, of_seen: FloatArray, slope: FloatArray, square: FloatArray, seen: Any, rate: float
) -> None:
    """AdaGrad with evidence that fades, in place. seen: how many observations there are in `slope`."""
    of_seen[...] = 1.0 + (of_seen - 1.0) * _KEPT**seen + square
    of -= rate * slope / np.sqrt(of_seen)


def _from_here(by_zone: Any) -> FloatArray:
    """For each zone, the sum over it and all after it."""
    result: FloatArray = np.cumsum(by_zone[::-1])[::-1]
    return result


def _best_rates(survival: FloatArray) -> CurveArray:
    """At each edge, the most of (what returns by a later edge) / (time held until then)."""
    area = np.concatenate(([0.0], np.cumsum(WIDTHS_S * 0.5 * (survival[:-1] + survival[1:]))))
    returned = survival[:-1, None] - survival[None, 1:]
    held_s = area[None, 1:] - area[:-1, None]
    best = np.divide(returned, held_s, out=np.zeros_like(returned), where=_LATER & (held_s > 0)).max(axis=1)
    result: CurveArray = np.append(best, best[-1]).astype(np.float32)
    return result


ARRAYS: Final = Arithmetic(_hazards, _learn, _best_rates)


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
