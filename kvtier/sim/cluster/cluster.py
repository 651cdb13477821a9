"""The whole: arrivals, routing, nodes, and what is counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvtier.errors import TraceError
from kvtier.sim.cluster.core_node import CoreNode
from kvtier.sim.cluster.costs import ServingCost
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.node import Node
from kvtier.sim.cluster.run_node import RunNode
from kvtier.sim.cluster.runs import Chains, Rows
from kvtier.sim.cluster.scenario import Scenario
from kvtier.sim.cluster.tally import Tally
from kvtier.sim.workload.turns import Turn, TurnStream

# How often the caller is told how far it is.
_ROWS_PER_REPORT = 1000


@dataclass(slots=True)
class Usage:
    """What the machines did up to a time. Bytes and seconds, over all nodes; by tenant where it is a dict."""

    at_s: float
    prefill_s: float
    decode_s: float
    to_gpu_bytes: int
    from_gpu_bytes: int
    disk_read_bytes: int
    drive_busy_s: float
    peer_bytes: int
    dropped: int
    written: dict[int, float]
    host_byte_s: dict[int, float]
    disk_byte_s: dict[int, float]


class Cluster:
    """One simulation: make it, run it once. tally and usages (at the end of the warm-up, and at the end) are
    its result.
    """

    def __init__(self, scenario: Scenario, policy: str, cost: ServingCost, block_tokens: int) -> None:
        self._scenario, self._cost = scenario, cost
        self.events = Events()
        self.tally = Tally()
        self.usages: list[Usage] = []
        self._chains = Chains(block_tokens, cost.token_bytes)
        self._rows = Rows()
        # Row -> jobs that go on from it and came before it ended.
        self._waiting: dict[int, list[Job]] = {}
        self.nodes = [self._node(policy, block_tokens) for _ in range(scenario.nodes.count)]

    def _node(self, policy: str, block_tokens: int) -> Node:
        told = (self._scenario, policy, self._cost, self.events, self._first_token, self._ended)
        return CoreNode(*told, block_tokens) if self._scenario.fidelity == "core" else RunNode(*told)

    def run(self, stream: TurnStream, progress: Callable[[int], object] | None = None) -> None:
        """Serve every turn. progress: told how many rows were taken in.

        Raises TraceError for what is wrong with the stream, and when it is empty.
        """
        with _no_collections():
            self._run(stream, progress)

    def _run(self, stream: TurnStream, progress: Callable[[int], object] | None) -> None:
        warm_s = self._scenario.warmup_s
        rows = 0
        for rows, turn in enumerate(stream.turns, 1):
            self.events.run_until(turn.t_s)
            if not self.usages and turn.t_s >= warm_s:
                self.usages.append(self._usage())
            self._take_in(turn)
            if progress is not None and rows % _ROWS_PER_REPORT == 0:
                progress(rows)
        if not rows:
            raise TraceError(0, "has no request")
        if not self.usages:
            raise TraceError(0, f"ends before the warm-up of {warm_s} s does")
        last_s = self.events.now_s
        self.events.run_out()
        end = self._usage()
        # Rates are over the time in which requests came; what is still being served then belongs to it.
        end.at_s = max(last_s, self.usages[0].at_s)
        self.usages.append(end)

    def _take_in(self, turn: Turn) -> None:
        """Name the turn's runs, and let it arrive: now, or once its sender has the answer before it."""
        rows = self._rows
        front, last, known = self._chains.add(turn)
        resumes = known > 0 and rows.conversation[turn.ref] == turn.conversation
        row = rows.add(turn)
        job = Job(row, turn, front, last, known, resumes=resumes)
        if not resumes or turn.conversation < 0 or turn.service_s < 0 or not self._scenario.closed:
            self._arrive(job)
        elif rows.ended_s[turn.ref] < 0:
            self._waiting.setdefault(turn.ref, []).append(job)
        else:
            self._follow(job)

    def _follow(self, job: Job) -> None:
        """The row before has ended: its reader takes as long as the load says."""
        rows, ref = self._rows, job.turn.ref
        late_s = rows.ended_s[ref] - rows.planned_end_s[ref]
        job.arrived_s = max(job.turn.t_s + max(late_s, 0.0), self.events.now_s)
        if job.arrived_s > self.events.now_s:
            self.events.at(job.arrived_s, self._arrive, job)
        else:
            self._arrive(job)

    def _arrive(self, job: Job) -> None:
        rows, turn = self._rows, job.turn
        home = rows.node[turn.ref] if job.resumes else -1
        if job.resumes:
            ended_s = rows.ended_s[turn.ref]
            job.idle_s = max(job.arrived_s - ended_s, 0.0) if ended_s >= 0 else 0.0
        node, moved = self._route(home)
        rows.node[job.row] = node
        if not self.nodes[node].engines[0].fits(job):
            self.tally.refused += turn.t_s >= self._scenario.warmup_s
            self._ended(job)
            return
        self.tally.moved += moved
        self.nodes[node].take(job, self.nodes[home] if moved else None)

    def _route(self, home: int) -> tuple[int, bool]:
        """(Node, whether the conversation moved to it)."""
        rules = self._scenario.nodes
        if home >= 0 and rules.route == "sticky" and self.nodes[home].begins_within(rules.overload_s):
            return home, False
        node = min(range(len(self.nodes)), key=lambda index: self.nodes[index].load())
        return node, home >= 0 and node != home

    def _first_token(self, job: Job, takes_s: float) -> None:
        if job.turn.t_s >= self._scenario.warmup_s:
            self.tally.first_token(job, self.events.now_s, takes_s, self._cost)

    def _ended(self, job: Job) -> None:
        self._rows.ended_s[job.row] = self.events.now_s
        for follower in self._waiting.pop(job.row, ()):
            self._follow(follower)

    def _usage(self) -> Usage:
        now_s = self.events.now_s
        engines = [engine for node in self.nodes for engine in node.engines]
        kept = [node.kept() for node in self.nodes]
        return Usage(
            at_s=now_s,
            prefill_s=sum(engine.prefill_s for engine in engines),
            decode_s=sum(engine.decode_s for engine in engines),
            to_gpu_bytes=sum(engine.to_gpu.nbytes for engine in engines),
            from_gpu_bytes=sum(engine.from_gpu.nbytes for engine in engines),
            disk_read_bytes=sum(node.drive.read_bytes for node in self.nodes),
            drive_busy_s=sum(node.drive.busy_s for node in self.nodes),
            peer_bytes=sum(node.to_peers.nbytes for node in self.nodes if node.to_peers is not None),
            dropped=sum(one.dropped for one in kept),
            written=_summed([one.written for one in kept]),
            host_byte_s=_summed([one.host_byte_s for one in kept]),
            disk_byte_s=_summed([one.disk_byte_s for one in kept]),
        )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Leave cycles alone: the collector walks all that is kept of a day again and again, and finds none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _summed(parts: Sequence[Mapping[int, float]]) -> dict[int, float]:
    total: dict[int, float] = {}
    for part in parts:
        for tenant, value in part.items():
            total[tenant] = total.get(tenant, 0) + value
    return dict(sorted(total.items()))
