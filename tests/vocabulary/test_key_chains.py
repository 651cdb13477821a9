"""Chains: how tokens are cut and keyed, and that a chain's recorded end is found from any other chain.

The oracle knows nothing of keys: it compares token prefixes.
"""

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import TokensError
from kvtier.keys import block_key, chain, encode_extras, make_root, pack_tokens, tail_key, tenant_secret, walk

B = 4
SECRET = bytes(range(32))
ROOT = make_root(tenant_secret(SECRET, "acme"), "acme", b"m" * 32, "exact", B)


class Recorded:
    """What a node records of parked chains, and its search for the longest front of a token list."""

    def __init__(self, tail_key_of=tail_key):
        self.full = set()
        self.tails = {}
        self.tail_key_of = tail_key_of

    def park(self, tokens):
        for ref in chain(ROOT, pack_tokens(tokens)):
            if ref.tokens == B:
                self.full.add(ref.key)
            else:
                packed = pack_tokens(tokens[ref.start :])
                key = self.tail_key_of(ref.parent, packed, ref.tokens)
                self.tails.setdefault(ref.parent, {})[key] = ref.tokens

    def front(self, tokens):
        """Tokens of the longest recorded front."""
        packed, parent, at = pack_tokens(tokens), ROOT.key, 0
        for ref in chain(ROOT, packed):
            if ref.key not in self.full:
                break
            parent, at = ref.key, at + B
        rest = packed[4 * at :]
        tails = self.tails.get(parent, {})
        lengths = sorted({n for n in tails.values() if 4 * n <= len(rest)}, reverse=True)
        return at + next((n for n in lengths if self.tail_key_of(parent, rest, n) in tails), 0)


def oracle(parked, tokens):
    """The longest recorded prefix that is a prefix of `tokens`: whole blocks, and each park's own end."""
    ends = {tuple(p[:n]) for p in parked for n in [*range(0, len(p) + 1, B), len(p)]}
    return max((len(e) for e in ends if tuple(tokens[: len(e)]) == e), default=0)


def variants(conversation):
    """Regenerate, edit and fork of a conversation, at every length."""
    for at in range(len(conversation) + 1):
        front, rest = conversation[:at], conversation[at:]
        yield front
        for length in range(1, 2 * B):
            yield front + [900 + i for i in range(length)]
        if rest:
            yield [*front, 999, *rest[1:]]
            yield [*front, 999, *rest]
            yield front + rest[1:]


def mismatches(recorded, parked, queries):
    return [q for q in queries if recorded.front(q) != oracle(parked, q)]


def test_regenerate_edit_and_fork_at_every_length_find_the_right_tail():
    conversation = list(range(100, 111))
    turns = [conversation[:n] for n in (3, 6, 8, 11)]
    recorded = Recorded()
    for turn in turns:
        recorded.park(turn)
    queries = list(variants(conversation))
    assert mismatches(recorded, turns, queries) == []
    assert {oracle(turns, q) for q in queries} == {0, 3, 4, 6, 8, 11}


def test_branches_are_found_beside_the_head():
    """Every variant is parked as a branch, and every variant is then looked for."""
    conversation = list(range(100, 110))
    branches = [v for v in variants(conversation) if v]
    recorded = Recorded()
    for branch in branches:
        recorded.park(branch)
    queries = [*branches, *(b[:-1] for b in branches), *([*b, 7] for b in branches)]
    assert mismatches(recorded, branches, queries) == []


few_tokens = st.lists(st.integers(0, 1), max_size=11)


@given(st.lists(few_tokens, max_size=5), st.lists(few_tokens, min_size=1, max_size=5))
def test_any_parks_and_any_lookups(parked, queries):
    recorded = Recorded()
    for tokens in parked:
        recorded.park(tokens)
    assert mismatches(recorded, parked, queries) == []


def test_control_tails_without_their_count_are_found_out():
    def padded(parent, packed, count):
        return block_key(parent, packed[: 4 * count].ljust(4 * B, b"\0"))

    recorded = Recorded(padded)
    recorded.park([1])
    recorded.tails[ROOT.key].update({k: 2 for k in recorded.tails[ROOT.key]})
    assert mismatches(recorded, [[1]], [[1, 0, 5]]) == [[1, 0, 5]]


def test_blocks_and_tail():
    refs = chain(ROOT, pack_tokens(range(10)))
    assert [(r.start, r.tokens) for r in refs] == [(0, 4), (4, 4), (8, 2)]
    assert [r.parent for r in refs] == [ROOT.key, refs[0].key, refs[1].key]
    assert refs[0].key == block_key(ROOT.key, pack_tokens(range(4)))
    assert refs[2].key == tail_key(refs[1].key, pack_tokens([8, 9, 10]), 2)
    assert chain(ROOT, b"") == []


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    extras=st.lists(st.tuples(st.integers(0, 39), st.binary(max_size=4)), max_size=4),
    private=st.none() | st.tuples(st.integers(0, 50), st.binary(min_size=1, max_size=4)),
    blocks=st.integers(0, 10),
)
def test_going_on_after_a_block_gives_the_same_chain(tokens, extras, private, blocks):
    extras = [e for e in extras if e[0] < len(tokens)]
    packed = pack_tokens(tokens)
    whole = chain(ROOT, packed, extras, private=private)
    at = min(blocks, len(tokens) // B) * B
    parent = whole[at // B - 1].key if at else None
    rest = chain(ROOT, packed[4 * at :], extras, parent=parent, first_position=at, private=private)
    assert whole[at // B :] == rest
    keys = walk(ROOT, packed[4 * at :], extras, parent=parent, first_position=at, private=private)
    assert list(keys) == [ref.key for ref in rest]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.data())
def test_chain_agrees_with_block_key(tokens, data):
    packed = pack_tokens(tokens)
    positions = st.integers(0, max(0, len(tokens) - 1))
    extras = data.draw(st.lists(st.tuples(positions, st.binary(max_size=3)), max_size=3)) if tokens else []
    key = ROOT.key
    for ref in chain(ROOT, packed, extras):
        own = [(p - ref.start, d) for p, d in extras if ref.start <= p < ref.start + ref.tokens]
        block = packed[4 * ref.start : 4 * (ref.start + ref.tokens)]
        assert (ref.parent, ref.key) == (key, block_key(key, block, encode_extras(own, None)))
        key = ref.key


def test_an_extra_enters_the_block_that_holds_it():
    tokens = pack_tokens(range(12))
    plain, marked = chain(ROOT, tokens), chain(ROOT, tokens, [(5, b"image")])
    assert [a.key == b.key for a, b in zip(plain, marked, strict=True)] == [True, False, False]
    moved = chain(ROOT, tokens, [(6, b"image")])
    assert moved[1].key != marked[1].key


def test_the_order_of_extras_does_not_count():
    tokens, extras = pack_tokens(range(12)), [(5, b"b"), (1, b"x"), (5, b"a"), (4, b"c")]
    assert chain(ROOT, tokens, extras) == chain(ROOT, tokens, extras[::-1])


@pytest.mark.parametrize("position", range(13))
def test_private_shares_nothing_from_its_position_on(position):
    tokens = pack_tokens(range(12))
    plain = chain(ROOT, tokens)
    one = chain(ROOT, tokens, private=(position, b"one"))
    two = chain(ROOT, tokens, private=(position, b"two"))
    shared = position // B
    assert one[:shared] == two[:shared] == plain[:shared]
    keys = [{r.key for r in refs[shared:]} for refs in (plain, one, two)]
    assert all(a.isdisjoint(b) for a, b in ((keys[0], keys[1]), (keys[0], keys[2]), (keys[1], keys[2])))


def test_private_is_carried_on_by_a_parent_and_by_the_salt_itself():
    tokens = pack_tokens(range(12))
    parent = chain(ROOT, tokens)[0].key
    go_on = {"parent": parent, "first_position": 4}
    plain = chain(ROOT, tokens[16:], **go_on)
    salted = chain(ROOT, tokens[16:], **go_on, private=(0, b"salt"))
    assert {r.key for r in plain}.isdisjoint(r.key for r in salted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": b"123"}, "not packed"),
        ({"first_position": 3, "parent": b"p" * 32}, "multiple of block_tokens"),
        ({"first_position": -4, "parent": b"p" * 32}, "multiple of block_tokens"),
        ({"first_position": 4}, "belong together"),
        ({"parent": b"p" * 32}, "belong together"),
        ({"first_position": 4, "parent": b"short"}, "32 bytes"),
        ({"extras": [(8, b"x")]}, "position 8"),
        ({"extras": [(-1, b"x")]}, "position -1"),
        ({"private": (-1, b"x")}, "private"),
        ({"private": (0, b"")}, "private"),
    ],
)
def test_malformed_chains_are_refused(arguments, message):
    with pytest.raises(TokensError, match=message):
        chain(ROOT, **{"tokens": pack_tokens(range(8)), **arguments})


@pytest.mark.parametrize(
    "tokens",
    [
        [0, 1, 2**32 - 1],
        (0, 1, 2**32 - 1),
        array("I", [0, 1, 2**32 - 1]),
        memoryview(array("I", [0, 1, 2**32 - 1])),
        np.array([0, 1, 2**32 - 1], dtype=np.int64),
        np.array([0, 1, 2**32 - 1], dtype=np.uint64),
        np.array([0, 1, 2**32 - 1], dtype=">u4"),
        np.array([0, 9, 1, 9, 2**32 - 1, 9], dtype=np.uint32)[::2],
        memoryview(bytes([0, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255])).cast("I"),
        list(np.array([0, 1, 2**32 - 1], dtype=np.int64)),
    ],
    ids=lambda t: type(t).__name__,
)
def test_all_forms_of_tokens_pack_alike(tokens):
    assert pack_tokens(tokens) == bytes([0, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255])


def test_small_integer_arrays_and_ranges():
    assert pack_tokens(range(3)) == pack_tokens(np.arange(3, dtype=np.int16)) == pack_tokens([0, 1, 2])
    assert pack_tokens([]) == pack_tokens(np.array([])) == b""


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [2**70],
        [1.0],
        ["1"],
        [None],
        "12",
        b"\0\0\0\0",
        bytearray(4),
        {1, 2},
        {1: 2},
        iter([1]),
        None,
        7,
        memoryview(b"\0\0\0\0"),
        np.array([-1]),
        np.array([2**32]),
        np.array([1.0]),
        np.array([True]),
        np.array([[1]]),
        np.array(1),
        np.array([-1], dtype=np.int8),
    ],
    ids=repr,
)
def test_what_is_no_list_of_tokens_is_refused(tokens):
    with pytest.raises(TokensError):
        pack_tokens(tokens)
