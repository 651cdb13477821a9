"""The log of a live daemon in the simulator: the identical instructions, and one wrong measurement seen."""

import dataclasses
import io
import json
from dataclasses import dataclass

import msgpack
import msgspec
import pytest

from kvtier.cli.main import run
from kvtier.client.client import connect
from kvtier.config.secrets import tenant_secret
from kvtier.daemon.embedded import Embedded
from kvtier.errors import KvtierError
from kvtier.geometry import Geometry, GroupGeometry
from kvtier.keys import pack_tokens
from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.node import journal
from kvtier.node.events import Received
from kvtier.policy.defaults import make_policies
from kvtier.sim.calibration import Calibration, Speed, calibrate
from kvtier.sim.cluster import core_node
from kvtier.sim.cluster.scenario import Disk, Worker, read_scenario
from kvtier.sim.open_loop import compare
from kvtier.sim.stimuli import load_of_log, replay_log
from kvtier.sim.workload.write import kvtrace_lines
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for, tokens_of
from kvtier.testing.node_bench import SETTINGS

TURNS = (60, 110, 150)
CHATS = 14


@dataclass
class Logged:
    path: object
    secret: bytes
    config: object

    @property
    def entries(self):
        return list(journal.read(io.BytesIO(self.path.read_bytes())))

    def replay(self, entries=None):
        log = b"".join(msgpack.packb(entry) for entry in entries or self.entries)
        policy = self.config.policy
        return replay_log(
            io.BytesIO(log), lambda: make_policies(policy.eviction, policy.restore), self.secret
        )


def recorded(path):
    """Chats that grow in a daemon whose host memory holds some of them only."""
    daemon = Embedded({**SETTINGS, "log.stimulus_log": str(path)})
    daemon.start()
    kv = KvMemory(128)
    client = connect(daemon.socket_path)
    worker = client.attach(kv.model, kv.pool, shard=SHARD)
    try:
        for count in TURNS:
            for chat in range(CHATS):
                tokens, pages = tokens_of(chat, count), pages_for(count)
                plan = worker.plan(f"chat-{chat}", tokens[:-10])
                if plan.plan_id:
                    worker.restore(plan, pages, deadline_s=20.0)
                kv.put(chat, pages, count)
                park = worker.park(f"chat-{chat}", tokens, pages, level="disk")
                assert park.result(timeout_s=20.0).level == "disk"
        secret = tenant_secret(daemon.config)
        found = Logged(path, secret, daemon.config)
    finally:
        worker.close(wait_s=1.0)
        client.close()
        daemon.close()
        kv.close()
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("log") / "stimuli")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another run of the same machine."""
    return recorded(tmp_path_factory.mktemp("log") / "stimuli")


def messages(entries, kind):
    """(index, message) of the messages of one kind."""
    for index, entry in enumerate(entries):
        if entry.get("kind") == "Received":
            message = journal.unpack(entry).message
            if isinstance(message, kind):
                yield index, message


def test_the_simulators_core_gives_the_identical_instructions(logged):
    done = logged.replay()
    assert done.starts == 1
    assert done.stimuli == len(logged.entries) - 1 > 100
    assert len(list(messages(logged.entries, t.DiskReadDone))) > 0


def altered(logged, index, **values):
    entries = logged.entries
    message = msgspec.structs.replace(journal.unpack(entries[index]).message, **values)
    entries[index] |= journal.pack(Received(entries[index]["peer"], message))
    return entries


@pytest.mark.parametrize("kind", [t.DiskReadDone, t.Copied])
def test_one_altered_measurement_is_detected(logged, kind):
    found = list(messages(logged.entries, kind))
    # Of a copy to the pool: what a gather takes is not learned from.
    first = next(i for i, done in found if done.bytes and not any(getattr(done, "checksums", ())))
    assert logged.replay(altered(logged, first)) == logged.replay()
    seconds = 3 * dict(found)[first].seconds + 1.0
    with pytest.raises(KvtierError, match="other instructions"):
        logged.replay(altered(logged, first, seconds=seconds, bytes=1 + dict(found)[first].bytes))


def test_another_secret_and_what_is_no_log_are_errors(logged):
    with pytest.raises(KvtierError, match="secret"):
        replay_log(io.BytesIO(logged.path.read_bytes()), make_policies, b"x" * 32)
    for text in (b"", b"hello", msgpack.packb({"a": 1}), msgpack.packb([1, 2])):
        with pytest.raises(KvtierError):
            replay_log(io.BytesIO(text), make_policies, b"x" * 32)


def test_a_log_is_a_load(logged):
    load = load_of_log(io.BytesIO(logged.path.read_bytes()))
    turns = list(load.turns)
    assert len(turns) == len(TURNS) * CHATS == load.total
    assert [(x.turn, x.tokens_in, x.tokens_out) for x in turns[::CHATS]] == [
        (number, count - 10, 10) for number, count in enumerate(TURNS)
    ]
    size = load.block_tokens
    for row, turn in enumerate(turns):
        assert turn.conversation == row % CHATS and turn.service_s > 0
        if row < CHATS:
            assert turn.ref == -1
        else:
            assert turn.ref == row - CHATS
            assert turn.shared_tokens == TURNS[row // CHATS - 1] // size * size
    text = "".join(kvtrace_lines(load_of_log(io.BytesIO(logged.path.read_bytes()))))
    assert "chat-" not in text and len(text.splitlines()) == len(turns) + 1


def entry(at_s, message, peer="client:1"):
    return {"at_s": at_s, **journal.pack(Received(peer, message)), "sends": b""}


def test_parks_without_plans_and_fronts_by_key_are_requests_too():
    geometry = Geometry(4, 2, (GroupGeometry("full", token_bytes=8),))
    attach = m.Attach(fingerprint=b"m" * 32, model="m", geometry=geometry, shard="s", layout="l")

    def park(name, tokens, **more):
        packed = pack_tokens(list(tokens))
        return m.Park(worker="w", request=1, conversation=name, tenant="t", tokens=packed, **more)

    def plan(name, tokens, **more):
        return m.MakePlan(worker="w", conversation=name, tenant="t", tokens=pack_tokens(list(tokens)), **more)

    entries = [
        entry(1.0, attach),
        entry(2.0, park("a", range(10))),
        entry(3.0, plan("a", range(8, 14), after_key=b"k" * 16, after_tokens=8)),
        entry(4.0, park("a", range(8, 20), after_key=b"k" * 16, after_tokens=8)),
        entry(5.0, plan("", range(9))),
        entry(6.0, plan("b", range(3), after_key=b"u" * 16, after_tokens=8)),
    ]
    log = io.BytesIO(b"".join(msgpack.packb(e) for e in entries))
    turns = list(load_of_log(log).turns)
    assert [(x.tokens_in, x.tokens_out, x.ref, x.shared_tokens) for x in turns] == [
        (10, 0, -1, 0), (14, 6, 0, 8), (9, 0, 0, 8), (11, 0, -1, 0)
    ]  # fmt: skip
    assert [x.service_s for x in turns] == [-1.0, 1.0, -1.0, -1.0]
    assert [x.conversation for x in turns] == [0, 0, -1, 1]


def test_a_request_that_comes_before_the_one_before_it_is_parked_is_one_request():
    geometry = Geometry(4, 2, (GroupGeometry("full", token_bytes=8),))
    attach = m.Attach(fingerprint=b"m" * 32, model="m", geometry=geometry, shard="s", layout="l")
    told = {"worker": "w", "conversation": "a", "tenant": "t"}

    def plan(count):
        return m.MakePlan(tokens=pack_tokens(list(range(count))), **told)

    def park(count):
        return m.Park(request=1, tokens=pack_tokens(list(range(count))), **told)

    entries = [entry(1.0, attach), entry(2.0, plan(8)), entry(3.0, plan(16)), entry(4.0, park(12))]
    # What is parked of the second one ends before its prompt does.
    entries += [entry(5.0, park(14)), entry(6.0, park(40))]
    turns = list(load_of_log(io.BytesIO(b"".join(msgpack.packb(e) for e in entries))).turns)
    assert [(x.t_s, x.tokens_in, x.tokens_out, x.service_s) for x in turns] == [
        (0.0, 8, 4, 2.0), (1.0, 16, 0, 2.0), (4.0, 40, 0, -1.0)
    ]  # fmt: skip


def test_the_command_checks_a_log_and_makes_a_trace(logged, tmp_path, capsys):
    trace, secret = tmp_path / "day.kvt", tmp_path / "secret"
    secret.write_bytes(logged.secret)
    secret.chmod(0o600)
    eviction = logged.config.policy.eviction
    settings = ["--set", f"access.tenant_secret_file={secret}", "--set", f"policy.eviction={eviction}"]
    assert run(["record", str(logged.path), *settings, "--against", str(logged.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    count = len(logged.entries) - 1
    assert found["identical"] == f"{count} of {count} stimuli" and int(found["decisions"]) > 50
    assert run(["record", str(logged.path), "--config", str(tmp_path / "none.toml")]) != 0
    capsys.readouterr()
    assert run(["record", str(logged.path), "--no-check", "--trace", str(trace), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == str(len(TURNS) * CHATS)
    speeds = tmp_path / "speeds.toml"
    assert (
        run(["record", str(logged.path), *settings, "--no-check", "--scenario", str(speeds), "--json"]) == 0
    )
    assert int(json.loads(capsys.readouterr().out)["speeds"]) >= 3
    assert read_scenario(speeds.read_text()).disk.read_bytes_per_s != Disk().read_bytes_per_s
    assert run(["simulate", str(trace), "--policy", "lru", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == len(TURNS) * CHATS


def test_a_node_that_records_nothing_says_how_to(capsys):
    assert run(["record"]) != 0
    said = capsys.readouterr().err
    assert "log.stimulus_log" in said and "start the daemon again" in said


# --- with simulated services --------------------------------------------------------------------------------


def policies(logged):
    policy = logged.config.policy
    return lambda: make_policies(policy.eviction, policy.restore)


def test_every_decision_of_a_live_run_is_simulated_too(logged, other):
    """How many agree hangs on how busy the machine was in the two runs: that is for a benchmark to say."""
    speeds = calibrate(other.entries, policies(other), other.secret)
    assert 1e5 < speeds.read.bytes_per_s <= 1e12 and speeds.gather.start_s < 5
    decisions = compare(logged.entries, policies(logged), logged.secret, speeds)
    kinds = [decision.kind for decision in decisions]
    assert kinds.count("plan") == kinds.count("park") == len(TURNS) * CHATS
    assert kinds.count("restore") >= CHATS
    assert sum(decision.same for decision in decisions) > len(decisions) / 4


def by_cost():
    """What a daemon decides by whose configuration says nothing."""
    return make_policies("lru", "cost")


def differing(decisions):
    return sum(not decision.same for decision in decisions) / len(decisions)


def test_decisions_of_simulated_services_differ_in_two_percent_at_most(virtual_day):
    first, second = (virtual_day(seed, 0.5, "lru+cost").entries for seed in (1, 2))
    log = b"".join(msgpack.packb(e) for e in first)
    assert replay_log(io.BytesIO(log), by_cost, core_node.SECRET).stimuli == len(first) - 1
    speeds = calibrate(second, by_cost, core_node.SECRET)
    assert speeds.scatter.bytes_per_s == pytest.approx(Worker().link_bytes_per_s, rel=0.3)
    decisions = compare(first, by_cost, core_node.SECRET, speeds)
    kinds = [decision.kind for decision in decisions]
    assert kinds.count("plan") == kinds.count("park") == 150
    assert kinds.count("restore") > 30
    assert differing(decisions) <= 0.02
    loaded = sum(sum(decision.recorded.from_tiers.values()) for decision in decisions)
    assert loaded > 10_000
    assert sum(decision.misplaced_tokens for decision in decisions) <= 0.15 * loaded


def slower(speeds, times):
    """Copies and reads with so much less bandwidth."""
    slow = {name: getattr(speeds, name) for name in ("scatter", "read")}
    slow = {name: Speed(speed.start_s, speed.bytes_per_s / times) for name, speed in slow.items()}
    return dataclasses.replace(speeds, **slow)


@pytest.mark.parametrize(("times", "restore"), [(5, "cost"), (1, "load")])
def test_an_altered_calibration_and_an_altered_policy_are_both_noticed(virtual_day, times, restore):
    first, second = (virtual_day(seed, 0.5, "lru+cost").entries for seed in (1, 2))
    speeds = slower(calibrate(second, by_cost, core_node.SECRET), times)
    decisions = compare(first, lambda: make_policies("lru", restore), core_node.SECRET, speeds)
    assert differing(decisions) > 0.1


def test_services_that_are_far_too_slow_lead_to_other_decisions(virtual_day):
    snail = Speed(30.0, 1e3)
    decisions = compare(
        virtual_day(1, 0.5).entries,
        make_policies,
        core_node.SECRET,
        Calibration(snail, snail, snail, snail),
    )
    assert differing(decisions) > 0.2
