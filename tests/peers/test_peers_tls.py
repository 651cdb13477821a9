"""TLS between nodes: both show a certificate of one authority, and a stranger gets nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.errors import ConfigError, KvtierError
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.handshake import Identity
from kvtier.peers.server import PeerServer, ServerSettings
from kvtier.peers.stream import Stream, StreamLost
from kvtier.peers.tls import TlsFiles, client_side, server_side
from kvtier.testing.certificates import make_authority, make_certificate
from kvtier.waiting import wait_until

TOKEN = b"0123456789abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def files(folder: Path) -> TlsFiles:
    try:
        return TlsFiles(*make_certificate(make_authority(folder / "ours", "ca"), "node"))
    except FileNotFoundError:
        pytest.skip("no openssl here")


@pytest.fixture(scope="module")
def theirs(folder: Path, files: TlsFiles) -> TlsFiles:
    return TlsFiles(*make_certificate(make_authority(folder / "theirs", "ca"), "node"))


@pytest.fixture
def server(files: TlsFiles) -> Iterator[PeerServer]:
    settings = ServerSettings(tls=server_side(files), handshake_s=5.0)
    made = PeerServer(Identity("a", 7, TOKEN), None, settings, lambda body, peer: body[::-1])
    yield made
    made.close()


def ask(server: PeerServer, files: TlsFiles | None, host: str = "127.0.0.1") -> bytes:
    tls = client_side(files) if files else None
    client = PeerClient(Identity("b", 7, TOKEN), "a", (host, server.port), ClientSettings(tls=tls))
    with contextlib.closing(client):
        return client.ask(b"abc", 10.0)


def test_nodes_of_one_authority_speak(server: PeerServer, files: TlsFiles) -> None:
    assert ask(server, files) == b"cba"


def test_whoever_shows_nothing_or_something_else_gets_nothing(
    server: PeerServer, files: TlsFiles, theirs: TlsFiles
) -> None:
    stranger = TlsFiles(theirs.cert, theirs.key, files.ca)
    for wrong in (None, theirs, stranger):
        with pytest.raises((StreamLost, KvtierError)):
            ask(server, wrong)
    assert ask(server, files) == b"cba"


def test_a_certificate_for_another_address_is_not_taken(folder: Path, files: TlsFiles) -> None:
    elsewhere = TlsFiles(*make_certificate(Path(files.ca), "elsewhere", "10.9.9.9"))
    settings = ServerSettings(tls=server_side(elsewhere))
    server = PeerServer(Identity("a", 7, TOKEN), None, settings, lambda body, peer: body)
    with contextlib.closing(server), pytest.raises(StreamLost, match="certificate verify failed"):
        ask(server, files)


def test_a_server_ends_at_once_although_a_peer_is_connected(files: TlsFiles) -> None:
    server = PeerServer(
        Identity("a", 7, TOKEN), None, ServerSettings(tls=server_side(files)), lambda body, peer: body
    )
    tls = client_side(files)
    client = PeerClient(Identity("b", 7, TOKEN), "a", ("127.0.0.1", server.port), ClientSettings(tls=tls))
    assert client.ask(b"abc", 10.0) == b"abc"
    ended = threading.Thread(target=server.close)
    ended.start()
    ended.join(30.0)
    assert not ended.is_alive(), "it waits for a connection that nobody closes"
    client.close()


def test_a_server_ends_at_once_although_a_peer_has_begun_tls_and_says_nothing(files: TlsFiles) -> None:
    settings = ServerSettings(tls=server_side(files), handshake_s=3600.0)
    server = PeerServer(Identity("a", 7, TOKEN), None, settings, lambda body, peer: body)
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        assert wait_until(lambda: any(not stream._plain for stream in server._open), 30.0)
        ended = threading.Thread(target=server.close, daemon=True)
        ended.start()
        ended.join(30.0)
        assert not ended.is_alive(), "it waits for a handshake that nobody goes on with"
        assert silent.recv(1) == b""


def test_nothing_goes_in_clear_while_another_thread_cuts_the_connection(
    files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    accepted: list[ssl.SSLSocket] = []
    accepting = threading.Thread(
        target=lambda: accepted.append(server_side(files).wrap_socket(theirs, server_side=True))
    )
    accepting.start()
    secured = client_side(files).wrap_socket(ours, server_hostname="127.0.0.1")
    accepting.join(30.0)
    # What is not read when a socket closes takes away what the other end has not read.
    accepted[0].send(b"hello")
    assert secured.recv(5) == b"hello"
    cut = socket.socket.shutdown

    def sends_meanwhile(sock: socket.socket, how: int) -> None:
        sock.send(b"what is private")
        cut(sock, how)

    monkeypatch.setattr(socket.socket, "shutdown", sends_meanwhile)
    Stream(secured).close()
    monkeypatch.undo()
    sent = b""
    while more := os.read(accepted[0].fileno(), 1 << 16):
        sent += more
    assert sent and b"private" not in sent
    accepted[0].close()


def test_who_says_nothing_is_cut_off(files: TlsFiles) -> None:
    settings = ServerSettings(tls=server_side(files), handshake_s=0.2)
    server = PeerServer(Identity("a", 7, TOKEN), None, settings, lambda body, peer: body)
    with contextlib.closing(server), socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.settimeout(20.0)
        assert silent.recv(1) == b""
        until_s = time.monotonic() + 20.0
        while not server.sent.refused and time.monotonic() < until_s:
            pass
        assert server.sent.refused == 1


@pytest.mark.parametrize(("wrong", "field"), [("cert", "tls_cert_file"), ("ca", "tls_ca_file")])
def test_files_that_are_no_certificates_are_named(
    tmp_path: Path, files: TlsFiles, wrong: str, field: str
) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("nothing")
    named = {"cert": files.cert, "key": files.key, "ca": files.ca, wrong: str(junk)}
    for side in (client_side, server_side):
        with pytest.raises(ConfigError, match=field):
            side(TlsFiles(**named))
