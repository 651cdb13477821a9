"""The restore policy that decides by cost: load, recompute, or both, whatever is soonest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from kvtier.policy import learned_state as read
from kvtier.policy.interfaces import LoadChoice, RestoreWish, Segment
from kvtier.policy.intervals import Interval, ResidualTracker
from kvtier.policy.load_cost import LoadCosts, LoadLine, Path
from kvtier.policy.restore_plan import Question, RestorePlan, plan_restore, queue_weight
from kvtier.policy.runs import Run, runs_of

_ANY_WISH: Final = RestoreWish()
# Slower sources first: a choice is judged with others whose slowest part is the same.
_SOURCES: Final[tuple[Literal["disk", "host"], ...]] = ("disk", "host")
_MOST_KINDS = 64
# Whole restores of a kind from which on they are believed more than the loads that they consist of.
_ENOUGH = 10


class _NoRecompute:
    """A worker of which nothing is known: computing is dearer than any load."""

    def seconds(self, past: int, new: int) -> float:
        return 1e9 * new


class CostRestore:
    """See RestorePolicy. Learns what loads cost; what computing costs comes with the wish.

    codec: of what lies on disk; '' for none.  queue_scale: how much a waiting request counts; 0 looks at the
    asking request alone.
    """

    def __init__(self, loads: LoadCosts | None = None, *, codec: str = "", queue_scale: float = 1.0) -> None:
        self.loads = loads if loads is not None else LoadCosts()
        self._paths = {"host": Path("host"), "disk": Path("disk", codec)}
        self._queue_scale = queue_scale
        self._kinds: dict[str, ResidualTracker] = {}

    def choose(self, segments: Sequence[Segment], tokens: int, wish: RestoreWish = _ANY_WISH) -> LoadChoice:
        """See RestorePolicy."""
        runs = runs_of([s for s in segments if s.end <= tokens])
        if not runs:
            return LoadChoice(0, 0.0, 0.0, why="nothing stored fits")
        lines = self._lines(runs, wish)
        question = Question(
            tokens,
            wish.recompute if wish.recompute is not None else _NoRecompute(),
            lines,
            gpu_weight=queue_weight(wish.waiting_requests, self._queue_scale),
            prefill_wait_s=wish.prefill_wait_s,
            deadline_s=wish.deadline_s,
            mixed=wish.mixed and wish.recompute is not None,
        )
        plan = plan_restore(runs, question)
        if not plan.load_end:
            return LoadChoice(0, 0.0, 0.0, why=_why(plan, wish))
        kind = _kind(runs, plan, wish)
        around = self._around(kind, plan.load_s, lines)
        return LoadChoice(
            plan.load_end,
            around.low_s,
            around.high_s,
            plan.compute_front,
            _why(plan, wish),
            kind,
            plan.load_s,
        )

    def _around(self, kind: str, load_s: float, lines: Mapping[str, LoadLine]) -> Interval:
        """The interval of a restore: from whole ones, or from its loads while too few are known."""
        tracker = self._kinds.get(kind)
        if tracker is not None and tracker.seen >= _ENOUGH:
            return tracker.around(load_s)
        line = lines[kind.partition(" ")[0]]
        return Interval(load_s * line.early_factor, load_s, load_s * line.late_factor)

    def _lines(self, runs: Sequence[Run], wish: RestoreWish) -> dict[str, LoadLine]:
        nbytes: dict[str, float] = {}
        for run in runs:
            for source, part in run.loads:
                nbytes[source] = nbytes.get(source, 0) + part
        return {
            source: self.loads.line(self._paths[source], int(total), wish.queued_bytes.get(source, 0))
            for source, total in nbytes.items()
        }

    def observed(
        self, source: Literal["host", "disk"], nbytes: int, seconds: float, queue_bytes: int = 0
    ) -> None:
        """See RestorePolicy. A load of nothing, or in no time, teaches nothing."""
        if nbytes > 0 and queue_bytes >= 0:
            self.loads.observed(self.loads.estimate(self._paths[source], nbytes, queue_bytes), seconds)

    def restored(self, choice: LoadChoice, seconds: float) -> None:
        """See RestorePolicy: how far whole restores are from what their loads would make."""
        if choice.kind and choice.expected_s > 0 and 0 < seconds < 1e9:
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


def _kind(runs: Sequence[Run], plan: RestorePlan, wish: RestoreWish) -> str:
    used = {
        key
        for run in runs
        if plan.compute_front < run.end and run.start < plan.load_end
        for key, _ in run.loads
    }
    slowest = next(source for source in _SOURCES if source in used)
    queued = any(wish.queued_bytes.get(source, 0) for source in used)
    return f"{slowest} {'loaded' if queued else 'idle'}"


def _why(plan: RestorePlan, wish: RestoreWish) -> str:
    if wish.recompute is None:
        compared = f"loading takes {plan.load_s:.3f} s; the worker's prefill rate is not known"
    else:
        compared = (
            f"first token after {plan.ttft_s:.3f} s; loading all {plan.load_ttft_s:.3f} s, "
            f"recomputing all {plan.recompute_ttft_s:.3f} s"
        )
    return f"{compared}; not all would arrive in {wish.deadline_s:.3f} s" if plan.late else compared
