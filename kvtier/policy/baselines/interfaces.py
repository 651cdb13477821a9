"""What a policy is asked when a trace is replayed, one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
# Compiles a kernel: numba.njit in the simulator, `plain` where numba is not installed.
Jit = Callable[[Callable[..., Any]], Callable[..., Any]]


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Jit that compiles nothing: the same answers, some hundred times slower."""
    return function


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a request once it is served. duration_s: -1 where the trace does not tell."""

    tokens_out: int
    stop: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it comes in.

    path: the blocks of the prompt, int32, the root first; blocks are numbered in order of first
    appearance, and a block always has the same parent.  conversation and turn: -1 where unknown.
    kind: 'u' new text of the user, 't' tool results only, '' unknown.  outcome: None in a causal replay.
    tenant: a number, 0 where there is only one.
    """

    row: int
    t_s: float
    conversation: int
    turn: int
    tokens_in: int
    kind: str
    path: IntArray
    outcome: Outcome | None
    tenant: int = 0


@dataclass(frozen=True, slots=True)
class Served:
    """What a policy did for one request.

    hit: blocks of the path that were resident, counted from the root without a gap.
    evicted: blocks that were resident and are no longer, in the order of their removal, int32.
    bypassed: blocks of the path that were not resident and are not kept, int32.
    """

    hit: int
    evicted: IntArray
    bypassed: IntArray


class BlockPolicy(Protocol):
    """One tier. Between two requests it never holds more blocks than its capacity."""

    def serve(self, arrival: Arrival) -> Served:
        """Count the resident front, then take in and evict. Arrivals come in order of time."""

    def finished(self, row: int, outcome: Outcome) -> None:
        """An earlier request is done; called in causal replays alone, before later arrivals."""


@dataclass(frozen=True, slots=True)
class ServedTwo:
    """hit: the front that lies in either tier; slow_writes: blocks written to the slow tier."""

    hit: int
    slow_writes: int


class TwoTierPolicy(Protocol):
    """A fast and a slow tier; capacities hold between requests, for each tier."""

    def serve(self, arrival: Arrival) -> ServedTwo:
        """See BlockPolicy."""

    def finished(self, row: int, outcome: Outcome) -> None:
        """See BlockPolicy."""
