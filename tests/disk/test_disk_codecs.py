"""Lossless codecs: every byte comes back, and nothing that is stored makes them write or take too much."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import tracemalloc

import lz4.block  # type: ignore[import-untyped]
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.disk.codecs import CODECS, RAW, check_codec, lz4_block, zstd_frame
from kvtier.disk.codecs.codec import Bytes, Codec, CodecMissing
from kvtier.disk.codecs.pieces import PIECE_BYTES
from kvtier.disk.codecs.planes import Planes
from kvtier.errors import ConfigError, CorruptObject, TierUnavailable

ENCODERS = [name for name in CODECS if name != RAW]
GUARD = 64


def numbers(count: int, dtype: str = "bfloat16", seed: int = 1) -> Bytes:
    """Normal numbers as KV has them: few exponents, noisy mantissas."""
    values = np.random.default_rng(seed).normal(0, 1, count).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(dtype).view(np.uint8)


def noise(nbytes: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def encoded(codec: Codec, payload: Bytes, item_bytes: int = 2) -> Bytes:
    """What the codec stores, in room enough for whatever it makes of the payload."""
    into: Bytes = np.zeros(2 * payload.nbytes + 1000, dtype=np.uint8)
    nbytes = codec.encode(payload, item_bytes, into)
    assert nbytes is not None
    return into[:nbytes].copy()


def decoded(codec: Codec, stored: Bytes, nbytes: int) -> Bytes:
    """What the codec makes of it, between two guards that must stay as they are."""
    room: Bytes = np.full(nbytes + 2 * GUARD, 0xEE, dtype=np.uint8)
    try:
        codec.decode(stored, room[GUARD : GUARD + nbytes])
    finally:
        assert (room[:GUARD] == 0xEE).all()
        assert (room[GUARD + nbytes :] == 0xEE).all()
    return room[GUARD : GUARD + nbytes]


# -- what goes in comes out


@given(st.sampled_from(ENCODERS), st.binary(max_size=3000), st.sampled_from([1, 2, 4]))
def test_any_bytes_come_back(name: str, data: bytes, item_bytes: int) -> None:
    payload: Bytes = np.frombuffer(data, dtype=np.uint8)
    stored = encoded(CODECS[name], payload, item_bytes)
    assert decoded(CODECS[name], stored, payload.nbytes).tobytes() == data


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(ENCODERS),
    st.sampled_from([0, 1, 2, 3, 4, 5, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["noise", "zeros", "numbers", "half"]),
    st.integers(0, 7),
)
def test_lengths_about_a_piece_come_back(
    name: str, nbytes: int, item_bytes: int, kind: str, shift: int
) -> None:
    """Whatever memory the payload lies at."""
    room: Bytes = np.zeros(nbytes + 8, dtype=np.uint8)
    payload = room[shift : shift + nbytes]
    if kind != "zeros":
        payload[:] = noise(nbytes) if kind == "noise" else numbers(nbytes)[:nbytes]
    if kind == "half":
        payload[nbytes // 2 :] = noise(nbytes - nbytes // 2)
    stored = encoded(CODECS[name], payload, item_bytes)
    assert np.array_equal(decoded(CODECS[name], stored, nbytes), payload)


@pytest.mark.parametrize(
    ("name", "dtype", "item_bytes", "at_least"),
    [
        ("planes-lz4", "bfloat16", 2, 1.15),
        ("planes-zstd", "bfloat16", 2, 1.4),
        ("planes-zstd", "float16", 2, 1.1),
        ("planes-zstd", "float32", 4, 1.1),
        ("planes-lz4", "float32", 4, 1.05),
    ],
)
def test_numbers_become_smaller_by_planes_and_not_without(
    name: str, dtype: str, item_bytes: int, at_least: float
) -> None:
    payload = numbers(1 << 20, dtype)
    assert payload.nbytes / encoded(CODECS[name], payload, item_bytes).nbytes > at_least
    assert payload.nbytes / encoded(CODECS["lz4"], payload).nbytes < 1.02, "the planes are why"


@pytest.mark.parametrize("name", ENCODERS)
def test_what_does_not_fit_is_not_encoded_and_nothing_is_written_beyond(name: str) -> None:
    payload = numbers(PIECE_BYTES)
    whole = encoded(CODECS[name], payload).nbytes
    for room in [0, 1, 3, 4, 7, 8, 100, PIECE_BYTES // 2, whole - 1]:
        into: Bytes = np.full(room + GUARD, 0xEE, dtype=np.uint8)
        assert CODECS[name].encode(payload, 2, into[:room]) is None
        assert (into[room:] == 0xEE).all()
    into = np.full(whole + GUARD, 0xEE, dtype=np.uint8)
    assert CODECS[name].encode(payload, 2, into[:whole]) == whole
    assert (into[whole:] == 0xEE).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_noise_becomes_no_smaller(name: str) -> None:
    payload = noise(4 * PIECE_BYTES)
    assert CODECS[name].encode(payload, 2, np.empty(payload.nbytes - 4096, dtype=np.uint8)) is None


def test_a_plane_that_does_not_pay_is_tried_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    compress = zstd_frame.ZstdFrame.compress

    def counted(self: zstd_frame.ZstdFrame, plane: Bytes) -> bytes:
        tried.append(plane.nbytes)
        return compress(self, plane)

    monkeypatch.setattr(zstd_frame.ZstdFrame, "compress", counted)
    payload = numbers(32 * PIECE_BYTES // 2)
    encoded(CODECS["planes-zstd"], payload)
    assert 32 < len(tried) < 32 + 8, "the exponents each time, the mantissas now and then"


def test_raw_is_never_smaller_and_copies_back() -> None:
    payload = noise(1000)
    assert CODECS[RAW].encode(payload, 2, np.empty(1000, dtype=np.uint8)) is None
    assert np.array_equal(decoded(CODECS[RAW], payload, 1000), payload)
    with pytest.raises(CorruptObject):
        decoded(CODECS[RAW], payload, 999)


@pytest.mark.parametrize("item_bytes", [0, 3, 8])
def test_an_unknown_width_is_refused(item_bytes: int) -> None:
    with pytest.raises(ValueError, match="numbers of"):
        encoded(CODECS["planes-lz4"], numbers(100), item_bytes)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 500))
def test_planes_are_the_bytes_of_the_numbers_in_order(item_bytes: int, count: int) -> None:
    payload = noise(count * item_bytes, seed=count)
    planes = Planes(item_bytes, count)
    parts = [np.empty(count, dtype=np.uint8) for _ in range(item_bytes)]
    for n, part in enumerate(parts):
        planes.split(payload, n, part)
        assert np.array_equal(part, payload[n::item_bytes])
    back = np.empty_like(payload)
    planes.merge(parts, back)
    assert np.array_equal(back, payload)


# -- what is stored may be anything


@given(st.sampled_from(ENCODERS), st.binary(max_size=400), st.integers(0, 3000))
@settings(max_examples=300)
def test_garbage_is_refused_and_stays_in_its_bounds(name: str, garbage: bytes, nbytes: int) -> None:
    try:
        decoded(CODECS[name], np.frombuffer(garbage, dtype=np.uint8), nbytes)
    except CorruptObject:
        pass
    else:
        assert garbage[:1] == b"\x01", "only what begins like an encoding can be one"


@pytest.mark.parametrize("name", ENCODERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_spoiled_encodings_stay_in_their_bounds(name: str, data: st.DataObject) -> None:
    """Other bytes of the right length may come out: that is for the checksum to see. Nothing else may."""
    payload = numbers(20_000)
    stored = encoded(CODECS[name], payload)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, stored.nbytes - 1))
        stored[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(CorruptObject):
        assert decoded(CODECS[name], stored, payload.nbytes).nbytes == payload.nbytes


@pytest.mark.parametrize("name", ENCODERS)
def test_every_truncation_and_every_addition_is_refused(name: str) -> None:
    payload = numbers(3000)
    stored = encoded(CODECS[name], payload)
    for length in range(stored.nbytes):
        with pytest.raises(CorruptObject):
            decoded(CODECS[name], stored[:length], payload.nbytes)
    with pytest.raises(CorruptObject, match="behind"):
        decoded(CODECS[name], np.append(stored, np.uint8(0)), payload.nbytes)
    for nbytes in (payload.nbytes - 1, payload.nbytes + 1, 0, payload.nbytes + PIECE_BYTES):
        with pytest.raises(CorruptObject):
            decoded(CODECS[name], stored, nbytes)


def bomb(name: str, packed: bytes, width: int) -> Bytes:
    """An encoding whose first plane is `packed`."""
    word = struct.pack("<I", len(packed) | 1 << 31)
    return np.frombuffer(struct.pack("<BBH", 1, width, 0) + word + packed, dtype=np.uint8)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_bomb_takes_no_memory(name: str) -> None:
    """64 MiB of zeros, compressed: honest about its length, silent about it, or lying."""
    zeros, nbytes = bytes(64 << 20), 2 * PIECE_BYTES
    if "lz4" in name:
        bombs = [lz4.block.compress(zeros, store_size=False), lz4.block.compress(zeros)]
    else:
        silent = zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
        honest = zstandard.ZstdCompressor().compress(zeros)
        at = honest.index(struct.pack("<I", 64 << 20))
        lying = honest[:at] + struct.pack("<I", PIECE_BYTES // 2) + honest[at + 4 :]
        bombs = [silent, honest, lying]
    for packed in bombs:
        stored = bomb(name, packed, 1 if name == "lz4" else 2)
        into: Bytes = np.empty(nbytes, dtype=np.uint8)
        tracemalloc.start()
        with pytest.raises(CorruptObject):
            CODECS[name].decode(stored, into)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20


def test_the_bomb_would_take_it_without_the_look_at_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsuspecting:
        content_size = PIECE_BYTES // 2

    monkeypatch.setattr(zstandard, "get_frame_parameters", lambda _: Unsuspecting)
    honest = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    into: Bytes = np.empty(2 * PIECE_BYTES, dtype=np.uint8)
    tracemalloc.start()
    with pytest.raises(CorruptObject):
        CODECS["planes-zstd"].decode(bomb("planes-zstd", honest, 2), into)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > 32 << 20


# -- packages that are missing


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, package in ((lz4_block._library, "lz4.block"), (zstd_frame._library, "zstandard")):
        library.cache_clear()
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "lz4", None)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_missing_package_is_said_with_the_fix(name: str, no_packages: None) -> None:
    with pytest.raises(ConfigError, match=r"disk\.codec.*not installed.*pip install"):
        check_codec(name)
    with pytest.raises(CodecMissing) as refusal:
        encoded(CODECS[name], numbers(100))
    assert isinstance(refusal.value, TierUnavailable), "never taken for damage"
    with pytest.raises(CodecMissing):
        decoded(CODECS[name], noise(100), 100)
    check_codec(RAW)


def test_names_are_checked() -> None:
    for name in CODECS:
        check_codec(name)
    with pytest.raises(ConfigError, match=r"tenant\.codec.*lz9.*planes-zstd"):
        check_codec("lz9", field="tenant.codec")


def test_the_disk_tier_loads_without_the_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('lz4', 'zstandard', 'cryptography'): sys.modules[name] = None\n"
        "import kvtier.disk.tier, kvtier.disk.fsck\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
