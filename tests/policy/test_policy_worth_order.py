"""The order of eviction by worth: leaves only, least worth first, as time passes and people come back."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.errors import ConfigError
from kvtier.policy import worth_usage
from kvtier.policy.prices import money_of
from kvtier.policy.returns import class_of
from kvtier.policy.survival import CLASSES, EDGES_S, SurvivalCurve
from kvtier.policy.usage import ParkedBlock, Turn
from kvtier.policy.worth import pays, worth_of
from kvtier.policy.worth_order import WorthOrder
from kvtier.policy.worth_runs import Book
from kvtier.testing.worth_rig import DAY_S, NBYTES, TOKENS, Node, chain, key

# --- the order --------------------------------------------------------------------------------------------


def test_what_waits_for_a_tool_stays_longer_than_what_waits_for_a_person():
    node = Node()
    node.park("person", 3, turn=Turn("end_turn"))
    node.park("tool", 3, turn=Turn("tool_use"))
    assert node.evicted(4) == ["person 2", "person 1", "person 0", "tool 2"]
    node = Node()
    node.park("tool", 3, turn=Turn("tool_use"))
    node.park("person", 3, turn=Turn("end_turn"))
    assert node.evicted(1) == ["person 2"], "also where LRU would have taken the tool's"


def test_what_another_conversation_goes_on_from_stays_until_that_goes():
    node = Node()
    node.park("a", 4)
    node.park("b", 5, front="a", shared=2)
    assert node.evicted(7) == ["a 3", "a 2", "b/a2 4", "b/a2 3", "b/a2 2", "a 1", "a 0"]


def test_a_branch_that_was_left_waits_for_nobody():
    node = Node()
    node.park("a", 4)
    node.wait(5.0)
    node.park("old", 2)
    node.wait(1000.0)
    node.ask("a", 600)
    node.park("a", 4, front="", turn=Turn("end_turn"))
    path = [
        *chain("a", 2),
        *(ParkedBlock(key("edit", i), i * TOKENS, (i + 1) * TOKENS, NBYTES) for i in (2, 3)),
    ]
    for before, block in itertools.pairwise(path):
        node.policies.host.added(block.key, before.key, NBYTES, node.now_s)
    node.usage.parked(("t", "a"), path, Turn("end_turn"), node.now_s)
    assert node.evicted(2) == ["a 3", "a 2"]


def test_what_was_forgotten_or_is_past_its_time_goes_first():
    node = Node()
    node.park("kept", 1, turn=Turn("tool_use"))
    node.park("gone", 1, turn=Turn("tool_use"))
    node.park("until", 1, turn=Turn("tool_use", keep_until_s=node.now_s + 1.0))
    node.wait(0.1)
    node.park("last", 1, turn=Turn("end_turn"))
    node.usage.forgotten(("t", "gone"))
    node.wait(2.0)
    assert node.evicted(4) == ["gone 0", "until 0", "last 0", "kept 0"]


def test_models_that_nobody_serves_go_first_and_are_written_nowhere():
    node = Node()
    node.park("old", 1, turn=Turn("tool_use", model=b"old"))
    node.park("new", 1, turn=Turn("end_turn", model=b"new"))
    admission = node.policies.admission
    node.usage.passed(node.now_s, True, 10 * NBYTES)
    assert admission.demote(key("old", 0), NBYTES, node.now_s)
    node.usage.serves({b"new": None}, {b"old": None})
    assert not admission.demote(key("old", 0), NBYTES, node.now_s)
    assert admission.demote(key("new", 0), NBYTES, node.now_s)
    assert node.evicted(1, "disk") == ["old 0"]
    node.usage.serves({b"new": None, b"old": None}, {})
    assert node.evicted(2, "host") == ["new 0", "old 0"]


def test_a_hint_keeps_what_is_expected_soon():
    node = Node()
    for name in ("a", "b", "c"):
        node.park(name, 1)
    node.wait(3600.0)
    node.usage.hinted(("t", "a"), node.now_s + 60.0, None, node.now_s)
    assert node.evicted(2) == ["b 0", "c 0"]


def test_after_a_restart_conversations_wait_since_they_were_parked():
    node = Node()
    for name, ago_s in (("day", DAY_S), ("minute", 60.0), ("hour", 3600.0)):
        node.policies.disk.added(key(name, 0), b"root", NBYTES, node.now_s)
        node.usage.adopted(("t", name), chain(name, 1), Turn(), node.now_s - ago_s)
    assert node.evicted(3, "disk") == ["day 0", "hour 0", "minute 0"]


def test_a_run_without_leaves_is_not_remembered_by_what_it_was_worth_once():
    """What is left behind under other blocks becomes a leaf later: by then it waits for nobody."""
    node = Node()
    path, on_it = chain("a", 2), chain("b", 4, front="a", shared=2)[2:]
    node.park("a", 2, turn=Turn("tool_use"))
    # Its blocks lie under another conversation's, so they are no leaves when their worth falls.
    for block, parent in zip(on_it, (path[1].key, on_it[0].key), strict=True):
        node.policies.host.added(block.key, parent, NBYTES, node.now_s)
    node.usage.parked(("t", "a"), chain("new", 1), Turn("tool_use"), node.now_s)
    node.policies.host.removed(key("b/a2", 3))
    node.policies.host.removed(key("b/a2", 2))
    node.park("person", 1, turn=Turn("end_turn"))
    assert node.evicted(2) == ["a 1", "a 0"]


# --- the overnight hump -----------------------------------------------------------------------------------


def hump(node, nights=40):
    """People of tenant 'night' come back after ten hours, those of 'now' within a minute."""
    for night in range(nights):
        for number in range(4):
            node.park(f"n{night}.{number}", 1, tenant="night", tiers=())
            node.park(f"s{night}.{number}", 1, tenant="now", tiers=())
        node.wait(40.0, 4)
        for number in range(4):
            node.ask(f"s{night}.{number}", tenant="now")
        node.wait(36_000.0, 60)
        for number in range(4):
            node.ask(f"n{night}.{number}", tenant="night")
        node.wait(40.0, 4)


MORNING = (
    "[gpu_hour]\nh100 = 2.7\n[host]\nper_gb_month = 2.6\n[disk]\nper_gb_month = 0.5\nper_tb_written = 0.07\n"
)


def kept(node, name, tier):
    """Whether a conversation is worth its room in the tier now, at its price."""
    account = node.usage.account(key(name, 0), NBYTES, (0, TOKENS), node.now_s)
    rate = account.horizon_returns * account.gpu_second
    hours = account.horizon_s / 3600
    gain = rate * (account.host_saving_s if tier == "host" else account.disk_saving_s)
    return gain >= hours * (account.host_per_hour if tier == "host" else account.disk_per_hour)


def test_overnight_the_chat_stays_on_disk_and_leaves_host_memory():
    node = Node(money=money_of(MORNING))
    hump(node)
    node.park("sleeper", 2, tenant="night")
    node.wait(3600.0, 20)
    node.park("awake", 2, tenant="now")
    node.wait(1.0)
    account = node.usage.account(key("sleeper", 0), NBYTES, (0, TOKENS), node.now_s)
    assert account.returns[1] < 0.2 < 0.5 < account.returns[2], "nothing in the next hour, much by tomorrow"
    assert kept(node, "sleeper", "disk")
    assert not kept(node, "sleeper", "host")
    assert node.evicted(2, "host") == ["sleeper 1", "sleeper 0"]
    # Who does not come back by night at all is worth less on disk than who sleeps.
    node.park("left", 2, tenant="now")
    node.wait(3600.0, 20)
    assert node.evicted(1, "disk") in (["left 1"], ["awake 1"])


def test_with_the_hazard_of_the_moment_alone_the_sleeper_is_given_up(monkeypatch):
    """The control: without horizons nobody keeps a chat that nothing happens with for hours."""
    node = Node(money=money_of(MORNING))
    hump(node)
    node.park("sleeper", 2, tenant="night")
    node.wait(3600.0, 20)
    assert kept(node, "sleeper", "disk")
    monkeypatch.setattr("kvtier.policy.worth_account.worth_of", _next_class_only)
    assert not kept(node, "sleeper", "disk")


def _next_class_only(curve, idle_s):
    """What is expected of the present class of age."""
    whole = worth_of(curve, idle_s)
    upto_s = float(EDGES_S[class_of(idle_s) + 1]) - idle_s
    returns = float(curve.returns_within(upto_s, idle_s))
    return type(whole)(returns / upto_s, upto_s, returns, upto_s)


# --- writes -----------------------------------------------------------------------------------------------


def test_a_full_disk_takes_what_is_worth_more_than_what_it_pushes_out():
    node = Node()
    node.park("stored", 1, tiers=("disk",), turn=Turn("end_turn"))
    node.park("tool", 1, tiers=("host",), turn=Turn("tool_use"))
    node.wait(1.0)
    node.park("person", 1, tiers=("host",), turn=Turn("end_turn"))
    node.wait(3600.0, 10)
    admission = node.policies.admission
    assert not admission.demote(key("person", 0), NBYTES, node.now_s), "equal worth is not worth a write"
    node.park("fresh", 1, tiers=("host",), turn=Turn("end_turn"))
    assert admission.demote(key("fresh", 0), NBYTES, node.now_s)
    node.usage.passed(node.now_s, True, NBYTES)
    assert admission.demote(key("person", 0), NBYTES, node.now_s), "there is room"


def test_with_prices_a_write_has_to_pay_for_itself():
    dear = MORNING.replace("per_tb_written = 0.07", "per_tb_written = 700000")
    for text, written in ((MORNING, True), (dear, False)):
        node = Node(money=money_of(text))
        node.park("a", 1, tiers=("host",))
        node.usage.passed(node.now_s, True, 10 * NBYTES)
        assert node.policies.admission.demote(key("a", 0), NBYTES, node.now_s) is written


def test_what_is_computed_sooner_than_read_is_not_written():
    class Fast:
        """A thousand times as fast as reading."""

        def seconds(self, past, new):
            return 1e-9 * new

    node = Node()
    node.usage.serves({b"m": Fast()}, {})
    node.park("a", 1, tiers=("host",), turn=Turn(model=b"m"))
    node.park("b", 1, tiers=("host",), turn=Turn(model=b"other"))
    node.usage.passed(node.now_s, True, 10 * NBYTES)
    assert not node.policies.admission.demote(key("a", 0), NBYTES, node.now_s)
    assert node.policies.admission.demote(key("b", 0), NBYTES, node.now_s)


def test_paying_counts_the_room_and_the_write():
    curve = SurvivalCurve(np.concatenate((np.ones(20), np.zeros(CLASSES - 19))).astype(np.float32))
    # It comes back for sure, about 20 classes from now.
    held_s = float(curve.expected_wait_s(EDGES_S[20], 0.0))
    assert pays(curve, 0.0, 1.0, 0.99 / held_s)
    assert not pays(curve, 0.0, 1.0, 1.01 / held_s)
    assert not pays(curve, 0.0, 1.0, 0.99 / held_s, once=0.02)
    assert not pays(curve, 1e9, 1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "device", "field"),
    [
        ("[gpu_hour]\na = 1\nb = 2\n", "", "policy.device"),
        ("", "", "policy.device"),
        ("[gpu_hour]\na = 1\n", "b", "prices.gpu_hour.b"),
        ("[gpu]\n", "", "prices.gpu"),
    ],
)
def test_prices_have_to_name_the_device(text, device, field):
    with pytest.raises(ConfigError) as refused:
        money_of(text, device)
    assert refused.value.field == field


# --- the heap against a plain search ----------------------------------------------------------------------


class OrderMachine(RuleBasedStateMachine):
    """Chains that share fronts come, are used, go and are forgotten; the order is held against all runs."""

    order = WorthOrder

    def __init__(self):
        super().__init__()
        self.node = Node()
        host = self.node.policies.host
        self.host = type(self).order(host._book, "host")
        host._book.orders = [self.host]
        self.held = {}

    def _held_chain(self, name, blocks, shared):
        front = "a" if name != "a" else ""
        return chain(name, blocks, front=front, shared=min(shared, blocks) if front else 0)

    @rule(
        name=st.sampled_from("abcd"),
        blocks=st.integers(1, 5),
        shared=st.integers(0, 3),
        stop=st.sampled_from(["tool_use", "end_turn"]),
        model=st.sampled_from([b"m", b"n"]),
    )
    def park(self, name, blocks, shared, stop, model):
        path = self._held_chain(name, blocks, shared)
        parent = b"root"
        for block in path:
            self.host.added(block.key, parent, block.nbytes, self.node.now_s)
            self.held[block.key] = parent
            self.node.usage.stored(("t", name), block, self.node.now_s)
            parent = block.key
        self.node.usage.parked(("t", name), path, Turn(stop, model), self.node.now_s)

    @rule(name=st.sampled_from("abcd"), tokens=st.integers(1, 3))
    def ask(self, name, tokens):
        self.node.ask(name, tokens)

    @rule(seconds=st.sampled_from([0.1, 3.0, 70.0, 4000.0, 1e6]))
    def wait(self, seconds):
        self.node.wait(seconds)

    @rule(name=st.sampled_from("abcd"))
    def forget(self, name):
        self.node.usage.forgotten(("t", name))

    @rule(retired=st.booleans())
    def retire(self, retired):
        self.node.usage.serves({}, {b"n": None} if retired else {})

    @rule(name=st.sampled_from("abcd"), number=st.integers(0, 4))
    def use(self, name, number):
        self.host.used(key(name, number), self.node.now_s)

    @rule(count=st.integers(1, 6), skip=st.integers(0, 3))
    def evict(self, count, skip):
        """Leaves only; what is skipped is not offered again; each is the least of all runs with a leaf."""
        book, skipped = self.host._book, set()
        for victim in self.host.victims(self.node.now_s):
            assert victim not in skipped
            assert victim not in self.held.values(), "a block went before the one that stands on it"
            if skip:
                skip -= 1
                skipped.add(victim)
                continue
            if not skipped:
                leaves = [k for k in self.held if k not in self.held.values()]
                least = min(book.worth(book.owner(k), "host") for k in leaves)
                assert book.worth(book.owner(victim), "host") <= least * (1 + 1e-6) + self._slack()
            del self.held[victim]
            self.host.removed(victim)
            count -= 1
            if not count:
                break

    def _slack(self):
        """What falls within a class of age is only seen at its end."""
        book = self.host._book
        curves = [book.owner(k).curve for k in self.held]
        falls = [float(-np.diff(curve.rates).min()) for curve in curves if curve is not None]
        return max(falls, default=0.0) * book.saving_s(book.nobody, "host") * 4

    @invariant()
    def every_leaf_can_be_found(self):
        offered = list(self.host.victims(self.node.now_s))
        assert sorted(offered) == sorted(k for k in self.held if k not in self.held.values())
        assert len(self.host) == len(self.held)

    @invariant()
    def ranks_are_those_of_a_search_among_all_runs(self):
        book = self.host._book
        leaves = [k for k in self.held if k not in self.held.values()]
        runs = list(dict.fromkeys(book.owner(k) for k in leaves))
        keys = [*self.held, b"unknown"]
        places = [(book.worth(book.owner(k), "host"), book.owner(k).used_s) for k in keys]
        worths = [(book.worth(run, "host"), run.used_s) for run in runs]
        expected = [(sum(worth < place for worth in worths), len(runs)) for place in places]
        assert self.host.ranks(keys, self.node.now_s) == expected

    @invariant()
    def nothing_is_remembered_of_what_has_gone(self):
        blocks = self.host._book.blocks
        assert {key for key, block in blocks.items() if block.held} == set(self.held)
        assert set(blocks) <= {*self.held, *self.held.values()}
        assert self.host._book.held_bytes == sum(block.nbytes for block in blocks.values() if block.held)


OrderMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOrder = OrderMachine.TestCase


def test_an_order_that_offers_parents_is_noticed():
    """The control."""

    class Broken(WorthOrder):
        def added(self, key, parent, nbytes, now_s):
            super().added(key, parent, nbytes, now_s)
            before = self._blocks[parent]
            self._leaf(before, before.run) if before.held else None

    machine = type("Machine", (OrderMachine,), {"order": Broken})()
    machine.park("a", 3, 0, "end_turn", b"m")
    with pytest.raises(AssertionError):
        machine.every_leaf_can_be_found()


def test_an_order_that_never_looks_again_is_noticed(monkeypatch):
    """The control: worth as it was when it was parked is another order than worth now."""

    def first():
        node = Node()
        node.park("tool", 1, turn=Turn("tool_use"))
        node.wait(1000.0)
        node.park("person", 1, turn=Turn("end_turn"))
        node.wait(30.0)
        return node.evicted(1)

    assert first() == ["tool 0"], "a tool that did not come back in a quarter of an hour is late"
    monkeypatch.setattr(Book, "ranked", lambda self, run: None)
    monkeypatch.setattr(worth_usage.CostUsage, "passed", lambda self, *args: None)
    assert first() == ["person 0"]


def test_of_what_nobody_waits_for_no_curve_is_kept():
    node = Node()
    node.park("a", 3)
    node.ask("a", 600)
    first = node.usage._chats["t", "a"].run
    node.park("a", 2)
    left = node.order("host")._book.owner(key("a", 2))
    assert left is first and left.curve is None and not left.waiting
    node.park("b", 1)
    forgotten = node.usage._chats["t", "b"].run
    node.usage.forgotten(("t", "b"))
    assert forgotten.curve is None
    over = [entry[3] for entry in node.usage._due if entry[3].over]
    assert over and all(wait.run is None for wait in over)


def test_conversations_that_are_followed_are_bounded(monkeypatch):
    monkeypatch.setattr(worth_usage, "_MOST_CHATS", 10)
    node = Node()
    for number in range(50):
        node.park(f"c{number}", 1, tiers=())
    assert len(node.usage._chats) == 10
    assert math.isclose(node.usage._chats["t", "c49"].run.clock_s, node.now_s)
