"""Connections and listeners: handshakes, credentials, backlog, ends in awkward moments."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier import protocol
from kvtier.credentials import Access
from kvtier.daemon.connection import Connection, Listener, Peer, welcome
from kvtier.daemon.loop import Loop, LoopThread
from kvtier.errors import AuthError, KvtierError
from kvtier.messages import Hello, Message, Ping, Pong
from kvtier.testing.node_bench import until
from kvtier.waiting import wait_until
from kvtier.wire import Channel, close_all, hello


class Server:
    """Answers pings; keeps what joined and left."""

    def __init__(self, path: Path, access: Access) -> None:
        self.path = str(path)
        self.joined: list[tuple[Connection, Peer, Hello]] = []
        self.left = 0
        self.got_fds: list[int] = []
        self.loop = Loop(0.01, lambda: None)
        self.listener = Listener(self.loop, path, access, self._join)
        self.thread = LoopThread(self.loop, "test-server", self.listener.close)
        self.thread.start()

    def _join(self, connection: Connection, peer: Peer, greeting: Hello) -> None:
        self.joined.append((connection, peer, greeting))
        connection.on_close = self._left
        connection.on_message = lambda message, fds: self._answer(connection, message, fds)
        connection.send(welcome(greeting, "test", 1, "0"))

    def _left(self) -> None:
        self.left += 1

    def _answer(self, connection: Connection, message: Message, fds: list[int]) -> None:
        self.got_fds += fds
        if isinstance(message, Ping):
            connection.send(Pong(id=message.id), fds)

    def channel(self, **options: str) -> Channel:
        return Channel.open(self.path, hello("client", **options), time.monotonic() + 10)

    def do(self, *work: Callable[[], None]) -> None:
        done = threading.Event()
        for call in (*work, done.set):
            self.loop.call(call)
        assert done.wait(10)

    def close(self) -> None:
        self.thread.stop(10)
        for _, peer, _ in self.joined:
            os.close(peer.pidfd)
        close_all(self.got_fds)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(uids: frozenset[int] = frozenset({os.getuid()}), token: str = "") -> Server:
        made.append(Server(tmp_path / f"{len(made)}.sock", Access(uids, token)))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def server(make: Callable[..., Server]) -> Server:
    return make()


def ping(channel: Channel, fds: tuple[int, ...] = ()) -> list[int]:
    answer, got = channel.exchange(protocol.encode(Ping(id=5)), 5, time.monotonic() + 10, fds)
    assert answer == Pong(id=5)
    return got


def test_the_peer_is_who_the_kernel_says(server: Server) -> None:
    channel = server.channel()
    ((_, peer, _),) = server.joined
    assert (peer.uid, peer.pid) == (os.getuid(), os.getpid())
    assert f"Pid:\t{os.getpid()}" in Path(f"/proc/self/fdinfo/{peer.pidfd}").read_text()
    channel.close()


def test_other_users_need_the_token(make: Callable[..., Server]) -> None:
    server = make(frozenset(), "the-right-word-here")
    for wrong in ("", "the-wrong-word-here"):
        with pytest.raises(AuthError):
            server.channel(token=wrong)
    ping(channel := server.channel(token="the-right-word-here"))
    channel.close()
    closed = make(frozenset())
    with pytest.raises(AuthError):
        closed.channel()


def test_descriptors_go_both_ways_with_their_message(server: Server) -> None:
    reader, writer = os.pipe()
    channel = server.channel()
    assert ping(channel) == []
    (got,) = ping(channel, (writer,))
    assert os.path.sameopenfile(got, writer)
    assert ping(channel) == []
    for fd in (reader, writer, got):
        os.close(fd)
    channel.close()


def test_more_than_the_socket_takes_waits_and_arrives_in_order(server: Server) -> None:
    channel = server.channel()
    ((connection, _, _),) = server.joined
    count = 20_000

    def send_all() -> None:
        for n in range(1, count + 1):
            connection.send(Ping(id=n))

    server.do(send_all)
    # Nobody has read yet: others are served meanwhile.
    ping(other := server.channel())
    other.close()
    for n in range(1, count + 1):
        message, _ = channel.recv(time.monotonic() + 10)
        assert message.id == n
    ping(channel)
    channel.close()


def test_whoever_is_gone_is_noticed_once(server: Server) -> None:
    channel = server.channel()
    ((connection, _, _),) = server.joined
    channel.close()
    until(lambda: server.left == 1, "it was noticed")
    server.do(lambda: connection.send(Ping(id=1)), connection.close)
    assert server.left == 1
    assert connection.closed


def test_whoever_greets_and_leaves_at_once_does_no_harm(server: Server) -> None:
    for _ in range(50):
        with socket.socket(socket.AF_UNIX) as brief:
            brief.connect(server.path)
            brief.sendall(protocol.encode(hello("client")))
    until(lambda: server.left == len(server.joined) == 50, "all came and went")
    ping(channel := server.channel())
    channel.close()


def test_without_descriptors_left_those_that_are_here_are_served(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = server.channel()

    def full(connection: Connection) -> Peer:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Connection, "peer", full)
    with pytest.raises(KvtierError):
        server.channel()
    ping(channel)
    monkeypatch.undo()
    ping(again := server.channel())
    again.close()
    channel.close()


def test_the_path_of_a_daemon_that_is_gone_is_taken_over_and_one_that_lives_is_not(
    make: Callable[..., Server], tmp_path: Path
) -> None:
    path = tmp_path / "0.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = make()
    ping(channel := server.channel())
    channel.close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KvtierError, match="cannot listen"):
        Listener(server.loop, path, Access(frozenset()), lambda *_: None)
    # The one that lives lets go of the connection by which it was asked.
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, 10.0)
    ping(channel := server.channel())
    channel.close()


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("somebody's")
    loop = Loop(1.0, lambda: None)
    with pytest.raises(KvtierError, match="cannot listen"):
        Listener(loop, tmp_path / "file", Access(frozenset()), lambda *_: None)
    assert (tmp_path / "file").read_text() == "somebody's"
    loop.close()


def test_a_listener_removes_only_its_own_socket(make: Callable[..., Server], tmp_path: Path) -> None:
    server = make()
    Path(server.path).unlink()
    Path(server.path).write_text("another's")
    assert server.thread.stop(10)
    assert Path(server.path).read_text() == "another's"
