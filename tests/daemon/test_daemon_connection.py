"""Connections and listeners: handshakes, credentials, backlog, ends in awkward moments."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier.config.credentials import Access
from kvtier.daemon import connection as connection_module
from kvtier.daemon.connection import Connection, Listener, Peer, welcome
from kvtier.daemon.loop import Loop, LoopThread
from kvtier.errors import AuthError, KvtierError
from kvtier.messages import protocol
from kvtier.messages.calls import Hello, Message, Ping, Pong
from kvtier.messages.wire import Channel, close_all, hello
from kvtier.testing.node_bench import until
from kvtier.waiting import wait_until


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


def test_a_closed_connection_is_freed_without_the_collector(server: Server) -> None:
    """A service's process sets aside what a full collection saw: cycles among it are never freed."""
    channel = server.channel()
    ping(channel)
    ((connection, peer, _),) = server.joined
    seen = weakref.ref(connection)
    channel.close()
    until(lambda: server.left == 1, "it is closed")
    assert connection.closed
    gc.disable()
    try:
        del connection
        os.close(peer.pidfd)
        server.joined.clear()
        # The loop holds what it called last.
        server.do()
        assert wait_until(lambda: seen() is None, 10)
    finally:
        gc.enable()


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


def silent(server: Server) -> socket.socket:
    """A connection that says nothing, and was taken."""
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(10)
    made.connect(server.path)
    return made


def test_whoever_does_not_greet_in_time_is_let_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ping(greeted := server.channel())
    quiet, slow = silent(server), silent(server)
    slow.sendall(protocol.encode(hello("client"))[:9])
    # An answer to a later one says that both have been taken.
    ping(server.channel())
    server.do()
    monkeypatch.setattr(connection_module, "_GREETING_S", -1.0)
    assert (quiet.recv(1), slow.recv(1)) == (b"", b"")
    monkeypatch.undo()
    ping(greeted)


def test_of_many_that_do_not_greet_the_oldest_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_UNGREETED_MOST", 3)
    many = [silent(server) for _ in range(10)]
    assert [each.recv(1) for each in many[:7]] == [b""] * 7
    # The newest may still greet.
    many[9].sendall(protocol.encode(hello("client")))
    assert many[9].recv(4)
    for each in many:
        each.close()


def test_without_descriptors_left_the_listener_rests_and_says_so_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ping(here := server.channel())
    real, calls = server.listener._socket, [0]

    class Starved:
        """A listening socket of a process whose descriptors are all in use."""

        def accept(self) -> None:
            calls[0] += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def fileno(self) -> int:
            return real.fileno()

        def close(self) -> None:
            real.close()

    rounds = [0]
    server.loop.at_ticks(lambda: rounds.__setitem__(0, rounds[0] + 1))
    monkeypatch.setattr(server.listener, "_socket", Starved())
    waiting = silent(server)
    until(lambda: calls[0] >= 5, "it was tried again")
    # At most once between two ticks, and those that are here are served meanwhile.
    assert calls[0] <= rounds[0] + 2
    ping(here)
    assert sum("wait until there is room" in line for line in caplog.messages) == 1
    monkeypatch.undo()
    waiting.sendall(protocol.encode(hello("client")))
    assert waiting.recv(4)
    waiting.close()


def test_whoever_asks_and_does_not_read_is_not_read_either(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_PAUSE_BYTES", 10_000)
    channel = server.channel()
    ((connection, _, _),) = server.joined
    frame, count, sent, asked = protocol.encode(Ping(id=9)), 100_000, 0, []

    def count_and_answer(message: Message, fds: list[int]) -> None:
        asked.append(message.id)
        connection.send(Pong(id=message.id))

    connection.on_message = count_and_answer
    flood = memoryview(frame * count)
    while sent < len(flood) and not connection._paused:
        with contextlib.suppress(BlockingIOError):
            sent += channel._socket.send(flood[sent:])
    assert connection._paused
    ping(other := server.channel())
    other.close()
    # What waits has a bound, however much is asked.
    assert connection._outbox_bytes <= 10_000 + len(protocol.encode(Pong(id=9)))
    # Whoever reads gets all of its answers, and may go on.
    for _ in range(sent // len(frame)):
        assert channel.recv(time.monotonic() + 10)[0] == Pong(id=9)
    rest = -sent % len(frame)
    channel._socket.sendall(frame[len(frame) - rest :])
    until(lambda: len(asked) == (sent + rest) // len(frame), "all were read")
    assert not connection.closed
    channel.close()


def test_a_stream_is_read_however_much_waits_and_ends_above_its_bound(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "_PAUSE_BYTES", 0)
    channel = Channel.open(server.path, hello("events"), time.monotonic() + 10)
    ((connection, _, _),) = server.joined
    for n in range(1, 1001):
        channel.send(Ping(id=n), time.monotonic() + 10)
    for n in range(1, 1001):
        assert channel.recv(time.monotonic() + 10)[0].id == n
    monkeypatch.setattr(connection_module, "_STREAM_MOST_BYTES", 1 << 20)

    def send_on() -> None:
        while not connection.closed and connection._outbox_bytes < 2 << 20:
            connection.send(Ping(id=1))

    server.do(send_on)
    assert connection.closed and server.left == 1
    assert any("does not read is let go" in line for line in caplog.messages)
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
