"""No two inputs meet in one key by moving bytes from one field to the next.

`recuts` cuts one string of bytes into fields in every possible way: inputs that a key over the plain
concatenation of its fields cannot tell apart.  The same inputs go to such a naive key as a control.
"""

import hashlib
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError, FingerprintError, GeometryError, TokensError
from kvtier.keys import (
    block_key,
    chain,
    encode_extras,
    engine_key,
    make_root,
    pack_tokens,
    root_key,
    tail_key,
    tenant_secret,
)

SECRET = bytes(range(32))
MODEL = b"m" * 32


def naive(*fields):
    """The mistake that these tests look for."""
    return hashlib.sha256(b"".join(fields)).digest()


def recuts(joined, widths):
    """All ways to cut `joined` into len(widths) fields; a width of None is free, and at least 1."""
    free = [i for i, w in enumerate(widths) if w is None]
    room = len(joined) - sum(w for w in widths if w is not None)
    for cut in itertools.product(range(1, room), repeat=len(free) - 1):
        sizes = [*cut, room - sum(cut)]
        if sizes[-1] < 1:
            continue
        fields, at = [], 0
        for i, width in enumerate(widths):
            size = sizes[free.index(i)] if width is None else width
            fields.append(joined[at : at + size])
            at += size
        yield tuple(fields)


def assert_apart(key_of, inputs):
    inputs = list(inputs)
    assert len(inputs) == len(set(inputs)) > 2
    assert len({key_of(*fields) for fields in inputs}) == len(inputs)
    assert len({naive(*fields) for fields in inputs}) == 1


def test_tenant_fingerprint_and_fidelity_do_not_run_together():
    joined = b"tenant-a" + b"abcdefgh" * 4 + b"exact"
    cuts = recuts(joined, [None, 32, None])
    assert_apart(lambda t, f, fid: root_key(SECRET, t.decode(), f, fid.decode(), 256), cuts)


def test_tenant_ab_c_is_not_a_bc():
    keys = {root_key(SECRET, t, MODEL, f, 256) for t, f in (("ab", "c"), ("a", "bc"), ("abc", "c"))}
    assert len(keys) == 3


def test_cluster_secret_and_tenant_do_not_run_together():
    joined = b"0123456789abcdefghijklmnop"
    cuts = [(joined[:at], joined[at:]) for at in range(16, len(joined))]
    assert_apart(lambda secret, tenant: tenant_secret(secret, tenant.decode()), cuts)


def test_secrets_that_differ_in_zeros_at_the_end_are_apart():
    assert tenant_secret(b"s" * 16, "a") != tenant_secret(b"s" * 16 + b"\0", "a")


def test_extra_and_tokens_do_not_run_together():
    parent, joined = b"p" * 32, b"abcd" * 6
    cuts = [(parent, joined[:at], joined[at:]) for at in range(0, len(joined), 4)]
    assert_apart(lambda p, extra, tokens: block_key(p, tokens, extra), cuts)


def test_parent_and_extra_do_not_run_together():
    joined = b"abcdefgh" * 6
    cuts = [(joined[:32], joined[32 : 32 + n], joined[32 + n :]) for n in (0, 4, 8, 12)]
    assert_apart(lambda p, extra, tokens: block_key(p, tokens, extra), cuts)


def test_token_count_is_not_content():
    """The header of one block, moved into the tokens or the extra of another, makes no equal key."""
    header = struct.pack("<II", 2, 0)
    tokens = pack_tokens([7, 8])
    inputs = [
        (tokens, b""),
        (header + tokens, b""),
        (tokens, header),
        (tokens[4:], tokens[:4]),
        (b"", tokens),
    ]
    assert len({block_key(b"p" * 32, t, e) for t, e in inputs}) == len(inputs)


def test_every_length_of_a_tail_has_its_own_key():
    tokens = pack_tokens([0] * 64)
    keys = {tail_key(b"p" * 32, tokens, n) for n in range(1, 65)}
    assert len(keys) == 64
    assert tail_key(b"p" * 32, tokens, 64) == block_key(b"p" * 32, tokens)


def test_engine_fields_do_not_run_together():
    def key_of(fidelity, scheme, version, extra, digest):
        return engine_key(
            SECRET,
            MODEL,
            fidelity=fidelity.decode(),
            scheme=scheme.decode(),
            scheme_version=version.decode(),
            extra=extra,
            digest=digest,
        )

    assert_apart(key_of, recuts(b"exactsgl1dg", [None] * 5))


def test_kinds_of_keys_are_apart():
    """An engine's digest that spells a block's bytes is still no block."""
    tokens = pack_tokens([1, 2, 3])
    block = block_key(SECRET, tokens)
    fields = {"fidelity": "exact", "scheme": "s", "scheme_version": "1"}
    engine = {engine_key(SECRET, MODEL, digest=d, **fields) for d in (tokens, SECRET + tokens, block)}
    roots = {root_key(SECRET, "t", MODEL, "exact", n) for n in (1, 2, 3)}
    assert len(engine | roots | {block, tenant_secret(SECRET, "t")}) == 8


def test_everything_in_a_root_counts():
    base = {"secret": SECRET, "tenant": "a", "fingerprint": MODEL, "fidelity": "exact", "block_tokens": 256}
    changes = {
        "secret": SECRET[::-1],
        "tenant": "b",
        "fingerprint": b"n" * 32,
        "fidelity": "fp8",
        "block_tokens": 128,
    }
    roots = [make_root(**base), *(make_root(**{**base, name: value}) for name, value in changes.items())]
    tokens = pack_tokens(range(10))
    assert len({chain(r, tokens)[-1].key for r in roots}) == 6


digests = st.binary(max_size=3).map(lambda b: b.replace(b"\x02", b"\0"))
extra_lists = st.lists(st.tuples(st.integers(0, 3), digests), max_size=3)
salts = st.none() | st.binary(min_size=1, max_size=3)


@given(extra_lists, salts, extra_lists, salts)
def test_extras_encode_apart(first, first_salt, second, second_salt):
    equal = sorted(first) == sorted(second) and first_salt == second_salt
    assert (encode_extras(first, first_salt) == encode_extras(second, second_salt)) == equal


def test_merged_and_split_extras_are_apart():
    lists = [
        [(0, b"abc")],
        [(0, b"ab"), (0, b"c")],
        [(0, b"a"), (0, b"bc")],
        [(0, b"a"), (1, b"bc")],
        [(0, b"abc"), (0, b"")],
        [(0, encode_extras([(0, b"abc")], None))],
    ]
    assert len({encode_extras(e, None) for e in lists} | {encode_extras([], b"abc")}) == len(lists) + 1
    assert len({b"".join(d for _, d in e) for e in lists[:5]}) == 1


ROOTS = [
    make_root(tenant_secret(SECRET, t), t, f, "exact", n)
    for t in ("a", "b")
    for f in (b"m" * 32, b"n" * 32)
    for n in (2, 4)
]
inputs = st.tuples(
    st.sampled_from(ROOTS),
    st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple),
    st.lists(st.tuples(st.just(0), st.sampled_from([b"", b"x", b"xx"])), max_size=2),
    st.none() | st.tuples(st.integers(0, 5), st.sampled_from([b"x", b"xx"])),
)


def meaning(root, tokens, extras, private):
    """What the last key of a chain names; the salt counts from the block that holds its position."""
    if private is not None:
        first = private[0] - private[0] % root.block_tokens
        private = (first, private[1]) if first < len(tokens) else None
    return root, tokens, sorted(extras), private


@given(inputs, inputs)
def test_keys_are_equal_exactly_when_their_meaning_is(first, second):
    keys = [chain(r, pack_tokens(t), e, private=p)[-1].key for r, t, e, p in (first, second)]
    assert (keys[0] == keys[1]) == (meaning(*first) == meaning(*second))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tenant_secret(b"short", "a"), ConfigError),
        (lambda: tenant_secret(SECRET, ""), ConfigError),
        (lambda: tenant_secret(SECRET, "\ud800"), ConfigError),
        (lambda: root_key(b"short", "a", MODEL, "exact", 256), ConfigError),
        (lambda: root_key(SECRET, "", MODEL, "exact", 256), ConfigError),
        (lambda: root_key(SECRET, "a", b"short", "exact", 256), FingerprintError),
        (lambda: root_key(SECRET, "a", MODEL, "", 256), ConfigError),
        (lambda: root_key(SECRET, "a", MODEL, "exact", 0), GeometryError),
        (lambda: tail_key(SECRET, b"\0" * 8, 3), TokensError),
        (lambda: tail_key(SECRET, b"\0" * 8, 0), TokensError),
        (
            lambda: engine_key(SECRET, MODEL, fidelity="exact", scheme="", scheme_version="1", digest=b"d"),
            TokensError,
        ),
    ],
)
def test_malformed_inputs_are_refused(call, error):
    with pytest.raises(error):
        call()


def test_keys_are_what_they_were():
    """Stored data is named by these keys: a change here loses all of it."""
    secret = tenant_secret(SECRET, "acme")
    root = make_root(secret, "acme", MODEL, "exact", 4)
    refs = chain(root, pack_tokens([1, 2, 3, 4, 5]), [(4, b"image")], private=(4, b"salt"))
    fields = {"fidelity": "exact", "scheme": "sglang", "scheme_version": "1", "digest": b"d" * 32}
    engine = engine_key(secret, MODEL, **fields)
    assert [k.hex()[:16] for k in (secret, root.key, refs[0].key, refs[1].key, engine)] == PINNED


PINNED = ["16040e4ebecbe592", "b5445c6f10f99fc2", "b650d4195e007783", "62d0b32d117b541f", "956f04449696c9af"]
