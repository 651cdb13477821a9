"""What plans said that restores would take, held against what they took."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

# Upper bounds of |taken - expected| / taken; the last bucket has none.
ERROR_BOUNDS: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
OUTCOMES: tuple[str, ...] = ("inside", "early", "late")
WAYS: tuple[str, ...] = ("load", "recompute", "both")


@dataclass(slots=True)
class EtaCounters:
    """Only ever grows. outcomes: restores by (slowest source, one of OUTCOMES).

    errors: by bucket of ERROR_BOUNDS, each in one bucket only; of the median that was expected.  ways: plans
    by what they do with what is stored.  prefills: that workers reported.
    """

    outcomes: dict[tuple[str, str], int] = field(default_factory=dict)
    errors: list[int] = field(default_factory=lambda: [0] * (len(ERROR_BOUNDS) + 1))
    errors_sum: float = 0.0
    ways: dict[str, int] = field(default_factory=dict)
    prefills: int = 0

    def see(self, source: str, eta_s: tuple[float, float, float], seconds: float) -> None:
        """A restore was expected to take low, middle, high seconds, and took so many."""
        low_s, middle_s, high_s = eta_s
        outcome = "early" if seconds < low_s else "late" if seconds > high_s else "inside"
        self.outcomes[source, outcome] = self.outcomes.get((source, outcome), 0) + 1
        error = abs(seconds - middle_s) / max(seconds, 1e-9)
        self.errors[bisect.bisect_left(ERROR_BOUNDS, error)] += 1
        self.errors_sum += error

    def total(self, outcome: str) -> int:
        """Over all sources."""
        return sum(seen for (_, name), seen in self.outcomes.items() if name == outcome)
