"""The shadow of LRU: it holds what LRU would, whatever is forgotten meanwhile."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy.lru import LeafLru
from kvtier.policy.worth_guard import LruShadow
from kvtier.policy.worth_runs import Block
from kvtier.testing.worth_rig import key


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


def test_what_stands_on_a_forgotten_block_is_found_by_nobody():
    """Others go on from it in pieces of their own."""
    shadow = LruShadow(Sizes())
    path = [key("a", n) for n in range(5)]
    other = [*path[:3], key("b", 3)]
    shadow.use(path, 1)
    shadow.use(other, 2)
    shadow.forget(path[2])
    assert [shadow.front(path), shadow.front(other)] == [2, 2]
    shadow.use(other, 3)
    assert [shadow.front(path), shadow.front(other)] == [5, 4]
    assert len(shadow) == shadow.nbytes == 6


def test_what_is_gone_behind_the_window_takes_no_room_and_ends_nothing():
    shadow = LruShadow(Sizes())
    path = [key("a", n) for n in range(5)]
    shadow.use(path, 1)
    for block in path[:4]:
        shadow.hollow(block)
    shadow.hollow(b"unknown")
    assert (shadow.front(path), shadow.nbytes) == (5, 1)
    shadow.use([*path, key("a", 5)], 2)
    assert (shadow.front(path), shadow.nbytes) == (5, 2)
    shadow.trim(1)
    assert (shadow.front(path), shadow.nbytes) == (5, 1)
    shadow.forget(path[4])
    assert (shadow.front(path), shadow.nbytes, len(shadow)) == (0, 0, 0)


STEPS = st.tuples(st.sampled_from(["use", "touch", "forget", "hollow", "trim"]), st.integers(0, 59))


@given(paths(), st.lists(STEPS, max_size=80))
@settings(max_examples=150)
def test_whatever_is_forgotten_a_front_has_no_gap_and_bytes_are_of_what_is_there(uses, steps):
    shadow, hollow, known = LruShadow(Sizes()), set(), uses or [[b"0"]]
    for request, (step, number) in enumerate(steps):
        path = known[number % len(known)]
        if step == "use":
            shadow.use(path, request)
            assert shadow.front(path) == len(path)
        elif step == "touch":
            shadow.touch(path)
        elif step == "trim":
            shadow.trim(number % 9)
        else:
            getattr(shadow, step)(path[number % len(path)])
            hollow |= {path[number % len(path)]} if step == "hollow" else set()
        hollow = {block for block in hollow if block in shadow}
        assert shadow.nbytes == len(shadow) - len(hollow)
        for each in known:
            assert shadow.front(each) == next((n for n, b in enumerate(each) if b not in shadow), len(each))


def test_what_a_new_block_weighs_that_is_gone_already():
    """As much as the block before it; the first one, as much as the path's own say."""
    held = {b"a": Block(b"a", None, held=1, nbytes=7)}
    shadow = LruShadow(held)
    shadow.use([b"a"], 1)
    shadow.use([b"a", b"b", b"c"], 2, 5)
    assert shadow.nbytes == 3 * 7
    shadow.use([b"x", b"y"], 3, 5)
    assert shadow.nbytes == 3 * 7 + 2 * 5
