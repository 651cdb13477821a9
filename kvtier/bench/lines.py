"""How a benchmark reports: JSON lines for programs, a table for people."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Line:
    """One figure. limit: what it is held against, in the same unit; ratio: value / limit."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    ratio: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def json(self) -> str:
        """As one JSON object."""
        return json.dumps({k: v for k, v in asdict(self).items() if v not in (None, {})})


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def alternate(
    limit: Sequence[Callable[[], object]],
    work: Callable[[], object],
    rounds: int,
    prepare: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Seconds of the quickest of `limit` and of `work`, round by round, after one that is not counted.

    prepare: done before each `work`, untimed.
    """
    limits: list[float] = []
    works: list[float] = []
    for number in range(rounds + 1):
        best = min(seconds(one) for one in limit)
        prepare()
        own = seconds(work)
        if number:
            limits.append(best)
            works.append(own)
    return limits, works


def rate_line(name: str, nbytes: int, limits: Sequence[float], works: Sequence[float], **detail: Any) -> Line:
    """GB/s (1e9 bytes) of the median round, and the median of the rounds' ratios to their limits."""
    ratios = [limit / work for limit, work in zip(limits, works, strict=True)]
    return Line(
        name,
        round(nbytes / statistics.median(works) / 1e9, 2),
        "GB/s",
        round(nbytes / statistics.median(limits) / 1e9, 2),
        round(statistics.median(ratios), 3),
        {"ratios": [round(r, 2) for r in ratios], **detail},
    )


def micros_line(name: str, samples: Sequence[float], limit_us: float | None = None, **detail: Any) -> Line:
    """Microseconds: the median; the 99th percentile beside it."""
    ordered = sorted(samples)
    median = statistics.median(ordered) * 1e6
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6
    ratio = round(median / limit_us, 3) if limit_us else None
    return Line(name, round(median, 1), "us", limit_us, ratio, {"p99_us": round(p99, 1), **detail})


def report(lines: Iterable[Line], *, as_json: bool) -> None:
    """Print each line as soon as it is there, as JSON; or all of them in the end, as a table."""
    if not as_json:
        print(table(list(lines)))
        return
    for line in lines:
        print(line.json(), flush=True)


def table(lines: Sequence[Line]) -> str:
    """For people."""
    rows = [("name", "value", "unit", "limit", "ratio")]
    rows += [(x.name, f"{x.value:g}", x.unit, _number(x.limit), _number(x.ratio)) for x in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
