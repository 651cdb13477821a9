"""Nodes that change, lose messages, restart and vanish, against what they really hold."""

import hashlib

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvtier.directory import announcer, block_table, streams
from kvtier.directory.announcements import Announcement, Answer, End, Layout, Part, Record, Run
from kvtier.directory.announcer import Announcer, Holding
from kvtier.directory.forms import Form
from kvtier.directory.routing import hints, shard_of_conversation, shards_of
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.directory.summary import Amounts, combine

FULL = Layout(16, (Part(0, "full", "all", 10),))
TWO = Layout(16, (Part(0, "full", "r0", 10), Part(0, "full", "r1", 10), Part(1, "state", "r0", 7)))
TENANTS = ("acme", "umbrella")
SHARDS = 2
NODES = st.integers(0, 2)
NUMBERS = st.sets(st.integers(0, 39), max_size=20)
HINTS = [hashlib.sha256(bytes([n])).digest()[:16] for n in range(40)]
NAMES = ("a", "b", "c")


def tenant_of(number):
    return TENANTS[number % 2]


class Node:
    """A node: what it holds, and its announcer. said: what the directory may know of it, in each shard."""

    def __init__(self, name):
        self.name, self.epoch = name, 0
        self.disk, self.records = {}, {}
        self.restart()

    def restart(self):
        """What is in host memory is lost."""
        self.epoch += 1
        self.blocks = {h: b._replace(host=0) for h, b in getattr(self, "blocks", {}).items() if b.disk}
        self.announcer = Announcer(self.name, self.epoch, SHARDS)
        self.fenced = False

    def set(self, number, layout, host, disk):
        holding = Holding(tenant_of(number), layout, 16 - number % 2, host, disk)
        if host or disk:
            self.blocks[HINTS[number]] = holding
        else:
            self.blocks.pop(HINTS[number], None)
        self.announcer.block(HINTS[number], holding)

    def give_snapshots(self):
        self.announcer.snapshot(self.blocks, self.records.values(), ())


class Cluster(RuleBasedStateMachine):
    """The truth is what the nodes hold; old: every message that was ever sent; heard: by shard and node."""

    def __init__(self):
        super().__init__()
        self.shards = [Shard(ShardSettings(n, SHARDS)) for n in range(SHARDS)]
        self.nodes = [Node(f"n{n}") for n in range(3)]
        self.old = []
        self.version = 0
        self.heard = [{} for _ in range(SHARDS)]

    def deliver(self, shard, message):
        heard = self.heard[shard]
        heard[message.node] = max(message.epoch, heard.get(message.node, 0))
        return self.shards[shard].apply(message, 0.0)

    @rule(node=NODES, numbers=NUMBERS, host=st.booleans(), disk=st.booleans())
    def change(self, node, numbers, host, disk):
        for number in numbers:
            self.nodes[node].set(number, FULL, int(host), int(disk))

    @rule(node=NODES, number=st.integers(0, 39), host=st.integers(0, 7), disk=st.integers(0, 7))
    def parts(self, node, number, host, disk):
        self.nodes[node].set(number, TWO, host, disk)

    @rule(node=NODES, name=st.sampled_from(NAMES), ends=st.integers(0, 2))
    def record(self, node, name, ends):
        self.version += 1
        ended = tuple(End(HINTS[n], 16 * (n + 1), float(self.version)) for n in range(ends))
        record = Record("acme", name, self.version, ended)
        if ended:
            self.nodes[node].records[name] = record
        else:
            self.nodes[node].records.pop(name, None)
        self.nodes[node].announcer.record(record)

    @rule(node=NODES, shard=st.integers(0, SHARDS - 1), fate=st.sampled_from("daxr"), times=st.integers(1, 4))
    def send(self, node, shard, fate, times):
        """A message is delivered, delivered without an answer, lost, or an old one comes again."""
        sender = self.nodes[node].announcer.senders[shard]
        self.nodes[node].give_snapshots()
        for _ in range(times):
            message = sender.next()
            if message is None:
                return
            self.old.append((shard, message))
            if fate == "x":
                # Lost, and so is the sender's memory of it: the numbers have a gap from here on.
                sender.answered(Answer(number=message.number))
            else:
                answer = self.deliver(shard, message)
                if fate != "a":
                    sender.answered(answer)

    @rule(data=st.data())
    def repeat(self, data):
        """An old message, maybe of an earlier epoch, comes again."""
        if self.old:
            shard, message = data.draw(st.sampled_from(self.old))
            self.deliver(shard, message)

    @rule(node=NODES)
    def restart(self, node):
        self.nodes[node].restart()

    @rule(node=NODES)
    def lost(self, node):
        for shard in self.shards:
            shard.lost(f"n{node}", self.nodes[node].epoch)
            for hits in (shard.find(t, b"".join(HINTS)) for t in TENANTS):
                assert (f"n{node}", self.nodes[node].epoch) not in hits.nodes

    @rule(shard=st.integers(0, SHARDS - 1))
    def crash(self, shard):
        self.shards[shard], self.heard[shard] = Shard(ShardSettings(shard, SHARDS)), {}

    @rule()
    def settle(self):
        """Everybody gets through; a probe shows a node that the directory knows nothing of it."""
        for node in self.nodes:
            for number, sender in enumerate(node.announcer.senders):
                self.settle_one(node, number, sender)
        self.compare()

    def settle_one(self, node, number, sender):
        sender.probe()
        for _ in range(20):
            if sender.wants_snapshot:
                node.give_snapshots()
            message = sender.next()
            if message is None:
                return
            self.old.append((number, message))
            sender.answered(self.deliver(number, message))
        raise AssertionError("the stream does not settle")

    def found(self):
        """(hint, node) -> (epoch, tenant, form) over all shards."""
        seen = {}
        where = shards_of(b"".join(HINTS), SHARDS)
        for number, shard in enumerate(self.shards):
            mine = [h for h, at in zip(HINTS, where, strict=True) if at == number]
            for tenant in TENANTS:
                hits = shard.find(tenant, b"".join(mine))
                for of, node_at, form_at in columns(hits):
                    name, epoch = hits.nodes[node_at]
                    assert (mine[of], name) not in seen, "a node is listed twice"
                    seen[mine[of], name] = (epoch, tenant, Form(*hits.forms[form_at]))
        return seen

    def compare(self):
        truth = {
            (hint, node.name): (node.epoch, h.tenant, Form(h.layout, h.tokens, h.host, h.disk))
            for node in self.nodes
            for hint, h in node.blocks.items()
        }
        assert self.found() == truth
        amounts = {}
        for (_, name), (_, tenant, form) in truth.items():
            sums = amounts.setdefault((name, tenant), [0, 0, 0, 0, 0])
            for at, held in ((0, form.host), (2, form.disk)):
                sums[at] += bool(held)
                sums[at + 1] += sum(
                    p.nbytes * (1 if p.kind == "state" else form.tokens)
                    for bit, p in enumerate(form.layout.parts)
                    if held >> bit & 1
                )
        for node in self.nodes:
            if node.records:
                amounts.setdefault((node.name, "acme"), [0, 0, 0, 0, 0])[4] = len(node.records)
        summary = combine(shard.summary() for shard in self.shards)
        assert summary.held == {key: Amounts(*sums) for key, sums in amounts.items()}
        assert summary.epochs == {node.name: node.epoch for node in self.nodes}
        for name in NAMES:
            held = {n.name: n.records[name].version for n in self.nodes if name in n.records}
            found = self.shards[shard_of_conversation("acme", name, SHARDS)].conversation("acme", name)
            assert (dict(found.versions) if found else {}) == held

    @invariant()
    def nothing_stale(self):
        """Of each node only the newest epoch that a shard heard of is ever told."""
        for (hint, name), (epoch, _, _) in self.found().items():
            assert epoch == self.heard[int(shards_of(hint, SHARDS)[0])][name]


def columns(hits):
    packed = ((hits.of, "I"), (hits.node_at, "H"), (hits.form_at, "I"))
    return list(zip(*(memoryview(column).cast(kind) for column, kind in packed), strict=True))


def run(examples=30, phases=(Phase.generate,)):
    run_state_machine_as_test(
        Cluster,
        settings=settings(max_examples=examples, stateful_step_count=30, deadline=None, phases=phases),
    )


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(block_table, "_LEAST_SLOTS", 16)
    monkeypatch.setattr(block_table, "_STEP", 8)
    monkeypatch.setattr(block_table, "_PACE", 1)
    monkeypatch.setattr(announcer, "MOST_BLOCKS", 7)
    monkeypatch.setattr(announcer, "MOST_RECORDS", 2)


def test_the_directory_follows_the_nodes():
    run(phases=tuple(Phase))


def whole(node, epoch, number, *runs, shard=0, shards=1, phase="whole"):
    stream = {"node": node, "epoch": epoch, "number": number, "shard": shard, "shards": shards}
    return Announcement(**stream, phase=phase, layouts=(FULL,), runs=runs)


def test_an_earlier_epoch_is_fenced():
    shard = Shard()
    shard.apply(whole("a", 5, 0, Run("acme", 0, 16, 1, 0, HINTS[0])), 0.0)
    answer = shard.apply(whole("a", 4, 9, Run("acme", 0, 16, 1, 0, HINTS[1])), 0.0)
    assert answer.fenced
    assert not answer.snapshot
    assert not shard.find("acme", HINTS[1]).nodes
    assert shard.find("acme", HINTS[0]).nodes == (("a", 5),)


def test_a_later_epoch_ends_the_one_before_even_without_a_snapshot():
    shard = Shard()
    shard.apply(whole("a", 5, 0, Run("acme", 0, 16, 1, 0, HINTS[0])), 0.0)
    assert shard.apply(whole("a", 6, 3, phase="change"), 0.0).snapshot
    assert not shard.find("acme", HINTS[0]).nodes
    assert shard.summary().absent == {"a": 6}


def test_what_was_there_answers_until_the_new_snapshot_is_whole():
    shard = Shard()
    two = Run("acme", 0, 16, 1, 0, HINTS[0] + HINTS[1])
    shard.apply(whole("a", 1, 0, two), 0.0)
    assert shard.apply(whole("a", 1, 2, phase="change"), 0.0).snapshot
    shard.apply(whole("a", 1, 3, Run("acme", 0, 16, 1, 0, HINTS[1]), phase="begin"), 0.0)
    assert len(shard.find("acme", HINTS[0] + HINTS[1]).of) == 8
    assert shard.summary().nodes["a"].host_blocks == 2
    shard.apply(whole("a", 1, 4, phase="end"), 0.0)
    assert len(shard.find("acme", HINTS[0] + HINTS[1]).of) == 4
    assert shard.summary().nodes["a"].host_blocks == 1


def test_a_tenant_sees_only_its_own():
    shard = Shard()
    shard.apply(whole("a", 1, 0, Run("acme", 0, 16, 1, 0, HINTS[0])), 0.0)
    assert shard.find("acme", HINTS[0]).nodes
    assert not shard.find("umbrella", HINTS[0]).nodes


def test_a_node_lost_many_times_leaves_no_rows_and_its_numbers_are_used_again():
    shard = Shard()
    for epoch in range(60):
        shard.apply(whole("a", epoch, 0, Run("acme", 0, 16, 1, 0, b"".join(HINTS))), 0.0)
        shard.lost("a", epoch)
    assert not shard.find("acme", b"".join(HINTS)).nodes
    for _ in range(3000):
        shard.tidy(0.0)
    assert shard.summary().rows == shard.summary().blocks == 0
    assert shard.summary().nodes == {}


@pytest.mark.parametrize(
    "message",
    [
        whole("a", 1, 0, shard=1, shards=2),
        whole("a", 1, 0, Run("acme", 1, 16, 1, 0, HINTS[0])),
        whole("a", 1, 0, Run("acme", 0, 16, 1, 0, HINTS[0][:9])),
        whole("a", 1, 0, Run("acme", 0, 16, 2, 0, HINTS[0])),
    ],
)
def test_what_no_sound_node_sends_changes_nothing(message):
    shard = Shard()
    with pytest.raises(ValueError, match=r"shard|run"):
        shard.apply(message, 0.0)
    assert not shard.summary().epochs


def test_hints_choose_shards_by_their_first_bytes():
    keys = [bytes([n]) + bytes(31) for n in range(256)]
    assert shards_of(hints(keys), 4).tolist() == [n // 64 for n in range(256)]


def test_a_gap_asks_for_a_snapshot_and_takes_nothing_before_it():
    shard = Shard()
    shard.apply(whole("a", 1, 0), 0.0)
    later = whole("a", 1, 2, Run("acme", 0, 16, 1, 0, HINTS[0]), phase="change")
    assert shard.apply(later, 0.0).snapshot
    assert shard.apply(whole("a", 1, 1, phase="change"), 0.0).snapshot
    assert not shard.find("acme", HINTS[0]).nodes
    assert not shard.apply(whole("a", 1, 3, Run("acme", 0, 16, 1, 0, HINTS[0])), 0.0).snapshot
    assert shard.find("acme", HINTS[0]).nodes


def test_a_message_that_comes_twice_is_taken_once():
    shard = Shard()
    shard.apply(whole("a", 1, 0), 0.0)
    change = whole("a", 1, 1, Run("acme", 0, 16, 1, 0, HINTS[0]), phase="change")
    gone = whole("a", 1, 2, Run("acme", 0, 16, 0, 0, HINTS[0]), phase="change")
    assert [shard.apply(m, 0.0).number for m in (change, change, gone, change, gone)] == [1, 1, 2, 2, 2]
    assert not shard.find("acme", HINTS[0]).nodes


def without_fences(admit):
    def trusting(self, message):
        stream = self.of(message.node)
        if message.epoch < stream.epoch:
            stream.epoch, stream.number = message.epoch, -1
        return admit(self, message)

    return trusting


def overlooks_gaps(admit):
    def patient(self, message):
        stream = self.of(message.node)
        if stream.phase == "live" and message.number > stream.number:
            stream.number = message.number - 1
        return admit(self, message)

    return patient


def takes_all(admit):
    def forgetful(self, message):
        self.of(message.node).number = message.number - 1
        return admit(self, message)

    return forgetful


def hoards(taken):
    def hoarding(self, stream, message):
        if message.phase in ("end", "whole"):
            stream.phase = "live"

    return hoarding


@pytest.mark.parametrize(
    ("method", "broken", "seen_by"),
    [
        ("admit", without_fences, test_an_earlier_epoch_is_fenced),
        ("admit", overlooks_gaps, test_a_gap_asks_for_a_snapshot_and_takes_nothing_before_it),
        ("admit", takes_all, test_a_message_that_comes_twice_is_taken_once),
        ("taken", hoards, test_what_was_there_answers_until_the_new_snapshot_is_whole),
    ],
)
def test_a_broken_directory_is_seen(monkeypatch, method, broken, seen_by):
    monkeypatch.setattr(streams.Streams, method, broken(getattr(streams.Streams, method)))
    with pytest.raises(AssertionError):
        seen_by()


def test_the_machine_sees_a_directory_that_keeps_the_dead(monkeypatch):
    monkeypatch.setattr(streams.Streams, "_silence", lambda self, stream: None)
    with pytest.raises((AssertionError, KeyError)):
        run(examples=200)
