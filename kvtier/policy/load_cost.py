"""How long a load takes: learned for each path that bytes come by, with an interval that holds.

    seconds = start + bytes / bandwidth + queued bytes / drain rate

for each path: host memory, the disk (one path for each codec, since decoding is a part of it), a peer's
host memory, a peer's disk.  The three coefficients are fitted by RobustFit; queued bytes are what the path
still has to move for others when the load is asked for.  They have a rate of their own, since a queue
drains in parallel with the load where a device serves several at once.  Intervals come from the residuals
of the same path in the same condition, idle or loaded, by adaptive conformal inference (see intervals.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from kvtier.errors import ConfigError
from kvtier.policy import learned_state as read
from kvtier.policy.intervals import Interval, ResidualTracker
from kvtier.policy.robust_fit import RobustFit

Source: TypeAlias = str
Load: TypeAlias = Literal["idle", "loaded"]
LOADS: Final[tuple[Load, ...]] = ("idle", "loaded")

# Start in seconds and bytes per second, until a path was used: a copy in memory, a read from NVMe, TCP.
_PRIOR: Final[dict[Source, tuple[float, float]]] = {
    "host": (0.0005, 8e9),
    "disk": (0.002, 1.5e9),
    "peer_host": (0.003, 1.2e9),
    # A peer of which it is not said where it has them.
    "peer": (0.004, 1.1e9),
    "peer_disk": (0.005, 1.0e9),
}
SOURCES: Final[tuple[Source, ...]] = tuple(_PRIOR)
# ln-spread of the guesses: start by a factor of 4, rates by 2.5.
_START_SPREAD, _RATE_SPREAD, _QUEUE_SPREAD = 1.4, 0.9, 0.9
_MOST_PATHS = 10_000
_MOST_BYTES, _MOST_SECONDS = 1 << 60, 1e9


@dataclass(frozen=True, slots=True)
class Path:
    """Where bytes come from.

    via: what tells paths of one source apart: a codec, a peer's name; '' for one.
    """

    source: Source
    via: str = ""

    @property
    def key(self) -> str:
        """One text: 'host', 'disk/zstd', 'peer_host/node-3'."""
        return f"{self.source}/{self.via}" if self.via else self.source

    @classmethod
    def of_key(cls, key: str) -> Path:
        """The path of such a text. Raises ConfigError for an unknown source."""
        name, slash, via = key.partition("/")
        for source in SOURCES:
            if name == source and bool(via) == bool(slash):
                return cls(source, via)
        raise ConfigError("path", f"'{key}' is not known", fix=f"a source is one of {', '.join(SOURCES)}")


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """What was expected of a load; handed back with what it took. nbytes: to load; queue_bytes: before it."""

    path: Path
    nbytes: int
    queue_bytes: int
    eta: Interval

    @property
    def load(self) -> Load:
        """The condition that its interval was learned in."""
        return "loaded" if self.queue_bytes else "idle"


@dataclass(frozen=True, slots=True)
class LoadLine:
    """Expected seconds of any number of bytes on a path as it is now: start_s, queue included, and a rate.

    early_factor, late_factor: ends of the interval over the expected time.
    """

    start_s: float
    bytes_per_s: float
    early_factor: float = 1.0
    late_factor: float = 1.0

    def seconds(self, nbytes: float) -> float:
        """Expected seconds; 0 for nothing."""
        return self.start_s + nbytes / self.bytes_per_s if nbytes > 0 else 0.0


class LoadCosts:
    """Learns what loads cost, path by path."""

    def __init__(self) -> None:
        self._fits: dict[Path, RobustFit] = {}
        self._residuals: dict[tuple[Path, Load], ResidualTracker] = {}

    def estimate(self, path: Path, nbytes: int, queue_bytes: int = 0) -> LoadEstimate:
        """Expected seconds to load `nbytes` behind `queue_bytes`, with an 80 % interval.

        Raises ValueError for negative bytes.
        """
        if not (0 <= nbytes <= _MOST_BYTES and 0 <= queue_bytes <= _MOST_BYTES):
            raise ValueError(f"cannot load {nbytes} bytes behind {queue_bytes}")
        if not nbytes:
            return LoadEstimate(path, 0, queue_bytes, Interval(0.0, 0.0, 0.0))
        expected_s = self._fit(path).predict((1.0, nbytes, queue_bytes))
        residuals = self._tracker(path, "loaded" if queue_bytes else "idle")
        return LoadEstimate(path, nbytes, queue_bytes, residuals.around(expected_s))

    def line(self, path: Path, nbytes: int, queue_bytes: int = 0) -> LoadLine:
        """The same for any number of bytes, for planning. nbytes: about how many, for the interval.

        Raises ValueError for negative bytes.
        """
        start_s, per_byte_s, per_queued_s = self._fit(path).theta
        around = self.estimate(path, max(nbytes, 1), queue_bytes).eta
        early, late = around.low_s / around.mid_s, around.high_s / around.mid_s
        return LoadLine(start_s + queue_bytes * per_queued_s, 1 / per_byte_s, min(early, 1.0), max(late, 1.0))

    def measured(self, path: Path) -> bool:
        """Whether a load by this path was ever seen."""
        return path in self._fits and self._fits[path].measurements > 0

    def hoped(self, path: Path, queue_bytes: int = 0) -> LoadLine:
        """What a path that was never measured may do: a spread better than the guess in everything."""
        start_s, rate = _PRIOR[path.source]
        start_s += queue_bytes / (rate * math.exp(_QUEUE_SPREAD))
        return LoadLine(start_s * math.exp(-_START_SPREAD), rate * math.exp(_RATE_SPREAD))

    def observed(self, estimate: LoadEstimate, seconds: float) -> None:
        """A load took so long. One of nothing, or in no time, teaches nothing."""
        if not estimate.nbytes or not 0 < seconds < _MOST_SECONDS:
            return
        self._tracker(estimate.path, estimate.load).outcome(estimate.eta, seconds)
        self._fit(estimate.path).observe((1.0, estimate.nbytes, estimate.queue_bytes), seconds)
        # The one observed last stands last, also in what is written down.
        self._fits[estimate.path] = self._fits.pop(estimate.path)

    def usual(self, source: Source) -> Path:
        """The path of a source that was measured most, of several the one observed last.

        One without a `via` where none was measured.
        """
        paths = [path for path in reversed(self._fits) if path.source == source]
        return max(paths, key=lambda path: self._fits[path].measurements, default=Path(source))

    def forget(self, path: Path) -> None:
        """The path is gone for good: a node that left. Unknown ones are no error."""
        self._fits.pop(path, None)
        for load in LOADS:
            self._residuals.pop((path, load), None)

    def _fit(self, path: Path) -> RobustFit:
        if path not in self._fits:
            self._fits[path] = _new_fit(path)
        return self._fits[path]

    def _tracker(self, path: Path, load: Load) -> ResidualTracker:
        tracker = self._residuals.get((path, load))
        if tracker is None:
            tracker = self._residuals[path, load] = ResidualTracker()
        return tracker

    def state(self) -> dict[str, Any]:
        """What was learned, as plain numbers, lists and tables."""
        return {
            path.key: {"fit": fit.state()} | {load: self._tracker(path, load).state() for load in LOADS}
            for path, fit in self._fits.items()
            if fit.measurements
        }

    @classmethod
    def from_state(cls, state: object, field: str = "loads") -> LoadCosts:
        """The costs whose `state` this is. Raises ConfigError naming the field."""
        costs = cls()
        table = read.mapping(state, field)
        read.require(len(table) <= _MOST_PATHS, field, f"has more than {_MOST_PATHS} paths")
        for key, entry in table.items():
            path, where = Path.of_key(key), f"{field}.{key}"
            learned = read.mapping(entry, where)
            read.only(learned, where, "fit", *LOADS)
            fit = _new_fit(path)
            fit.restore(learned["fit"], f"{where}.fit")
            costs._fits[path] = fit
            for load in LOADS:
                costs._residuals[path, load] = ResidualTracker.from_state(learned[load], f"{where}.{load}")
        return costs


def _new_fit(path: Path) -> RobustFit:
    start_s, rate = _PRIOR[path.source]
    return RobustFit((start_s, 1 / rate, 1 / rate), (_START_SPREAD, _RATE_SPREAD, _QUEUE_SPREAD))
