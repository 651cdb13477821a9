"""The restore policy that decides by cost: load, recompute, or both, whatever is soonest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from kvtier.policy import learned_state as read
from kvtier.policy.interfaces import LoadChoice, RestoreWish, Segment
from kvtier.policy.intervals import Interval, ResidualTracker
from kvtier.policy.load_cost import LoadCosts, LoadLine, Path
from kvtier.policy.restore_plan import Question, RestorePlan, plan_restore, queue_weight
from kvtier.policy.runs import Run, runs_of

_ANY_WISH: Final = RestoreWish()
_MOST_KINDS = 64
# Whole restores of a kind from which on they are believed more than the loads that they consist of.
_ENOUGH = 10
# After so many refusals to load by a path, since one was seen, a load is made: what is never used is never
# learned.  Few are enough where they took long to come.
_LOOK_AGAIN: Final = 64
_LOOK_AGAIN_FEW, _LOOK_AGAIN_S = 4, 30.0
# How often a load takes longer than the upper end of its interval.
_MISSED: Final = 0.1


class _NoRecompute:
    """A worker of which nothing is known: computing is dearer than any load."""

    def seconds(self, past: int, new: int) -> float:
        return 1e9 * new


class CostRestore:
    """See RestorePolicy. Learns what loads cost; what computing costs comes with the wish.

    queue_scale: how much a waiting request counts; 0 looks at the asking request alone.
    """

    def __init__(self, loads: LoadCosts | None = None, *, queue_scale: float = 1.0) -> None:
        self.loads = loads if loads is not None else LoadCosts()
        self._queue_scale = queue_scale
        self._kinds: dict[str, ResidualTracker] = {}
        # Refusals since a load was seen, and when the first one was, by the slowest path of what was refused.
        self._refused: dict[str, tuple[int, float]] = {}
        # Paths without a measurement by which one load was made to get one.
        self._tried: dict[str, None] = {}

    def choose(self, segments: Sequence[Segment], tokens: int, wish: RestoreWish = _ANY_WISH) -> LoadChoice:
        """See RestorePolicy."""
        runs = runs_of([s for s in segments if s.end <= tokens])
        if not runs:
            return LoadChoice(0, 0.0, 0.0, why="nothing stored fits")
        lines = self._lines(runs, wish)
        question = self._question(tokens, wish, lines)
        # By layer, what is cut off at the deadline leaves nothing: no risk of that is worth taking.
        plan = plan_restore(runs, question) if wish.by_layer else self._plan(runs, question)
        hoped = self._first(runs, plan, tokens, wish, lines)
        if hoped is not None:
            return self._chosen(
                runs, hoped, lines, wish, f"{_why(hoped, wish)}; never measured, so it is tried"
            )
        unsafe = plan.late and not wish.by_layer
        if (unsafe or not plan.load_end) and self._look_again(runs, lines, wish.now_s):
            # Whoever carries it out cuts off what comes after the deadline.
            deadline_s = math.inf if plan.late else wish.deadline_s
            blind = RestoreWish(deadline_s=deadline_s, queued_bytes=wish.queued_bytes)
            plan = plan_restore(runs, self._question(tokens, blind, lines))
            return self._chosen(runs, plan, lines, wish, f"{_why(plan, blind)}; to see how long it takes now")
        return self._chosen(runs, plan, lines, wish, _why(plan, wish))

    def _plan(self, runs: Sequence[Run], question: Question) -> RestorePlan:
        """What costs least, where a load that is not safe to come in time is worth its risk.

        At the deadline a restore ends with the front that came, which is what would be safe to load, and has
        waited until then.  The chance of that lies between a half, where the load is expected at the
        deadline, and a tenth, where its interval ends there.
        """
        safe = plan_restore(runs, question)
        if not safe.late or question.takes != "fronts":
            return safe
        expected = {key: replace(line, late_factor=1.0) for key, line in question.lines.items()}
        bold = plan_restore(runs, replace(question, lines=expected))
        if bold.load_end <= safe.load_end:
            return safe
        slowest = question.lines[_slowest(runs, question.lines, 0, bold.load_end)]
        spread_s = bold.load_s * (slowest.late_factor - 1)
        over_s = bold.load_s + spread_s - question.deadline_s
        chance = _MISSED + (0.5 - _MISSED) * min(max(over_s / spread_s, 0.0), 1.0) if spread_s else _MISSED
        waited_s = max(question.prefill_wait_s, question.deadline_s)
        late_s = max(waited_s + (1 + question.gpu_weight) * safe.gpu_s, bold.cost_s)
        return bold if bold.cost_s + chance * (late_s - bold.cost_s) < safe.cost_s else safe

    def _question(self, tokens: int, wish: RestoreWish, lines: Mapping[str, LoadLine]) -> Question:
        blind = wish.recompute is None
        return Question(
            tokens,
            wish.recompute if wish.recompute is not None else _NoRecompute(),
            lines,
            gpu_weight=queue_weight(wish.waiting_requests, self._queue_scale),
            prefill_wait_s=wish.prefill_wait_s,
            deadline_s=wish.deadline_s,
            takes="fronts" if blind and wish.takes == "both" else wish.takes,
        )

    def _chosen(
        self,
        runs: Sequence[Run],
        plan: RestorePlan,
        lines: Mapping[str, LoadLine],
        wish: RestoreWish,
        why: str,
    ) -> LoadChoice:
        recompute_s = plan.recompute_ttft_s if wish.recompute is not None else 0.0
        if not plan.load_end:
            return LoadChoice(
                0, 0.0, 0.0, why=why, late=plan.late, recompute_s=recompute_s, load_s=plan.load_ttft_s
            )
        path = _slowest(runs, lines, plan.compute_front, plan.load_end)
        kind = _kind(path, wish)
        around, median_s = self._around(kind, plan.load_s, lines[path])
        return LoadChoice(
            plan.load_end,
            around.low_s,
            around.high_s,
            plan.compute_front,
            why,
            kind,
            plan.load_s,
            median_s,
            plan.late,
            recompute_s,
            plan.load_ttft_s if wish.recompute is not None else 0.0,
        )

    def _first(
        self,
        runs: Sequence[Run],
        plan: RestorePlan,
        tokens: int,
        wish: RestoreWish,
        lines: Mapping[str, LoadLine],
    ) -> RestorePlan | None:
        """A plan that loads more, should paths that were never measured be as quick as may be hoped.

        One such load is made; until it was seen, what is guessed counts.
        """
        if plan.load_end == runs[-1].end:
            return None
        if wish.by_layer and plan.load_end and wish.deadline_s < math.inf:
            # What is safe would be lost with what is tried, were that cut off at the deadline.
            return None
        paths = {key: Path.of_key(key) for key in lines}
        used = {*_bytes_of(runs, plan.compute_front, plan.load_end), *self._tried}
        new = [k for k, path in paths.items() if k not in used and not self.loads.measured(path)]
        if not new:
            return None
        hoped = {k: self.loads.hoped(paths[k], wish.queued_bytes.get(paths[k].source, 0)) for k in new}
        found = plan_restore(runs, self._question(tokens, wish, {**lines, **hoped}))
        nbytes = _bytes_of(runs, found.compute_front, found.load_end)
        tried = [key for key in new if key in nbytes]
        if found.load_end <= plan.load_end or not tried:
            return None
        self._tried.update(dict.fromkeys(tried))
        return replace(found, load_s=max(lines[key].seconds(part) for key, part in nbytes.items()))

    def _look_again(self, runs: Sequence[Run], lines: Mapping[str, LoadLine], now_s: float) -> bool:
        """Whether to load what is not worth it, or too late, by what is known: it may be out of date."""
        path = _slowest(runs, lines, 0, runs[-1].end)
        count, since_s = self._refused.get(path, (0, now_s))
        waited = count >= _LOOK_AGAIN_FEW and now_s - since_s >= _LOOK_AGAIN_S
        if waited or count >= _LOOK_AGAIN:
            del self._refused[path]
            return True
        self._refused[path] = count + 1, since_s
        return False

    def _around(self, kind: str, load_s: float, line: LoadLine) -> tuple[Interval, float]:
        """The interval of a restore: from whole ones, or from its loads while too few are known."""
        tracker = self._kinds.get(kind)
        if tracker is not None and tracker.seen >= _ENOUGH:
            return tracker.spread(load_s)
        return Interval(load_s * line.early_factor, load_s, load_s * line.late_factor), load_s

    def _lines(self, runs: Sequence[Run], wish: RestoreWish) -> dict[str, LoadLine]:
        nbytes: dict[str, float] = {}
        for run in runs:
            for key, part in run.loads:
                nbytes[key] = nbytes.get(key, 0) + part
        paths = {key: Path.of_key(key) for key in nbytes}
        return {
            key: self.loads.line(paths[key], int(total), wish.queued_bytes.get(paths[key].source, 0))
            for key, total in nbytes.items()
        }

    def observed(self, source: str, nbytes: int, seconds: float, queue_bytes: int = 0, via: str = "") -> None:
        """See RestorePolicy. A load of nothing, or in no time, teaches nothing."""
        if nbytes > 0 and queue_bytes >= 0:
            path = Path(source, via)
            self.loads.observed(self.loads.estimate(path, nbytes, queue_bytes), seconds)
            self._refused.pop(path.key, None)
            self._tried.pop(path.key, None)

    def line(self, source: str, queue_bytes: int = 0) -> LoadLine:
        """See RestorePolicy."""
        return self.loads.line(self.loads.usual(source), 0, queue_bytes)

    def restored(self, choice: LoadChoice, seconds: float) -> None:
        """See RestorePolicy: how far whole restores are from what their loads would make."""
        if choice.kind and choice.expected_s > 0 and 0 < seconds < 1e9:
            if choice.kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
            tracker = self._kinds.setdefault(choice.kind, ResidualTracker())
            tracker.outcome(Interval(choice.eta_low_s, choice.expected_s, choice.eta_high_s), seconds)

    def state(self) -> dict[str, Any]:
        """What was learned, as plain numbers, lists and tables."""
        return {
            "loads": self.loads.state(),
            "restores": {kind: tracker.state() for kind, tracker in self._kinds.items() if tracker.seen},
        }

    def restore(self, state: object, field: str = "restore") -> None:
        """Take over what `state` returned once.

        Raises ConfigError naming the field, and changes nothing then.
        """
        table = read.mapping(state, field)
        read.only(table, field, "loads", "restores")
        loads = LoadCosts.from_state(table["loads"], f"{field}.loads")
        kinds = read.mapping(table["restores"], f"{field}.restores")
        read.require(len(kinds) <= _MOST_KINDS, f"{field}.restores", "has too many kinds")
        trackers = {
            kind: ResidualTracker.from_state(entry, f"{field}.restores.{kind}")
            for kind, entry in kinds.items()
        }
        self.loads, self._kinds = loads, trackers


def _bytes_of(runs: Sequence[Run], start: int, end: int) -> dict[str, float]:
    """By path, what lies between two tokens."""
    nbytes: dict[str, float] = {}
    for run in runs:
        share = (min(end, run.end) - max(start, run.start)) / (run.end - run.start)
        for key, part in run.loads if share > 0 else ():
            nbytes[key] = nbytes.get(key, 0.0) + part * share
    return nbytes


def _slowest(runs: Sequence[Run], lines: Mapping[str, LoadLine], start: int, end: int) -> str:
    """The path that what lies between two tokens waits for longest; runs are not cut for this."""
    nbytes: dict[str, float] = {}
    for run in runs:
        if start < run.end and run.start < end:
            for key, part in run.loads:
                nbytes[key] = nbytes.get(key, 0.0) + part
    return max(nbytes, key=lambda key: lines[key].seconds(nbytes[key]))


def _kind(path: str, wish: RestoreWish) -> str:
    """Restores are judged with others that wait for the same path, idle or behind others; peers are alike."""
    known = Path.of_key(path)
    name = known.source if known.source.startswith("peer") else known.key
    return f"{name} {'loaded' if wish.queued_bytes.get(known.source, 0) else 'idle'}"


def _why(plan: RestorePlan, wish: RestoreWish) -> str:
    if wish.recompute is None:
        compared = f"loading takes {plan.load_s:.3f} s; the worker's prefill rate is not known"
    else:
        compared = (
            f"first token after {plan.ttft_s:.3f} s; loading all {plan.load_ttft_s:.3f} s, "
            f"recomputing all {plan.recompute_ttft_s:.3f} s"
        )
    return f"{compared}; not all would arrive in {wish.deadline_s:.3f} s" if plan.late else compared
