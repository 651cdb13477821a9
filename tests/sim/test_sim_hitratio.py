"""The command, and its decisions in the hands of a checker that knows the trace and the rules alone."""

import dataclasses
import json
import subprocess
import sys

import pytest

from kvtier.cli.main import run
from kvtier.errors import ConfigError
from kvtier.policy.baselines.interfaces import Outcome, Served
from kvtier.sim.hitratio import measure, sizes_of_lru_points, sizes_of_shares, unbounded_percent
from kvtier.sim.registry import POLICIES, Setup, make_policy
from kvtier.sim.replay import replay, replay_two_tiers

BLOCK_TOKENS = 16
LEAF_ONLY = ("lru", "tlru", "gdsf", "ttl", "cost", "clairvoyant")


def check(rows, decisions, capacity, *, leaf_only, bypass, expires=False):
    """Replays what a decisions file says; the token hit ratio in percent, or AssertionError."""
    paths, count, parent = [], 0, {}
    resident, hits = set(), 0
    assert [entry["row"] for entry in decisions] == list(range(len(rows)))
    for row, entry in zip(rows, decisions, strict=True):
        *_, ref, shared, blocks = row
        path = paths[ref][:shared] if ref >= 0 else []
        path = path + list(range(count, count + blocks - shared))
        count += blocks - shared
        parent |= dict(zip(path, [None, *path], strict=False))
        paths.append(path)
        front = next((i for i, block in enumerate(path) if block not in resident), len(path))
        assert entry["hit"] <= front if expires else entry["hit"] == front, "hit"
        hits += entry["hit"]
        passed = entry["bypassed"]
        assert len(set(passed)) == len(passed) and set(passed) <= set(path) - resident, "bypassed"
        assert bypass or len(path) > capacity or not passed, "bypassed what had to go in"
        held = resident | (set(path) - set(passed))
        for block in entry["evicted"]:
            assert block in resident and block in held, "evicted what was not there"
            assert bypass or expires or block not in path[:capacity], "evicted what was pinned"
            held.remove(block)
            assert not leaf_only or all(parent[other] != block for other in held), "no leaf"
        assert len(held) <= capacity, "capacity"
        resident = held
    return 100 * hits * BLOCK_TOKENS / sum(row[3] for row in rows)


@pytest.fixture
def kv(capsys):
    def call(*arguments):
        code = run(["hitratio", *map(str, arguments)])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


@pytest.fixture
def file_of(tmp_path, text_of):
    def write(rows, name="trace.kvt"):
        path = tmp_path / name
        path.write_bytes(text_of(rows))
        return path

    return write


def decided(kv, tmp_path, trace, policy, blocks, *more):
    out = tmp_path / f"{policy}.jsonl"
    code, text, err = kv(trace, "--blocks", blocks, "--policies", policy, "--decisions", out, "--json", *more)
    assert code == 0, err
    return json.loads(text), [json.loads(line) for line in out.read_text().splitlines()]


def rules_of(policy):
    return {
        "leaf_only": policy in LEAF_ONLY,
        "bypass": policy in ("cost", "clairvoyant", "never"),
        "expires": policy == "ttl",
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_decisions_obey_the_rules_and_give_the_score(kv, tmp_path, rows_of, file_of, policy):
    rows = rows_of(3)
    for blocks in (10, 60):
        result, decisions = decided(kv, tmp_path, file_of(rows), policy, blocks, "--ttl", "20")
        capacity = 10**9 if policy == "unbounded" else blocks
        assert check(rows, decisions, capacity, **rules_of(policy)) == pytest.approx(
            result["token_hit_percent"], abs=1e-9
        )
        assert result["token_hit_percent"] > 0 or policy == "never"


def spoilt(decisions, how):
    decisions = json.loads(json.dumps(decisions))
    at = next(i for i, entry in enumerate(decisions) if len(entry["evicted"]) > 1 and entry["hit"])
    entry = decisions[at]
    if how == "hit":
        entry["hit"] += 1
    elif how == "capacity":
        entry["evicted"].pop()
    elif how == "order":
        entry["evicted"].reverse()
    elif how == "unknown":
        entry["evicted"].append(10**6)
    elif how == "twice":
        entry["evicted"].append(entry["evicted"][0])
    elif how == "row":
        del decisions[at]
    return decisions


@pytest.mark.parametrize("how", ["hit", "capacity", "order", "unknown", "twice", "row"])
def test_the_checker_sees_what_is_wrong(kv, tmp_path, rows_of, file_of, how):
    rows = rows_of(3)
    _, decisions = decided(kv, tmp_path, file_of(rows), "lru", 30)
    check(rows, decisions, 30, **rules_of("lru"))
    with pytest.raises(AssertionError):
        check(rows, spoilt(decisions, how), 30, **rules_of("lru"))


def test_the_checker_sees_a_policy_that_evicts_inner_blocks(kv, tmp_path, rows_of, file_of):
    rows = rows_of(3)
    _, decisions = decided(kv, tmp_path, file_of(rows), "sieve", 30)
    with pytest.raises(AssertionError, match="no leaf"):
        check(rows, decisions, 30, **rules_of("lru"))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "clairvoyant"])
@pytest.mark.parametrize("causal", [False, True])
def test_decisions_do_not_depend_on_what_follows(rows_of, trace_of, policy, causal):
    rows, other = rows_of(5), rows_of(6)
    cut = 170
    follow = [[*row[:8], -1, 0, row[10]] for row in other[cut:]]
    follow = [[max(row[0], rows[cut - 1][0]), *row[1:]] for row in follow]
    logs = []
    for version in (rows, rows[:cut], rows[:cut] + follow):
        trace, log = trace_of(version), []

        def note(row, served, log=log):
            log.append((row, served.hit, served.evicted.tolist(), served.bypassed.tolist()))

        replay(trace, make_policy(policy, Setup(25, BLOCK_TOKENS), trace), causal=causal, on_served=note)
        logs.append(log[:cut])
    assert logs[0] == logs[1] == logs[2]
    assert policy in ("never", "unbounded") or any(evicted for _, _, evicted, _ in logs[0])


def test_the_prefix_test_would_see_a_look_ahead(rows_of, trace_of):
    hits = []
    for version in (rows_of(5), rows_of(5)[:170]):
        trace, log = trace_of(version), []
        policy = make_policy("clairvoyant", Setup(25, BLOCK_TOKENS), trace)
        replay(trace, policy, on_served=lambda row, served, log=log: log.append(served.evicted.tolist()))
        hits.append(log[:170])
    assert hits[0] != hits[1]


class Watcher:
    """Notes what it is told, and when."""

    def __init__(self):
        self.told, self.at_arrival, self.now = {}, [], 0.0

    def serve(self, arrival):
        self.at_arrival.append(arrival.outcome)
        self.now = arrival.t_s
        self.told |= {row: (outcome, arrival.t_s) for row, (outcome, t_s) in self.told.items() if t_s is None}
        return Served(0, arrival.path[:0], arrival.path)

    def finished(self, row, outcome):
        self.told[row] = (outcome, None)


def test_a_causal_replay_tells_outcomes_when_they_are_due(rows_of, trace_of):
    rows = rows_of(8)
    trace, causal, open_book = trace_of(rows), Watcher(), Watcher()
    replay(trace, causal, causal=True)
    replay(trace, open_book)
    assert set(causal.at_arrival) == {None}
    assert not open_book.told
    assert open_book.at_arrival[4] == Outcome(rows[4][4], rows[4][6], rows[4][7])
    times = [row[0] for row in rows]
    for row, values in enumerate(rows):
        due = values[0] + values[7]
        first = next((t for later, t in enumerate(times) if later > row and t >= due), None)
        if values[7] < 0 or first is None:
            assert row not in causal.told
        else:
            assert causal.told[row] == (Outcome(values[4], values[6], values[7]), first)


def test_cost_weighs_positions(trace_of):
    # A chain of 3 blocks, then the same 3: weights 1, 1 + 16/30000, 1 + 32/30000; 2 of the 3 fit.
    rows = [[0.0, 0, 0, 50, 0, "", "", -1, -1, 0, 3], [1.0, 0, 1, 50, 0, "", "", -1, 0, 3, 3]]
    result = measure(trace_of(rows), "lru", Setup(2, 16), share_percent=66)
    assert result.token_hit_percent == pytest.approx(100 * 2 * 16 / 100)
    assert result.cost_hit_percent == pytest.approx(100 * (2 + 16 / 30000) / (2 * (3 + 48 / 30000)))


def test_lru_points_are_the_smallest_sizes_that_reach_them(rows_of, trace_of):
    trace = trace_of(rows_of(9))
    bound = unbounded_percent(trace)
    for size, percent in zip(sizes_of_lru_points(trace, [30, 60, 80]), [30, 60, 80], strict=True):
        at, below = (
            measure(trace, "lru", Setup(blocks, 16), share_percent=0).token_hit_percent
            for blocks in (size.blocks, size.blocks - 1)
        )
        assert at >= bound * percent / 100 > below
    assert sizes_of_shares(trace, [50])[0].blocks == trace.unique_blocks // 2


def test_lru_points_need_reuse(trace_of):
    with pytest.raises(ConfigError, match="used twice"):
        sizes_of_lru_points(trace_of([[0.0, 0, 0, 50, 0, "", "", -1, -1, 0, 3]]), [30])


def test_a_line_for_each_policy_and_size(kv, rows_of, file_of):
    code, out, err = kv(
        file_of(rows_of(3)), "--shares", "5,20", "--policies", "lru,gdsf,clairvoyant", "--json"
    )
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(x["policy"], x["share_percent"]) for x in lines] == [
        (policy, share) for share in (5.0, 20.0) for policy in ("lru", "gdsf", "clairvoyant")
    ]
    by_name = {(x["policy"], x["share_percent"]): x for x in lines}
    for share in (5.0, 20.0):
        assert (
            by_name["lru", share]["token_hit_percent"] <= by_name["clairvoyant", share]["token_hit_percent"]
        )
        assert by_name["lru", share]["slow_writes_per_block"] > 0
        assert by_name["lru", share]["seconds"] > 0
    assert "lru" in kv(file_of(rows_of(3)), "--lru-points", "30")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--shares", "1", "--blocks", "4"],
        ["--shares", "x"],
        ["--shares", "0"],
        ["--shares", "0.0001"],
        ["--lru-points", "101"],
        ["--blocks", "-3"],
        ["--blocks", "0"],
        ["--blocks", "4", "--policies", "nothing"],
        ["--blocks", "1", "--policies", "lru"],
        ["--blocks", "4,5", "--policies", "lru", "--decisions", "x"],
    ],
)
def test_wrong_usage_is_told(kv, rows_of, file_of, arguments):
    code, out, err = kv(file_of(rows_of(3)), *arguments)
    assert (code, out) == (2, "")
    assert err


def test_a_bad_trace_is_told_with_its_line(kv, tmp_path):
    (tmp_path / "bad").write_text("nothing\n")
    code, _, err = kv(tmp_path / "bad", "--blocks", "4")
    assert code == 2
    assert "line 1" in err


def test_standard_input_is_read(rows_of, text_of):
    code = "import sys; from kvtier.cli.main import run; sys.exit(run(sys.argv[1:]))"
    arguments = ["hitratio", "-", "--blocks", "20", "--policies", "never", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=text_of(rows_of(3)),
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["capacity_blocks"] == 20


def test_a_policy_that_is_registered_can_be_named(kv, monkeypatch, rows_of, file_of):
    monkeypatch.setitem(POLICIES, "mine", dataclasses.replace(POLICIES["lru"]))
    code, out, _ = kv(file_of(rows_of(3)), "--blocks", "20", "--policies", "lru,mine", "--json")
    assert code == 0
    first, second = (json.loads(line)["token_hit_percent"] for line in out.splitlines())
    assert first == second


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "sieve", "gdsf"])
def test_two_tiers_write_every_block_at_most_when_it_leaves(rows_of, trace_of, policy):
    trace = trace_of(rows_of(3))
    score, writes = replay_two_tiers(trace, POLICIES[policy].two(Setup(80, BLOCK_TOKENS), 20))
    fast_only = measure(trace, policy, Setup(20, BLOCK_TOKENS), share_percent=0)
    assert score.token_hit_percent > fast_only.token_hit_percent
    assert writes > 0.3
    wide = Setup(3 * trace.unique_blocks, BLOCK_TOKENS)
    score, writes = replay_two_tiers(trace, POLICIES[policy].two(wide, 20))
    if policy in LEAF_ONLY:
        assert score.token_hit_percent == pytest.approx(unbounded_percent(trace))
    assert writes <= 1
