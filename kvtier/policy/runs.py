"""Stored fronts as runs, neighbouring blocks in equal state: a decision costs by run and not by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvtier.policy.interfaces import Segment
from kvtier.policy.load_cost import Path


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [start, end) whose blocks lie alike.

    A restore may be cut every step_tokens from start, and at end.

    loads: the key of a path and the bytes of the whole run that come by it; bytes of equal keys share a
    device and add up, those of different keys come at the same time.
    """

    start: int
    end: int
    step_tokens: int
    loads: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.end and self.step_tokens > 0 and all(b >= 0 for _, b in self.loads)):
            raise ValueError(f"a run of tokens [{self.start}, {self.end}) by {self.step_tokens} is none")

    @property
    def cuts(self) -> int:
        """How many places there are to cut at, the end included."""
        return -(-(self.end - self.start) // self.step_tokens)

    def cut(self, index: int) -> int:
        """The token after the first `index` steps; 0 is the start."""
        return min(self.start + index * self.step_tokens, self.end)

    def cut_at_most(self, tokens: float) -> int:
        """The index of the last cut that is not after `tokens`, between 0 and `cuts`."""
        if tokens >= self.end:
            return self.cuts
        return max(int((tokens - self.start) // self.step_tokens), 0)


def runs_of(segments: Sequence[Segment]) -> tuple[Run, ...]:
    """Segments as runs: neighbours of one path, one step and one size are put together.

    Segments end where a restore may end, in ascending order; one more token may lie before the first.  Raises
    ValueError for segments that overlap.
    """
    runs: list[Run] = []
    first: Segment | None = None
    end = nbytes = 0
    for segment in segments:
        if segment.start < end:
            raise ValueError(f"segments overlap at token {segment.start}")
        if first is not None and _goes_on(first, end, segment):
            nbytes += segment.nbytes
        else:
            if first is not None:
                runs.append(_run(first, end, nbytes))
            first, nbytes = segment, segment.nbytes
        end = segment.end
    if first is not None:
        runs.append(_run(first, end, nbytes))
    return tuple(runs)


def _goes_on(first: Segment, end: int, segment: Segment) -> bool:
    """Whether a run from `first` to `end` may take a segment in.

    Only the last block of a run may be short, and all have the same bytes for each token.
    """
    tokens, step = segment.end - segment.start, first.step
    return (
        segment.start == end
        and (end - first.start) % step == 0
        and (segment.step == step or tokens <= min(step, segment.step))
        and (segment.source, segment.via) == (first.source, first.via)
        and segment.nbytes * (first.end - first.start) == first.nbytes * tokens
    )


def _run(first: Segment, end: int, nbytes: int) -> Run:
    key = Path(first.source, first.via).key
    return Run(first.start, end, first.step, ((key, nbytes),))


def common_runs(ranks: Sequence[Sequence[Run]]) -> tuple[Run, ...]:
    """What every rank of a group holds, as runs that carry the loads of all ranks.

    A front is only worth what its shortest rank holds: the ranks compute a layer together.  Ranks on one node
    give the disk one key, and each its own link another.  Raises ValueError for ranks whose steps differ.
    """
    if not ranks or not all(ranks):
        return ()
    steps = {run.step_tokens for runs in ranks for run in runs if run.cuts > 1}
    if len(steps) > 1:
        raise ValueError(f"the ranks of a group cut at different steps: {sorted(steps)}")
    edges = sorted({edge for runs in ranks for run in runs for edge in (run.start, run.end)})
    found: list[Run] = []
    at = [0] * len(ranks)
    for start, end in pairwise(edges):
        for rank, runs in enumerate(ranks):
            while at[rank] < len(runs) and runs[at[rank]].end <= start:
                at[rank] += 1
        if any(at[rank] == len(runs) for rank, runs in enumerate(ranks)):
            break
        here = [runs[at[rank]] for rank, runs in enumerate(ranks)]
        # A rank without bytes before its first run needs none there: sliding layers behind their window.
        parts = [_part(run, start, end) for run in here if run.start <= start]
        step = next(iter(steps), end - start)
        found.append(Run(start, end, step, _added(parts)))
    return tuple(found)


def _part(run: Run, start: int, end: int) -> Iterable[tuple[str, float]]:
    share = (end - start) / (run.end - run.start)
    return [(key, nbytes * share) for key, nbytes in run.loads]


def _added(parts: Iterable[Iterable[tuple[str, float]]]) -> tuple[tuple[str, float], ...]:
    total: dict[str, float] = {}
    for part in parts:
        for key, nbytes in part:
            total[key] = total.get(key, 0.0) + nbytes
    return tuple(total.items())
