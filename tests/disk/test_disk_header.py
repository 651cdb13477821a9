"""Block headers: what is put in comes out, and no flipped bit goes unnoticed."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.disk.header import (
    HEADER_BYTES,
    BlockHeader,
    HeaderDamaged,
    HeaderError,
    HeaderUnsupported,
    NotAHeader,
    decode,
    encode,
)
from kvtier.objects import ObjectId, ObjectMeta, Root

U63 = st.integers(0, (1 << 63) - 1)
U64 = st.integers(0, (1 << 64) - 1)
KEYS = st.binary(min_size=32, max_size=32)
NAMES = st.text(max_size=40)

ROOTS = st.builds(Root, KEYS, NAMES, KEYS, NAMES, st.integers(1, 1 << 20))
METAS = st.builds(
    ObjectMeta,
    object_id=st.builds(ObjectId, KEYS, st.integers(0, 1000), NAMES),
    root=ROOTS,
    parent_key=KEYS,
    start=U63,
    tokens=st.integers(0, 1 << 20),
    first_valid=st.integers(0, 1 << 20),
    nbytes=U64,
    checksum=U64,
)
HEADERS = st.builds(
    BlockHeader,
    METAS,
    sequence=U64,
    store_id=st.binary(min_size=16, max_size=16),
    stored_bytes=U64,
    codec=NAMES,
    checksum_name=NAMES,
)


def example() -> BlockHeader:
    root = Root(b"r" * 32, "acme", b"f" * 32, "exact", 256)
    meta = ObjectMeta(ObjectId(b"k" * 32, 1, "L0+4.H0+2"), root, b"p" * 32, 512, 200, 3, 70_001, 0xABCDEF)
    return BlockHeader(meta, 77, b"s" * 16, 70_001)


def flipped(page: bytes, bit: int) -> bytes:
    changed = bytearray(page)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def resealed(page: bytes) -> bytes:
    return page[:-8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(page[:-8]))


@given(HEADERS)
def test_round_trip(header: BlockHeader) -> None:
    page = encode(header)
    assert len(page) == HEADER_BYTES
    assert decode(page) == header


@given(HEADERS, st.integers(0, HEADER_BYTES * 8 - 1))
def test_a_flipped_bit_is_noticed(header: BlockHeader, bit: int) -> None:
    with pytest.raises(HeaderError):
        decode(flipped(encode(header), bit))


def test_every_flipped_bit_is_noticed_and_the_checksum_is_why() -> None:
    page = encode(example())
    unchecked = 0
    for bit in range(HEADER_BYTES * 8):
        wrong = flipped(page, bit)
        with pytest.raises(HeaderError):
            decode(wrong)
        try:
            decode(wrong, check=False)
            unchecked += 1
        except HeaderError:
            pass
    assert unchecked > HEADER_BYTES, "without the header's checksum most flips must go unnoticed"


@given(st.binary(max_size=HEADER_BYTES))
def test_noise_is_not_a_header(noise: bytes) -> None:
    with pytest.raises(HeaderError):
        decode(noise.ljust(HEADER_BYTES, b"\0"))


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_a_sealed_page_with_any_body_is_a_header_or_a_typed_error(body: bytes) -> None:
    page = bytearray(encode(example()))
    struct.pack_into("<H", page, 10, len(body))
    page[96:-8] = body.ljust(HEADER_BYTES - 104, b"\0")
    with pytest.raises(HeaderDamaged):
        decode(resealed(bytes(page)))


def test_a_length_beyond_the_page_is_refused() -> None:
    page = bytearray(encode(example()))
    struct.pack_into("<H", page, 10, 4000)
    with pytest.raises(HeaderDamaged):
        decode(resealed(bytes(page)))


def test_newer_versions_and_unknown_features_are_refused_by_name() -> None:
    newer = bytearray(encode(example()))
    struct.pack_into("<H", newer, 8, 2)
    with pytest.raises(HeaderUnsupported, match="version 2"):
        decode(resealed(bytes(newer)))
    feature = bytearray(encode(example()))
    struct.pack_into("<I", feature, 12, 4)
    with pytest.raises(HeaderUnsupported, match="0x4"):
        decode(resealed(bytes(feature)))
    reserved = bytearray(encode(example()))
    reserved[70] = 1
    with pytest.raises(HeaderUnsupported):
        decode(resealed(bytes(reserved)))


def test_a_short_page_is_not_a_header() -> None:
    with pytest.raises(NotAHeader):
        decode(encode(example())[:-1])


def test_names_that_do_not_fit_are_refused() -> None:
    header = example()
    root = replace(header.meta.root, tenant="t" * HEADER_BYTES)
    with pytest.raises(ValueError, match="do not fit"):
        encode(replace(header, meta=replace(header.meta, root=root)))
