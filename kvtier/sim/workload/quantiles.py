"""Distributions as tables of quantiles, so that a published percentile is a visible number."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right

import msgspec

from kvtier.errors import ConfigError


class Quantiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """points: (share, value) from share 0 to 1, values over 0; between them log(value) is linear in share.

    Between two points the value is log-uniform, so mean and partial sums have closed forms.
    Raises ConfigError for points that do not rise.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        values = [value for _, value in self.points]
        if len(self.points) < 2 or shares[0] != 0 or shares[-1] != 1:
            raise ConfigError("points", "do not go from the share 0 to the share 1")
        if any(b <= a for a, b in itertools.pairwise(shares)):
            raise ConfigError("points", "have shares that do not rise")
        if not all(0 < value < math.inf for value in values):
            raise ConfigError("points", "have values that are not above 0")
        if any(b < a for a, b in itertools.pairwise(values)):
            raise ConfigError("points", "have values that fall")

    def mean(self) -> float:
        """The mean of the whole distribution."""
        return self.sum_over(0.0)

    def share_below(self, value: float) -> float:
        """What part of the distribution lies at or below `value`."""
        for (low_share, low), (high_share, high) in zip(self.points, self.points[1:], strict=False):
            if value < low:
                return low_share
            if value < high:
                return low_share + (high_share - low_share) * math.log(value / low) / math.log(high / low)
        return 1.0

    def sum_over(self, value: float) -> float:
        """What the part above `value` adds to the mean."""
        total = 0.0
        for (low_share, low), (high_share, high) in zip(self.points, self.points[1:], strict=False):
            start = max(value, low)
            if start >= high:
                total += (high_share - low_share) * high * (high == low and high > value)
            else:
                total += (high_share - low_share) * (high - start) / math.log(high / low)
        return total


class Sampler:
    """Draws from a table: a uniform number in [0, 1) becomes a value."""

    __slots__ = ("_logs", "_shares")

    def __init__(self, table: Quantiles) -> None:
        self._shares = [share for share, _ in table.points]
        self._logs = [math.log(value) for _, value in table.points]

    def value(self, share: float) -> float:
        """The quantile of `share`."""
        index = bisect_right(self._shares, share)
        low, high = self._shares[index - 1], self._shares[index]
        part = (share - low) / (high - low)
        return math.exp(self._logs[index - 1] + part * (self._logs[index] - self._logs[index - 1]))
