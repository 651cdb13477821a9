"""Load, recompute, or both: the restore that costs least, over runs of blocks in equal state.

What is minimised is

    time to first token + gpu_weight * GPU seconds

for a request of N tokens.  A front plan (for engines that take one contiguous front) loads [0, e) and
computes the rest; with C(p, n) the seconds to compute n tokens after p, and L the seconds of the slowest
path,

    max(wait, L(0, e)) + (1 + gpu_weight) * C(e, N - e)

C(e, N - e) is concave in e (attention makes late tokens dearer) and L is linear between the places where
another path becomes the slowest, so between those places the sum is concave and its least value is at one of
them: within one source all or nothing, and an interior front only where sources differ, where loading hides
behind the prefill queue, or where a deadline cuts.

A mixed plan computes [0, m) from the front while [m, e) is loaded from the back (Jin et al., "Compute or
Load KV Cache? Why Not Both?", ICML 2025):

    max(wait + C(0, m), L(m, e)) + C(e, N - e) + gpu_weight * (C(0, m) + C(e, N - e))

Within a run this is convex in m, so that bisection finds the meeting point.  As e the ends of runs are
tried, the deadline's cut and the best front's end: with one source and whole blocks that is exact, since a
block that is computed at the front costs less than one at the back.  Where the engine goes on to compute as
long as nothing has arrived, the true meeting point settles itself; the plan's is what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import inf
from typing import Final, Literal

from kvtier.policy.interfaces import Recompute, Takes
from kvtier.policy.load_cost import LoadLine
from kvtier.policy.runs import Run

Way = Literal["load", "recompute", "mixed"]
# Requests that come while one is computed, beside those that wait already. On average they are as many as the
# share of time in which a worker is busy; half of it is assumed.
_COMING: Final = 0.5


@dataclass(frozen=True, slots=True)
class Question:
    """What a plan is for.

    tokens: of the request, more than the last run's end or equal.  lines: cost of each path that runs name.
    gpu_weight: what a second of the GPU counts beside a second of waiting; see `queue_weight`.
    prefill_wait_s: until the engine could begin to compute.  deadline_s: when all that is loaded must be
    there; held against the upper end of the paths' intervals.  takes: what the engine can use.
    """

    tokens: int
    recompute: Recompute
    lines: Mapping[str, LoadLine]
    gpu_weight: float = 0.0
    prefill_wait_s: float = 0.0
    deadline_s: float = inf
    takes: Takes = "fronts"

    def __post_init__(self) -> None:
        for name in ("tokens", "gpu_weight", "prefill_wait_s", "deadline_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for key, line in self.lines.items():
            if not (line.start_s >= 0 and line.bytes_per_s > 0):
                raise ValueError(f"path {key} has no bandwidth: {line}")


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Compute [0, compute_front), load [compute_front, load_end), compute the rest.

    ttft_s, load_s, gpu_s: expected time to first token, of the load, and of computing.  cost_s: what was
    minimised.  recompute_ttft_s, load_ttft_s: of computing everything, and of loading all that is stored;
    late: the deadline forbids the latter.
    """

    compute_front: int
    load_end: int
    ttft_s: float
    load_s: float
    gpu_s: float
    cost_s: float
    recompute_ttft_s: float
    load_ttft_s: float
    late: bool = False

    @property
    def way(self) -> Way:
        """What the plan does with what is stored."""
        if self.load_end == 0:
            return "recompute"
        return "mixed" if self.compute_front else "load"


def queue_weight(waiting_requests: int, scale: float = 1.0) -> float:
    """gpu_weight from the prefill queue: a second of the GPU makes each waiting request wait a second longer.

    So that the sum of all times to first token is minimised.  Half a request more is counted, for those that
    come while this one is computed: with an empty queue a second of the GPU is not free.  scale 0 looks at
    this request alone.
    """
    if waiting_requests < 0 or scale < 0:
        raise ValueError("waiting requests and their scale must not be negative")
    return (waiting_requests + _COMING) * scale


def plan_restore(runs: Sequence[Run], question: Question) -> RestorePlan:
    """The plan of least expected cost. runs: ascending; see Run.

    O(runs * paths^2) for fronts, O(runs^2 * log(blocks)) for mixed plans.  Raises ValueError for runs that
    overlap or go beyond the request, and KeyError for a path without a line.
    """
    return _Planner(runs, question).best()


@dataclass(frozen=True, slots=True)
class _Choice:
    compute_front: int
    load_end: int
    ttft_s: float
    load_s: float
    gpu_s: float
    cost_s: float


class _Planner:
    def __init__(self, runs: Sequence[Run], question: Question) -> None:
        self._runs, self._question = runs, question
        keys = list(dict.fromkeys(key for run in runs for key, _ in run.loads))
        self._lines = [question.lines[key] for key in keys]
        # Bytes of each path before each run, and after the last.
        self._before: list[list[float]] = [[0.0] * len(keys)]
        end = 0
        for run in runs:
            if run.start < end or run.end > question.tokens:
                raise ValueError(f"run [{run.start}, {run.end}) overlaps, or ends after the request")
            end = run.end
            self._before.append(list(self._before[-1]))
            for key, nbytes in run.loads:
                self._before[-1][keys.index(key)] += nbytes

    def best(self) -> RestorePlan:
        nothing = self._front(0, 0)
        choices = [nothing]
        latest = self._latest()
        whole = self._front(len(self._runs) - 1, self._runs[-1].cuts) if self._runs else nothing
        late = bool(self._runs) and latest != (len(self._runs) - 1, self._runs[-1].cuts)
        if self._question.takes == "all_or_nothing":
            choices += [] if late else [whole]
        else:
            choices += [self._front(*at) for at in self._front_cuts(latest)]
        best = min(choices, key=lambda c: (c.cost_s, -c.load_end))
        if self._question.takes == "both":
            ends = [(index, run.cuts) for index, run in enumerate(self._runs)]
            for end in dict.fromkeys([*ends, latest, self._place(best.load_end)]):
                best = min([best, *self._mixed(end)], key=lambda c: c.cost_s)
        return RestorePlan(
            best.compute_front,
            best.load_end,
            best.ttft_s,
            best.load_s,
            best.gpu_s,
            best.cost_s,
            recompute_ttft_s=nothing.ttft_s,
            load_ttft_s=whole.ttft_s,
            late=late,
        )

    # --- what a choice costs --------------------------------------------------------------------------------

    def _bytes(self, index: int, cut: int) -> list[float]:
        """Bytes of each path before a cut of a run."""
        run = self._runs[index]
        share = (run.cut(cut) - run.start) / (run.end - run.start)
        pairs = zip(self._before[index], self._before[index + 1], strict=True)
        return [before + share * (after - before) for before, after in pairs]

    def _load_s(self, begin: Sequence[float] | None, end: Sequence[float], *, late: bool = False) -> float:
        """Seconds to load what lies between two places; `late`: at the upper end of each path's interval."""
        longest = 0.0
        for path, line in enumerate(self._lines):
            seconds = line.seconds(end[path] - (begin[path] if begin else 0.0))
            longest = max(longest, seconds * (line.late_factor if late else 1.0))
        return longest

    def _front(self, index: int, cut: int) -> _Choice:
        """Load up to a cut, compute the rest."""
        ask = self._question
        end = self._runs[index].cut(cut) if cut else 0
        load_s = self._load_s(None, self._bytes(index, cut)) if cut else 0.0
        gpu_s = ask.recompute.seconds(end, ask.tokens - end)
        ttft_s = max(ask.prefill_wait_s, load_s) + gpu_s
        return _Choice(0, end, ttft_s, load_s, gpu_s, ttft_s + ask.gpu_weight * gpu_s)

    # --- fronts ---------------------------------------------------------------------------------------------

    def _latest(self) -> tuple[int, int]:
        """The longest front that arrives before the deadline, as run and cut; (0, 0) for none."""
        place = (0, 0)
        for index, run in enumerate(self._runs):
            in_time = _last(run.cuts, partial(self._in_time, index))
            if in_time:
                place = (index, in_time)
            if in_time < run.cuts:
                break
        return place

    def _in_time(self, index: int, cut: int) -> bool:
        return self._load_s(None, self._bytes(index, cut), late=True) <= self._question.deadline_s

    def _too_late(self, index: int, end_bytes: Sequence[float], cut: int) -> bool:
        begin = self._bytes(index, cut)
        return self._load_s(begin, end_bytes, late=True) > self._question.deadline_s

    def _front_cuts(self, latest: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Every place where the least cost can be, no later than `latest`."""
        for index, run in enumerate(self._runs[: latest[0] + 1]):
            most = latest[1] if index == latest[0] else run.cuts
            corners = {most, 1}
            for tokens in self._corners(index):
                cut = run.cut_at_most(tokens)
                corners |= {cut, cut + 1}
            yield from ((index, cut) for cut in sorted(corners) if 1 <= cut <= most)

    def _corners(self, index: int) -> Iterator[float]:
        """Tokens of a run at which another path becomes the slowest, or the load outlasts the wait."""
        run, tokens = self._runs[index], self._runs[index].end - self._runs[index].start
        lines = {(self._question.prefill_wait_s, 0.0)}
        for path, line in enumerate(self._lines):
            before, after = self._before[index][path], self._before[index + 1][path]
            if after:
                lines.add(
                    (line.start_s + before / line.bytes_per_s, (after - before) / tokens / line.bytes_per_s)
                )
        for (level, slope), (other_level, other_slope) in combinations(lines, 2):
            if slope != other_slope:
                yield run.start + (other_level - level) / (slope - other_slope)

    # --- both -----------------------------------------------------------------------------------------------

    def _place(self, end: int) -> tuple[int, int]:
        """The run and cut that end at a token."""
        for index, run in enumerate(self._runs):
            if run.start < end <= run.end:
                return index, run.cut_at_most(end)
        return 0, 0

    def _mixed(self, end: tuple[int, int]) -> Iterator[_Choice]:
        """The best of each run to meet in, when what is loaded ends at `end`."""
        last, last_cut = end
        if not last_cut:
            return
        end_bytes = self._bytes(last, last_cut)
        rest_s = self._rest_s(self._runs[last].cut(last_cut))
        for index in range(last + 1):
            # Nothing loaded at all is a front plan, so the meeting point lies before the end.
            most = last_cut - 1 if index == last else self._runs[index].cuts
            least = _last(most, partial(self._too_late, index, end_bytes)) + 1
            if least <= most:
                yield self._meeting(index, least, most, end, end_bytes, rest_s)

    def _rest_s(self, end: int) -> float:
        return self._question.recompute.seconds(end, self._question.tokens - end)

    def _meeting(
        self,
        index: int,
        least: int,
        most: int,
        end: tuple[int, int],
        end_bytes: Sequence[float],
        rest_s: float,
    ) -> _Choice:
        """The cheapest meeting point among the cuts [least, most] of a run; convex there, so by bisection."""
        ask, run = self._question, self._runs[index]
        load_end = self._runs[end[0]].cut(end[1])

        def choice(cut: int) -> _Choice:
            front = run.cut(cut)
            front_s = ask.recompute.seconds(0, front)
            load_s = self._load_s(self._bytes(index, cut), end_bytes)
            gpu_s = front_s + rest_s
            ttft_s = max(ask.prefill_wait_s + front_s, load_s) + rest_s
            return _Choice(front, load_end, ttft_s, load_s, gpu_s, ttft_s + ask.gpu_weight * gpu_s)

        low, high = least, most
        while low < high:
            middle = (low + high) // 2
            if choice(middle).cost_s <= choice(middle + 1).cost_s:
                high = middle
            else:
                low = middle + 1
        return choice(low)


def _last(most: int, holds: Callable[[int], bool]) -> int:
    """The last cut in [1, most] up to which `holds` is true; 0 when it is not true of the first."""
    if most and holds(most):
        # Mostly nothing forbids any.
        return most
    low, high = 0, max(most - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
