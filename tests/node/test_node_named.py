"""Which blocks have a conversation's name: found without a walk over everybody else's."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvtier.messages.calls import Forget
from kvtier.node.blocks import BlockTree
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import problems
from kvtier.testing.rig_cluster import begun, end_well, pair, park_at
from kvtier.testing.rig_uses import UNIT

BLOCK = 4
ROOT = Root(b"root", "acme", b"f" * 32, "exact", BLOCK)
NAMES = [("acme", "a"), ("acme", "b"), ("umbrella", "a")]


def walked(tree, name):
    """The oracle: every block is looked at."""
    return [block for block in tree if name in block.names]


def objects_of(blocks):
    return [stored.meta for block in blocks for stored in block.parts.values()]


def expected_receipt(tree, name):
    """(erased objects, their bytes, kept objects, their bytes) by the walk over everything."""
    own = walked(tree, name)
    erased = objects_of(block for block in own if block.names == {name})
    shared = objects_of(block for block in own if block.names != {name})
    return len(erased), sum(m.nbytes for m in erased), len(shared), sum(m.nbytes for m in shared)


# --- what it costs ----------------------------------------------------------------------------------------


class Counting(dict):
    """A tree's blocks, and how many of them were looked at."""

    looked_at = 0

    def __getitem__(self, key):
        self.looked_at += 1
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.looked_at += 1
        return super().get(key, default)

    def values(self):
        self.looked_at += len(self)
        return super().values()


def looked_at_by_a_forget(rig, others):
    worker = rig.attach()
    rig.park(worker, "mine", range(10), level="disk")
    rig.park(worker, "mine", [*range(4), 90, 91])
    rig.run()
    for number in range(others):
        rig.park(worker, f"other{number}", [*range(4), *range(100 * number + 100, 100 * number + 120)])
        rig.run()
    tree = rig.core.state.tree
    tree._blocks = counting = Counting(tree._blocks)
    counting.looked_at = 0
    rig.ask(Forget(conversation="mine", tenant="acme"))
    looked_at = counting.looked_at
    assert not walked(tree, ("acme", "mine"))
    assert len(tree) > 5 * others
    return looked_at


def test_a_forget_looks_at_the_conversations_own_blocks_whatever_else_there_is(make_rig):
    few, many = (looked_at_by_a_forget(make_rig(arena_bytes=(1024 * UNIT,)), others) for others in (2, 40))
    assert 0 < few == many < 60


def looked_at_by_a_plan(rig, others):
    worker = rig.attach()
    for number in range(others):
        # Some are shorter than a block, and all begin at one root.
        rig.park(worker, f"other{number}", range(100 * number + 100, 100 * number + 101 + number % 11))
    rig.park(worker, "mine", range(11))
    rig.run()
    tree = rig.core.state.tree
    tree._blocks = counting = Counting(tree._blocks)
    planned = rig.plan(worker, "mine", range(12))
    looked_at = counting.looked_at
    assert planned.plan.load_tokens == 11
    rig.park(worker, "mine", range(12))
    rig.run()
    return looked_at, counting.looked_at


def test_a_plan_and_a_park_look_at_no_more_with_many_conversations(make_rig):
    few, many = (looked_at_by_a_plan(make_rig(arena_bytes=(1024 * UNIT,)), others) for others in (22, 88))
    assert few == many


# --- that it finds all, and only, of them -----------------------------------------------------------------

KEYS = st.integers(0, 23)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "name", "chain", "drop", "forget"]), KEYS, st.sampled_from(NAMES)
    ),
    max_size=80,
)


def parent_of(number):
    """A tree with long chains and forks."""
    return number - 1 if number % 6 else (number // 2 - 1 if number else -1)


def key_of(number):
    return ROOT.key if number < 0 else b"k%02d" % number


def depth_of(number):
    return 0 if number < 0 else 1 + depth_of(parent_of(number))


def meta_of(number):
    start = (depth_of(number) - 1) * BLOCK
    return ObjectMeta(ObjectId(key_of(number), 0, "all"), ROOT, key_of(parent_of(number)), start, BLOCK, 0, 1)


def live(tree, steps):
    """Carry out the steps: in any order, with parents missing, and with names only in a chain's middle."""
    for kind, number, name in steps:
        block = tree.get(key_of(number))
        if kind == "add":
            tree.add(meta_of(number))
        elif kind == "drop":
            tree.drop(meta_of(number).object_id)
        elif kind == "forget":
            expected = {b.key for b in walked(tree, name)}
            found = [b.key for b in tree.unname(name)]
            assert len(found) == len(expected)
            assert set(found) == expected
            assert not walked(tree, name)
        elif block is not None:
            tree.name([block] if kind == "name" else tree.chain(block.key), name, None)
        for each in NAMES:
            found = [b.key for b in tree.named(each)]
            assert len(found) == len(set(found))
            assert set(found) == {b.key for b in walked(tree, each)}


@settings(max_examples=400)
@given(STEPS)
def test_a_tree_finds_what_a_walk_over_all_of_it_finds(steps):
    tree = BlockTree()
    live(tree, steps)
    for name in NAMES:
        tree.unname(name)
    for number in range(24):
        tree.drop(meta_of(number).object_id)
    assert not len(tree)
    assert not tree._named
    assert not tree._children


class LosesTips(BlockTree):
    """Broken: what stands before a block that goes is not found any more."""

    def _move_tip(self, name, gone):
        self._named[name].tips.pop(gone.key, None)


class LooksAtTips(BlockTree):
    """Broken: it finds no more than the ends."""

    def named(self, name):
        return [self._blocks[tip] for tip in self._named[name].tips] if name in self._named else []


@pytest.mark.parametrize("broken", [LosesTips, LooksAtTips])
def test_a_tree_that_misses_some_is_noticed(broken):
    story = [("add", n, NAMES[0]) for n in (0, 1, 2)] + [("chain", 2, NAMES[0]), ("drop", 2, NAMES[0])]
    live(BlockTree(), story)
    with pytest.raises(AssertionError):
        live(broken(), story)


def test_a_conversation_that_was_forgotten_leaves_nothing_to_look_through(rig, worker):
    for name in ("a", "b"):
        rig.park(worker, name, [*range(8), ord(name)])
        rig.run()
    assert rig.ask(Forget(conversation="a", tenant="acme")).receipt.kept_shared_objects == 2
    assert set(rig.core.state.tree._named) == {("acme", "b")}


# --- a node's histories -----------------------------------------------------------------------------------

TEXTS = [range(10), range(22), [*range(8), 70, 71, 72, 73, 74], [*range(100, 115)], [*range(100, 108), 9]]
EVENTS = st.one_of(
    st.tuples(
        st.just("park"),
        st.sampled_from(NAMES),
        st.sampled_from(TEXTS),
        st.sampled_from(["host", "disk"]),
        st.sampled_from([None, 4]),
    ),
    st.tuples(st.just("break off"), st.sampled_from(NAMES), st.sampled_from(TEXTS), st.integers(0, 2)),
    st.tuples(st.just("forget"), st.sampled_from(NAMES)),
    st.tuples(st.just("power loss")),
)


def forget_and_compare(rig, name):
    expected = expected_receipt(rig.core.state.tree, name)
    answers = len(rig.answers)
    rig.ask(Forget(conversation=name[1], tenant=name[0]))
    rig.run()
    (answer,) = list(rig.answers.values())[answers]
    receipt = answer.receipt
    assert expected == (
        receipt.erased_objects,
        receipt.erased_bytes,
        receipt.kept_shared_objects,
        receipt.kept_shared_bytes,
    )
    assert not walked(rig.core.state.tree, name)


def happen(rig, worker, event):
    kind, *what = event
    if kind == "park":
        (tenant, name), tokens, level, private_from = what
        rig.park(worker, name, tokens, tenant=tenant, level=level, private_from=private_from)
        rig.run()
    elif kind == "break off":
        (tenant, name), tokens, batches = what
        rig.park(worker, name, tokens, tenant=tenant)
        for _ in range(batches):
            rig.finish(rig.copies()[0]) if rig.copies() else None
        rig.finish(rig.copies()[0], "it broke") if rig.copies() else None
        rig.run()
    elif kind == "forget":
        forget_and_compare(rig, what[0])
    else:
        rig = rig.restarted()
        rig.run()
        worker = rig.attach()
    assert problems(rig) == []
    return rig, worker


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, max_size=12))
def test_a_forget_answers_as_a_walk_over_everything_would(events):
    rig = CoreRig()
    worker = rig.attach()
    for event in events:
        rig, worker = happen(rig, worker, event)
    for name in NAMES:
        forget_and_compare(rig, name)
    assert not len(rig.core.state.tree)


def test_what_was_brought_from_another_node_is_found_too():
    here, there = pair()
    park_at(there)
    restore = begun(here)
    here.run()
    tree, name = here.core.state.tree, ("acme", "chat")
    assert restore.receipt.tokens == 10
    assert name not in here.core.state.conversations
    assert tree.named(name) == walked(tree, name) != []
    end_well(here, there)
