"""Conversations as their waits are followed: one wait by each clock, and what the next one is judged by."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from kvtier.policy.baselines.interfaces import IntArray
from kvtier.policy.worth_runs import Run


@dataclass(slots=True, eq=False)
class Wait:
    """One wait by one clock: from the arrival of a request, or from its end.

    codes: None of what several conversations use, of which nothing is taught.  run: whose worth it is; None
    for a wait that teaches alone, since another clock is known by now.  teaches: whether it does; taught:
    classes of age before this one have taught what they can.  expected: what is still to be judged, see
    Forecasts.  hint_s: as it was said, after said_s of the wait.  end_s: when it is
    looked at because its run is kept long enough."""

    tenant: str
    codes: IntArray | None
    start_s: float
    run: Run | None
    teaches: bool = False
    taught: int = 0
    expected: tuple[float, ...] = ()
    hint_s: float | None = None
    said_s: float = 0.0
    over: bool = False
    end_s: float = inf

    def end(self) -> None:
        """Nobody waits any more. It may be known for days, its run is not."""
        self.over, self.run = True, None

    @property
    def ended(self) -> bool:
        """Nobody waits any more, or from a later time on."""
        return self.over or (self.codes is None and self.run is not None and self.run.clock_s > self.start_s)


@dataclass(slots=True, eq=False)
class Chat:
    """A conversation. asked: its wait since the last request came, and wait: since that was parked.

    head: its newest end; ends: blocks by which it is told.  asked_s: when the last request came; inf: none
    yet.  request: the number of the last one, which found so many blocks of the path up to the newest end,
    and would have with LRU; held: tokens of it that were in its engine.
    """

    run: Run
    asked: Wait | None = None
    wait: Wait | None = None
    head: bytes = b""
    ends: tuple[bytes, ...] = ()
    serving: bool = False
    asked_s: float = inf
    turns: int = 0
    tokens_in: int = 0
    new_tokens: int = 0
    gaps_s: tuple[float, float] = field(default=(-1.0, -1.0))
    request: int = 0
    found: tuple[int, int] = (0, 0)
    held: int = 0
