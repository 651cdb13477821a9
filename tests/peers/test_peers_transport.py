"""Objects from one node to another over real sockets, and everything that can go wrong with them."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvtier.checksum import checksum
from kvtier.errors import AuthError, ConfigError, KvtierError
from kvtier.messages.peers import PeerProof
from kvtier.objects import ObjectId
from kvtier.peers import handshake
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.fetch import Came, Wanted
from kvtier.peers.handshake import Identity
from kvtier.peers.lending import AgentFailed
from kvtier.peers.server import Opened, PeerServer, Sent, ServerSettings
from kvtier.peers.stream import Stream, StreamLost
from kvtier.testing.fake_agent import LentMemory, lending_of
from kvtier.testing.local_carrier import LocalCarrier
from kvtier.testing.node_cluster import free_port
from kvtier.waiting import wait_until


def until(holds: Callable[[], bool], what: str) -> None:
    assert wait_until(holds, 10.0), what


MAKE_CERTIFICATE = (
    "openssl",
    "req",
    "-x509",
    "-newkey",
    "rsa:2048",
    "-nodes",
    "-days",
    "2",
    "-subj",
    "/CN=h",
)
TOKEN = b"0123456789abcdef"
MEMORY = LentMemory(48 << 20)
Bytes = npt.NDArray[np.uint8]


def id_of(number: int) -> ObjectId:
    return ObjectId(number.to_bytes(32, "big"), 0, "L0+1.H0+1")


def noise(number: int, nbytes: int) -> Bytes:
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


class Shelf:
    """A source in memory. gate: None, or what an open object waits for before it is handed out."""

    def __init__(self, objects: dict[ObjectId, Bytes]) -> None:
        self.objects = objects
        self.sums = {name: checksum(data) for name, data in objects.items()}
        self.gate: threading.Event | None = None
        self.reached = threading.Semaphore(0)
        self.held = 0
        self._lock = threading.Lock()

    @contextmanager
    def open(self, object_id: ObjectId, peer: str) -> Iterator[Opened | str]:
        assert peer == "b"
        data = self.objects.get(object_id)
        if data is None:
            yield "missing"
            return
        with self._lock:
            self.held += 1
        try:
            self.reached.release()
            if self.gate is not None:
                assert self.gate.wait(20)
            yield Opened(data, self.sums[object_id])
        finally:
            with self._lock:
                self.held -= 1


@pytest.fixture
def shelf() -> Shelf:
    MEMORY.clear()
    return Shelf({id_of(n): MEMORY.room(noise(n, 300_000 + n * 70_001)) for n in range(12)})


@pytest.fixture
def server(shelf: Shelf) -> Iterator[PeerServer]:
    made = PeerServer(Identity("a", 7, TOKEN), shelf, ServerSettings(stall_s=5.0))
    yield made
    if shelf.gate is not None:
        shelf.gate.set()
    made.close()


@pytest.fixture(params=["tcp", "relayed", "fake", "nixl"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def client(server: PeerServer, way: str) -> Iterator[PeerClient]:
    """Over each way there is: one contract for all."""
    if way in ("tcp", "relayed"):
        made = client_of(server.port) if way == "tcp" else relayed_client(server)
        yield made
        made.close()
        assert made.way in (way, "")
        return
    try:
        theirs, ours = lending_of(way, "a", 7, MEMORY), lending_of(way, "b", 3, MEMORY)
    except AgentFailed as error:
        pytest.skip(str(error))
    server._settings = dataclasses.replace(server._settings, lending=theirs)
    made = client_of(server.port, lending=ours)
    yield made
    made.close()
    assert ours.close(10.0) and theirs.close(10.0)


def client_of(port: int, **settings: object) -> PeerClient:
    own = Identity("b", 3, TOKEN)
    return PeerClient(own, "a", ("127.0.0.1", port), ClientSettings(**settings))  # type: ignore[arg-type]


def relayed_client(server: PeerServer, **settings: object) -> PeerClient:
    """TCP leads nowhere, and the server's own end of what is carried is in this process."""
    return client_of(free_port(), carrier=LocalCarrier({"a": server.tunnels.pass_on}), **settings)


def wants(shelf: Shelf, *numbers: int) -> list[Wanted]:
    return [
        Wanted(
            id_of(n), MEMORY.room(np.full(len(shelf.objects[id_of(n)]), 0xEE, np.uint8)), shelf.sums[id_of(n)]
        )
        for n in numbers
    ]


def arrived(shelf: Shelf, wanted: Wanted) -> bool:
    return bool(np.array_equal(wanted.into, shelf.objects[wanted.object_id]))


def test_objects_arrive_as_they_are(shelf: Shelf, server: PeerServer, client: PeerClient) -> None:
    wanted = wants(shelf, *range(12))
    ended: list[int] = []
    came = Came()
    assert client.fetch(wanted, 20.0, lambda i, _: ended.append(i), came) == [""] * 12
    assert all(arrived(shelf, w) for w in wanted)
    assert came.bytes == came.lent_bytes + came.relayed_bytes or client.way == "tcp"
    assert sorted(ended) == list(range(12))
    assert client.epoch == 7
    nbytes = sum(w.into.nbytes for w in wanted)
    # A server counts after it has sent.
    until(lambda: server.sent == Sent(objects=12, bytes=nbytes, wire_bytes=nbytes), "all of it is counted")
    until(lambda: shelf.held == 0, "objects are let go")


def test_connections_are_used_again_also_when_the_peer_closed_them(
    shelf: Shelf, server: PeerServer, client: PeerClient
) -> None:
    assert client.fetch(wants(shelf, 1, 2, 3, 4), 20.0) == [""] * 4
    idle = list(client._idle)
    # How many were opened is chance: one of them may have been quick enough for all four.
    assert client.fetch(wants(shelf, 5), 20.0) == [""]
    assert set(client._idle) == set(idle)
    for stream in list(server._open):
        stream.close()
    until(lambda: not server._open, "the server has let them go")
    assert client.fetch(wants(shelf, 7, 8, 9), 20.0) == ["", "", ""]


def test_what_is_not_there_is_said_and_the_rest_arrives(shelf: Shelf, client: PeerClient) -> None:
    wanted = wants(shelf, 1, 2, 3)
    del shelf.objects[id_of(2)]
    assert client.fetch(wanted, 20.0) == ["", "missing", ""]


@pytest.mark.parametrize("known", [True, False])
def test_wrong_bytes_are_never_taken(shelf: Shelf, client: PeerClient, known: bool) -> None:
    wanted = wants(shelf, 1, 2)
    shelf.objects[id_of(1)][-1] ^= 1
    asked = [Wanted(w.object_id, w.into, w.checksum if known else None) for w in wanted]
    assert client.fetch(asked, 20.0) == ["corrupt", ""]


def test_a_peer_that_lies_about_the_sum_is_found_out(shelf: Shelf, client: PeerClient) -> None:
    wanted = wants(shelf, 1)
    shelf.objects[id_of(1)] = MEMORY.room(noise(99, wanted[0].into.nbytes))
    shelf.sums[id_of(1)] = checksum(shelf.objects[id_of(1)])
    assert client.fetch(wanted, 20.0) == ["corrupt"]
    # Nobody can, who does not know the sum.
    assert client.fetch([Wanted(id_of(1), wanted[0].into, None)], 20.0) == [""]


def test_another_length_is_not_written(shelf: Shelf, client: PeerClient) -> None:
    wanted = wants(shelf, 1)
    shelf.objects[id_of(1)] = MEMORY.room(noise(1, wanted[0].into.nbytes + 1))
    assert client.fetch(wanted, 20.0) == ["peer_lost"]
    assert (wanted[0].into == 0xEE).all()


def test_a_deadline_ends_it_and_nothing_is_written_afterwards(shelf: Shelf, client: PeerClient) -> None:
    shelf.gate = threading.Event()
    wanted = wants(shelf, 1, 2, 3)
    assert client.fetch(wanted, 0.2) == ["deadline"] * 3
    shelf.gate.set()
    until(lambda: shelf.held == 0, "the server has let them go")
    assert all((w.into == 0xEE).all() for w in wanted)


def test_a_cancelled_fetch_ends_at_once(shelf: Shelf, client: PeerClient) -> None:
    shelf.gate = threading.Event()
    outcomes: list[list[str]] = []
    thread = threading.Thread(target=lambda: outcomes.append(list(client.fetch(wants(shelf, 1, 2), 60.0))))
    thread.start()
    assert shelf.reached.acquire(timeout=10)
    client.cancel()
    thread.join(10)
    assert outcomes == [["cancelled", "cancelled"]]
    client.close()
    assert client.fetch(wants(shelf, 1), 1.0) == ["cancelled"]


def test_a_peer_that_is_not_there_is_an_outcome(shelf: Shelf, server: PeerServer) -> None:
    port = server.port
    server.close()
    gone = client_of(port)
    assert gone.fetch(wants(shelf, 1, 2), 5.0) == ["peer_lost", "peer_lost"]
    gone.close()


def test_a_peer_that_dies_in_the_middle(shelf: Shelf, server: PeerServer, client: PeerClient) -> None:
    shelf.gate = threading.Event()
    outcomes: list[list[str]] = []
    thread = threading.Thread(target=lambda: outcomes.append(list(client.fetch(wants(shelf, 1, 2), 60.0))))
    thread.start()
    assert shelf.reached.acquire(timeout=10)
    for stream in list(server._open):
        stream.close()
    thread.join(10)
    assert outcomes == [["peer_lost", "peer_lost"]]


def test_one_who_does_not_read_is_dropped(shelf: Shelf) -> None:
    big = {id_of(1): noise(1, 64 << 20)}
    holder = Shelf(big)
    server = PeerServer(Identity("a", 7, TOKEN), holder, ServerSettings(stall_s=0.3))
    try:
        lazy = client_of(server.port)
        stream = lazy.new_stream(time.monotonic() + 5)
        assert isinstance(stream, Stream)
        stream._sock.sendall(want_of(1))
        until(lambda: server.sent.dropped == 1 and holder.held == 0, "the server has given up")
        stream.close()
        lazy.close()
    finally:
        server.close()


def want_of(number: int) -> bytes:
    from kvtier.messages.peers import Want
    from kvtier.messages.protocol import encode

    return encode(Want(block_key=id_of(number).block_key, group=0, shard="L0+1.H0+1"))


# --- who is let in


def test_another_token_is_refused_on_both_sides(shelf: Shelf, server: PeerServer) -> None:
    stranger = PeerClient(
        Identity("b", 3, b"another token of 25 bytes"), "a", ("127.0.0.1", server.port), ClientSettings()
    )
    with pytest.raises(AuthError, match="does not know this cluster's token"):
        stranger.fetch(wants(shelf, 1), 5.0)
    stranger.close()
    assert server.sent.objects == 0


def test_a_caller_that_only_pretends_is_refused(
    shelf: Shelf, server: PeerServer, client: PeerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.peers.client.prove", lambda *_: PeerProof(mac=bytes(32)))
    with pytest.raises(AuthError, match="refuses this node"):
        client.fetch(wants(shelf, 1), 5.0)
    monkeypatch.setattr("kvtier.peers.server.check", lambda *_: None)
    assert client.fetch(wants(shelf, 1), 5.0) == [""], "without the check it would be let in"


def test_another_node_than_the_one_called(shelf: Shelf, server: PeerServer) -> None:
    lost = PeerClient(Identity("b", 3, TOKEN), "c", ("127.0.0.1", server.port), ClientSettings())
    with pytest.raises(AuthError, match="'c' was called, this is 'a'"):
        lost.fetch(wants(shelf, 1), 5.0)
    lost.close()
    assert server.sent.objects == 0


def test_proofs_are_of_one_connection_and_one_direction() -> None:
    one, other = Identity("a", 7, TOKEN), Identity("b", 3, TOKEN)
    greeting = handshake.hello(other, "a", bytes(32))
    proof = handshake.answer(one, greeting, b"n" * 32)
    back = handshake.prove(other, greeting, proof)
    handshake.check(one, greeting, b"n" * 32, back)
    for wrong in (proof, PeerProof(mac=b"")):
        with pytest.raises(AuthError):
            handshake.check(one, greeting, b"n" * 32, wrong)
    with pytest.raises(AuthError):
        handshake.check(one, greeting, b"m" * 32, back)
    with pytest.raises(AuthError):
        handshake.check(Identity("a", 8, TOKEN), greeting, b"n" * 32, back)
    assert "0123" not in repr(one)
    with pytest.raises(ConfigError, match="too few"):
        Identity("a", 1, b"short")


@pytest.mark.parametrize(
    "junk", [b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64, b"\x04\0\0\0abcd", bytes(1 << 20)]
)
def test_garbage_is_refused_and_others_are_served(
    shelf: Shelf, server: PeerServer, client: PeerClient, junk: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        with contextlib.suppress(OSError):
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
        assert client.fetch(wants(shelf, 1), 5.0) == [""]


def test_an_address_that_cannot_be_had(shelf: Shelf, server: PeerServer) -> None:
    with pytest.raises(ConfigError, match=str(server.port)):
        PeerServer(Identity("a", 7, TOKEN), shelf, ServerSettings(port=server.port))


def test_more_connections_than_allowed_are_refused(shelf: Shelf) -> None:
    server = PeerServer(Identity("a", 7, TOKEN), shelf, ServerSettings(connections=1))
    try:
        first = client_of(server.port, streams=1)
        assert first.fetch(wants(shelf, 1), 5.0) == [""]
        second = client_of(server.port, streams=1)
        assert second.fetch(wants(shelf, 1), 5.0) == ["peer_lost"]
        first.close()
        second.close()
    finally:
        server.close()


# --- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    try:
        subprocess.run(
            [
                *MAKE_CERTIFICATE,
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-keyout",
                tmp_path / "key.pem",
                "-out",
                tmp_path / "cert.pem",
            ],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no openssl here")
    return tmp_path


def test_over_tls(shelf: Shelf, certificate: Path) -> None:
    called = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    called.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server = PeerServer(Identity("a", 7, TOKEN), shelf, ServerSettings(tls=called))
    try:
        caller = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        client = client_of(server.port, tls=caller)
        wanted = wants(shelf, 1, 2, 3)
        assert client.fetch(wanted, 20.0) == [""] * 3
        assert all(arrived(shelf, w) for w in wanted)
        client.close()
        trusting_nobody = client_of(server.port, tls=ssl.create_default_context())
        assert trusting_nobody.fetch(wants(shelf, 1), 5.0) == ["peer_lost"]
        trusting_nobody.close()
        in_clear = client_of(server.port, connect_s=0.5)
        assert in_clear.fetch(wants(shelf, 1), 5.0) == ["peer_lost"]
        in_clear.close()
    finally:
        server.close()


def test_a_stream_ends_for_good(server: PeerServer) -> None:
    stream = Stream(socket.create_connection(("127.0.0.1", server.port)))
    stream.close()
    stream.close()
    with pytest.raises(OSError, match="receiving"):
        stream.fill(memoryview(bytearray(1)), time.monotonic() + 1)


# --- questions ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(shelf: Shelf) -> Iterator[PeerServer]:
    """Answers with who asks and what, and refuses what begins with 'no'."""

    def answer(body: bytes, peer: str) -> bytes:
        if body.startswith(b"no"):
            raise AuthError("not that")
        return peer.encode() + b":" + body

    made = PeerServer(Identity("a", 7, TOKEN), shelf, ServerSettings(), answer)
    yield made
    made.close()


def test_questions_and_objects_share_a_connection(shelf: Shelf, asked: PeerServer) -> None:
    client = client_of(asked.port, streams=1)
    try:
        assert client.ask(b"who am I", 5.0) == b"b:who am I"
        assert client.fetch(wants(shelf, 1), 20.0) == [""]
        large = b"x" * 1_000_000
        assert client.ask(large, 20.0) == b"b:" + large
        with pytest.raises(KvtierError, match="not that"):
            client.ask(b"no", 5.0)
        assert client.ask(b"still here", 5.0) == b"b:still here"
        assert len(asked._open) == 1
    finally:
        client.close()


def test_nobody_answers_where_there_is_nobody_to(client: PeerClient) -> None:
    with pytest.raises(StreamLost):
        client.ask(b"anybody?", 2.0)


def test_a_connection_that_the_other_end_closed_is_replaced(asked: PeerServer) -> None:
    client = client_of(asked.port, streams=1)
    try:
        assert client.ask(b"1", 5.0)
        for stream in list(asked._open):
            stream.close()
        until(lambda: not asked._open, "it is closed")
        assert client.ask(b"2", 5.0) == b"b:2"
    finally:
        client.close()


def test_a_peer_of_an_earlier_start_gives_nothing(shelf: Shelf, asked: PeerServer) -> None:
    client = client_of(asked.port)
    client.least_epoch = 8
    try:
        wanted = wants(shelf, 1)
        assert client.fetch(wanted, 5.0) == ["peer_lost"]
        assert not arrived(shelf, wanted[0])
        with pytest.raises(StreamLost, match="earlier start"):
            client.ask(b"who", 5.0)
        client.least_epoch = 7
        assert client.fetch(wants(shelf, 1), 20.0) == [""]
    finally:
        client.close()


def test_where_no_more_threads_can_be_had_fewer_connections_do(
    shelf: Shelf, client: PeerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, left = threading.Thread.start, [1]

    def refuses(self: threading.Thread) -> None:
        if self.name == "kvtier-fetch":
            if not left:
                raise RuntimeError("can't start new thread")
            left.pop()
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuses)
    for _ in range(2):
        wanted = wants(shelf, *range(8))
        assert client.fetch(wanted, 20.0) == [""] * 8
        assert all(arrived(shelf, one) for one in wanted)
