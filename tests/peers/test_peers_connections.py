"""Connections that a client keeps: to whom, for how long, and what ends them."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kvtier.carriage import Bytes, Passing
from kvtier.checksum import checksum
from kvtier.objects import ObjectId
from kvtier.peers import server as server_module
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.fetch import Wanted
from kvtier.peers.handshake import Identity
from kvtier.peers.relay import Relayed
from kvtier.peers.server import Opened, PeerServer, ServerSettings
from kvtier.peers.stream import StreamLost
from kvtier.testing.node_bench import until

TOKEN = b"0123456789abcdef"
OBJECT = ObjectId(bytes(32), 0, "L0+1.H0+1")
DATA = np.arange(100_000, dtype=np.uint8)


class Shelf:
    """A source with one object."""

    @contextmanager
    def open(self, object_id: ObjectId, peer: str) -> Iterator[Opened | str]:
        yield Opened(DATA, checksum(DATA))


@pytest.fixture
def client() -> Iterator[PeerClient]:
    server = PeerServer(Identity("a", 7, TOKEN), Shelf(), ServerSettings())
    made = client_of(server.port)
    yield made
    made.close()
    server.close()


def client_of(port: int) -> PeerClient:
    return PeerClient(Identity("b", 1, TOKEN), "a", ("127.0.0.1", port), ClientSettings())


def fetched(client: PeerClient, timeout_s: float = 5.0) -> list[str]:
    return list(client.fetch([Wanted(OBJECT, np.zeros_like(DATA), None)], timeout_s))


def test_connections_to_an_earlier_start_are_not_used_again(client: PeerClient) -> None:
    assert fetched(client) == [""]
    # The node has started again elsewhere, and the former one still answers behind a cut.
    client.least_epoch = 8
    assert fetched(client) == ["peer_lost"]


def test_a_deadline_beyond_a_sockets_clock_is_none_to_wait_for(client: PeerClient) -> None:
    assert fetched(client, 1e12) == [""]


def test_closing_a_client_ends_questions_that_wait() -> None:
    asked, gate = threading.Event(), threading.Event()

    def answer(body: bytes, peer: str) -> bytes:
        asked.set()
        assert gate.wait(20)
        return body

    server = PeerServer(Identity("a", 7, TOKEN), None, ServerSettings(), answer)
    client = client_of(server.port)
    lost: list[BaseException] = []

    def ask() -> None:
        try:
            client.ask(b"?", 60.0)
        except StreamLost as error:
            lost.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert asked.wait(10)
        client.close()
        asking.join(5)
        assert lost and not asking.is_alive()
        with pytest.raises(StreamLost):
            client.ask(b"?", 5.0)
    finally:
        gate.set()
        server.close()
        asking.join()


# --- nobody can be taken for a while ------------------------------------------------------------------------


class Starved:
    """A listening socket; each call of `accept` fails with the next error as long as there is one."""

    def __init__(self, real: socket.socket, errors: Iterator[int]) -> None:
        self.real, self.errors, self.calls = real, errors, 0

    def accept(self) -> Any:
        self.calls += 1
        number = next(self.errors, None)
        if number is not None:
            raise OSError(number, os.strerror(number))
        return self.real.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def starved_server(monkeypatch: pytest.MonkeyPatch, errors: Iterator[int]) -> PeerServer:
    create = socket.create_server
    monkeypatch.setattr(socket, "create_server", lambda *at, **how: Starved(create(*at, **how), errors))
    return PeerServer(Identity("a", 7, TOKEN), Shelf(), ServerSettings())


def test_a_node_without_descriptors_is_reached_again_once_it_has_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passing = [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOBUFS, errno.ENOMEM, errno.EPROTO]
    server = starved_server(monkeypatch, iter(passing))
    client = client_of(server.port)
    try:
        assert fetched(client, 30.0) == [""]
    finally:
        client.close()
        server.close()
    assert sum("wait until they can be taken" in line for line in caplog.messages) == 1


def test_a_server_that_can_take_nobody_rests_and_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_REST_S", 3600.0)
    server = starved_server(monkeypatch, itertools.repeat(errno.EMFILE))
    listener: Any = server._listener
    until(lambda: listener.calls, "it was tried")
    server.close()
    assert listener.calls == 1
    assert not server._thread.is_alive()


# --- no thread is to be had, or none is free ----------------------------------------------------------------


def test_a_connection_without_a_thread_is_refused_and_the_next_one_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, refused = threading.Thread.start, [0]

    def refuses(self: threading.Thread) -> None:
        if self.name == "kvtier-peer":
            refused[0] += 1
            raise RuntimeError("can't start new thread")
        start(self)

    server = PeerServer(Identity("a", 7, TOKEN), Shelf(), ServerSettings())
    begins = Passing("c", np.zeros(0, np.uint8), first=True)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuses)
            with socket.create_connection(("127.0.0.1", server.port), 10) as called:
                assert called.recv(1) == b"", "it is closed at once"
            assert server.tunnels.pass_on(begins) is None
        assert refused[0] == server.sent.refused == 2
        assert not server._open
        client = client_of(server.port)
        assert fetched(client) == [""]
        client.close()
        assert server.tunnels.pass_on(begins) is not None
    finally:
        server.close()


class Busy:
    """A carrier whose calls do not begin; or none can be made."""

    name = "relayed"

    def __init__(self) -> None:
        self.answers: list[Future[Bytes | None]] = []
        self.full = False

    def pass_on(self, node: str, call: Passing) -> Future[Bytes | None]:
        if self.full:
            raise RuntimeError("can't start new thread")
        self.answers.append(Future())
        return self.answers[-1]


def test_a_call_that_is_given_up_before_it_began_is_never_made() -> None:
    carrier = Busy()
    wire = Relayed(carrier, "a")
    with pytest.raises(StreamLost, match="the time is over"):
        wire.fill(memoryview(bytearray(1)), time.monotonic() + 0.05)
    assert [answer.cancelled() for answer in carrier.answers] == [True]
    wire.close()


def test_a_call_for_which_there_is_no_thread_loses_the_connection() -> None:
    carrier = Busy()
    carrier.full = True
    wire = Relayed(carrier, "a")
    with pytest.raises(StreamLost, match="relayed: can't start"):
        wire.fill(memoryview(bytearray(1)), time.monotonic() + 10)
    # Nor does its end need one.
    wire.close()
