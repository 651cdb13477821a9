"""Whose return is waited for: conversations, followed by ids or by paths, and what their waits teach."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvtier.policy.baselines.interfaces import Arrival, IntArray, Jit, Outcome
from kvtier.policy.cost_cache_kernels import Pieces
from kvtier.policy.return_time import ReturnTimes
from kvtier.policy.return_time_context import Clock, Context, codes_of
from kvtier.policy.survival import CLASSES, EDGES_S, survival_kernels

# A request without an id continues the one whose path it has at least so much of: the rest is retokenised.
_SAME_PATH: Final = 0.9


@dataclass(slots=True)
class _Wait:
    """One row's wait by one clock; `codes` as told by its context."""

    row: int
    start_s: float
    codes: IntArray
    over: bool = False


@dataclass(slots=True)
class _Request:
    """What later requests want to know of a row."""

    t_s: float
    conversation: int
    turns: int
    tokens_in: int
    new_tokens: int
    kind: str
    blocks: int
    gap_s: float
    gap_before_s: float
    tenant: int
    waits: list[_Wait] = field(default_factory=list)


class Waits:
    """Follows conversations, teaches ReturnTimes, and keeps each row's curve in `pieces`."""

    def __init__(self, jit: Jit) -> None:
        self.times = ReturnTimes(jit)
        self.pieces = _no_pieces()
        self._kernels = survival_kernels(jit)
        self._requests: dict[int, _Request] = {}
        self._last: dict[int, int] = {}
        self._due: list[tuple[float, int, int, _Wait]] = []
        self._number = 0

    def arrive(self, arrival: Arrival, rows: IntArray, ends: IntArray) -> None:
        """A request: it may end a wait, and starts one. rows, ends: last users along its known front."""
        self._pass_time(arrival.t_s)
        self._grow(arrival.row + 1)
        self.pieces.start[rows] = ends
        before = self._continued(arrival, rows, ends)
        request = self._request(arrival, before)
        if before is not None:
            self._returned(before, arrival.t_s)
        if arrival.conversation >= 0:
            self._last[arrival.conversation] = arrival.row
        self._requests[arrival.row] = request
        self.pieces.used_s[arrival.row] = arrival.t_s
        self.pieces.waiting[arrival.row] = True
        self._wait(arrival.row, request, arrival.outcome)

    def finished(self, row: int, outcome: Outcome) -> None:
        """How an earlier request ended."""
        if row in self._requests and self.pieces.waiting[row]:
            self._wait(row, self._requests[row], outcome)

    def _pass_time(self, now_s: float) -> None:
        """Learn from waits that went on past a class of age by now."""
        due = self._due
        while due and due[0][0] <= now_s:
            _, _, age_class, wait = heapq.heappop(due)
            if wait.over:
                continue
            self.times.lasted(wait.codes, age_class)
            self._remind(wait, age_class + 1)

    def _continued(self, arrival: Arrival, rows: IntArray, ends: IntArray) -> int | None:
        """The row that this request is the next turn of."""
        if arrival.conversation >= 0:
            return self._last.get(arrival.conversation)
        if not len(rows):
            return None
        row, shared = int(rows[-1]), int(ends[-1])
        length = self._requests[row].blocks if row in self._requests else 0
        same = length > 1 and shared >= max(length - 1, _SAME_PATH * length)
        return row if same and self.pieces.waiting[row] else None

    def _request(self, arrival: Arrival, before: int | None) -> _Request:
        known = None if before is None else self._requests.get(before)
        fresh = _Request(
            arrival.t_s,
            arrival.conversation,
            0,
            arrival.tokens_in,
            arrival.tokens_in,
            arrival.kind,
            len(arrival.path),
            -1.0,
            -1.0,
            arrival.tenant,
        )
        if known is not None:
            fresh.turns = known.turns + 1
            fresh.new_tokens = max(arrival.tokens_in - known.tokens_in, 0)
            fresh.gap_s = max(arrival.t_s - known.waits[-1].start_s, 0.0)
            fresh.gap_before_s = known.gap_s
        return fresh

    def _returned(self, row: int, now_s: float) -> None:
        for wait in self._requests.pop(row).waits:
            wait.over = True
            self.times.ended(wait.codes, max(now_s - wait.start_s, 0.0))
        self.pieces.waiting[row] = False

    def _wait(self, row: int, request: _Request, outcome: Outcome | None) -> None:
        """Start to wait, by the clock of the request's end where that is known."""
        ended = outcome is not None and outcome.duration_s >= 0
        clock: Clock = "end" if ended else "arrival"
        duration_s = -1.0 if outcome is None else outcome.duration_s
        start_s = request.t_s + max(duration_s, 0.0)
        context = Context(
            clock=clock,
            stop=None if outcome is None else outcome.stop,
            kind=request.kind,
            turns=request.turns,
            tokens_in=request.tokens_in,
            new_tokens=request.new_tokens,
            tokens_out=-1 if outcome is None else outcome.tokens_out,
            duration_s=duration_s,
            gap_s=request.gap_s,
            gap_before_s=request.gap_before_s,
            tenant=request.tenant,
            hour=start_s / 3600 % 24,
        )
        wait = _Wait(row, start_s, codes_of(context))
        request.waits.append(wait)
        self.pieces.clock_s[row] = wait.start_s
        survival = self.pieces.survival[row]
        self._kernels.survive(self.times.hazards(wait.codes), survival)
        self._kernels.rank(survival, self.pieces.rates[row])
        self._remind(wait, 0)

    def _remind(self, wait: _Wait, age_class: int) -> None:
        """Nothing is learned of the last class: it has no end."""
        if age_class < CLASSES - 1:
            self._number += 1
            due_s = wait.start_s + EDGES_S[age_class + 1]
            heapq.heappush(self._due, (due_s, self._number, age_class, wait))

    def _grow(self, rows: int) -> None:
        have = len(self.pieces.start)
        if rows > have:
            rows = max(rows, 2 * have, 1024)
            self.pieces = Pieces(*(_grown(column, rows) for column in self.pieces))


def _no_pieces() -> Pieces:
    ints, times = np.zeros(0, np.int32), np.zeros(0, np.float64)
    curves = np.zeros((0, CLASSES + 1), np.float32)
    return Pieces(ints, ints, ints, np.zeros(0, np.bool_), times, times, curves, curves)


def _grown(column: np.ndarray, rows: int) -> np.ndarray:
    longer = np.zeros((rows, *column.shape[1:]), column.dtype)
    longer[: len(column)] = column
    return longer
