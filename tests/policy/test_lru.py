"""LeafLru against a model that looks at everything each time."""

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.policy.lru import LeafLru

KEYS = [bytes([k]) for k in range(12)]
ROOT = b"root"
# A fixed tree: every key's parent is always the same one, as block keys say.
PARENT = {key: KEYS[(index - 1) // 2] if index else ROOT for index, key in enumerate(KEYS)}
KEY = st.sampled_from(KEYS)


class Model:
    """Keys by the time of their last use; a leaf is what no other one stands on."""

    def __init__(self):
        self.used_at = {}
        self.clock = 0

    def touch(self, key):
        self.clock += 1
        self.used_at[key] = self.clock

    def leaves(self):
        parents = {PARENT[key] for key in self.used_at}
        return sorted((key for key in self.used_at if key not in parents), key=self.used_at.get)


class LruMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.lru = LeafLru()
        self.model = Model()

    @rule(key=KEY)
    def add(self, key):
        self.lru.added(key, PARENT[key], 1, 0.0)
        self.model.touch(key)

    @rule(key=KEY)
    def use(self, key):
        self.lru.used(key, 0.0)
        if key in self.model.used_at:
            self.model.touch(key)

    @rule(key=KEY)
    def remove(self, key):
        self.lru.removed(key)
        self.model.used_at.pop(key, None)

    @rule(keep=st.sets(KEY), stop_after=st.integers(0, 12))
    def evict(self, keep, stop_after):
        """As a tier does: skip what is in use, remove the rest, stop when there is room."""
        seen = []
        for key in self.lru.victims(0.0):
            assert key not in seen, "the same block came up twice"
            expected = [leaf for leaf in self.model.leaves() if leaf not in seen]
            assert key == expected[0]
            seen.append(key)
            if key not in keep:
                self.lru.removed(key)
                del self.model.used_at[key]
            if len(seen) > stop_after:
                break
        else:
            assert not [leaf for leaf in self.model.leaves() if leaf not in seen]

    @invariant()
    def the_order_is_the_models(self):
        assert list(self.lru.victims(0.0)) == self.model.leaves()
        assert len(self.lru) == len(self.model.used_at)


TestLru = LruMachine.TestCase
TestLru.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), KEY), max_size=60))
@settings(derandomize=True, deadline=None)
def test_no_block_goes_before_the_blocks_that_stand_on_it(steps):
    lru, held = LeafLru(), set()
    for what, key in steps:
        if what == "add":
            lru.added(key, PARENT[key], 1, 0.0)
            held.add(key)
        else:
            lru.removed(key)
            held.discard(key)
    for key in lru.victims(0.0):
        assert not any(PARENT[other] == key for other in held)
        lru.removed(key)
        held.discard(key)
    assert not held


def test_a_parent_comes_up_when_its_last_child_is_gone():
    lru = LeafLru()
    lru.added(b"front", ROOT, 1, 0.0)
    lru.added(b"end", b"front", 1, 0.0)
    victims = lru.victims(0.0)
    assert next(victims) == b"end"
    lru.removed(b"end")
    assert next(victims) == b"front"


def test_what_was_skipped_comes_up_again():
    lru = LeafLru()
    for key in KEYS:
        lru.added(key, ROOT, 1, 0.0)
    first = lru.victims(0.0)
    assert [next(first), next(first)] == KEYS[:2]
    first.close()
    assert list(lru.victims(0.0)) == KEYS


def test_blocks_may_come_before_their_front():
    lru = LeafLru()
    lru.added(b"end", b"front", 1, 0.0)
    lru.added(b"front", ROOT, 1, 0.0)
    assert list(lru.victims(0.0)) == [b"end"]


def test_unknown_keys_are_no_error():
    lru = LeafLru()
    lru.used(b"?", 0.0)
    lru.removed(b"?")
    assert list(lru.victims(0.0)) == []


def test_the_heap_stays_in_proportion_to_what_is_held():
    lru = LeafLru()
    lru.added(b"front", ROOT, 1, 0.0)
    lru.added(b"other", ROOT, 1, 0.0)
    for _ in range(20_000):
        lru.used(b"other", 0.0)
        lru.added(b"end", b"front", 1, 0.0)
        lru.removed(b"end")
    assert len(lru._heap) <= 2048
    assert list(lru.victims(0.0)) == [b"front", b"other"]
