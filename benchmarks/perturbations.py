"""Whether `cost` holds up elsewhere: recorded traces, bent in many ways, and generated loads.

    python -m benchmarks.perturbations TRACE... --json           # all changes and sizes; long
    python -m benchmarks.perturbations TRACE --half --only plain,ids-removed --points 60
    python -m benchmarks.perturbations --generated

A line for each load, change and size: token hits of `cost` in percent, held against those of `lru`; beside
them the causal figure, the bound, how far `cost` is on the way from `lru` to it, and the best baseline.
Sizes are those at which LRU reaches so many percent of what is to be had.
"""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.bench.lines import Line
from kvtier.sim.hitratio import Size, sizes_of_lru_points
from kvtier.sim.read_trace import read_trace
from kvtier.sim.registry import POLICIES, Objective, Setup, make_policy
from kvtier.sim.replay import Score, replay, replay_two_tiers
from kvtier.sim.trace import Trace
from kvtier.sim.workload.generate import Generator
from kvtier.sim.workload.profiles import CHAT, CODING, Profile
from kvtier.sim.workload.settings import Synthetic
from kvtier.sim.workload.write import kvtrace_lines

Rows = npt.NDArray[np.int64]
BASELINES: Final = ("arc", "s3fifo", "sieve", "gdsf", "tlru")
_SEED: Final = 1
_FAST_PERCENT: Final = 10
_AWAY_S: Final = 1800.0


def chosen(trace: Trace, rows: Rows, coarser: int = 1) -> Trace:
    """Some rows, in this order, with blocks numbered anew; `coarser` old blocks make one new one."""
    number = np.full(trace.unique_blocks, -1, np.int32)
    parents: list[npt.NDArray[np.int32]] = []
    leaf, blocks, count = [], [], 0
    for row in rows:
        path = trace.path(int(row))[coarser - 1 :: coarser]
        fresh = path[number[path] < 0]
        number[fresh] = np.arange(count, count + len(fresh))
        count += len(fresh)
        above = np.concatenate(([-1], number[path]))[:-1]
        parents.append(above[len(path) - len(fresh) :].astype(np.int32))
        leaf.append(number[path[-1]] if len(path) else -1)
        blocks.append(len(path))
    columns = ("t_s", "conversation", "turn", "tokens_in", "tokens_out", "duration_s", "tenant")
    return replace(
        trace,
        block_tokens=trace.block_tokens * coarser,
        kind=tuple(trace.kind[row] for row in rows),
        stop=tuple(trace.stop[row] for row in rows),
        leaf=np.array(leaf, np.int32),
        blocks=np.array(blocks, np.int32),
        parent=np.concatenate(parents),
        **{name: getattr(trace, name)[rows] for name in columns},
    )


def together(one: Trace, other: Trace) -> Trace:
    """Both at once; they share neither blocks nor conversations."""
    conversation = other.conversation + np.where(other.conversation >= 0, one.conversation.max() + 1, 0)
    both = replace(
        one,
        t_s=np.concatenate((one.t_s, other.t_s)),
        conversation=np.concatenate((one.conversation, conversation)),
        turn=np.concatenate((one.turn, other.turn)),
        tokens_in=np.concatenate((one.tokens_in, other.tokens_in)),
        tokens_out=np.concatenate((one.tokens_out, other.tokens_out)),
        duration_s=np.concatenate((one.duration_s, other.duration_s)),
        tenant=np.concatenate((one.tenant, other.tenant)),
        kind=one.kind + other.kind,
        stop=one.stop + other.stop,
        leaf=np.concatenate((one.leaf, np.where(other.leaf >= 0, other.leaf + one.unique_blocks, -1))),
        blocks=np.concatenate((one.blocks, other.blocks)),
        parent=np.concatenate(
            (one.parent, np.where(other.parent >= 0, other.parent + one.unique_blocks, -1))
        ),
    )
    both = replace(both, leaf=both.leaf.astype(np.int32), parent=both.parent.astype(np.int32))
    return chosen(both, np.argsort(both.t_s, kind="stable"))


def chats_of(trace: Trace) -> Rows:
    """A number for each row's chat: its conversation, or without one the third block of its path."""
    third = [int(trace.path(row)[:3][-1]) if trace.blocks[row] else -1 for row in range(len(trace))]
    return np.where(trace.conversation >= 0, trace.conversation, np.array(third, np.int64))


def _half_of_chats(trace: Trace) -> Trace:
    chats = chats_of(trace)
    names = np.unique(chats)
    kept = np.random.default_rng(_SEED).random(len(names)) < 0.5
    return chosen(trace, np.flatnonzero(kept[np.searchsorted(names, chats)]))


def _slower(trace: Trace, times: float) -> Trace:
    duration_s = np.where(trace.duration_s >= 0, trace.duration_s * times, -1.0)
    return replace(trace, t_s=trace.t_s * times, duration_s=duration_s)


def _doubled(trace: Trace) -> Trace:
    return together(trace, replace(trace, t_s=trace.t_s + _AWAY_S))


def _later(trace: Trace) -> Trace:
    """From a third of its time on, at another hour of the day."""
    begin_s = trace.t_s[0] + (trace.t_s[-1] - trace.t_s[0]) / 3
    late = chosen(trace, np.flatnonzero(trace.t_s >= begin_s))
    return replace(late, t_s=late.t_s + 5 * 3600.0)


def _two_paces(trace: Trace) -> Trace:
    """From its middle on, everything takes five times as long: habits change in mid-stream."""
    middle_s = float(np.median(trace.t_s))
    after = trace.t_s >= middle_s
    t_s = np.where(after, middle_s + (trace.t_s - middle_s) * 5, trace.t_s)
    duration_s = np.where(after & (trace.duration_s >= 0), trace.duration_s * 5, trace.duration_s)
    return replace(trace, t_s=t_s, duration_s=duration_s)


def _no_stops(trace: Trace) -> Trace:
    return replace(trace, stop=("",) * len(trace))


def _no_outcomes(trace: Trace) -> Trace:
    none = np.zeros_like(trace.tokens_out)
    return replace(_no_stops(trace), tokens_out=none, duration_s=np.full_like(trace.duration_s, -1.0))


def _no_ids(trace: Trace) -> Trace:
    none = np.full_like(trace.conversation, -1)
    return replace(trace, conversation=none, turn=none, kind=("",) * len(trace))


def _one_id(trace: Trace) -> Trace:
    """A gateway that gives everybody the same conversation."""
    return replace(trace, conversation=np.zeros_like(trace.conversation))


def _scrambled_tenants(trace: Trace) -> Trace:
    return replace(trace, tenant=np.random.default_rng(_SEED).integers(0, 50, len(trace)))


CHANGES: Final[dict[str, Callable[[Trace], Trace]]] = {
    "plain": lambda trace: trace,
    "time-x0.1": lambda trace: _slower(trace, 0.1),
    "time-x10": lambda trace: _slower(trace, 10.0),
    "half-of-chats": _half_of_chats,
    "chats-doubled": _doubled,
    "blocks-x4": lambda trace: chosen(trace, np.arange(len(trace)), 4),
    "starts-later": _later,
    "two-paces": _two_paces,
    "stops-removed": _no_stops,
    "outcomes-removed": _no_outcomes,
    "ids-removed": _no_ids,
    "one-id-for-all": _one_id,
    "tenants-scrambled": _scrambled_tenants,
}


def measured(
    name: str, trace: Trace, size: Size, objective: Objective, *, baselines: bool, two_tiers: bool
) -> Line:
    """One load at one size."""
    setup = Setup(size.blocks, trace.block_tokens, objective)

    def score(policy: str, *, causal: bool = False) -> float:
        return _percent(replay(trace, make_policy(policy, setup, trace), causal=causal), objective)

    lru, cost, bound = score("lru"), score("cost"), score("clairvoyant")
    detail: dict[str, object] = {
        "objective": objective,
        "share_percent": round(size.share_percent, 3),
        "causal": round(score("cost", causal=True), 2),
        "clairvoyant": round(bound, 2),
        "way_percent": round(100 * (cost - lru) / (bound - lru), 1) if bound - lru >= 0.1 else None,
    }
    if baselines:
        best, policy = max((score(policy), policy) for policy in BASELINES)
        detail["best_baseline"] = [policy, round(best, 2)]
    if two_tiers:
        for policy in ("lru", "cost"):
            two = POLICIES[policy].two
            assert two is not None
            result, writes = replay_two_tiers(trace, two(setup, max(size.blocks * _FAST_PERCENT // 100, 1)))
            detail[f"two_tiers_{policy}"] = [round(_percent(result, objective), 2), round(writes, 2)]
    return Line(name, round(cost, 2), "%", round(lru, 2), None, detail)


def _percent(score: Score, objective: Objective) -> float:
    return score.token_hit_percent if objective == "tokens" else score.cost_hit_percent


def generated(profiles: tuple[Profile, ...], sessions_per_day: float, hours: float) -> Trace:
    """A load of the generator."""
    settings = Synthetic(profiles=profiles, sessions_per_day=sessions_per_day, hours=hours)
    text = "".join(kvtrace_lines(Generator(settings, _SEED).stream()))
    return read_trace(io.BytesIO(text.encode()))


def _generated_loads() -> Iterator[tuple[str, Trace]]:
    kinds: dict[str, tuple[Profile, ...]] = {"coding": (CODING,), "chat": (CHAT,), "both": (CODING, CHAT)}
    for (name, profiles), (sessions, hours) in itertools.product(kinds.items(), ((300, 24.0), (1500, 6.0))):
        yield f"generated {name}, {sessions} a day, {hours:.0f} h", generated(profiles, sessions, hours)


def _loads(options: argparse.Namespace) -> Iterator[tuple[str, Trace]]:
    for path in options.traces:
        with path.open("rb") as file:
            trace = read_trace(file)
        name = path.name.partition(".")[0]
        if options.half:
            name, trace = f"half of {name}", _half_of_chats(trace)
        for change, bend in CHANGES.items():
            if options.only is None or change in options.only:
                yield f"{name}, {change}", bend(trace)
    if options.generated:
        yield from _generated_loads()


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--only", type=lambda text: set(text.split(",")), help=", ".join(CHANGES))
    parser.add_argument("--half", action="store_true", help="begin with half of a trace's chats")
    parser.add_argument("--points", default="30,60,80,95", help="sizes, by what LRU reaches of all")
    parser.add_argument("--objective", choices=("tokens", "gpu_seconds"), default="tokens")
    parser.add_argument("--generated", action="store_true", help="generated loads too")
    parser.add_argument("--baselines", action="store_true", help="all baselines beside lru too")
    parser.add_argument(
        "--two-tiers", action="store_true", help="two-tier runs too, a tenth of the size fast"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name, trace in _loads(options):
        for size in sizes_of_lru_points(trace, [float(point) for point in options.points.split(",")]):
            line = measured(
                f"{name}, {size.blocks} blocks",
                trace,
                size,
                options.objective,
                baselines=options.baselines,
                two_tiers=options.two_tiers,
            )
            text = f"{line.name:70} {line.value:>7} {line.limit:>7} {line.detail}"
            print(line.json() if options.json else text, flush=True)


if __name__ == "__main__":
    main()
