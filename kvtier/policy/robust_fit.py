"""Seconds as a weighted sum of a few amounts (a call, operations, bytes), fitted while it is used.

With theta_j = prior_j * exp(u_j), so that no coefficient is ever negative, it minimises

    sum_i v_i * rho(ln(seconds_i / (theta . amounts_i)) / spread)  +  sum_j (u_j / prior_spread_j)^2 / 2

rho is Huber's ("Robust Estimation of a Location Parameter", 1964): an outlier pulls with a bounded force.
v_i halves with age.  The solution is found by iteratively reweighted least squares (Holland and Welsch,
1977) on the recent measurements.  Where a guess is off by orders of magnitude, what it says of one amount may
be too little to be seen beside another: then it is also tried from where each amount alone explains all, and
the least sum counts.  The second sum is the prior: alone it is the answer before anything was
measured, with some measurements it hardly counts, and what measurements do not tell apart stays where the
prior has it.

A few large errors in a row on one side are no outliers but a new state of things (another clock rate, a
busier drive): then what came before them is forgotten at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from operator import mul
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.policy import learned_state as read

# Beyond so many spreads an error pulls no harder; 95 % efficient where errors are normal.
_HUBER = 1.345
# ln-spread of single measurements before any was seen, its least value, and how many it stands for.
_FIRST_SPREAD, _LEAST_SPREAD, _SPREAD_EVIDENCE = 0.2, 0.02, 4.0
# Older measurements than this weigh under a sixteenth of the newest.
_ROWS_PER_HALF_LIFE = 4
# So many errors in a row beyond so many spreads on one side mean a change.
_CHANGE_RUN, _CHANGE_SPREADS = 5, 2.0
# A median error of so many spreads is no noise.
_FAR_SPREADS = 4.0
# A fit with a wider spread than this is no fit yet: other starts are tried.
_POOR_SPREAD = 0.25
_ROUNDS, _LONGEST_STEP, _SETTLED = 32, 1.0, 1e-4
_FITS_PER_MEMORY = 10
_MOST = 1e21
# No coefficient is further from its guess than this, as a factor's logarithm.
_FURTHEST = 200.0

_Array = npt.NDArray[np.float64]


class RobustFit:
    """Learns theta in seconds = theta . amounts.

    prior: the guess of theta, all above 0.  prior_spread: of ln(theta) around it; 0.7 is a factor of 2.
    half_life: measurements after which an old one counts half.
    """

    def __init__(self, prior: Sequence[float], prior_spread: Sequence[float], half_life: int = 25) -> None:
        if len(prior) != len(prior_spread) or not all(p > 0 for p in (*prior, *prior_spread, half_life)):
            raise ValueError("a fit needs a guess above 0 and a spread above 0 for each amount")
        self._prior = np.asarray(prior, dtype=np.float64)
        self._prior_spread = np.asarray(prior_spread, dtype=np.float64)
        self._half_life = half_life
        self._rows: deque[tuple[float, ...]] = deque(maxlen=_ROWS_PER_HALF_LIFE * half_life)
        self._settle(np.zeros(len(prior)), _FIRST_SPREAD)
        self._run = 0
        # Measurements since the last fit: it is done again when a tenth of them is new.
        self._pending = 0

    @property
    def theta(self) -> tuple[float, ...]:
        """The present coefficients, in seconds for each unit of their amounts."""
        return self._theta

    @property
    def measurements(self) -> int:
        """How many measurements count now."""
        return len(self._rows)

    def predict(self, amounts: Sequence[float]) -> float:
        """Expected seconds; at least a nanosecond."""
        return max(float(sum(map(mul, self._theta, amounts))), 1e-9)

    def observe(self, amounts: Sequence[float], seconds: float) -> None:
        """Learn from one measurement.

        Raises ValueError unless it is finite, seconds > 0 and an amount > 0.
        """
        row = (*map(float, amounts), float(seconds))
        if len(row) != len(self._prior) + 1 or not _is_row(row):
            raise ValueError(f"cannot learn from {tuple(amounts)} in {seconds} s")
        error = math.log(seconds / self.predict(amounts))
        self._rows.append(row)
        self._pending += 1
        if self._changed(error):
            self._pending = len(self._rows)
            while len(self._rows) > _CHANGE_RUN:
                self._rows.popleft()
        if self._pending >= max(len(self._rows) // _FITS_PER_MEMORY, 1):
            self._fit()
            self._pending = 0

    def _changed(self, error: float) -> bool:
        """Whether this error ends a run of large ones on one side; the count begins anew then."""
        side = 0 if abs(error) < _CHANGE_SPREADS * self._spread else 1 if error > 0 else -1
        self._run = self._run + side if side and side * self._run >= 0 else side
        if abs(self._run) < _CHANGE_RUN:
            return False
        self._run = 0
        return True

    def _settle(self, u: _Array, spread: float) -> None:
        """Take over a fit's result."""
        self._u, self._spread = np.clip(u, -_FURTHEST, _FURTHEST), spread
        self._theta = tuple((self._prior * np.exp(self._u)).tolist())

    def _fit(self) -> None:
        table = np.asarray(self._rows)
        amounts, seconds = table[:, :-1], np.log(table[:, -1])
        age = np.exp2(-np.arange(len(table) - 1, -1, -1) / self._half_life)
        # From the prior each time: the answer depends on the measurements alone, not on the way to it.
        u, spread = self._fitted(np.zeros(len(self._prior)), amounts, seconds, age)
        if spread > _POOR_SPREAD:
            starts = [self._alone(j, amounts, seconds, age) for j in range(len(u))]
            found = [(u, spread), *(self._fitted(start, amounts, seconds, age) for start in starts)]
            least = min(spread for _, spread in found)
            u, spread = min(found, key=lambda f: self._loss(f[0], least, amounts, seconds, age))
        self._settle(u, spread)

    def _alone(self, j: int, amounts: _Array, seconds: _Array, age: _Array) -> _Array:
        """Where the amount j explains everything."""
        u, parts = np.zeros(len(self._prior)), amounts[:, j] * self._prior[j]
        some = parts > 0
        if some.any():
            u[j] = _median(seconds[some] - np.log(parts[some]), age[some])
        return np.clip(u, -_FURTHEST, _FURTHEST)

    def _loss(self, u: _Array, spread: float, amounts: _Array, seconds: _Array, age: _Array) -> float:
        """What is minimised."""
        errors = np.abs(seconds - np.log((amounts * (self._prior * np.exp(u))).sum(axis=1))) / spread
        rho = np.where(errors < _HUBER, errors * errors / 2, _HUBER * (errors - _HUBER / 2))
        return float((age * rho).sum() + ((u / self._prior_spread) ** 2).sum() / 2)

    def _fitted(self, u: _Array, amounts: _Array, seconds: _Array, age: _Array) -> tuple[_Array, float]:
        """From a start: where it leads, and the spread around it."""
        spread = _FIRST_SPREAD
        for _ in range(_ROUNDS):
            parts = amounts * (self._prior * np.exp(u))
            expected = parts.sum(axis=1)
            shares = parts / expected[:, None]
            errors = seconds - np.log(expected)
            spread = _spread_of(errors, age)
            weights = age * np.minimum(1.0, _HUBER * spread / np.maximum(np.abs(errors), 1e-12))
            precision = np.diag((spread / self._prior_spread) ** 2)
            weighted = shares * weights[:, None]
            step = np.linalg.solve(weighted.T @ shares + precision, weighted.T @ errors - precision @ u)
            longest = float(np.abs(step).max())
            u = u + step * min(1.0, _LONGEST_STEP / max(longest, 1e-12))
            if longest < _SETTLED:
                break
        return np.clip(u, -_FURTHEST, _FURTHEST), spread

    def state(self) -> dict[str, Any]:
        """What was learned, as plain numbers and lists."""
        return {
            "rows": [list(row) for row in self._rows],
            "run": self._run,
            "pending": self._pending,
            "spread": self._spread,
            "u": self._u.tolist(),
        }

    def restore(self, state: object, field: str) -> None:
        """Take over what `state` returned once.

        Raises ConfigError naming the field, and changes nothing then.
        """
        table = read.mapping(state, field)
        read.only(table, field, "rows", "run", "pending", "spread", "u")
        run = int(read.number(table["run"], f"{field}.run", 1 - _CHANGE_RUN, _CHANGE_RUN - 1))
        spread = read.number(table["spread"], f"{field}.spread", _LEAST_SPREAD, _MOST)
        size = len(self._prior)
        u = read.numbers(table["u"], f"{field}.u", -_FURTHEST, _FURTHEST, most=size, least=size)
        most, width = self._rows.maxlen or 0, len(self._prior) + 1
        rows = []
        for index, row in enumerate(read.items(table["rows"], f"{field}.rows", most=most)):
            where = f"{field}.rows[{index}]"
            values = tuple(read.numbers(row, where, 0, _MOST, most=width, least=width))
            read.require(_is_row(values), where, "is no measurement")
            rows.append(values)
        pending = int(read.number(table["pending"], f"{field}.pending", 0, most))
        self._rows = deque(rows, maxlen=most)
        self._run, self._pending = run, pending
        self._settle(np.asarray(u), spread)


def _is_row(row: Sequence[float]) -> bool:
    *amounts, seconds = row
    fine = all(0 <= value <= _MOST for value in row)
    return fine and seconds > 0 and any(amounts)


def _spread_of(errors: _Array, age: _Array) -> float:
    """1.4826 times the weighted median of absolute errors, with some of the first guess mixed in.

    A guess that is far off makes all errors large and alike. So that this does not look like noise, which the
    guess may outweigh, errors whose median is many spreads from 0 are taken around it.
    """
    seen = 1.4826 * _median(np.abs(errors), age)
    if len(errors) >= _CHANGE_RUN:
        centre = _median(errors, age)
        around = 1.4826 * _median(np.abs(errors - centre), age)
        seen = around if abs(centre) > _FAR_SPREADS * max(around, _LEAST_SPREAD) else seen
    weight = float(age.sum())
    mixed = (weight * seen + _SPREAD_EVIDENCE * _FIRST_SPREAD) / (weight + _SPREAD_EVIDENCE)
    return max(mixed, _LEAST_SPREAD)


def _median(values: _Array, age: _Array) -> float:
    """The weighted median."""
    order = np.argsort(values)
    total = np.cumsum(age[order])
    return float(values[order[int(np.searchsorted(total, total[-1] / 2))]])
