"""Nodes that drive the daemon's own core: the same as the fast ones, where both have the same rules."""

import random
from itertools import pairwise

import msgspec
import pytest

from kvtier.errors import ConfigError
from kvtier.keys import pack_tokens
from kvtier.sim.cluster.cluster import Cluster
from kvtier.sim.cluster.core_text import packed_text
from kvtier.sim.cluster.costs import FlopsCost
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.result import result_of
from kvtier.sim.cluster.runs import Chains
from kvtier.sim.cluster.scenario import Disk, Host, Nodes, Scenario, Worker, changed
from kvtier.sim.workload.turns import Turn, TurnStream

GIB = 1 << 30
SMALL = changed(
    Scenario(),
    nodes=Nodes(workers=2),
    host=Host(capacity_bytes=2 * GIB),
    disk=Disk(capacity_bytes=4 * GIB),
    worker=Worker(pool_bytes=1 * GIB),
)


def load(seed, rows=120):
    """Conversations that grow and pause, with branches and more text than any tier holds."""
    chance, turns, t_s, past = random.Random(seed), [], 0.0, {}
    for row in range(rows):
        t_s += chance.expovariate(0.2)
        chat = chance.randrange(12)
        if chat in past and chance.random() < 0.9:
            ref, stored = chance.choice(past[chat][-2:])
        else:
            ref, stored = -1, 0
        tokens_in, out = stored + chance.randrange(100, 1500), chance.randrange(10, 200)
        if tokens_in > 6000:
            ref, stored, tokens_in = -1, 0, 1000
        past.setdefault(chat, []).append((row, tokens_in + out))
        turns.append(Turn(t_s, chat, chat % 2, 1, tokens_in, out, "u", "", -1.0, ref, stored))
    return turns


def run(scenario, turns, policy="lru"):
    cluster = Cluster(scenario, policy, FlopsCost(scenario.model, scenario.worker), 64)
    cluster.run(TurnStream("test", 64, iter(turns)))
    return cluster, result_of(cluster, scenario, policy)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("level", ["host", "disk"])
def test_the_core_and_the_runs_come_to_the_same(seed, level):
    scenario = changed(SMALL, level=level)
    _, fast = run(scenario, load(seed))
    cluster, core = run(changed(scenario, fidelity="core"), load(seed))
    assert core.requests == fast.requests == 120
    assert core.hits.bound == fast.hits.bound
    assert core.hits.total == pytest.approx(fast.hits.total, abs=4)
    assert core.resumed.p50_s == pytest.approx(fast.resumed.p50_s, rel=0.5)
    assert core.hits.host + core.hits.disk > 5
    # Everything that was begun has ended.
    node = cluster.nodes[0]
    assert not node._restoring and not node._asked
    assert node.core.state.host.usage().used_bytes <= SMALL.host.capacity_bytes
    assert node._disk.used_bytes <= SMALL.disk.capacity_bytes


def test_a_core_driven_simulation_repeats_to_the_byte():
    scenario = changed(SMALL, fidelity="core")
    first, second = (msgspec.json.encode(run(scenario, load(3, 60))[1]) for _ in range(2))
    assert first == second


def test_a_disk_that_holds_little_is_never_overfilled():
    scenario = changed(SMALL, fidelity="core", disk=Disk(capacity_bytes=300 << 20), level="disk")
    cluster, result = run(scenario, load(4, 60))
    assert 0 < cluster.nodes[0]._disk.used_bytes <= 300 << 20
    assert result.traffic.disk_written > 300 << 20


def test_what_a_core_cannot_do_is_said():
    with pytest.raises(ConfigError, match="no core"):
        run(changed(SMALL, fidelity="core"), load(1, 2), "none")
    nodes = Nodes(peer_bytes_per_s=1e9)
    with pytest.raises(ConfigError, match="peer_bytes_per_s"):
        run(changed(SMALL, fidelity="core", nodes=nodes), load(1, 2))


def test_texts_are_equal_as_far_as_blocks_are_shared():
    chains, jobs = Chains(64, 1.0), []
    for row, turn in enumerate(load(7)):
        front, last, known = chains.add(turn)
        job = Job(row, turn, front, last, known, resumes=False)
        jobs.append((job, packed_text(job, turn.tokens_in + turn.tokens_out)))
        if turn.ref >= 0:
            before = jobs[turn.ref][1]
            own = jobs[-1][1]
            assert own[: 4 * known] == before[: 4 * known]
            after = slice(4 * known, 4 * known + 256)
            assert own[after] != before[after] or not before[after]
    starts = [text[:256] for job, text in jobs if job.turn.ref < 0]
    assert len(set(starts)) == len(starts)
    assert len(pack_tokens(list(range(5)))) == 20
    assert all(a[0].row < b[0].row for a, b in pairwise(jobs))
