"""What a turn costs as nodes grow from one to four, all of them on this machine.

    python -m benchmarks.scaling [--json] [--nodes 4] [--turns 120] [--rounds 3]

Each node is what a node is: its node, disk and gpu services and one worker, each a process of its own; the
directory is one more process.  All workers go at once, one turn after the other: they park conversations of
190 tokens in blocks of 32 KiB to disk ('park'), restore those of their own node from its host memory
('local'), then those of the next node, each once, over TCP on loopback ('pulled').  A restore is its plan and
all until its receipt.

The nodes share one machine's cores, so turns a second stop growing when these are full: that says nothing of
machines of their own.  What does is the processor time of one turn, by kind of process: where it stays what
it is however many nodes there are, nothing stands in the way of more of them, and the directory's part is
what all of them share.  It is read from /proc in ticks of 10 ms, and has what processes do at rest in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from kvtier.bench.lines import Line, table
from kvtier.client.client import connect
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for, tokens_of
from kvtier.testing.node_cluster import cluster_settings
from kvtier.testing.service_processes import ServiceProcesses, processor_s
from kvtier.testing.worker_process import OrderedProcess, serve
from kvtier.waiting import wait_until

_TOKENS = 190
_PAGES = pages_for(_TOKENS)
_WAIT_S = 30.0
# Of one conversation; twice that, and as much again, fit into host memory.
_MOST_TURNS = 150
_PHASES = ("park", "local", "pulled")
# Plan and the whole, in seconds.
_Turn: TypeAlias = tuple[float, float]


class _Station:
    """Inside a worker's process: does as many turns as it is told."""

    def __init__(self, path: str) -> None:
        self._kv = KvMemory(len(_PAGES))
        # What the pages hold is the same in every turn: making it is none of kvtier's work.
        self._kv.put(0, _PAGES, _TOKENS)
        self._client = connect(path, required=False)
        self._worker = self._client.attach(self._kv.model, self._kv.pool, shard=SHARD)

    def park(self, first: int, count: int) -> list[_Turn]:
        """Conversations of these numbers, to disk."""
        return [self._park(seed) for seed in range(first, first + count)]

    def restore(self, first: int, count: int, source: str) -> list[_Turn]:
        """Conversations of these numbers, all of them from `source`."""
        return [self._restore(seed, source) for seed in range(first, first + count)]

    def knows(self, seed: int) -> bool:
        """Whether a plan finds all of it, here or elsewhere."""
        plan = self._worker.plan(f"chat-{seed}", tokens_of(seed, _TOKENS))
        self._worker.drop(plan)
        return plan.load_tokens == _TOKENS

    def right(self, seed: int) -> bool:
        """Whether it comes back bit for bit."""
        self._kv.poison(_PAGES)
        self._restore(seed, "")
        return self._kv.front(0, _PAGES, _TOKENS) == _TOKENS

    def _park(self, seed: int) -> _Turn:
        begun_s = time.perf_counter()
        receipt = self._worker.park(f"chat-{seed}", tokens_of(seed, _TOKENS), _PAGES, level="disk").result()
        if receipt.level != "disk":
            raise RuntimeError(f"a park failed: {receipt}")
        return 0.0, time.perf_counter() - begun_s

    def _restore(self, seed: int, source: str) -> _Turn:
        begun_s = time.perf_counter()
        plan = self._worker.plan(f"chat-{seed}", tokens_of(seed, _TOKENS))
        planned_s = time.perf_counter() - begun_s
        receipt = self._worker.restore(plan, _PAGES, deadline_s=_WAIT_S)
        if receipt.tokens != _TOKENS or source not in ("", *receipt.sources) or len(receipt.sources) > 1:
            raise RuntimeError(f"not a restore from {source}: {receipt}")
        return planned_s, time.perf_counter() - begun_s


@dataclass(slots=True)
class _Measured:
    """Of one phase at one number of nodes, over all rounds. cpu_s: by kind of process."""

    turns: list[_Turn] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)

    def lines(self, phase: str, nodes: int) -> Iterator[Line]:
        """Rate, 99th percentile and processor time of a turn."""
        what = f"{phase}, {nodes} nodes" if nodes > 1 else f"{phase}, 1 node"
        count = len(self.turns)
        whole_ms = _millis([whole for _, whole in self.turns])
        plan_ms = _millis([plan for plan, _ in self.turns])
        detail = {"p50_ms": _at(whole_ms, 0.5), "turns": count, "load": round(os.getloadavg()[0], 1)}
        yield Line(f"turns a second: {what}", round(count / self.seconds, 1), "1/s", detail=detail)
        asked = (
            {} if phase == "park" else {"plan_p50_ms": _at(plan_ms, 0.5), "plan_p99_ms": _at(plan_ms, 0.99)}
        )
        yield Line(f"p99 of a turn: {what}", _at(whole_ms, 0.99), "ms", detail=asked)
        each_ms = {kind: round(spent_s / count * 1e3, 3) for kind, spent_s in sorted(self.cpu_s.items())}
        total_ms = sum(self.cpu_s.values()) / count * 1e3
        share = round(self.cpu_s["directory"] / sum(self.cpu_s.values()), 3)
        detail = {**each_ms, "directory_share": share}
        yield Line(f"processor time of a turn: {what}", round(total_ms, 2), "ms", detail=detail)


class _Nodes:
    """So many nodes with a worker each, for a `with`."""

    def __init__(self, count: int) -> None:
        self._names = tuple(f"node-{number}" for number in range(count))
        self._stack = ExitStack()
        self._services: list[ServiceProcesses] = []
        self.workers: list[OrderedProcess] = []

    def __enter__(self) -> _Nodes:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-bench-")))
            for name, own in cluster_settings(folder / "shared", self._names).items():
                services = stack.enter_context(ServiceProcesses(folder / name, own))
                self._services.append(services)
                worker = OrderedProcess("benchmarks.scaling", "--worker", services.socket_path)
                self.workers.append(stack.enter_context(worker))
            self._pool = stack.enter_context(ThreadPoolExecutor(len(self._names)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def settled(self) -> None:
        """All of host memory is there, so that nobody is at work with it."""
        for services in self._services:
            with connect(services.socket_path) as client:
                services.wait_faulted(client)

    def all_know(self, seeds: Sequence[int]) -> None:
        """Wait until each worker's node has heard of its seed."""
        for worker, seed in zip(self.workers, seeds, strict=True):
            if not wait_until(lambda w=worker, s=seed: w.do("knows", seed=s), _WAIT_S):  # type: ignore[misc]
                raise RuntimeError(f"conversation {seed} is not known elsewhere")

    def measure(self, into: _Measured, order: str, firsts: Sequence[int], **how: Any) -> None:
        """Have every worker carry out an order at once, each from its own number on."""
        before, begun_s = self._cpu_s(), time.perf_counter()
        calls = [
            self._pool.submit(worker.do, order, first=first, **how)
            for worker, first in zip(self.workers, firsts, strict=True)
        ]
        for call in calls:
            into.turns += [(plan, whole) for plan, whole in call.result()]
        into.seconds += time.perf_counter() - begun_s
        for kind, spent_s in self._cpu_s().items():
            into.cpu_s[kind] = into.cpu_s.get(kind, 0.0) + spent_s - before[kind]

    def _cpu_s(self) -> dict[str, float]:
        """Processor seconds so far, by kind of process."""
        spent = {"worker": sum(processor_s(worker.pid) for worker in self.workers)}
        for services in self._services:
            for name in services.names:
                spent[name] = spent.get(name, 0.0) + processor_s(services.pid(name))
        return spent


def scaling(most: int, turns: int, rounds: int) -> Iterator[Line]:
    """From one node to `most`, in turns, so that a slow minute hits all of them."""
    found = {(phase, count): _Measured() for count in range(1, most + 1) for phase in _PHASES}
    for _ in range(rounds):
        for count in range(1, most + 1):
            with _Nodes(count) as nodes:
                _round(nodes, turns, {phase: found[phase, count] for phase in _PHASES})
    for (phase, count), measured in found.items():
        if measured.turns:
            yield from measured.lines(phase, count)


def _round(nodes: _Nodes, turns: int, into: dict[str, _Measured]) -> None:
    own = [1 + place * turns for place in range(len(nodes.workers))]
    nodes.settled()
    nodes.measure(into["park"], "park", own, count=turns)
    nodes.measure(into["local"], "restore", own, count=turns, source="host")
    checked = own
    if len(own) > 1:
        theirs = [*own[1:], own[0]]
        nodes.all_know([first + turns - 1 for first in theirs])
        nodes.measure(into["pulled"], "restore", theirs, count=turns, source="peer")
        checked = theirs
    if not all(worker.do("right", seed=first) for worker, first in zip(nodes.workers, checked, strict=True)):
        raise RuntimeError("what came back is not what was parked")


def _millis(seconds: Sequence[float]) -> list[float]:
    return sorted(one * 1e3 for one in seconds)


def _at(ordered: Sequence[float], share: float) -> float:
    return round(statistics.median(ordered) if share == 0.5 else ordered[int(len(ordered) * share)], 2)


def main() -> int:
    """Print the lines, or be a worker."""
    parser = argparse.ArgumentParser(description="What a turn costs as nodes grow, all on this machine.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--nodes", type=int, default=4, help="the most nodes")
    parser.add_argument(
        "--turns", type=int, default=120, help=f"of each worker and phase, {_MOST_TURNS} at most"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", metavar="SOCKET", help="be a worker: for the benchmark itself")
    options = parser.parse_args()
    if options.worker:
        return serve(_Station(options.worker))
    lines = list(scaling(options.nodes, min(options.turns, _MOST_TURNS), options.rounds))
    print("\n".join(line.json() for line in lines) if options.json else table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
