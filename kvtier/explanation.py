"""Why a conversation's KV lies where it lies: what `kvtier explain` and `Client.explain` answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExplainedRun:
    """Neighbouring blocks in equal state: tokens [start, end), bytes by tier.

    returns: the chance of a return within 5 minutes, an hour and a day, in that order; empty where nobody
    reckons, as all else but load_s is 0 then.  best_s: for how long it is best kept, by when it is back with
    the chance best_returns.  recompute_s, load_s: to have it in a pool by computing, and from where it
    lies.  *_worth_s: what keeping it there saves on average, in seconds of a worker's GPUs: against the next
    tier below, or against computing it.  *_worth, *_per_hour: that, and its room, in money; None without
    prices.  *_rank: (how many go before it, of how many).  decision, why: in words.
    """

    start: int
    end: int
    tiers: tuple[str, ...]
    host_bytes: int
    disk_bytes: int
    load_s: float
    decision: str
    why: str
    returns: tuple[float, ...] = ()
    idle_s: float = 0.0
    best_s: float = 0.0
    best_returns: float = 0.0
    recompute_s: float = 0.0
    host_worth_s: float = 0.0
    disk_worth_s: float = 0.0
    host_worth: float | None = None
    disk_worth: float | None = None
    host_per_hour: float | None = None
    disk_per_hour: float | None = None
    host_rank: tuple[int, int] = (0, 0)
    disk_rank: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Explanation:
    """One conversation. policy: what eviction goes by.  currency: of the amounts of money; '' for none.

    runs: of the newest branch from its front, then what other branches have beside it.
    """

    conversation: str
    tenant: str
    found: bool
    policy: str
    currency: str = ""
    runs: tuple[ExplainedRun, ...] = ()
    detail: str = ""
