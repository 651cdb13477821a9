"""Tables of quantiles from a recorded trace, to put into a scenario in place of the published ones."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtier.errors import TraceError
from kvtier.sim.workload.quantiles import Quantiles
from kvtier.sim.workload.turns import Turn

_SHARES: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
# Clocks of traces tick in milliseconds or seconds; two points of one table are never equal.
_LEAST_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class Fitted:
    """waits: seconds from the end of a request to the next of its conversation; requests: of a conversation.

    without_end: gaps between arrivals that were taken for waits, since the trace tells no durations.
    """

    waits: Quantiles
    requests: Quantiles
    samples: int
    without_end: int


def fit(turns: Iterable[Turn], kinds: str = "u") -> Fitted:
    """Of turns whose kind is one of `kinds`, or not told. Raises TraceError where nobody comes back.

    Memory grows with the conversations. Waits of 0 and less count as a millisecond.
    """
    ended: dict[int, tuple[float, bool]] = {}
    counts: dict[int, int] = {}
    waits = array("d")
    without_end = 0
    for turn in turns:
        if turn.conversation < 0:
            continue
        wanted = not turn.kind or turn.kind in kinds
        before = ended.get(turn.conversation)
        if before is not None and wanted:
            waits.append(max(turn.t_s - before[0], _LEAST_S))
            without_end += not before[1]
        counts[turn.conversation] = counts.get(turn.conversation, 0) + wanted
        ended[turn.conversation] = (turn.t_s + max(turn.service_s, 0.0), turn.service_s >= 0)
    if not waits:
        raise TraceError(0, "has no conversation that goes on")
    requests = np.array([count for count in counts.values() if count], np.float64)
    return Fitted(_table(np.array(waits)), _table(requests), len(waits), without_end)


def to_toml(fitted: Fitted) -> str:
    """Both tables, for a profile of a scenario."""
    lines = [f"# fitted to {fitted.samples} waits"]
    for name, table in (("wait", fitted.waits), ("requests", fitted.requests)):
        points = ", ".join(f"[{share:g}, {value:g}]" for share, value in table.points)
        lines.append(f"{name} = {{ points = [{points}] }}")
    return "\n".join(lines) + "\n"


def _table(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Quantiles:
    found = np.quantile(values, _SHARES)
    return Quantiles(tuple((share, float(value)) for share, value in zip(_SHARES, found, strict=True)))
