"""Worth against its shadow of LRU: that is LRU, what may be lost is bounded, and LRU leads meanwhile."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy import worth_guard
from kvtier.policy.defaults import make_policies
from kvtier.policy.usage import ParkedBlock, Turn
from kvtier.policy.worth_guard import Guard, LruShadow
from kvtier.policy.worth_runs import Book
from kvtier.testing.worth_rig import NBYTES, TOKENS, Node, chain, key

# --- the shadow of a node ---------------------------------------------------------------------------------


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
    """Host memory of `capacity` blocks and maybe a disk, and how much of what was asked for they had."""

    def __init__(self, eviction, capacity, disk_capacity=0, window=99):
        """window: in blocks; what lies behind it is dropped once a turn is parked."""
        self.window = window
        self.policies, self.capacity = make_policies(eviction, "cost"), capacity
        self.disk_capacity, self.on_disk = disk_capacity, {}
        self.held, self.hits, self.asked, self.now_s, self.lru_led = {}, 0, 0, 1e6, 0

    def turn(self, name, blocks, stop):
        """A request for all of a conversation, which ends at once."""
        self.now_s += 1.0
        host, usage = self.policies.host, self.policies.usage
        path = [ParkedBlock(key(name, n), n * TOKENS, (n + 1) * TOKENS, NBYTES) for n in range(blocks)]
        free_bytes = (self.disk_capacity - len(self.on_disk)) * NBYTES
        usage.passed(self.now_s, self.disk_capacity > 0, free_bytes)
        usage.asked(("t", name), blocks * TOKENS, self.now_s)
        self.asked += blocks
        # Behind the window of the last block nothing is needed.
        behind = len(path) - self.window if path[-1].key in self.held else 0
        self.hits += max(behind, 0)
        for block in path[max(behind, 0) :]:
            if block.key not in self.held and block.key not in self.on_disk:
                break
            host.used(block.key, self.now_s)
            self.hits += 1
        own = {block.key for block in path}
        for parent, block in zip([b"root", *(b.key for b in path)], path, strict=False):
            if block.key in self.on_disk:
                self.policies.disk.used(block.key, self.now_s)
            if block.key in self.held:
                host.used(block.key, self.now_s)
                continue
            if len(self.held) >= self.capacity:
                self._evict_one(own)
            host.added(block.key, parent, block.nbytes, self.now_s)
            self.held[block.key] = parent
        usage.parked(("t", name), path, Turn(stop), self.now_s)
        self.lru_led += usage.by_last_use()
        for block in path[: -self.window]:
            if self.held.pop(block.key, None) is not None:
                host.removed(block.key)

    def _evict_one(self, own):
        for victim in self.policies.host.victims(self.now_s):
            if victim not in own:
                if self.disk_capacity and victim not in self.on_disk:
                    self._write(victim, own)
                self.policies.host.removed(victim)
                del self.held[victim]
                return

    def _write(self, key, own):
        """To the disk, if that is worth it; what is worth least there goes."""
        if not self.policies.admission.demote(key, NBYTES, self.now_s):
            return
        disk = self.policies.disk
        for victim in disk.victims(self.now_s) if len(self.on_disk) >= self.disk_capacity else ():
            if victim not in own:
                disk.removed(victim)
                del self.on_disk[victim]
                break
        disk.added(key, self.held[key], NBYTES, self.now_s)
        self.on_disk[key] = None


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


def served_by_two_tiers(eviction, turns=1000):
    """Some come back more often than others: either tier has room for half of those whom LRU holds."""
    tier, chance = Tier(eviction, CAPACITY // 2, CAPACITY // 2), random.Random(1)
    for number in range(turns):
        name = f"regular {int(chance.expovariate(1 / 12))}" if number % 8 else f"once {number}"
        tier.turn(name, BLOCKS, "end_turn")
    return tier


def test_in_two_tiers_too_it_loses_no_more_than_its_bound(deceived):
    lru, worth = served_by_two_tiers("lru"), served_by_two_tiers("cost")
    assert worth.policies.usage.by_last_use()
    assert 0 < lru.hits - worth.hits <= worth_guard._PATIENCE * BLOCKS


def test_control_a_shadow_of_the_larger_tier_does_not_see_all_that_lru_would_have(deceived, monkeypatch):
    trim, most = LruShadow.trim, CAPACITY // 2 * NBYTES
    monkeypatch.setattr(LruShadow, "trim", lambda self, capacity: trim(self, min(capacity, most)))
    lru, worth = served_by_two_tiers("lru"), served_by_two_tiers("cost")
    assert lru.hits - worth.hits > 5 * worth_guard._PATIENCE * BLOCKS


def test_in_two_tiers_worth_that_is_not_deceived_leads():
    lru, worth = served_by_two_tiers("lru"), served_by_two_tiers("cost")
    assert not worth.lru_led
    assert worth.hits > lru.hits


def served_behind_windows(eviction, turns=800):
    """As `served`, by a model all of whose layers slide."""
    tier = Tier(eviction, CAPACITY // BLOCKS, window=1)
    for number in range(turns):
        tier.turn(f"once {number}" if number % 2 else f"regular {number // 2 % REGULARS}", BLOCKS, "end_turn")
    return tier


def test_behind_windows_too_it_loses_no_more_than_its_bound(deceived):
    lru, worth = served_behind_windows("lru"), served_behind_windows("cost")
    assert worth.lru_led
    bound = worth_guard._PATIENCE + 2 * CAPACITY / BLOCKS
    assert 0 < lru.hits - worth.hits <= bound * BLOCKS


def test_control_a_shadow_that_forgets_what_stands_on_what_is_gone_sees_nothing(deceived, monkeypatch):
    monkeypatch.setattr(LruShadow, "hollow", LruShadow.forget)
    lru, worth = served_behind_windows("lru"), served_behind_windows("cost")
    assert not worth.lru_led
    assert worth.hits < 0.5 * lru.hits


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
