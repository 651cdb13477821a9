"""Whether a restore took as long as its plan said."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Forecast:
    """Restores of one source in one state. inside: those that ended within the plan's interval."""

    source: str
    state: str
    restores: int = 0
    inside: int = 0
    too_slow: int = 0

    @property
    def inside_percent(self) -> float:
        """How often the interval held; 0 without a restore."""
        return 100 * self.inside / self.restores if self.restores else 0.0


class Forecasts:
    """By source, and by whether anything was queued there when the plan was made."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Forecast] = {}

    def see(self, eta_s: tuple[float, float], source: str, seconds: float, *, loaded: bool) -> None:
        """A restore is done. eta_s: the interval of its plan."""
        state = "loaded" if loaded else "idle"
        seen = self._seen.setdefault((source, state), Forecast(source, state))
        seen.restores += 1
        seen.inside += eta_s[0] <= seconds <= eta_s[1]
        seen.too_slow += seconds > eta_s[1]

    def all(self) -> list[Forecast]:
        """In order of source and state."""
        return [self._seen[name] for name in sorted(self._seen)]


def summed(parts: list[Forecasts]) -> tuple[Forecast, ...]:
    """Over all nodes."""
    total: dict[tuple[str, str], Forecast] = {}
    for part in parts:
        for seen in part.all():
            into = total.setdefault((seen.source, seen.state), Forecast(seen.source, seen.state))
            into.restores += seen.restores
            into.inside += seen.inside
            into.too_slow += seen.too_slow
    return tuple(total[name] for name in sorted(total))
