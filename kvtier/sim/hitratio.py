"""Policies side by side on one trace: hit ratios by size, and the decisions behind them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from kvtier.errors import ConfigError
from kvtier.policy.baselines.interfaces import Served
from kvtier.sim.future import lru_hits
from kvtier.sim.registry import Setup, entry_of, make_policy
from kvtier.sim.replay import replay, replay_two_tiers
from kvtier.sim.trace import Trace


@dataclass(frozen=True, slots=True)
class HitRatio:
    """One policy at one size. Percents are 0 to 100; share_percent: of the trace's unique blocks.

    unbounded_token_hit_percent: what a cache without bound reaches.  slow_writes_per_block: blocks that a
    two-tier run of the same total size wrote to its slow tier, for each unique block, and
    two_tier_token_hit_percent its hits; None without such a run.  seconds: wall time of the replays.
    """

    policy: str
    share_percent: float
    capacity_blocks: int
    token_hit_percent: float
    cost_hit_percent: float
    unbounded_token_hit_percent: float
    slow_writes_per_block: float | None
    two_tier_token_hit_percent: float | None
    causal: bool
    seconds: float


def measure(
    trace: Trace,
    policy: str,
    setup: Setup,
    *,
    share_percent: float,
    causal: bool = False,
    fast_share_percent: float = 0.0,
    on_served: Callable[[int, Served], None] | None = None,
) -> HitRatio:
    """Replay a trace against a policy; once more in two tiers where fast_share_percent is not 0.

    fast_share_percent: what part of the capacity is the fast tier.  Raises ConfigError for unknown names
    and sizes that leave no room.
    """
    entry = entry_of(policy)
    started_s = time.perf_counter()
    one = replay(trace, make_policy(policy, setup, trace), causal=causal, on_served=on_served)
    two, writes = None, None
    if fast_share_percent and entry.two is not None:
        fast = max(int(setup.capacity * fast_share_percent / 100), 1)
        if fast >= setup.capacity:
            raise ConfigError("fast_share", f"leaves no slow tier of {setup.capacity} blocks")
        two, writes = replay_two_tiers(trace, entry.two(setup, fast), causal=causal)
    return HitRatio(
        policy=policy,
        share_percent=share_percent,
        capacity_blocks=setup.capacity,
        token_hit_percent=one.token_hit_percent,
        cost_hit_percent=one.cost_hit_percent,
        unbounded_token_hit_percent=unbounded_percent(trace),
        slow_writes_per_block=writes,
        two_tier_token_hit_percent=None if two is None else two.token_hit_percent,
        causal=causal,
        seconds=time.perf_counter() - started_s,
    )


def unbounded_percent(trace: Trace) -> float:
    """Token hit ratio without a bound: whatever was there before is a hit."""
    tokens = int(trace.tokens_in.sum())
    hits = int(trace.blocks.sum()) - trace.unique_blocks
    return 100 * hits * trace.block_tokens / tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class Size:
    """A capacity in blocks, and as a share of the trace's unique blocks."""

    share_percent: float
    blocks: int


def sizes_of_shares(trace: Trace, shares_percent: Sequence[float]) -> list[Size]:
    """Shares of the trace's unique blocks, rounded down to blocks."""
    return [Size(share, int(trace.unique_blocks * share / 100)) for share in shares_percent]


def sizes_of_blocks(trace: Trace, counts: Sequence[int]) -> list[Size]:
    """Sizes that are given in blocks."""
    return [Size(100 * blocks / max(trace.unique_blocks, 1), blocks) for blocks in counts]


def sizes_of_lru_points(trace: Trace, percents: Sequence[float]) -> list[Size]:
    """The smallest sizes at which LRU has these percentages of the hits of an unbounded cache."""
    hits = lru_hits(trace)
    if not hits[-1]:
        raise ConfigError("lru_points", "the trace has no block that is used twice", fix="use shares")
    counts = [int(np.searchsorted(hits, hits[-1] * percent / 100)) for percent in percents]
    return sizes_of_blocks(trace, counts)


def decisions_to(file: TextIO) -> Callable[[int, Served], None]:
    """Writes a JSON line for each request: row, hit, evicted and bypassed blocks."""

    def write(row: int, served: Served) -> None:
        line = {
            "row": row,
            "hit": served.hit,
            "evicted": served.evicted.tolist(),
            "bypassed": served.bypassed.tolist(),
        }
        file.write(json.dumps(line, separators=(",", ":")) + "\n")

    return write
