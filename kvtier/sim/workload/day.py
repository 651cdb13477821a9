"""Day and night: when sessions start, and when people who left in the evening come back."""

from __future__ import annotations

from typing import Final

import msgspec

from kvtier.errors import ConfigError

HOUR_S: Final = 3600.0
DAY_S: Final = 86400.0
# Assumed: a service whose users live around one time zone; quiet from 1 to 6, busy from 9 to 18.
_ARRIVALS: Final = (
    0.30, 0.20, 0.14, 0.11, 0.10, 0.13, 0.25, 0.50, 0.85, 1.10, 1.20, 1.20,
    1.05, 1.10, 1.20, 1.20, 1.15, 1.05, 0.90, 0.85, 0.85, 0.80, 0.65, 0.45,
)  # fmt: skip


class Day(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """arrivals: relative rate of new sessions in each hour of the day, assumed.

    start_hour: hour of day at time 0.  A wait of over an hour whose end falls between night_from and
    night_to (hours of day) lasts, with sleep_probability, until the morning and a little longer
    (exponential with mean morning_s); all four are assumed.
    """

    arrivals: tuple[float, ...] = _ARRIVALS
    start_hour: float = 0.0
    night_from: float = 23.0
    night_to: float = 7.0
    sleep_probability: float = 0.8
    morning_s: float = 5400.0

    def __post_init__(self) -> None:
        if len(self.arrivals) != 24 or not all(rate >= 0 for rate in self.arrivals) or not sum(self.arrivals):
            raise ConfigError("arrivals", "are not 24 rates of which one is above 0")
        for name in ("start_hour", "night_from", "night_to"):
            if not 0 <= getattr(self, name) < 24:
                raise ConfigError(name, f"{getattr(self, name)} is no hour of the day")
        if not 0 <= self.sleep_probability <= 1:
            raise ConfigError("sleep_probability", f"{self.sleep_probability} is no probability")
        if not self.morning_s > 0:
            raise ConfigError("morning_s", f"{self.morning_s} is not above 0")

    def hour(self, t_s: float) -> float:
        """The hour of day at a time, 0 to 24."""
        return (self.start_hour + t_s / HOUR_S) % 24

    def night_left_s(self, t_s: float) -> float:
        """How long the night lasts from here; 0 by day."""
        into = (self.hour(t_s) - self.night_from) % 24
        length = (self.night_to - self.night_from) % 24
        return (length - into) * HOUR_S if into < length else 0.0
