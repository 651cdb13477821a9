"""KV that travels encoded: when it does, that it comes back as it was, and nodes of other releases."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.checksum import checksum
from kvtier.disk.codecs import CODECS
from kvtier.errors import CorruptObject, MalformedMessage
from kvtier.messages.peers import Offer, PeerReady, Sending, Want
from kvtier.messages.protocol import LENGTH, decode, encode
from kvtier.objects import ObjectId
from kvtier.peers import fetch as fetch_module
from kvtier.peers.choice import KEEP_CODEC_S, KEEP_S, RAW, Figures, Rates, choose, expected_bytes_per_s
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.coding import CHUNK_BYTES, Coding, encoded, measured, receive_encoded
from kvtier.peers.fetch import Came, Wanted
from kvtier.peers.handshake import Identity
from kvtier.peers.server import Opened, PeerServer, ServerSettings
from kvtier.peers.stream import StreamLost
from kvtier.waiting import wait_until

TOKEN = b"0123456789abcdef"
MB = 1e6
ZSTD = "planes-zstd"
# A gigabyte a second at either end.
QUICK = Figures(ratio=1.5, encode_bytes_per_s=1e9, decode_bytes_per_s=1e9)
Bytes = npt.NDArray[np.uint8]


def like_kv(nbytes: int, seed: int = 1) -> Bytes:
    """Numbers of bfloat16; the last byte of an odd length is of one that is cut."""
    noise = np.random.default_rng(seed).standard_normal(nbytes // 2 + 1, np.float32)
    return (noise.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)[:nbytes]


def of_chance(nbytes: int) -> Bytes:
    return np.random.default_rng(5).integers(0, 256, nbytes, np.uint8)


# --- the choice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({}, RAW),
        ({RAW: 120 * MB}, ZSTD),
        # Ten times the link: the encoder would be what is waited for.
        ({RAW: 1200 * MB}, RAW),
        # It was tried, and something else is what is waited for: a drive, or busy processors.
        ({RAW: 120 * MB, ZSTD: 125 * MB}, RAW),
        ({RAW: 120 * MB, ZSTD: 170 * MB}, ZSTD),
        ({ZSTD: 170 * MB}, RAW),
    ],
)
def test_the_choice_is_by_what_was_measured(measured: dict[str, float], best: str) -> None:
    assert choose(measured, {ZSTD: QUICK}) == best


def test_the_best_of_several_is_taken_and_none_without_an_offer() -> None:
    small = Figures(ratio=1.2, encode_bytes_per_s=5e9, decode_bytes_per_s=5e9)
    offers = {ZSTD: QUICK, "planes-lz4": small}
    assert choose({RAW: 120 * MB}, offers) == ZSTD
    assert choose({RAW: 1000 * MB}, offers) == "planes-lz4"
    assert choose({RAW: 120 * MB}, {}) == RAW


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0])
def test_an_offer_that_makes_no_sense_is_not_taken(bad: float) -> None:
    assert choose({RAW: 120 * MB}, {ZSTD: Figures(bad, 1e9, 1e9)}) == RAW
    assert choose({RAW: 120 * MB}, {ZSTD: Figures(1.5, bad, 1e9)}) == RAW


@given(st.floats(1e5, 1e11), st.floats(1.0, 3.0), st.floats(1e6, 1e10), st.floats(1e6, 1e10))
def test_what_is_expected_exceeds_no_part_of_the_way(
    raw: float, ratio: float, encode_rate: float, decode_rate: float
) -> None:
    figures = Figures(ratio, encode_rate, decode_rate)
    found = expected_bytes_per_s(raw, figures)
    assert found <= encode_rate and found <= decode_rate and found <= raw * ratio
    if choose({RAW: raw}, {ZSTD: figures}):
        assert found > raw


def test_rates_are_of_the_time_in_which_something_came() -> None:
    rates = Rates()
    for at_s in (0.0, 0.1, 0.2, 0.3):
        rates.came(RAW, 10_000_000, at_s)
    assert rates.measured(1.0) == {RAW: pytest.approx(100 * MB)}
    # Nothing was wanted for a while, and then only a little: neither says anything of the link.
    rates.pause()
    rates.came(RAW, 10_000_000, 100.0)
    rates.came(RAW, 1000, 150.0)
    assert rates.measured(150.0) == {RAW: pytest.approx(100 * MB)}


def test_what_comes_while_one_way_gives_over_to_the_other_counts_for_neither() -> None:
    rates = Rates()
    for turn in range(100):
        rates.came(RAW if turn % 2 else ZSTD, 64 << 20, float(turn))
    assert not rates.measured(100.0)


def test_a_codec_that_did_badly_is_tried_again_long_before_the_link_is() -> None:
    rates = Rates()
    for codec in (RAW, ZSTD):
        for at_s in (0.0, 1.0):
            rates.came(codec, 100_000_000, at_s)
    assert set(rates.measured(2.0)) == {RAW, ZSTD}
    assert set(rates.measured(2.0 + KEEP_CODEC_S)) == {RAW}
    assert not rates.measured(2.0 + KEEP_S)


# --- the encoding ---------------------------------------------------------------------------------------


class Wire:
    """What was sent, as a stream to read from."""

    def __init__(self, sent: bytes) -> None:
        self._sent = io.BytesIO(sent)
        self.left = len(sent)

    def fill(self, into: memoryview, until_s: float) -> None:
        if len(into) > self.left:
            raise StreamLost("the end")
        self.left -= self._sent.readinto(into)


def received(sent: bytes, into: Bytes, codec: str = ZSTD) -> tuple[int | None, int, int]:
    """The sum, bytes of KV, bytes of the wire."""
    wire, told = Wire(sent), [(0, 0)]
    found = receive_encoded(
        wire,  # type: ignore[arg-type]
        CODECS[codec],
        into,
        0.0,
        lambda nbytes, wire_bytes: told.append((nbytes, wire_bytes)),
    )
    return found, sum(n for n, _ in told), sum(n for _, n in told)


@pytest.fixture(autouse=True)
def packages() -> None:
    pytest.importorskip("zstandard")
    pytest.importorskip("lz4")


@settings(max_examples=25, deadline=None)
@given(
    st.one_of(st.integers(0, 70_000), st.integers(CHUNK_BYTES - 3, 2 * CHUNK_BYTES + 3)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([ZSTD, "planes-lz4"]),
    st.sampled_from([like_kv, of_chance]),
)
def test_what_was_encoded_comes_back(nbytes: int, width: int, codec: str, make: Any) -> None:
    data = make(nbytes)
    sent = b"".join(bytes(part) for part in encoded(CODECS[codec], width, data))
    into = np.full(nbytes, 0xEE, np.uint8)
    assert received(sent, into, codec) == (checksum(data), nbytes, len(sent))
    assert np.array_equal(into, data)


def test_kv_becomes_smaller_and_chance_hardly_larger() -> None:
    for data, least, most in ((like_kv(3 << 20), 0.6, 0.7), (of_chance(3 << 20), 1.0, 1.0001)):
        sent = sum(len(part) for part in encoded(CODECS[ZSTD], 2, data))
        assert least <= sent / len(data) <= most


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200_000), st.binary(min_size=1, max_size=8), st.integers(0, 10_000_000))
def test_whatever_comes_is_right_or_known_to_be_wrong(nbytes: int, junk: bytes, at: int) -> None:
    data = like_kv(nbytes)
    sent = bytearray(b"".join(bytes(part) for part in encoded(CODECS[ZSTD], 2, data)))
    at %= len(sent) or 1
    sent[at : at + len(junk)] = junk
    into = np.zeros(nbytes, np.uint8)
    try:
        found, _, _ = received(bytes(sent), into)
    except (MalformedMessage, StreamLost):
        return
    assert found is None or (found == checksum(data)) == np.array_equal(into, data)


def test_a_chunk_longer_than_its_place_is_refused() -> None:
    for word in (1001, 1001 | 1 << 31, 999):
        with pytest.raises(MalformedMessage, match="for a chunk of 1000"):
            received(word.to_bytes(4, "little") + bytes(2000), np.zeros(1000, np.uint8))


def test_figures_are_those_of_kv() -> None:
    found = measured(CODECS[ZSTD]).figures
    assert 1.4 < found.ratio < 1.6
    assert found.encode_bytes_per_s > 0 and found.decode_bytes_per_s > 0
    assert measured(CODECS["raw"]).figures.encode_bytes_per_s == 0


# --- between nodes --------------------------------------------------------------------------------------


class Damaging:
    """A codec whose encodings are damaged on their way. at: of the encoding's bytes, from its end."""

    def __init__(self, at: int) -> None:
        self._at = at

    def encode(self, payload: Bytes, item_bytes: int, into: Bytes) -> int | None:
        length = CODECS[ZSTD].encode(payload, item_bytes, into)
        assert length is not None
        into[self._at if self._at >= 0 else length + self._at] ^= 0x40
        return length

    def decode(self, stored: Bytes, into: Bytes) -> None:
        CODECS[ZSTD].decode(stored, into)


class Shelf:
    def __init__(self, *objects: Bytes) -> None:
        self.objects = objects

    @contextmanager
    def open(self, object_id: ObjectId, peer: str) -> Iterator[Opened | str]:
        data = self.objects[int.from_bytes(object_id.block_key, "big")]
        yield Opened(data, checksum(data))


@contextmanager
def nodes(
    shelf: Shelf, sending: Any, receiving: Any, streams: int = 1
) -> Iterator[tuple[PeerServer, PeerClient]]:
    """sending, receiving: codec of either end; None: it has none."""
    ours, theirs = (
        {ZSTD: Coding(codec, QUICK)} if codec is not None else {} for codec in (sending, receiving)
    )
    server = PeerServer(Identity("a", 7, TOKEN), shelf, ServerSettings(codecs=ours))
    address = ("127.0.0.1", server.port)
    client = PeerClient(Identity("b", 3, TOKEN), "a", address, ClientSettings(streams=streams, codecs=theirs))
    try:
        yield server, client
    finally:
        client.close()
        server.close()


def wants(shelf: Shelf, width: int = 2) -> list[Wanted]:
    return [
        Wanted(ObjectId(n.to_bytes(32, "big"), 0, "s"), np.zeros_like(data), checksum(data), width)
        for n, data in enumerate(shelf.objects)
    ]


class Told(Rates):
    """As if this had been measured of what came as it is, whatever comes."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__()
        self._told = {RAW: bytes_per_s}

    def measured(self, now_s: float) -> dict[str, float]:
        return self._told


def over_a_link_of(client: PeerClient, bytes_per_s: float) -> None:
    client._rates["tcp"] = Told(bytes_per_s)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(*(like_kv(CHUNK_BYTES + n * 100_001, seed=n) for n in range(6)))


def test_a_slow_link_has_kv_encoded_and_a_quick_one_has_not(shelf: Shelf) -> None:
    codec = CODECS[ZSTD]
    with nodes(shelf, codec, codec, streams=3) as (server, client):
        whole = sum(len(data) for data in shelf.objects)
        wire_bytes = 0
        for rate, least, most in ((100 * MB, 0.6, 0.7), (5000 * MB, 1.0, 1.0)):
            # The first connection tells what the other end has.
            first, came = Came(), Came()
            client.fetch(wants(shelf)[:1], 20.0, came=first)
            over_a_link_of(client, rate)
            wanted = wants(shelf)
            assert client.fetch(wanted, 20.0, came=came) == [""] * len(wanted)
            assert all(np.array_equal(w.into, d) for w, d in zip(wanted, shelf.objects, strict=True))
            assert came.bytes == whole
            assert came.coded_bytes == (whole if most < 1 else 0)
            assert least <= came.wire_bytes / whole <= most
            wire_bytes += first.wire_bytes + came.wire_bytes
        # A server counts after it has sent.
        assert wait_until(lambda: server.sent.wire_bytes == wire_bytes, 20.0)


def test_what_was_measured_of_a_former_start_of_the_peer_does_not_count(shelf: Shelf) -> None:
    codec = CODECS[ZSTD]
    with nodes(shelf, codec, codec) as (server, client):
        client.fetch(wants(shelf)[:1], 20.0)
        over_a_link_of(client, 100 * MB)
        came = Came()
        assert client.fetch(wants(shelf), 20.0, came=came) == [""] * len(shelf.objects)
        assert (client.epoch, came.coded_bytes > 0) == (7, True)
        settings = ServerSettings(port=server.port, codecs={ZSTD: Coding(codec, QUICK)})
        server.close()
        again = PeerServer(Identity("a", 8, TOKEN), shelf, settings)
        try:
            came = Came()
            assert client.fetch(wants(shelf), 20.0, came=came) == [""] * len(shelf.objects)
            assert (client.epoch, came.coded_bytes) == (8, 0)
        finally:
            again.close()


@pytest.mark.parametrize(("sending", "receiving", "width"), [(1, 0, 2), (0, 1, 2), (0, 0, 2), (1, 1, 0)])
def test_without_the_codec_at_both_ends_bytes_travel_as_they_are(
    shelf: Shelf, sending: int, receiving: int, width: int
) -> None:
    codec = CODECS[ZSTD]
    with nodes(shelf, codec if sending else None, codec if receiving else None) as (_, client):
        client.fetch(wants(shelf)[:1], 20.0)
        over_a_link_of(client, 100 * MB)
        wanted, came = wants(shelf, width), Came()
        assert client.fetch(wanted, 20.0, came=came) == [""] * len(wanted)
        assert came.coded_bytes == 0 and came.wire_bytes == came.bytes > 0
        assert all(np.array_equal(w.into, d) for w, d in zip(wanted, shelf.objects, strict=True))


# The head of a chunk's encoding; the frame of its last plane.
@pytest.mark.parametrize("at", [0, -1000])
def test_a_damaged_encoding_is_a_miss_and_the_connection_goes_on(shelf: Shelf, at: int) -> None:
    with nodes(shelf, Damaging(at), CODECS[ZSTD]) as (server, client):
        client.fetch(wants(shelf)[:1], 20.0)
        over_a_link_of(client, 100 * MB)
        assert client.fetch(wants(shelf), 20.0) == ["corrupt"] * 6
        assert len(server._open) == 1
        over_a_link_of(client, 5000 * MB)
        assert client.fetch(wants(shelf), 20.0) == [""] * 6


def test_the_check_above_sees_a_receiver_that_does_not_check(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def believes(*arguments: Any) -> int:
        with suppress(CorruptObject):
            receive_encoded(*arguments)
        return checksum(shelf.objects[0])

    monkeypatch.setattr(fetch_module, "receive_encoded", believes)
    with nodes(shelf, Damaging(-1000), CODECS[ZSTD]) as (_, client):
        client.fetch(wants(shelf)[:1], 20.0)
        over_a_link_of(client, 100 * MB)
        wanted = wants(shelf)[:1]
        assert client.fetch(wanted, 20.0) == [""]
        assert not np.array_equal(wanted[0].into, shelf.objects[0])


def test_a_codec_that_nobody_asked_for_is_not_taken(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fetch_module, "Want", lambda **fields: Want(**fields | {"codec": ZSTD, "item_bytes": 2})
    )
    with nodes(shelf, CODECS[ZSTD], CODECS[ZSTD]) as (_, client):
        assert client.fetch(wants(shelf), 20.0) == ["peer_lost"] * 6


def test_a_width_that_no_numbers_have_is_no_harm(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "Want", lambda **fields: Want(**fields | {"item_bytes": 3}))
    with nodes(shelf, CODECS[ZSTD], CODECS[ZSTD]) as (_, client):
        client.fetch(wants(shelf)[:1], 20.0)
        over_a_link_of(client, 100 * MB)
        came = Came()
        assert client.fetch(wants(shelf), 20.0, came=came) == [""] * 6
        assert came.coded_bytes == 0


# --- an earlier release ---------------------------------------------------------------------------------


class FormerReady(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="peer_ready"):
    id: int = 0
    reason: str = ""


class FormerWant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="want"):
    id: int = 0
    block_key: bytes
    group: int
    shard: str


class FormerSending(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sending"):
    id: int = 0
    nbytes: int = 0
    checksum: int = 0
    reason: str = ""


NOW = (
    PeerReady(codecs=(Offer(ZSTD, 1.5, 1e9),)),
    Want(block_key=bytes(32), group=1, shard="s", codec=ZSTD, item_bytes=2),
    Sending(nbytes=7, checksum=9, codec=RAW),
)
FORMER = (
    FormerReady(),
    FormerWant(block_key=bytes(32), group=1, shard="s"),
    FormerSending(nbytes=7, checksum=9),
)


@pytest.mark.parametrize(("now", "former"), list(zip(NOW, FORMER, strict=True)))
def test_an_earlier_release_understands_and_is_understood(now: Any, former: Any) -> None:
    body = encode(now)[LENGTH.size :]
    assert msgspec.msgpack.decode(body, type=type(former)) == former
    understood = decode(memoryview(msgspec.msgpack.encode(former)))
    assert type(understood) is type(now)
    # It names no codec, so none is used.
    assert not getattr(understood, "codec", "") and not getattr(understood, "codecs", ())
