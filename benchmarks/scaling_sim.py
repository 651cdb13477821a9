"""Restores a second and their p99 as nodes grow from 1 to 256, simulated, with the directory's share of them.

    python -m benchmarks.scaling_sim [--json] [--nodes 1,4,16,64,256] [--minutes 20] [--policy lru+cost]

Weak scaling: every node has the same load (generated chat of the busy hours), the same workers without a
prefix cache of their own, so that each turn that goes on is restored or computed, and the same tiers.  A
conversation whose node is busy goes to another one, which pulls what it needs from there.
benchmarks/scaling.py puts the same question to live nodes on one machine.

The directory is simulated with what it costs: services that answer one call after the other, one for each
16 nodes; a plan that finds less than its prompt asks for the conversation's branches, then all services at
once for the blocks; what changed at a node is gathered for 20 ms and told to every shard that it concerns,
and each shard gets a probe every 2 s.  What a call takes of a service's processor is measured first, on a
real shard.  Assumed: 0.2 ms for a round trip between nodes.  Not in it: the connections' own cost, and what
a node looks up of another one before it pulls.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.directory import keys_of
from kvtier.bench.lines import Line, report
from kvtier.directory import calls
from kvtier.directory.announcements import Announcement, End, Layout, Part, Record, Run
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.sim.cluster.cluster import Cluster
from kvtier.sim.cluster.costs import FlopsCost, ServingCost
from kvtier.sim.cluster.engine import Engine
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.node import Node
from kvtier.sim.cluster.run_node import RunNode
from kvtier.sim.cluster.scenario import Host, Nodes, Scenario, Worker, changed
from kvtier.sim.cluster.tally import Tally
from kvtier.sim.workload.day import Day
from kvtier.sim.workload.generate import Generator
from kvtier.sim.workload.settings import Synthetic

# As in kvtier/daemon/peer_directory.py; shards as `cluster.shards` has them by default.
_GATHER_S, _PROBE_S, _SHARDS = 0.02, 2.0, 16
_NODES_A_SERVICE: Final = 16
_ROUND_TRIP_S: Final = 2e-4
_BLOCK_TOKENS: Final = 256
_LAYOUT = Layout(_BLOCK_TOKENS, (Part(0, "full", "L0+32.H0+8", 131072),))
_KNOWN_BLOCKS, _MOST_BLOCKS, _RECORDS, _REPEATS, _SETTLED = 200_000, 1024, 64, 200, 1000
# Served before anything counts; workers of a node, and the sessions that it gets in a day.
_WARM_S: Final = 600.0
_WORKERS: Final = 4
_SESSIONS: Final = 12_000.0
_SETUP = Scenario(
    level="disk",
    warmup_s=_WARM_S,
    worker=Worker(keeps_idle=False),
    host=Host(capacity_bytes=256 << 30),
    nodes=Nodes(workers=_WORKERS, overload_s=0.5, peer_bytes_per_s=12.5e9),
)


@dataclass(frozen=True, slots=True)
class Call:
    """What a call takes of a service's processor: seconds for itself, and for each block in it."""

    start_s: float
    block_s: float = 0.0

    def seconds(self, blocks: float) -> float:
        """Of a call with so many."""
        return self.start_s + blocks * self.block_s


@dataclass(frozen=True, slots=True)
class Costs:
    """tell: a message of changed blocks, a probe where there are none; record_s: for each conversation in it;
    find: a shard's part of a chain; get: a conversation."""

    tell: Call
    record_s: float
    find: Call
    get: Call


class _Service:
    """One real shard of a directory, fed and asked in the words that travel."""

    def __init__(self) -> None:
        self._shard = Shard(ShardSettings(0, 1))
        self._keys = keys_of(0, _KNOWN_BLOCKS)
        self._number = self._chats = 0
        self.tell(0, phase="whole")
        whole_s = sum(self.tell(_MOST_BLOCKS, first=at) for at in range(0, _KNOWN_BLOCKS, _MOST_BLOCKS))
        # With what growing takes, of which each message does a piece.
        self.block_s = whole_s / _KNOWN_BLOCKS
        for _ in range(_SETTLED):
            self.tell(0)

    def tell(self, blocks: int, records: int = 0, first: int = 0, phase: Any = "change") -> float:
        """Seconds to take in a message."""
        said = Announcement(
            node="node-1",
            epoch=1,
            number=self._number,
            shard=0,
            shards=1,
            phase=phase,
            layouts=(_LAYOUT,),
            runs=(Run("tenant", 0, _BLOCK_TOKENS, 1, 0, self._keys[first : first + blocks].tobytes()),),
            records=tuple(self._record() for _ in range(records)),
        )
        self._number += 1
        return self._answer(calls.Tell(said, "10.0.0.1:7200"))

    def find(self, blocks: int) -> float:
        """Seconds to say who has so many."""
        return self._answer(calls.Find("tenant", [(0, self._keys[5000 : 5000 + blocks].tobytes())]))

    def get(self) -> float:
        """Seconds to say what is known of a conversation."""
        return self._answer(calls.GetConversation(0, "tenant", "chat-1"))

    def _record(self) -> Record:
        self._chats += 1
        return Record("tenant", f"chat-{self._chats}", 1, (End(bytes(16), 8192, 1.7e9),))

    def _answer(self, asked: calls.Call) -> float:
        body = calls.pack(asked)
        begun_s = time.thread_time()
        call = calls.unpack_call(body)
        answer: calls.Told
        if isinstance(call, calls.Tell):
            answer = self._shard.apply(call.announcement, 0.0)
            if answer.snapshot or answer.fenced:
                raise RuntimeError("the shard did not take it")
        elif isinstance(call, calls.Find):
            answer = calls.Found([self._shard.find(call.tenant, keys) for _, keys in call.asked], {})
        else:
            assert isinstance(call, calls.GetConversation)
            found = self._shard.conversation(call.tenant, call.conversation)
            answer = calls.Page([found] if found is not None else [])
        calls.pack(answer)
        return time.thread_time() - begun_s


def measured_costs() -> Costs:
    """What small calls take of this processor, and what each block and record adds.

    Medians, of calls that take turns, so that a slow moment hits all of them.
    """
    service = _Service()
    works: tuple[Callable[[], float], ...] = (
        lambda: service.tell(1),
        lambda: service.tell(1, _RECORDS),
        lambda: service.find(1),
        lambda: service.find(_MOST_BLOCKS),
        service.get,
    )
    taken = np.array([[work() for work in works] for _ in range(_REPEATS)])
    tell_s, told_s, find_s, found_s, get_s = np.median(taken, axis=0).tolist()
    find = Call(find_s, max(found_s - find_s, 0.0) / _MOST_BLOCKS)
    return Costs(Call(tell_s, service.block_s), max(told_s - tell_s, 0.0) / _RECORDS, find, Call(get_s))


class Directory:
    """Services that answer in turn. Times in seconds of the simulation."""

    def __init__(self, nodes: int, costs: Costs) -> None:
        self._costs = costs
        self.services = min(-(-nodes // _NODES_A_SERVICE), _SHARDS)
        self._free_s = [0.0] * self.services
        # Probes come all the time.
        self._probing = nodes * _SHARDS / _PROBE_S / self.services * costs.tell.start_s
        self.told_s = self.asked_s = 0.0
        self.messages = self.blocks = 0
        self.waits_s = array("d")

    def tell(self, now_s: float, blocks: int, records: int) -> None:
        """What changed at a node: blocks are spread over all shards, each record has one."""
        shards = min(_SHARDS, blocks + records)
        if not shards:
            return
        seconds = self._costs.tell.seconds(blocks / shards) * shards + self._costs.record_s * records
        self.messages, self.blocks = self.messages + shards, self.blocks + blocks
        self.told_s += seconds
        for place in range(self.services):
            self._serve(place, now_s, seconds / self.services)

    def ask(self, now_s: float, conversation: int, blocks: int) -> float:
        """When a plan knows who has what of a conversation and a chain of so many blocks."""
        got_s = self._serve(conversation % self.services, now_s, self._costs.get.seconds(1)) + _ROUND_TRIP_S
        shards = min(_SHARDS, blocks)
        each_s = self._costs.find.seconds(blocks / shards) * shards / self.services
        found_s = max(self._serve(place, got_s, each_s) for place in range(self.services))
        self.asked_s += self._costs.get.start_s + each_s * self.services
        self.waits_s.append(found_s + _ROUND_TRIP_S - now_s)
        return found_s + _ROUND_TRIP_S

    def busy(self, seconds: float) -> float:
        """The share of its time that a service computed, over so many seconds."""
        return (self.told_s + self.asked_s) / seconds / self.services + self._probing

    def _serve(self, place: int, now_s: float, seconds: float) -> float:
        """The end of a call; probes leave less of the processor for it."""
        seconds /= max(1.0 - self._probing, 0.01)
        self._free_s[place] = max(self._free_s[place], now_s) + seconds
        return self._free_s[place]


class _Node(RunNode):
    """A node that asks the directory before it plans, and tells it what changed."""

    directory: Directory

    def take(self, job: Job, home: Node | None) -> None:
        """See Node."""
        missing = job.turn.tokens_in - self.store.find(job.front, job.known).tokens
        if job.turn.conversation < 0 or missing < _BLOCK_TOKENS:
            self._go_on((job, home))
            return
        blocks = max(job.turn.tokens_in // _BLOCK_TOKENS, 1)
        known_s = self.directory.ask(self._events.now_s, job.turn.conversation, blocks)
        self._events.at(known_s, self._go_on, (job, home))

    def _go_on(self, what: tuple[Job, Node | None]) -> None:
        super().take(*what)
        self._changed(records=0)

    def _park(self, job: Job, engine: Engine) -> None:
        super()._park(job, engine)
        self._changed(records=1)

    def _changed(self, records: int) -> None:
        """Have what came and went since the last time told, with what else changes soon."""
        moved = self.store.host.moved_bytes + self.store.disk.moved_bytes
        if not self._gathering and (records or moved > self._told_bytes):
            self._gathering = True
            self._events.at(self._events.now_s + _GATHER_S, self._tell, None)
        self._records += records

    def _tell(self, _: None) -> None:
        moved = self.store.host.moved_bytes + self.store.disk.moved_bytes
        blocks = round((moved - self._told_bytes) / self._cost.token_bytes / _BLOCK_TOKENS)
        self.directory.tell(self._events.now_s, blocks, self._records)
        self._told_bytes, self._records, self._gathering = moved, 0, False

    _told_bytes = _records = 0
    _gathering = False


class _Restores(Tally):
    """Keeps how long each restore took, from the request on."""

    restores: array[float]
    pulled: int

    def first_token(self, job: Job, now_s: float, takes_s: float, cost: ServingCost) -> None:
        """See Tally."""
        super().first_token(job, now_s, takes_s, cost)
        if job.host_tokens or job.disk_tokens or job.peer_tokens:
            self.restores.append(job.ready_s - job.arrived_s)
            self.pulled += job.peer_tokens > 0


class _Cluster(Cluster):
    """With a directory."""

    def __init__(self, scenario: Scenario, policy: str, costs: Costs, block_tokens: int) -> None:
        self.directory = Directory(scenario.nodes.count, costs)
        super().__init__(scenario, policy, FlopsCost(scenario.model, scenario.worker), block_tokens)
        self.tally = self.found = _Restores()
        self.found.restores, self.found.pulled = array("d"), 0

    def _node(self, policy: str, block_tokens: int) -> Node:
        told = (self._scenario, policy, self._cost, self.events, self._first_token, self._ended)
        node = _Node(*told)
        node.directory = self.directory
        return node


def scaling(sizes: list[int], minutes: float, policy: str) -> Iterator[Line]:
    """All sizes, the same load on each node."""
    costs = measured_costs()
    for name, call in (("tell", costs.tell), ("find", costs.find), ("get", costs.get)):
        detail = {"a_block_us": round(call.block_s * 1e6, 3)} if call.block_s else {}
        if name == "tell":
            detail["a_record_us"] = round(costs.record_s * 1e6, 2)
        yield Line(f"directory, measured: {name}", round(call.start_s * 1e6, 1), "us", detail=detail)
    first_rate = 0.0
    for nodes in sizes:
        begun_s = time.process_time()
        cluster = simulated(nodes, minutes, policy, costs)
        cpu_s = time.process_time() - begun_s
        rate = len(cluster.found.restores) / (minutes * 60 - _WARM_S) / nodes
        first_rate = first_rate or rate
        yield from _lines(cluster, nodes, rate, first_rate, cpu_s)


def simulated(nodes: int, minutes: float, policy: str, costs: Costs) -> _Cluster:
    """One size, served to the end."""
    load = Synthetic(sessions_per_day=_SESSIONS * nodes, hours=minutes / 60, day=Day(start_hour=10.0))
    scenario = changed(_SETUP, nodes=changed(_SETUP.nodes, count=nodes))
    stream = Generator(load, scenario.seed).stream()
    cluster = _Cluster(scenario, policy, costs, stream.block_tokens)
    cluster.run(stream)
    return cluster


def _lines(cluster: _Cluster, nodes: int, rate: float, first_rate: float, cpu_s: float) -> Iterator[Line]:
    where = f"{nodes} nodes" if nodes > 1 else "1 node"
    found, directory, until_s = cluster.found, cluster.directory, cluster.usages[-1].at_s
    total = found.total()
    detail = {
        "a_node": round(rate, 3),
        "pulled_percent": round(100 * found.pulled / max(len(found.restores), 1), 1),
        "requests": total.requests,
        "hits_percent": round(100 * (total.host + total.disk + total.peer) / max(total.tokens_in, 1), 1),
        "prefill_busy_percent": round(100 * cluster.usages[-1].prefill_s / until_s / nodes / _WORKERS, 1),
        "simulated_in_cpu_s": round(cpu_s, 1),
    }
    share = round(rate / first_rate, 3) if first_rate else None
    yield Line(
        f"restores a second: {where}",
        round(rate * nodes, 2),
        "1/s",
        round(first_rate * nodes, 2),
        share,
        detail,
    )
    restore_ms = _quantiles(found.restores, 1e3)
    yield Line(f"p99 of a restore: {where}", restore_ms["p99"], "ms", detail={"p50": restore_ms["p50"]})
    first_ms = _quantiles(found.resumed_ttft_s, 1e3)
    yield Line(
        f"p99 to the first token on resume: {where}", first_ms["p99"], "ms", detail={"p50": first_ms["p50"]}
    )
    ask_ms = _quantiles(directory.waits_s, 1e3)
    detail = {
        "p50": ask_ms["p50"],
        "part_of_p50_restore": round(ask_ms["p50"] / max(restore_ms["p50"], 1e-9), 3),
        "part_of_p50_first_token": round(ask_ms["p50"] / max(first_ms["p50"], 1e-9), 3),
    }
    yield Line(f"p99 of asking the directory: {where}", ask_ms["p99"], "ms", detail=detail)
    detail = {
        "services": directory.services,
        "lookups_a_second": round(len(directory.waits_s) / until_s, 2),
        "messages_a_second": round(directory.messages / until_s, 1),
        "blocks_a_second": round(directory.blocks / until_s, 1),
        "told_percent": round(100 * directory.told_s / until_s / directory.services, 3),
        "asked_percent": round(100 * directory.asked_s / until_s / directory.services, 3),
    }
    busy = round(100 * directory.busy(until_s), 3)
    yield Line(f"directory, a service's processor: {where}", busy, "%", detail=detail)


def _quantiles(values: array[float], times: float) -> dict[str, float]:
    p50, p99 = np.percentile(np.asarray(values) if len(values) else np.zeros(1), (50, 99)) * times
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def main() -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(description="Restores a second as nodes grow, simulated.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--nodes", default="1,4,16,64,256", help="sizes, separated by commas")
    parser.add_argument("--minutes", type=float, default=20.0, help="of load; the first ten are not counted")
    parser.add_argument("--policy", default="lru+cost")
    options = parser.parse_args()
    nodes = [int(nodes) for nodes in options.nodes.split(",")]
    report(scaling(nodes, options.minutes, options.policy), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
