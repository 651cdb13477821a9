"""How far a generated load is from what was published about real ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier.sim.workload.turns import Draws

_Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distance:
    """One quantity. high: the end of a published range, otherwise the same as low.

    off_percent: how far generated lies outside of the published value or range, in percent of its nearer
    end; negative below.
    """

    quantity: str
    source: str
    unit: str
    low: float
    high: float
    generated: float
    samples: int

    @property
    def off_percent(self) -> float:
        """See the class."""
        if self.low <= self.generated <= self.high:
            return 0.0
        end = self.low if self.generated < self.low else self.high
        return 100 * (self.generated - end) / end


def distances(draws: Draws) -> list[Distance]:
    """The published figures that a load's draws can be held against; those without draws are left out."""
    found: list[Distance] = []
    coding = np.array(draws.waits.get("coding", ()), np.float64)
    if len(coding):
        found += _coding_waits(coding)
    requests = np.array(draws.requests.get("coding", ()), np.float64)
    if len(requests):
        found.append(_one("requests in a session, mean", "TraceLab", "", 9.2, requests.mean(), requests))
        found.append(
            _one("requests in a session, p99", "TraceLab", "", 137, np.percentile(requests, 99), requests)
        )
    steps = np.array(draws.step_waits, np.float64)
    if len(steps):
        for share, bound in ((86, 1), (95, 10)):
            name = f"agent steps under {bound} s"
            found.append(_one(name, "router issue 285", "%", share, _below(steps, bound), steps))
    chat = np.array(draws.waits.get("chat", ()), np.float64)
    if len(chat):
        found.append(_one("reuse within 10 min", "Bailian", "%", 80, _below(chat, 600), chat))
    return found


def _coding_waits(waits: _Values) -> Iterator[Distance]:
    for name, percent, published in (("p50", 50, 86.0), ("p90", 90, 1260.0), ("p99", 99, 50400.0)):
        yield _one(f"human wait, {name}", "TraceLab", "s", published, np.percentile(waits, percent), waits)
    yield _one("human wait, longest", "TraceLab", "s", 31 * 86400, waits.max(), waits)
    yield _one("waits within 5 min", "TraceLab", "%", 70, _below(waits, 300), waits, high=80)
    yield _one("waits within an hour", "TraceLab", "%", 95, _below(waits, 3600), waits, high=96)
    share = 100 * waits[waits > np.float64(3600)].sum() / waits.sum()
    yield _one("idle time in waits over an hour", "TraceLab", "%", 90, share, waits)


def _below(values: _Values, bound: float) -> float:
    return 100 * float((values <= np.float64(bound)).mean())


def _one(
    quantity: str,
    source: str,
    unit: str,
    low: float,
    generated: float,
    values: _Values,
    *,
    high: float | None = None,
) -> Distance:
    return Distance(quantity, source, unit, low, low if high is None else high, float(generated), len(values))
