"""Worth against its shadow of LRU: that is LRU, what may be lost is bounded, and LRU leads meanwhile."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy import worth_guard
from kvtier.policy.defaults import make_policies
from kvtier.policy.lru import LeafLru
from kvtier.policy.usage import ParkedBlock, Turn
from kvtier.policy.worth_guard import Guard, LruShadow
from kvtier.policy.worth_runs import Block, Book
from kvtier.testing.worth_rig import NBYTES, TOKENS, Node, chain, key

# --- the shadow -------------------------------------------------------------------------------------------


class Sizes(dict):
    """Every block is held, and has one byte."""

    def get(self, key):
        return Block(key, None, held=1, nbytes=1)


class Lru:
    """The daemon's own LRU over a tier of so many blocks, which takes a path at once."""

    def __init__(self, capacity):
        self.order, self.capacity = LeafLru(), capacity

    def use(self, path):
        held = set(self.order)
        for parent, block in zip([b"root", *path], path, strict=False):
            if block not in held:
                self.order.added(block, parent, 1, 0.0)
        # The front was used after what stands on it.
        for block in reversed(path):
            self.order.used(block, 0.0)
        for victim in self.order.victims(0.0):
            if len(self.order) <= self.capacity:
                return
            self.order.removed(victim)


def paths():
    """Paths of a tree: below each block up to three others."""
    steps = st.lists(st.integers(0, 2), min_size=1, max_size=9)
    return st.lists(steps, max_size=60).map(
        lambda all_: [[bytes(steps[: n + 1]) for n in range(len(steps))] for steps in all_]
    )


@given(paths(), st.integers(9, 25))
@settings(max_examples=80)
def test_the_shadow_holds_what_lru_holds(uses, capacity):
    lru, shadow = Lru(capacity), LruShadow(Sizes())
    for request, path in enumerate(uses):
        held = set(lru.order)
        front = next((n for n, block in enumerate(path) if block not in held), len(path))
        assert shadow.front(path) == front
        lru.use(path)
        shadow.use(path, request)
        shadow.trim(capacity)
        assert shadow.nbytes == len(shadow) == len(lru.order)
        assert all(block in shadow for block in lru.order)


def test_a_touch_is_a_use_of_what_is_there():
    shadow = LruShadow(Sizes())
    for number, name in enumerate("ab"):
        shadow.use([key(name, n) for n in range(3)], number)
    shadow.touch([key("a", n) for n in range(5)])
    shadow.trim(3)
    assert [key("a", n) in shadow for n in range(3)] == [True] * 3


def test_what_was_forgotten_is_gone_with_what_stands_on_it():
    shadow = LruShadow(Sizes())
    path = [key("a", n) for n in range(5)]
    shadow.use(path, 1)
    shadow.forget(path[2])
    shadow.forget(b"unknown")
    assert (shadow.front(path), len(shadow), shadow.nbytes) == (2, 2, 2)
    shadow.use(path, 2)
    assert shadow.front(path) == 5
    assert shadow.front(path, before=2) == 2


def test_the_shadow_never_holds_more_than_the_tiers():
    node = Node()
    shadow = node.usage._guard.shadow
    for number in range(20):
        node.park(f"c{number}", 4)
        node.evicted(3), node.evicted(3, "disk")
        assert shadow.nbytes <= len(set(node.order("host")) | set(node.order("disk"))) * NBYTES + 3 * NBYTES
    node.park("last", 1)
    held = set(node.order("host")) | set(node.order("disk"))
    assert shadow.nbytes == len(held) * NBYTES


def test_what_a_caller_forgot_leaves_the_shadow_and_a_victim_does_not():
    node = Node()
    node.park("a", 3)
    node.park("b", 3)
    shadow = node.usage._guard.shadow
    for tier in ("host", "disk"):
        node.order(tier).removed(key("a", 2))
    assert key("a", 2) not in shadow
    gone = node.evicted(1)[0].encode()
    assert node.evicted(1, "disk")[0].encode() == gone
    assert gone in shadow


# --- who leads --------------------------------------------------------------------------------------------


class Tier:
    """One tier of `capacity` blocks, and how much of what was asked for it had."""

    def __init__(self, eviction, capacity):
        self.policies, self.capacity = make_policies(eviction, "cost"), capacity
        self.held, self.hits, self.asked, self.now_s = {}, 0, 0, 1e6

    def turn(self, name, blocks, stop):
        """A request for all of a conversation, which ends at once."""
        self.now_s += 1.0
        host, usage = self.policies.host, self.policies.usage
        path = [ParkedBlock(key(name, n), n * TOKENS, (n + 1) * TOKENS, NBYTES) for n in range(blocks)]
        usage.passed(self.now_s, False, 0)
        usage.asked(("t", name), blocks * TOKENS, self.now_s)
        self.asked += blocks
        for block in path:
            if block.key not in self.held:
                break
            host.used(block.key, self.now_s)
            self.hits += 1
        own = {block.key for block in path}
        for parent, block in zip([b"root", *(b.key for b in path)], path, strict=False):
            if block.key in self.held:
                host.used(block.key, self.now_s)
                continue
            if len(self.held) >= self.capacity:
                self._evict_one(own)
            host.added(block.key, parent, block.nbytes, self.now_s)
            self.held[block.key] = None
        usage.parked(("t", name), path, Turn(stop), self.now_s)

    def _evict_one(self, own):
        for victim in self.policies.host.victims(self.now_s):
            if victim not in own:
                self.policies.host.removed(victim)
                del self.held[victim]
                return


BLOCKS, CAPACITY, REGULARS = 3, 72, 10


@pytest.fixture
def deceived(monkeypatch):
    """Those who come once are taken for those who will be back at once, and those who come back for lost."""
    monkeypatch.setattr(Book, "_rate", lambda self, run: 1.0 if run.name[1].startswith("once") else 1e-9)


def served(eviction, turns=1200):
    """Some come back again and again, and as many strangers come between them: LRU has room for both."""
    tier = Tier(eviction, CAPACITY)
    for number in range(turns):
        tier.turn(f"once {number}" if number % 2 else f"regular {number // 2 % REGULARS}", BLOCKS, "end_turn")
    return tier


def test_worth_that_is_deceived_loses_no_more_than_its_bound(deceived):
    lru, worth = served("lru"), served("cost")
    assert lru.hits == (600 - REGULARS) * BLOCKS
    assert worth.policies.usage.by_last_use() and lru.policies.usage.by_last_use()
    # The bound, and until what worth had chosen has gone.
    bound = worth_guard._PATIENCE + 2 * CAPACITY / BLOCKS
    assert 0 < lru.hits - worth.hits <= bound * BLOCKS


def test_without_the_guard_it_loses_nearly_everything(deceived, monkeypatch):
    monkeypatch.setattr(worth_guard, "_PATIENCE", math.inf)
    assert served("cost").hits < 0.2 * served("lru").hits


def test_worth_leads_again_once_half_of_the_debt_is_forgotten(deceived, monkeypatch):
    monkeypatch.setattr(worth_guard, "_MEMORY", 1 - 1 / 100)
    changes = []
    judge = Guard._judge

    def watched(self, *turn):
        before = self._book.lru_leads
        judge(self, *turn)
        if self._book.lru_leads != before:
            changes.append(self._book.lru_leads)

    monkeypatch.setattr(Guard, "_judge", watched)
    served("cost", 800)
    assert changes[:3] == [True, False, True]


def test_what_was_won_is_a_credit_only_up_to_the_bound(monkeypatch):
    """However long it did well, worth loses no more afterwards."""
    good = {"yes": True}

    def rate(self, run):
        return 1.0 if run.name[1].startswith("once") != good["yes"] else 1e-9

    monkeypatch.setattr(Book, "_rate", rate)
    tier, lru = Tier("cost", 32), Tier("lru", 32)
    won = []
    for number in range(1600):
        good["yes"] = number < 800
        # LRU has room for neither kind in the first half, and for the regulars in the second.
        regulars = 8 if good["yes"] else 3
        name = f"once {number}" if number % 2 else f"regular {number // 2 % regulars}"
        tier.turn(name, BLOCKS, "end_turn"), lru.turn(name, BLOCKS, "end_turn")
        won.append((tier.hits - lru.hits) / BLOCKS)
    assert won[799] > 10 * worth_guard._PATIENCE
    assert 0 < won[799] - won[-1] <= 2 * worth_guard._PATIENCE + 2 * 32 / BLOCKS


def test_while_lru_leads_the_disk_takes_what_host_memory_lets_go():
    node = Node()
    node.park("worthless", 1, tiers=("host",))
    node.usage.forgotten(("t", "worthless"))
    node.park("worth", 3, turn=Turn("tool_use"))
    admission, book = node.policies.admission, node.order("host")._book
    assert not admission.demote(key("worthless", 0), NBYTES, node.now_s)
    assert not node.usage.by_last_use()
    book.lru_leads = True
    assert admission.demote(key("worthless", 0), NBYTES, node.now_s)


@given(st.lists(st.tuples(st.sampled_from(["park", "use", "evict"]), st.integers(0, 7)), max_size=60))
@settings(max_examples=60)
def test_by_last_use_the_run_used_longest_ago_goes(steps):
    node = Node()
    order = node.order("host")
    # Names and how many blocks are left, the one used longest ago first.
    used: dict[str, int] = {}
    for step, chat in steps:
        node.wait(1.0)
        order._book.lru_leads = True
        name = f"c{chat}"
        if step == "evict" and used:
            oldest = next(iter(used))
            used[oldest] -= 1
            assert node.evicted(1) == [f"{oldest} {used[oldest]}"]
            if not used[oldest]:
                del used[oldest]
        elif step == "use" and name in used:
            order.used(key(name, 0), node.now_s)
            used[name] = used.pop(name)
        elif step == "park" and name not in used:
            node.park(name, 2, tiers=("host",))
            used[name] = 2
    order._book.lru_leads = True
    left = [f"{name} {at}" for name, blocks in used.items() for at in reversed(range(blocks))]
    assert [*node.evicted(len(left) + 1)] == left


def test_the_same_turns_give_the_same_decisions(deceived):
    one, other = served("cost", 300), served("cost", 300)
    assert (one.hits, list(one.held)) == (other.hits, list(other.held))


def test_after_a_restart_the_shadow_has_what_was_adopted():
    node = Node()
    path = chain("a", 3)
    for before, block in zip([None, *path], path, strict=False):
        node.order("disk").added(block.key, before.key if before else b"root", NBYTES, node.now_s)
    node.usage.adopted(("t", "a"), path, Turn(), node.now_s - 50.0)
    shadow = node.usage._guard.shadow
    assert (shadow.front([block.key for block in path]), shadow.nbytes) == (3, 3 * NBYTES)
    assert not node.order("disk")._book.lru_leads


def test_of_paths_that_were_parked_a_bounded_part_is_known(monkeypatch):
    monkeypatch.setattr(worth_guard, "_SWEEP_FROM", 0)
    tier = Tier("cost", 30)
    for number in range(60):
        tier.turn(f"c{number}", BLOCKS, "end_turn")
    guard = tier.policies.usage._guard
    assert guard._known_blocks == sum(map(len, guard._paths.values())) == worth_guard._PATHS * 30
    # Whose path is not known is judged by what is there when it is parked.
    tier.turn("c0", BLOCKS, "end_turn")
    assert guard._known_blocks == worth_guard._PATHS * 30
