"""How often a restore's expected interval holds: simulated paths that queue, stall, drift and change.

    python -m benchmarks.eta [--restores 4000] [--seed 1]

Each path is a queue with one server.  Restores come in a Poisson stream whose rate changes between quiet
and busy phases; sizes are lognormal; a load's time is start + bytes / bandwidth times lognormal noise, one
in thirty stalls for a Pareto-distributed time; bandwidth drifts by a random walk and changes for good
once.  What a load took is learned when it ends, not when it is asked for.  Prints JSON lines: coverage of
the 80 % intervals over all, for each path idle and loaded, and the mean interval score (Gneiting and
Raftery, 2007) against that of one constant interval for each path, from the 10th to the 90th percentile of
what its loads took, known in hindsight.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.bench.lines import Line
from kvtier.policy.load_cost import LOADS, Load, LoadCosts, LoadEstimate, Path

# Path, start in seconds, bytes per second: unlike the guesses that the learner starts from.
PATHS = (
    (Path("host"), 0.0008, 21e9),
    (Path("disk"), 0.004, 3.1e9),
    (Path("disk", "zstd"), 0.006, 0.9e9),
    (Path("peer_host", "b"), 0.002, 2.4e9),
    (Path("peer_disk", "b"), 0.009, 1.3e9),
)
_MEDIAN_BYTES, _SIZE_SPREAD = 400e6, 1.1
_NOISE, _STALL_SHARE, _STALL_S = 0.12, 1 / 30, 0.05
_DRIFT, _CHANGE = 0.01, 0.55
_PHASE_RESTORES = 60
_QUIET, _BUSY = 0.15, 0.75
_MISS = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """One restore: what was expected, and what it took."""

    estimate: LoadEstimate
    seconds: float

    @property
    def load(self) -> Load:
        """The condition in which it was asked for."""
        return self.estimate.load

    @property
    def held(self) -> bool:
        """Whether the interval held."""
        return self.estimate.eta.low_s <= self.seconds <= self.estimate.eta.high_s


def simulate(
    costs: LoadCosts, path: Path, start_s: float, bytes_per_s: float, restores: int, seed: int
) -> list[Outcome]:
    """The outcomes of `restores` loads on one path, in the order in which they were asked for."""
    random = np.random.default_rng(seed)
    now_s, free_s, rate = 0.0, 0.0, bytes_per_s
    waiting: list[tuple[float, int, Outcome]] = []
    outcomes: list[Outcome] = []
    mean_s = start_s + _MEDIAN_BYTES * np.exp(_SIZE_SPREAD**2 / 2) / bytes_per_s
    for number in range(restores):
        usage = _BUSY if number // _PHASE_RESTORES % 2 else _QUIET
        now_s += random.exponential(mean_s / usage)
        rate *= np.exp(random.normal(0, _DRIFT))
        if number == restores // 2:
            rate *= _CHANGE
        while waiting and waiting[0][0] <= now_s:
            ended = heapq.heappop(waiting)[2]
            costs.observed(ended.estimate, ended.seconds)
        ahead = sum(o.estimate.nbytes for _, _, o in waiting)
        nbytes = max(int(random.lognormal(np.log(_MEDIAN_BYTES), _SIZE_SPREAD)), 4096)
        work_s = (start_s + nbytes / rate) * np.exp(random.normal(0, _NOISE))
        if random.random() < _STALL_SHARE:
            work_s += _STALL_S * (1 + random.pareto(1.8))
        free_s = max(free_s, now_s) + work_s
        outcome = Outcome(costs.estimate(path, nbytes, ahead), float(free_s - now_s))
        outcomes.append(outcome)
        heapq.heappush(waiting, (free_s, number, outcome))
    return outcomes


def interval_score(low_s: float, high_s: float, seconds: float, miss: float = _MISS) -> float:
    """Width, and 2 / miss times what the outcome lies outside; smaller is better."""
    return high_s - low_s + 2 / miss * (max(low_s - seconds, 0.0) + max(seconds - high_s, 0.0))


def coverage(outcomes: Sequence[Outcome]) -> float:
    """Share of the intervals that held."""
    return sum(o.held for o in outcomes) / len(outcomes)


def score_ratio(by_path: Sequence[Sequence[Outcome]]) -> float:
    """Mean over paths of our mean interval score over that of the constant interval."""
    ratios = []
    for outcomes in by_path:
        low_s, high_s = np.percentile([o.seconds for o in outcomes], (10, 90))
        ours = [interval_score(o.estimate.eta.low_s, o.estimate.eta.high_s, o.seconds) for o in outcomes]
        constant = [interval_score(low_s, high_s, o.seconds) for o in outcomes]
        ratios.append(float(np.mean(ours) / np.mean(constant)))
    return float(np.mean(ratios))


def run(restores: int, seed: int) -> list[list[Outcome]]:
    """All paths, with one learner for all."""
    costs = LoadCosts()
    share = restores // len(PATHS)
    return [
        simulate(costs, path, start_s, rate, share, seed * 1000 + index)
        for index, (path, start_s, rate) in enumerate(PATHS)
    ]


def report(by_path: Sequence[Sequence[Outcome]]) -> Iterator[Line]:
    """The figures as lines."""
    everything = list(itertools.chain.from_iterable(by_path))
    yield Line("coverage of 80 % intervals", round(coverage(everything), 4), "share", 0.8)
    for outcomes in by_path:
        for load in LOADS:
            chosen = [o for o in outcomes if o.load == load]
            name = f"coverage, {outcomes[0].estimate.path.key} {load}"
            yield Line(name, round(coverage(chosen), 4), "share", 0.8, None, {"restores": len(chosen)})
    yield Line("interval score against a constant p10 to p90", round(score_ratio(by_path), 4), "ratio", 0.8)
    off = [abs(o.estimate.eta.mid_s - o.seconds) / o.seconds for o in everything]
    yield Line("relative error of the estimate, median", round(float(np.median(off)), 4), "share")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--restores", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for line in report(run(options.restores, options.seed)):
        print(line.json())


if __name__ == "__main__":
    main()
