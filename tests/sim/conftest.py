"""Small synthetic traces and days in virtual time, the same for the same seed."""

import dataclasses
import hashlib
import io
import json
import random
from typing import ClassVar

import msgspec
import pytest

from kvtier.node import journal
from kvtier.node.core import NodeCore
from kvtier.sim.cluster import core_node, engine
from kvtier.sim.cluster.cluster import Cluster
from kvtier.sim.cluster.costs import FlopsCost
from kvtier.sim.cluster.links import Link
from kvtier.sim.cluster.scenario import Disk, Host, Nodes, Scenario, Worker, changed
from kvtier.sim.cluster.tally import Tally
from kvtier.sim.read_trace import read_trace
from kvtier.sim.workload.turns import Turn, TurnStream

FIELDS = ["t", "sid", "turn", "in", "out", "kind", "stop", "dur", "ref", "lcp", "n"]
BLOCK_TOKENS = 16


def kvtrace(rows, **header):
    """Bytes of a plain kvtrace/1 file."""
    lines = [{"format": "kvtrace/1", "fields": FIELDS, "block_tokens": BLOCK_TOKENS, **header}, *rows]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def chat_rows(seed, requests=300, chats=12):
    """Conversations that grow, pause, branch and share a system prompt."""
    chance = random.Random(seed)
    rows, last, t_s = [], {}, 0.0
    for row in range(requests):
        t_s = round(t_s + chance.expovariate(1), 3)
        chat = min(int(chance.expovariate(0.3)), chats - 1) + (row // 100) * 3
        ref, turn = last.get(chat, (-1, -1))
        if ref == -1 and rows:
            ref, shared = 0, min(2, rows[0][10])
        elif ref == -1:
            shared = 0
        else:
            shared = rows[ref][10] - (chance.random() < 0.2) * chance.randrange(rows[ref][10] + 1)
        blocks = shared + chance.randrange(0 if shared else 1, 6)
        tokens = blocks * BLOCK_TOKENS + chance.randrange(BLOCK_TOKENS)
        stop = chance.choice(["tool_use", "end_turn", ""])
        dur = chance.choice([-1, 0.5, 3.0])
        rows.append([t_s, chat, turn + 1, tokens, chance.randrange(50), "u", stop, dur, ref, shared, blocks])
        last[chat] = (row, turn + 1)
    return rows


@pytest.fixture
def rows_of():
    return chat_rows


@pytest.fixture
def text_of():
    return kvtrace


@pytest.fixture
def trace_of():
    """Reads a trace from rows."""
    return lambda rows: read_trace(io.BytesIO(kvtrace(rows)))


class LoggedCore(NodeCore):
    """Writes the log that a daemon would write."""

    logs: ClassVar[list] = []

    def __init__(self, settings, host, policies, secret, rng, *, epoch, arena_bytes, generation_slots):
        super().__init__(
            settings,
            host,
            policies,
            secret,
            rng,
            epoch=epoch,
            arena_bytes=arena_bytes,
            generation_slots=generation_slots,
        )
        sha = hashlib.sha256(secret).hexdigest()
        origin = journal.Origin(settings, sha, 1, epoch, tuple(arena_bytes), generation_slots)
        self.entries = [{"origin": msgspec.to_builtins(dataclasses.asdict(origin))}]
        self.logs.append(self.entries)

    def handle(self, now_s, stimulus):
        sends = super().handle(now_s, stimulus)
        self.entries.append({"at_s": now_s, **journal.pack(stimulus), "sends": journal.digest(sends)})
        return sends


@dataclasses.dataclass
class VirtualDay:
    """A simulated run with the log that its node wrote, and the time to first token of each row."""

    scenario: Scenario
    entries: list
    ttft_s: list


class RowTally(Tally):
    """By row, in order of arrival."""

    rows: dict

    def first_token(self, job, now_s, takes_s, cost):
        self.rows[job.row] = now_s - job.arrived_s
        super().first_token(job, now_s, takes_s, cost)


VIRTUAL = changed(
    Scenario(),
    fidelity="core",
    nodes=Nodes(workers=2),
    host=Host(capacity_bytes=1 << 30),
    disk=Disk(capacity_bytes=8 << 30, read_bytes_per_s=2e9),
    worker=Worker(pool_bytes=1 << 30, keeps_idle=False),
)


def virtual_turns(seed):
    """Conversations that grow and begin anew, 150 requests."""
    chance, turns, t_s, stored = random.Random(seed), [], 0.0, {}
    for row in range(150):
        t_s += chance.expovariate(0.5)
        chat = chance.randrange(12)
        ref, tokens = stored.get(chat, (-1, 0))
        if tokens > 3000:
            ref, tokens = -1, 0
        tokens_in = tokens + chance.randrange(100, 900)
        stored[chat] = (row, tokens_in + 50)
        turns.append(Turn(t_s, chat, 0, 1, tokens_in, 50, "u", "", -1.0, ref, tokens))
    return turns


def ttft_of(scenario, stream, policy="lru"):
    """Seconds to the first token, by row."""
    cluster = Cluster(scenario, policy, FlopsCost(scenario.model, scenario.worker), stream.block_tokens)
    cluster.tally = tally = RowTally()
    tally.rows = {}
    cluster.run(stream)
    return [tally.rows[row] for row in range(len(tally.rows))]


@pytest.fixture
def virtual_day(monkeypatch):
    """The log of a node in virtual time, whose copies and reads take now more and now less."""

    def make(seed, jitter, policy="lru"):
        chance = random.Random(seed)

        class Shaky(Link):
            def send(self, now_s, nbytes):
                return super().send(now_s, int(nbytes * (1 + jitter * (chance.random() - 0.5))))

        with monkeypatch.context() as patch:
            patch.setattr(core_node, "NodeCore", LoggedCore)
            patch.setattr(engine, "Link", Shaky)
            ttft_s = ttft_of(VIRTUAL, TurnStream("test", 64, iter(virtual_turns(seed))), policy)
        return VirtualDay(VIRTUAL, LoggedCore.logs.pop(), ttft_s)

    return make


@pytest.fixture
def ttft_by_row():
    return ttft_of
