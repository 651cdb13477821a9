"""What the cluster's directory costs: memory, announcements, lookups, a rebuild after a crash, stalls.

All shards live in this process and are fed in turn, so the figures are those of one core; a deployment
spreads shards over actors.  Blocks are synthetic: random keys, of which each tenth is held by a second
node.  Lookups are given in the processor's time, with the clock's beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kvtier.bench.lines import Line, micros_line, report, seconds
from kvtier.directory.announcements import HINT_BYTES, Announcement, End, Layout, Part, Phase, Record, Run
from kvtier.directory.locate import Choice, NodeState, rank
from kvtier.directory.locate import Line as Path_
from kvtier.directory.lookups import Front, fronts, questions
from kvtier.directory.routing import shard_of_conversation, shards_of
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.keys import BlockRef

_LAYOUT = Layout(256, (Part(0, "full", "L0+32.H0+8", 131072),))
_BATCH, _RECORDS, _CHAIN, _LOOKUPS = 2048, 64, 128, 400
_AIM_BYTES, _AIM_LOCATE_US = 100.0, 2000.0
_TENANTS = 50


class Cluster:
    """Shards of a directory and nodes that say what they hold.

    stalls: seconds that a shard took for each message.  cpu: the processor's time of it; the rest was
    waiting for other work of the machine.
    """

    def __init__(self, nodes: int, shards: int) -> None:
        self.nodes, self.shards = nodes, [Shard(ShardSettings(n, shards)) for n in range(shards)]
        self._numbers: dict[tuple[int, int], int] = {}
        self.stalls: list[float] = []
        self.cpu: list[float] = []

    def reset(self) -> None:
        """Count anew."""
        self.stalls, self.cpu = [], []

    def say(
        self,
        node: int,
        shard: int,
        phase: Phase,
        runs: tuple[Run, ...] = (),
        records: tuple[Record, ...] = (),
    ) -> None:
        """Send one message; count the time that the shard is busy with it."""
        number = self._numbers.get((node, shard), -1) + 1
        self._numbers[node, shard] = number
        message = Announcement(
            node=f"node-{node}",
            epoch=1,
            number=number,
            shard=shard,
            shards=len(self.shards),
            phase=phase,
            layouts=(_LAYOUT,) if runs else (),
            runs=runs,
            records=records,
        )
        before = time.thread_time()
        self.stalls.append(seconds(lambda: self.shards[shard].apply(message, 0.0)))
        self.cpu.append(time.thread_time() - before)

    def blocks(self, node: int, keys: np.ndarray, phase: Phase = "change") -> None:
        """A node has these blocks. keys: uint8 [n, HINT_BYTES]; a third is on disk as well."""
        where = shards_of(keys.tobytes(), len(self.shards))
        for shard in range(len(self.shards)):
            mine = keys[where == shard]
            for first in range(0, len(mine), _BATCH):
                part = mine[first : first + _BATCH]
                third = len(part) // 3
                tenant = f"tenant-{(node + first // _BATCH) % _TENANTS}"
                runs = (
                    Run(tenant, 0, 256, 1, 1, part[:third].tobytes()),
                    Run(tenant, 0, 256, 1, 0, part[third:].tobytes()),
                )
                self.say(node, shard, phase, runs)

    def begin(self) -> None:
        """Every node begins its snapshot with nothing, and ends it."""
        for node in range(self.nodes):
            for shard in range(len(self.shards)):
                self.say(node, shard, "whole")

    def rows(self) -> int:
        """Over all shards."""
        return sum(shard.summary().rows for shard in self.shards)


def resident_bytes() -> int:
    """Of this process, its share of what it shares."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel tells no Pss")


def keys_of(node: int, count: int) -> np.ndarray:
    """The same keys for a node in each run; uint8 [count, HINT_BYTES]."""
    raw = np.random.default_rng(node).bytes(count * HINT_BYTES)
    return np.frombuffer(raw, np.uint8).reshape(-1, HINT_BYTES)


def fill(cluster: Cluster, blocks: int) -> float:
    """Announce blocks over all nodes, each tenth twice; answers the seconds that shards were busy."""
    each = blocks // cluster.nodes
    step = max(each // 2, 1)
    for first in range(0, each, step):
        for node in range(cluster.nodes):
            cluster.blocks(node, keys_of(node, each)[first : first + step])
            # The copies stand at the next node.
            cluster.blocks(node, keys_of((node + 1) % cluster.nodes, each)[first : first + step // 10])
    return sum(cluster.stalls)


def converse(cluster: Cluster, conversations: int) -> float:
    """Announce conversation records over all nodes; answers the seconds that shards were busy."""
    waiting: dict[tuple[int, int], list[Record]] = {}
    for number in range(conversations):
        tenant, name = f"tenant-{number % _TENANTS}", f"chat-{number:08x}"
        end = End(hashlib.sha256(name.encode()).digest()[:HINT_BYTES], 8192, 1.7e9 + number)
        where = (number % cluster.nodes, shard_of_conversation(tenant, name, len(cluster.shards)))
        batch = waiting.setdefault(where, [])
        batch.append(Record(tenant, name, 1, (end,)))
        if len(batch) == _RECORDS:
            cluster.say(*where, "change", records=tuple(batch))
            batch.clear()
    for where, batch in waiting.items():
        cluster.say(*where, "change", records=tuple(batch))
    return sum(cluster.stalls)


def lookups(cluster: Cluster, blocks: int) -> Iterator[Line]:
    """The front of 128 blocks over all shards; then the ranking of all nodes, for a prefix that all have."""
    each = blocks // cluster.nodes
    tenants = [f"tenant-{n}" for n in range(_TENANTS)]
    chains = []
    for number in range(_LOOKUPS):
        first = (number * 131) % max(each - _CHAIN, 1)
        chains.append(refs(keys_of(number % cluster.nodes, each)[first : first + _CHAIN]))
    turns = iter(enumerate(chains))

    def ask_next() -> None:
        number, chain = next(turns)
        ask(cluster, tenants[number % _TENANTS], chain)

    yield timed("directory: fronts of 128 blocks, mostly at one node", ask_next)
    hot = keys_of(10**6, _CHAIN)
    where = shards_of(hot.tobytes(), len(cluster.shards))
    for node in range(cluster.nodes):
        for shard in range(len(cluster.shards)):
            keys = hot[where == shard].tobytes()
            cluster.say(node, shard, "change", (Run("shared", 0, 256, 1, 0, keys),))
    chain = refs(hot)
    spread = ask(cluster, "shared", chain)
    assert len(spread) == cluster.nodes, len(spread)
    yield timed(
        f"directory: fronts of 128 blocks that {cluster.nodes} nodes hold",
        lambda: ask(cluster, "shared", chain),
    )
    asked = questions(chain, len(cluster.shards))
    answers = [(q, cluster.shards[q.shard].find("shared", q.keys)) for q in asked]
    yield timed(
        f"directory: one shard's part of it, {len(asked[0].places)} blocks",
        lambda: cluster.shards[asked[0].shard].find("shared", asked[0].keys),
    )
    states = {f"node-{n}": _state(n) for n in range(cluster.nodes)}
    yield timed(
        f"directory: fronts and ranking of {cluster.nodes} nodes from the shards' answers",
        lambda: choose(fronts(chain, answers), states),
        _AIM_LOCATE_US,
    )


def timed(name: str, work: Callable[[], object], aim_us: float | None = None) -> Line:
    """Microseconds of the processor's time; those of the clock beside it."""
    walls, cpus = [], []
    for _ in range(_LOOKUPS):
        before = time.thread_time()
        walls.append(seconds(work))
        cpus.append(time.thread_time() - before)
    wall = micros_line(name, walls)
    return micros_line(name, cpus, aim_us, clock_us=wall.value, clock_p99_us=wall.detail["p99_us"])


def ask(cluster: Cluster, tenant: str, chain: list[BlockRef]) -> list[Front]:
    """Ask the shards in turn, and put their answers together."""
    asked = questions(chain, len(cluster.shards))
    return fronts(chain, [(q, cluster.shards[q.shard].find(tenant, q.keys)) for q in asked])


def choose(found: list[Front], states: dict[str, NodeState]) -> list[Choice]:
    """Rank all nodes for a request that is a little longer than the front."""
    return rank(_CHAIN * 256 + 500, found, states)


def refs(keys: np.ndarray) -> list[BlockRef]:
    """A chain of full blocks with such keys."""
    return [BlockRef(key.tobytes() * 2, b"", n * 256, 256) for n, key in enumerate(keys)]


class _Prefill:
    def seconds(self, past: int, new: int) -> float:
        """A model of about 8 billion parameters."""
        return new * 1e-4 + new * (past + new / 2) * 1e-9


def _state(number: int) -> NodeState:
    link = Path_(0.003, 1.2e9)
    return NodeState(_Prefill(), Path_(5e-4, 8e9), Path_(2e-3, 1.5e9), link, wait_s=number * 0.01)


def measure(nodes: int, shards: int, blocks: int, conversations: int) -> Iterator[Line]:
    """All figures for one size."""
    size = {"nodes": nodes, "shards": shards, "blocks": blocks, "conversations": conversations}
    keys_of(0, 1)
    before = resident_bytes()
    cluster = Cluster(nodes, shards)
    cluster.begin()
    cluster.reset()
    busy_s = fill(cluster, blocks)
    rows = cluster.rows()
    distinct = sum(shard.summary().blocks for shard in cluster.shards)
    grown = resident_bytes() - before
    per_block = grown / distinct
    yield Line(
        "directory: bytes of memory for a block",
        round(per_block, 1),
        "B",
        _AIM_BYTES,
        round(per_block / _AIM_BYTES, 3),
        {"rows": rows, "distinct": distinct, **size},
    )
    tables = sum(shard.summary().table_bytes for shard in cluster.shards)
    yield Line("directory: bytes of tables for a block", round(tables / distinct, 1), "B")
    yield Line(
        "directory: blocks announced",
        round(rows / busy_s),
        "blocks/s",
        None,
        None,
        {"blocks_a_message": round(rows / len(cluster.stalls))},
    )
    yield _longest("directory: longest stall while blocks are announced", cluster)
    cluster.reset()
    between = resident_bytes()
    busy_s = converse(cluster, conversations)
    yield Line("directory: conversations announced", round(conversations / busy_s), "records/s")
    grown = resident_bytes() - between
    yield Line("directory: bytes of memory for a conversation", round(grown / conversations, 1), "B")
    yield _longest("directory: longest stall while conversations are announced", cluster)
    yield from lookups(cluster, blocks)
    yield from _crash(cluster, blocks)


def _crash(cluster: Cluster, blocks: int) -> Iterator[Line]:
    """One shard loses everything: every node sends it a snapshot. Then all of one node is lost."""
    each = blocks // cluster.nodes
    cluster.shards[0] = Shard(ShardSettings(0, len(cluster.shards)))
    cluster.reset()
    for node in range(cluster.nodes):
        keys = keys_of(node, each)
        mine = keys[shards_of(keys.tobytes(), len(cluster.shards)) == 0]
        cluster.say(node, 0, "begin")
        for first in range(0, len(mine), _BATCH):
            run = Run(f"tenant-{node % _TENANTS}", 0, 256, 1, 0, mine[first : first + _BATCH].tobytes())
            cluster.say(node, 0, "more", (run,))
        cluster.say(node, 0, "end")
    rows = cluster.shards[0].summary().rows
    rebuilt_s = round(sum(cluster.stalls), 3)
    yield Line("directory: one shard rebuilt after a crash", rebuilt_s, "s", None, None, {"rows": rows})
    lost = [seconds(lambda shard=shard: shard.lost("node-1", 1)) for shard in cluster.shards]  # type: ignore[misc]
    yield micros_line("directory: a node is lost, for one shard", lost)


def _longest(name: str, cluster: Cluster) -> Line:
    wall, cpu = sorted(cluster.stalls), sorted(cluster.cpu)
    at = int(len(wall) * 0.99)
    rest = {"p99": wall[at], "longest_cpu": cpu[-1], "p99_cpu": cpu[at]}
    detail = {f"{name}_ms": round(value * 1e3, 2) for name, value in rest.items()}
    return Line(name, round(wall[-1] * 1e3, 2), "ms", None, None, detail)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.directory", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--conversations", type=int, default=100_000)
    told = parser.parse_args()
    report(measure(told.nodes, told.shards, told.blocks, told.conversations), as_json=told.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
