"""The cluster in virtual time: against sums done by hand, against queueing theory, and against itself."""

import contextlib
import gc
import io
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError, TraceError
from kvtier.sim.cluster import cluster as cluster_module
from kvtier.sim.cluster import run_node
from kvtier.sim.cluster.cluster import Cluster
from kvtier.sim.cluster.costs import FlopsCost
from kvtier.sim.cluster.deciders import policies_of
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.links import Drive, Link
from kvtier.sim.cluster.result import result_of
from kvtier.sim.cluster.scenario import Disk, Host, Nodes, Scenario, Worker, changed, read_scenario
from kvtier.sim.cluster.simulate import simulate
from kvtier.sim.cluster.store import RunStore
from kvtier.sim.workload.recorded import recorded_turns
from kvtier.sim.workload.settings import Synthetic
from kvtier.sim.workload.turns import Turn, TurnStream

GIB = 1 << 30
TOKEN_BYTES = 131072
ONE = changed(Scenario(), nodes=Nodes(workers=1))
COST = FlopsCost(ONE.model, ONE.worker)


def turn(t_s, tokens_in, out=0, *, conversation=0, number=0, ref=-1, shared=0, tenant=0):
    return Turn(t_s, conversation, tenant, number, tokens_in, out, "u", "", -1.0, ref, shared)


def run(scenario, turns, policy="lru", block_tokens=64):
    cluster = Cluster(scenario, policy, FlopsCost(scenario.model, scenario.worker), block_tokens)
    cluster.run(TurnStream("test", block_tokens, iter(turns)))
    return cluster


def small(**sizes):
    """A node with little room, so that everything has to move."""
    return changed(
        ONE,
        host=Host(capacity_bytes=sizes.get("host", 2 * GIB)),
        disk=Disk(capacity_bytes=sizes.get("disk", 8 * GIB)),
        worker=Worker(pool_bytes=sizes.get("pool", 4 * GIB)),
    )


def test_the_model_costs_what_its_sizes_say():
    assert COST.token_bytes == TOKEN_BYTES
    # Two operations for each of 7e9 weights, and attention.
    assert COST.seconds(0, 1000) == pytest.approx(0.01 + 2 * 6.98e9 * 1000 / 4e14, rel=0.02)
    assert COST.seconds(50_000, 1000) > 1.5 * COST.seconds(0, 1000)


def test_a_request_alone_waits_for_its_prefill_only():
    cluster = run(ONE, [turn(5.0, 4000, 10)])
    assert cluster.tally.ttft_s[0] == pytest.approx(COST.seconds(0, 4000), rel=1e-6)


def test_a_second_request_at_the_same_time_waits_for_the_first():
    cluster = run(ONE, [turn(5.0, 4000), turn(5.0, 4000, conversation=1)])
    assert list(cluster.tally.ttft_s) == pytest.approx([COST.seconds(0, 4000), 2 * COST.seconds(0, 4000)])


def test_a_conversation_that_the_engine_still_has_computes_its_new_tokens_only():
    cluster = run(ONE, [turn(0, 4000, 96), turn(60, 5000, ref=0, number=1, shared=4096)])
    assert cluster.tally.ttft_s[1] == pytest.approx(COST.seconds(4096, 904), rel=1e-6)
    assert cluster.tally.total().gpu == 4096


def test_an_engine_that_keeps_nothing_loads_what_the_one_that_does_still_has():
    forgetful = changed(ONE, worker=changed(ONE.worker, keeps_idle=False))
    turns = [turn(0, 4000, 96), turn(60, 5000, ref=0, number=1, shared=4096)]
    found = [run(scenario, turns).tally.total() for scenario in (ONE, forgetful)]
    assert [(counts.gpu, counts.host) for counts in found] == [(4096, 0), (0, 4096)]


def filler(count, at_s=60.0, tokens=30_000, first=100):
    """Other conversations, which need the pool, and host memory, for themselves."""
    return [turn(at_s + i, tokens, conversation=first + i) for i in range(count)]


def test_a_conversation_in_host_memory_comes_over_the_link():
    scenario = small(host=64 * GIB)
    turns = [turn(0, 4096), *filler(3), turn(500, 5000, ref=0, number=1, shared=4096)]
    cluster = run(scenario, turns)
    load_s = scenario.host.start_s + 4096 * TOKEN_BYTES / scenario.worker.link_bytes_per_s
    assert cluster.tally.ttft_s[-1] == pytest.approx(load_s + COST.seconds(4096, 904), rel=1e-5)
    assert cluster.tally.total().host == 4096


def test_a_conversation_on_disk_comes_from_the_drive():
    scenario = small(host=4 * GIB, disk=64 * GIB)
    turns = [turn(0, 4096), *filler(3), turn(500, 5000, ref=0, number=1, shared=4096)]
    cluster = run(scenario, turns)
    load_s = scenario.disk.start_s + 4096 * TOKEN_BYTES / scenario.disk.read_bytes_per_s
    assert cluster.tally.ttft_s[-1] == pytest.approx(load_s + COST.seconds(4096, 904), rel=1e-5)
    assert cluster.tally.total().disk == 4096


def test_what_is_nowhere_is_computed():
    scenario = small(host=4 * GIB, disk=0)
    turns = [turn(0, 4096), *filler(3), turn(500, 5000, ref=0, number=1, shared=4096)]
    cluster = run(scenario, turns)
    assert cluster.tally.ttft_s[-1] == pytest.approx(COST.seconds(0, 5000), rel=1e-5)
    assert cluster.tally.total().host == 0


def late(policy, *, host=64 * GIB, **speeds):
    """The last of three turns of one chat, which only comes in part before its deadline."""
    scenario = changed(small(host=host, disk=64 * GIB), deadline_s=0.05)
    scenario = changed(scenario, worker=changed(scenario.worker, **speeds))
    turns = [turn(0, 4096), *filler(3), turn(500, 5000, ref=0, number=1, shared=4096)]
    return scenario, run(scenario, turns, policy).tally


def test_of_a_restore_that_is_late_counts_what_came_before_its_deadline():
    scenario, tally = late("lru", host=4 * GIB)
    came = int((0.05 - scenario.disk.start_s) * scenario.disk.read_bytes_per_s / TOKEN_BYTES)
    assert tally.total().late == 1
    assert tally.total().disk == came
    assert tally.ttft_s[-1] == pytest.approx(0.05 + COST.seconds(came, 5000 - came), rel=1e-5)


def test_of_a_link_that_is_too_slow_for_the_deadline_counts_what_came():
    scenario, tally = late("lru", link_bytes_per_s=5e9)
    came = int((0.05 - scenario.host.start_s) * 5e9 / TOKEN_BYTES)
    assert (tally.total().late, tally.total().host) == (1, came)


def test_by_cost_a_load_ends_where_its_deadline_is_and_the_rest_is_computed():
    # All of it would take 0.065 s, and the link is about as quick as is guessed before it was used.
    _, tally = late("lru+cost", link_bytes_per_s=8.2e9)
    total = tally.total()
    assert total.late == 0
    assert 0 < total.host < 4096
    assert total.host % 512 == 0
    assert 0.05 < tally.ttft_s[-1] < COST.seconds(0, 5000)


def resumed_s(link_bytes_per_s, policy, *, mixed):
    """Time to first token of a conversation of 30,000 tokens in host memory, when all is quiet again."""
    scenario = small(host=256 * GIB, pool=6 * GIB)
    worker = changed(scenario.worker, link_bytes_per_s=link_bytes_per_s, mixed=mixed)
    scenario = changed(scenario, worker=worker, deadline_s=1000.0)
    turns = []
    # The policy learns what loads cost.
    for chat in range(30):
        turns.append(turn(chat * 100.0, 30_016, conversation=chat))
    for number, chat in enumerate(range(30)):
        t_s = 4000.0 + 100 * number
        turns.append(turn(t_s, 30_100, conversation=chat, ref=chat, number=1, shared=30_016))
    return run(scenario, turns, policy).tally.ttft_s[-1]


def test_a_mixed_restore_is_never_worse_and_nearly_twice_as_fast_at_break_even():
    compute_s, nbytes = COST.seconds(0, 30_100), 30_016 * TOKEN_BYTES
    for factor in (0.2, 0.5, 1.0, 2.0, 5.0):
        speed = factor * nbytes / compute_s
        load_s = ONE.host.start_s + nbytes / speed + COST.seconds(30_016, 84)
        best_s = min(compute_s, load_s)
        mixed_s = resumed_s(speed, "lru+cost", mixed=True)
        assert mixed_s <= 1.02 * best_s, factor
        if factor == 1.0:
            assert best_s / mixed_s >= 1.9
            assert resumed_s(speed, "lru+cost", mixed=False) > 0.95 * best_s


def test_a_request_that_no_pool_can_hold_is_refused_and_nothing_waits_for_it():
    scenario = small(pool=1 * GIB)
    turns = [turn(0, 10_000), turn(1, 11_000, ref=0, number=1, shared=10_000), turn(2, 1000, conversation=3)]
    cluster = run(scenario, turns)
    assert cluster.tally.refused == 2
    assert len(cluster.tally.ttft_s) == 1


def test_the_wait_before_a_single_server_is_that_of_pollaczek_and_khinchine():
    chance, t_s, turns = random.Random(1), 0.0, []
    takes_s = COST.seconds(0, 2048)
    for number in range(20_000):
        t_s += chance.expovariate(0.7 / takes_s)
        turns.append(turn(t_s, 2048, conversation=number))
    cluster = run(ONE, turns, "none")
    waits_s = [ttft_s - takes_s for ttft_s in cluster.tally.ttft_s]
    assert sum(waits_s) / len(waits_s) == pytest.approx(0.7 * takes_s / (2 * 0.3), rel=0.08)


def test_the_next_turn_waits_for_the_answer_before_it():
    first = turn(0, 60_000, 100)._replace(service_s=1.0)
    second = turn(3, 61_000, ref=0, number=1, shared=60_100)
    second = second._replace(service_s=1.0)
    cluster = run(ONE, [first, second])
    alone = run(ONE, [first])
    ended_s = alone.events.now_s
    assert ended_s > 3
    rows = cluster._rows
    # Two seconds after the answer, as in the load.
    assert rows.ended_s[1] > ended_s + 2
    assert cluster.tally.resumed_idle_s[0] == pytest.approx(2.0, rel=1e-5)
    open_loop = run(changed(ONE, closed=False), [first, second])
    assert open_loop.tally.resumed_idle_s[0] == 0.0


def test_a_conversation_that_moves_is_fetched_where_there_is_a_link():
    def moved(speed):
        nodes = Nodes(count=2, workers=1, overload_s=0.5, peer_bytes_per_s=speed)
        busy = [turn(99, 100_000, conversation=50 + i) for i in range(5)]
        turns = [turn(0, 8192), *busy, turn(100, 9000, ref=0, number=1, shared=8192)]
        return run(changed(ONE, nodes=nodes), turns).tally

    assert moved(0.0).moved == moved(10e9).moved == 1
    assert moved(0.0).total().peer == 0
    assert moved(10e9).total().peer == 8192


def test_only_what_is_not_here_is_fetched():
    nodes = Nodes(count=2, workers=1, overload_s=0.5, peer_bytes_per_s=10e9)
    busy = [turn(99, 100_000, conversation=50 + i) for i in range(5)]
    turns = [turn(0, 8192), *busy, turn(100, 9000, ref=0, number=1, shared=8192)]
    # Back where it was, which lacks what the second turn added.
    turns += [turn(199, 1000, conversation=60), turn(199, 100_000, conversation=61)]
    turns.append(turn(200, 9800, ref=6, number=2, shared=9000))
    found = run(changed(ONE, nodes=nodes), turns)
    assert found.tally.moved == 2
    assert found.nodes[0].to_peers.nbytes == 8192 * COST.token_bytes
    assert found.nodes[1].to_peers.nbytes < 1000 * COST.token_bytes
    assert found.tally.total().host == 8192


def test_what_would_come_too_late_is_not_sent():
    link = Link(1000.0, 0.0)
    assert link.send(0.0, 10_000, until_s=2.0) == 10.0
    assert (link.nbytes, link.send(1.0, 500)) == (2000, 2.5)
    # Its turn would come behind the deadline.
    assert link.send(1.0, 500, until_s=2.0) == 3.0
    assert (link.nbytes, link.busy_s) == (2500, 2.5)


@pytest.mark.parametrize("policy", ["none", "lru", "unbounded"])
def test_sums_agree(policy, rows_of, text_of):
    stream = recorded_turns(io.BytesIO(text_of(rows_of(3, requests=2000))))
    scenario = changed(ONE, host=Host(capacity_bytes=40 << 20), disk=Disk(capacity_bytes=100 << 20))
    cluster = Cluster(scenario, policy, COST, stream.block_tokens)
    cluster.run(stream)
    total = cluster.tally.total()
    found = total.gpu + total.host + total.disk + total.peer
    assert total.requests + cluster.tally.refused == 2000
    assert 0 < found <= total.known <= total.tokens_in
    assert total.prefill_s + total.pool_saved_s + total.load_saved_s == pytest.approx(total.plain_s)
    assert total.pool_saved_s + total.load_saved_s <= total.could_save_s + 1e-9
    engines = [engine for node in cluster.nodes for engine in node.engines]
    assert sum(engine.prefill_s for engine in engines) == pytest.approx(total.prefill_s)
    assert all(engine.running == engine._reserved == 0 for engine in engines)
    if policy == "unbounded":
        assert found == total.known - unfinished(total, cluster)


def unfinished(total, cluster):
    """What could not be found although nothing was ever dropped: its row had not ended."""
    return total.known - (total.gpu + total.host)


def test_more_room_is_no_worse(rows_of, text_of):
    def hits(host):
        stream = recorded_turns(io.BytesIO(text_of(rows_of(5, requests=2000))))
        scenario = changed(small(pool=64 << 20), host=Host(capacity_bytes=host), disk=Disk(capacity_bytes=0))
        cluster = Cluster(scenario, "lru", COST, stream.block_tokens)
        cluster.run(stream)
        return cluster.tally.total().host + cluster.tally.total().gpu

    few, some, many = hits(10 << 20), hits(100 << 20), hits(10 * GIB)
    assert few < some < many


def test_the_first_minutes_are_served_and_not_counted():
    turns = [turn(0, 4096), turn(100, 5000, ref=0, number=1, shared=4096)]
    cluster = run(changed(ONE, warmup_s=50.0), turns)
    assert cluster.tally.total().requests == 1
    assert cluster.tally.total().gpu == 4096
    result = result_of(cluster, changed(ONE, warmup_s=50.0), "lru")
    assert result.requests == 1
    with pytest.raises(TraceError, match="warm-up"):
        run(changed(ONE, warmup_s=5000.0), turns)


# --- stores -------------------------------------------------------------------------------------------------


class Greedy(RunStore):
    """A store that forgets to make room."""

    def _take_in(self, run, now_s):
        self.host.add(run, now_s)
        return True


def exercised(store_type, seed, monkeypatch=None):
    chance = random.Random(seed)
    scenario = small(host=300 << 20, disk=700 << 20, pool=256 << 20)
    cluster = Cluster(scenario, "lru", COST, 64)
    node = cluster.nodes[0]
    through = seed % 2 == 0
    store = store_type(300 << 20, scenario.disk, node.drive, node.store.policies, write_through=through)
    cluster.nodes[0].store = store
    over = []

    def check(rows):
        over.append(
            max(store.host.used_bytes - store.host.capacity_bytes, store.disk.used_bytes - (700 << 20))
        )

    turns, ends = [], []
    for row in range(400):
        ref = chance.randrange(row) if row and chance.random() < 0.7 else -1
        shared = min(chance.randrange(1, 4000), ends[ref]) if ref >= 0 else 0
        tokens_in, out = shared + chance.randrange(1, 1500), chance.randrange(200)
        ends.append(tokens_in + out)
        turns.append(
            turn(row * chance.random() * 2, tokens_in, out, conversation=row, ref=ref, shared=shared)
        )
    turns.sort(key=lambda t: t.t_s)
    turns = [t._replace(ref=-1, shared_tokens=0) if t.ref >= i else t for i, t in enumerate(turns)]
    turns = [
        t._replace(shared_tokens=min(t.shared_tokens, turns[t.ref].tokens_in + turns[t.ref].tokens_out))
        if t.ref >= 0
        else t
        for t in turns
    ]
    for t in turns:
        cluster.events.run_until(t.t_s)
        cluster._take_in(t)
        check(0)
    cluster.events.run_out()
    check(0)
    return store, over


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_no_tier_ever_holds_more_than_it_can_and_host_memory_holds_fronts(seed):
    store, over = exercised(RunStore, seed)
    assert max(over) <= 0
    for run in store.host._runs.values():
        assert run.parent is None or run.parent in store.host
    assert store.host.used_bytes == sum(run.nbytes for run in store.host._runs.values())
    assert store.disk.used_bytes == sum(run.nbytes for run in store.disk._runs.values())
    assert store.drive.written_bytes == sum(store.written.values())


def test_the_check_of_capacity_sees_a_store_that_makes_no_room():
    _, over = exercised(Greedy, 1)
    assert max(over) > 0


# --- links and events ---------------------------------------------------------------------------------------


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


class JobOfItself(cluster_module.Job):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.itself = self


@pytest.mark.parametrize(("job", "clean"), [(cluster_module.Job, True), (JobOfItself, False)])
def test_behind_a_day_there_are_no_cycles_to_collect(monkeypatch, no_collector, job, clean):
    # Uncompiled: the compiler leaves cycles of its own.
    monkeypatch.setattr(run_node, "compiled_policies_of", policies_of)
    monkeypatch.setattr(cluster_module, "Job", job)
    rows = [turn(60.0 * n, 2048, 64, conversation=n) for n in range(100)]
    gc.collect()
    state = run(small(host=GIB, disk=2 * GIB), rows, "cost+cost")
    assert (gc.collect() < len(rows)) == clean
    assert state.nodes[0].store.written, "host memory was full"


@pytest.mark.parametrize("rows", [[turn(0.0, 64)], []])
def test_a_day_leaves_the_collector_as_it_was(rows):
    with contextlib.suppress(TraceError):
        run(ONE, rows)
    assert gc.isenabled()


def test_a_link_serves_in_order():
    link = Link(100.0, 0.5)
    assert link.send(0.0, 200) == 2.5
    assert link.send(1.0, 100) == 3.5
    assert link.queued_bytes(1.0) == 200
    assert link.send(10.0, 100) == 11.5
    assert link.busy_s == 4.0


def test_reads_of_a_drive_pass_its_writes():
    drive = Drive(100.0, 50.0, 0.0, 25)
    assert drive.write(0.0, 500) == 10.0
    # Half a second of the batch that is being written, then the read.
    assert drive.read(1.0, 100) == 2.5
    assert drive.backlog_s(1.0) == 10.0
    assert drive.write(1.0, 50) == 12.0


def test_events_of_one_time_happen_in_the_order_in_which_they_were_asked_for():
    events, seen = Events(), []
    for name in "abc":
        events.at(1.0, seen.append, name)
    events.at(0.5, lambda _: events.at(0.0, seen.append, "late"), None)
    events.run_until(1.0)
    assert seen == ["late", "a", "b", "c"]
    assert events.now_s == 1.0


# --- scenarios ----------------------------------------------------------------------------------------------

TOML = """
policies = ["none", "lru"]
deadline_s = "2s"
[nodes]
count = 2
workers = 2
[host]
capacity_bytes = "64GiB"
[disk]
capacity_bytes = "1TiB"
[synthetic]
sessions_per_day = 600
hours = 6
[prices.gpu_hour]
h100 = 2.0
[prices.host]
per_gb_month = 1.0
[prices.disk]
per_gb_month = 0.05
per_tb_written = 0.1
"""


def test_a_scenario_reads_sizes_and_durations():
    scenario = read_scenario(TOML)
    assert scenario.host.capacity_bytes == 64 * GIB
    assert scenario.deadline_s == 2.0
    assert scenario.synthetic == Synthetic(sessions_per_day=600, hours=6)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("h100 = 2.0", "", "prices.gpu_hour.h100"),
        ("per_tb_written = 0.1", "", "prices.disk.endurance_tb_per_tb"),
        ("count = 2", "count = 0", "nodes.count"),
        ("count = 2", "counts = 2", "nodes.counts"),
        ('capacity_bytes = "1TiB"', "read_bytes_per_s = 0", "disk.read_bytes_per_s"),
        ('capacity_bytes = "1TiB"', 'capacity_bytes = "1TiX"', "disk.capacity_bytes"),
        ("hours = 6", "hours = -6", "synthetic.hours"),
        ("workers = 2", "workers = 'two'", "nodes.workers"),
        ('deadline_s = "2s"', "deadline_s = -1", "deadline_s"),
        ("per_gb_month = 1.0", "per_gb_month = -1.0", "prices.host.per_gb_month"),
        ("[nodes]", "[nodes", "scenario"),
        ("[nodes]", "[moods]\n[nodes]", "moods"),
    ],
)
def test_nonsense_in_a_scenario_is_named(old, new, field):
    assert old in TOML
    with pytest.raises(ConfigError) as caught:
        read_scenario(TOML.replace(old, new))
    assert caught.value.field == field


def test_a_missing_price_is_named():
    with pytest.raises(ConfigError, match=r"prices\.host.*missing"):
        read_scenario(TOML.replace("[prices.host]\nper_gb_month = 1.0\n", ""))


def test_an_unknown_policy_and_an_empty_load_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="telepathy"):
        simulate(changed(ONE, policies=("telepathy",)))
    with pytest.raises(TraceError, match="no request"):
        run(ONE, [])
    with pytest.raises(ConfigError, match="no file"):
        simulate(changed(ONE, trace=str(tmp_path / "none.kvt"), policies=("lru",)))


def test_a_simulation_repeats_to_the_byte():
    scenario = read_scenario(TOML)
    first, second = (msgspec.json.encode(simulate(scenario)) for _ in range(2))
    assert first == second
    assert first != msgspec.json.encode(simulate(changed(scenario, seed=2)))
