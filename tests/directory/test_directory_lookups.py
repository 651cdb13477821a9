"""Fronts of a chain against a plain reading of what 'restorable' means, over random layouts and holdings."""

import hashlib

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.directory import lookups
from kvtier.directory.announcements import Layout, Part
from kvtier.directory.announcer import Announcer, Holding
from kvtier.directory.lookups import Front, Hits, fronts, questions
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.keys import BlockRef

BLOCK = 16
RANKS = ("r0", "r1")
PARTS = st.one_of(
    st.builds(Part, st.just(0), st.just("full"), st.sampled_from(RANKS), st.integers(1, 9)),
    st.builds(
        Part, st.just(1), st.just("sliding"), st.sampled_from(RANKS), st.integers(1, 9), st.integers(2, 70)
    ),
    st.builds(Part, st.just(2), st.just("state"), st.sampled_from(RANKS), st.integers(1, 9)),
)
LAYOUTS = st.lists(PARTS, min_size=1, max_size=4, unique_by=lambda p: (p.group, p.shard)).map(
    lambda parts: Layout(BLOCK, tuple(parts))
)


def chain(blocks, tail):
    names = [hashlib.sha256(b"block%d" % n).digest() for n in range(blocks)]
    sizes = [BLOCK] * (blocks - 1) + [tail]
    return [BlockRef(k, b"", n * BLOCK, size) for n, (k, size) in enumerate(zip(names, sizes, strict=True))]


class Directory:
    """Shards and the nodes that announce to them."""

    def __init__(self, shards):
        self.shards = [Shard(ShardSettings(n, shards)) for n in range(shards)]

    def announce(self, node, epoch, held):
        announcer = Announcer(node, epoch, len(self.shards))
        announcer.snapshot({key[:16]: holding for key, holding in held.items()}, (), ())
        for shard, sender in zip(self.shards, announcer.senders, strict=True):
            while (message := sender.next()) is not None:
                sender.answered(shard.apply(message, 0.0))

    def fronts(self, refs, wanted=()):
        asked = questions(refs, len(self.shards))
        wire = [(q, msgspec.msgpack.encode(self.shards[q.shard].find("acme", q.keys))) for q in asked]
        return fronts(refs, [(q, msgspec.msgpack.decode(hits, type=Hits)) for q, hits in wire], wanted)


def plain_front(node, refs, held, wanted):
    """The same by the definition, block by block."""
    best = None
    for count in range(1, len(refs) + 1):
        end = refs[count - 1].start + refs[count - 1].tokens
        needed = []
        for at, ref in enumerate(refs[:count]):
            holding = held.get(ref.key)
            if holding is None:
                return best
            parts = [(b, p) for b, p in enumerate(holding.layout.parts) if not wanted or p.shard in wanted]
            if not set(wanted) <= {p.shard for _, p in parts}:
                return best
            for bit, part in parts:
                first = max(0, end - part.window_tokens + 1)
                if (
                    part.kind == "full"
                    or (part.kind == "sliding" and ref.start + ref.tokens > first)
                    or (part.kind == "state" and at == count - 1)
                ):
                    needed.append((holding, bit, part))
        if any(not (h.host | h.disk) >> bit & 1 for h, bit, _ in needed):
            continue
        sums = {"host": 0, "disk": 0}
        for holding, bit, part in needed:
            nbytes = part.nbytes * (1 if part.kind == "state" else holding.tokens)
            sums["host" if holding.host >> bit & 1 else "disk"] += nbytes
        best = Front(node, 1, count, end, sums["host"], sums["disk"])
    return best


CASES = st.builds(
    lambda *all_: all_,
    LAYOUTS,
    st.integers(1, 9),
    st.integers(1, BLOCK),
    st.integers(1, 3),
    st.sampled_from([(), ("r0",), ("r0", "r1"), ("r9",)]),
)


def check(case, data):
    layout, blocks, tail, shards, wanted = case
    refs = chain(blocks, tail)
    directory = Directory(shards)
    most = (1 << len(layout.parts)) - 1
    # Mostly whole, so that fronts are not all empty.
    masks = st.one_of(st.just(most), st.just(most), st.just(0), st.integers(0, most))
    expected = []
    for node in ("a", "b", "c"):
        held = {}
        for ref in refs:
            host, disk = data.draw(masks), data.draw(masks)
            if host | disk:
                held[ref.key] = Holding("acme", layout, ref.tokens, host, disk)
        directory.announce(node, 1, held)
        expected.append(plain_front(node, refs, held, wanted))
    expected = sorted((f for f in expected if f), key=lambda f: (-f.tokens, f.disk_bytes, f.node))
    assert directory.fronts(refs, wanted) == expected


@settings(max_examples=200, deadline=None)
@given(CASES, st.data())
def test_fronts_are_what_the_definition_says(case, data):
    check(case, data)


def test_forgetting_windows_and_states_would_be_seen(monkeypatch):
    layout = Layout(BLOCK, (Part(0, "full", "r0", 1), Part(1, "sliding", "r0", 1, 2 * BLOCK + 1)))
    directory, refs = Directory(1), chain(4, BLOCK)
    held = {ref.key: Holding("acme", layout, BLOCK, 1 if n == 2 else 3, 0) for n, ref in enumerate(refs)}
    directory.announce("a", 1, held)
    assert [f.blocks for f in directory.fronts(refs)] == [2]
    of = lookups._Kind.of
    careless = classmethod(lambda cls, *told: of(*told)._replace(state=True, lacks=frozenset()))
    monkeypatch.setattr(lookups._Kind, "of", careless)
    assert directory.fronts(refs) != [plain_front("a", refs, held, ())]


def test_a_shard_of_the_directory_that_is_gone_makes_fronts_shorter():
    layout = Layout(BLOCK, (Part(0, "full", "r0", 1),))
    refs, directory = chain(8, BLOCK), Directory(3)
    held = {ref.key: Holding("acme", layout, BLOCK, 1, 0) for ref in refs}
    directory.announce("a", 1, held)
    assert directory.fronts(refs)[0].blocks == 8
    lost = questions(refs, 3)[0]
    directory.shards[lost.shard] = Shard(ShardSettings(lost.shard, 3))
    first_gap = int(lost.places.min())
    assert [f.blocks for f in directory.fronts(refs)] == ([first_gap] if first_gap else [])


def test_ranks_of_one_model_on_two_nodes_are_asked_for_apart():
    layout = Layout(BLOCK, (Part(0, "full", "r0", 1), Part(0, "full", "r1", 1)))
    refs, directory = chain(3, BLOCK), Directory(2)
    for node, mask in (("a", 1), ("b", 2)):
        directory.announce(node, 1, {ref.key: Holding("acme", layout, BLOCK, mask, 0) for ref in refs})
    assert directory.fronts(refs) == []
    assert [f.node for f in directory.fronts(refs, ["r0"])] == ["a"]
    assert [f.node for f in directory.fronts(refs, ["r1"])] == ["b"]


def test_nothing_is_asked_and_nothing_answered():
    assert questions([], 2) == []
    assert fronts([], []) == []
    assert Directory(2).fronts(chain(2, BLOCK)) == []


def test_two_keys_that_meet_cost_a_wrong_hint_and_nothing_else():
    """It takes two keys with equal hints for one block; the node will say 'missing'."""
    layout = Layout(BLOCK, (Part(0, "full", "r0", 1),))
    directory = Directory(1)
    one, two = b"x" * 8 + b"same half" + b"1" * 15, b"x" * 8 + b"same half" + b"2" * 15
    directory.announce("a", 1, {one: Holding("acme", layout, BLOCK, 1, 0)})
    assert directory.fronts([BlockRef(two, b"", 0, BLOCK)])[0].node == "a"
