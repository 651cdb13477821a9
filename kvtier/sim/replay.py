"""Requests of a trace given to a policy, one after the other, and what it scored."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvtier.policy.baselines.gdsf import COST_DOUBLES_AT_TOKENS
from kvtier.policy.baselines.interfaces import Arrival, BlockPolicy, Outcome, Served, TwoTierPolicy
from kvtier.sim.trace import Trace


@dataclass(frozen=True, slots=True)
class Score:
    """Hits in percent: of all prompt tokens, and of the cost of all full blocks."""

    token_hit_percent: float
    cost_hit_percent: float


class _Learner(Protocol):
    def finished(self, row: int, outcome: Outcome) -> None: ...


def replay(
    trace: Trace,
    policy: BlockPolicy,
    *,
    causal: bool = False,
    on_served: Callable[[int, Served], None] | None = None,
) -> Score:
    """Serve every request. on_served: called with the row and what was done, in order."""
    hits = np.zeros(len(trace), np.int64)
    for arrival in _arrivals(trace, policy, causal):
        served = policy.serve(arrival)
        hits[arrival.row] = served.hit
        if on_served is not None:
            on_served(arrival.row, served)
    return score(trace, hits)


def replay_two_tiers(trace: Trace, policy: TwoTierPolicy, *, causal: bool = False) -> tuple[Score, float]:
    """Serve every request; the score, and the slow tier's writes for each unique block of the trace."""
    hits = np.zeros(len(trace), np.int64)
    writes = 0
    for arrival in _arrivals(trace, policy, causal):
        served = policy.serve(arrival)
        hits[arrival.row] = served.hit
        writes += served.slow_writes
    return score(trace, hits), writes / max(trace.unique_blocks, 1)


def score(trace: Trace, hits: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Score:
    """hits: blocks of each row's path that were hit, counted from the root."""
    tokens = int(trace.tokens_in.sum())
    cost = _front_cost(trace.blocks.astype(np.int64), trace.block_tokens)
    hit_cost = _front_cost(hits, trace.block_tokens)
    return Score(
        100 * int(hits.sum()) * trace.block_tokens / tokens if tokens else 0.0,
        100 * hit_cost / cost if cost else 0.0,
    )


def _front_cost(blocks: np.ndarray[tuple[int], np.dtype[np.int64]], block_tokens: int) -> float:
    """Weights of the first blocks of each path, summed: sum over i < n of 1 + i * block_tokens / 30000."""
    pairs = int((blocks * (blocks - 1) // 2).sum())
    return int(blocks.sum()) + pairs * block_tokens / COST_DOUBLES_AT_TOKENS


def _arrivals(trace: Trace, policy: _Learner, causal: bool) -> Iterator[Arrival]:
    """Arrivals in order; in a causal replay, outcomes are told as soon as they are due and not before.

    An unknown duration is due never.
    """
    running: list[tuple[float, int]] = []
    for row in range(len(trace)):
        t_s = float(trace.t_s[row])
        while running and running[0][0] <= t_s:
            _, done = heapq.heappop(running)
            policy.finished(done, trace.outcome(done))
        yield Arrival(
            row=row,
            t_s=t_s,
            conversation=int(trace.conversation[row]),
            turn=int(trace.turn[row]),
            tokens_in=int(trace.tokens_in[row]),
            kind=trace.kind[row],
            path=trace.path(row),
            outcome=None if causal else trace.outcome(row),
            tenant=int(trace.tenant[row]),
        )
        if causal and trace.duration_s[row] >= 0:
            heapq.heappush(running, (t_s + float(trace.duration_s[row]), row))
