"""The listening side of a Unix socket: connections, their handshake, and the processes behind them."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier import protocol
from kvtier.config import Config
from kvtier.credentials import Access, read_token
from kvtier.daemon.loop import Loop
from kvtier.errors import KvtierError, MalformedMessage, ProtocolError
from kvtier.messages import Failed, Hello, Message, Welcome
from kvtier.wire import FrameBuffer, close_all, receive

log = logging.getLogger(__name__)

# linux/socket.h; Python has no name for it yet. A descriptor of the peer's process that cannot be forged.
_SO_PEERPIDFD = 77
_UCRED = struct.Struct("3i")
_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end: user, process, and a descriptor of that process."""

    uid: int
    pid: int
    pidfd: int


class Connection:
    """One accepted connection. Its callbacks run in the loop's thread.

    on_message: a message and its descriptors, which are the receiver's.  on_close: once, however it ends;
    also in the middle of `send`, when the other end is gone.  forget: the same, for who keeps count.
    """

    def __init__(self, loop: Loop, connected: socket.socket, forget: Callable[[Connection], None]) -> None:
        connected.setblocking(False)
        self._loop = loop
        self._socket = connected
        self._forget = forget
        self._frames = FrameBuffer()
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._awaiting_room = False
        self.closed = False
        self.on_message: Callable[[Message, list[int]], None] = _drop
        self.on_close: Callable[[], None] = _nothing
        loop.watch(connected.fileno(), self._ready)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, now or as soon as the other end takes it. Nothing is sent once closed."""
        if not self.closed:
            self._outbox.append((memoryview(protocol.encode(message)), tuple(fds)))
            self._flush()

    def close(self) -> None:
        """End the connection."""
        if self.closed:
            return
        self.closed = True
        self._loop.unwatch(self._socket.fileno())
        self._frames.clear()
        self._socket.close()
        self._forget(self)
        self.on_close()

    def peer(self) -> Peer:
        """The process at the other end, as the kernel knows it. Raises OSError when it is gone."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(raw)
        try:
            pidfd = self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            # Only where the kernel lacks the option: else the process is gone, and its id may be another's.
            if error.errno != errno.ENOPROTOOPT:
                raise
            pidfd = os.pidfd_open(pid)
        return Peer(uid, pid, pidfd)

    def _ready(self) -> None:
        if self._outbox:
            self._flush()
        if not self.closed and self._fill():
            self._deliver()

    def _fill(self) -> bool:
        try:
            nbytes, cut = receive(self._socket, self._frames)
        except BlockingIOError:
            return False
        except OSError:
            nbytes, cut = 0, False
        if not nbytes or cut:
            self.close()
            return False
        return True

    def _deliver(self) -> None:
        try:
            while not self.closed and (body := self._frames.peek()) is not None:
                message, fds = protocol.decode(body), self._frames.take()
                self.on_message(message, fds)
        except ProtocolError as error:
            # Whoever sent this does not speak the protocol: say so, and be rid of it.
            self.send(failed(error, 0))
            self.close()

    def _flush(self) -> None:
        while self._outbox:
            rest, fds = self._outbox[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._socket.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._await_room(True)
                return
            except OSError:
                self.close()
                return
            if sent < len(rest):
                self._outbox[0] = (rest[sent:], ())
            else:
                self._outbox.popleft()
        self._await_room(False)

    def _await_room(self, wanted: bool) -> None:
        if wanted is not self._awaiting_room:
            self._awaiting_room = wanted
            self._loop.watch_writable(self._socket.fileno(), wanted)


class Listener:
    """A Unix socket that takes connections, checks who they are, and shakes hands.

    on_join: a connection whose Hello was accepted; it is not answered yet: `welcome` does that.
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        access: Access,
        on_join: Callable[[Connection, Peer, Hello], None],
    ) -> None:
        self._loop = loop
        self._path = path
        self._access = access
        self._on_join = on_join
        self._connections: set[Connection] = set()
        self._socket = _listen(path)
        self._inode = os.stat(path).st_ino
        loop.watch(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Take no more, end all connections, remove the socket's file if it is still ours."""
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
        for connection in list(self._connections):
            connection.close()
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except OSError as error:
            # Nobody came after all, or there is no descriptor left for them: those that are here go on.
            log.warning("a connection was not taken: %s", error)
            return
        connection = Connection(self._loop, accepted, self._connections.discard)
        self._connections.add(connection)
        connection.on_message = lambda message, fds: self._greet(connection, message, fds)

    def _greet(self, connection: Connection, message: Message, fds: list[int]) -> None:
        close_all(fds)
        peer: Peer | None = None
        try:
            if not isinstance(message, Hello):
                raise MalformedMessage(f"the first message is {type(message).__name__}, not Hello")
            protocol.agree_version(message)
            peer = connection.peer()
            self._access.check(peer.uid, message.token)
        except KvtierError as error:
            if peer is not None:
                os.close(peer.pidfd)
            connection.send(failed(error, message.id))
            connection.close()
            return
        except OSError as error:
            log.warning("a peer's process cannot be watched: %s", error)
            connection.close()
            return
        connection.on_message = _drop
        self._on_join(connection, peer, message)


def access_of(config: Config) -> Access:
    """Who may connect to this node's sockets: its own user, those allowed, and who knows the token."""
    token = read_token(config.access.token_file) if config.access.token_file else ""
    return Access(frozenset({os.getuid(), *config.access.allowed_uids}), token)


def welcome(hello: Hello, node: str, epoch: int, software: str) -> Welcome:
    """The answer to an accepted Hello."""
    version = protocol.agree_version(hello)
    return Welcome(id=hello.id, version=version, node=node, epoch=epoch, software=software)


def failed(error: KvtierError, request_id: int) -> Failed:
    """An error as it travels."""
    return Failed(id=request_id, error=type(error).__name__, message=error.message, fix=error.fix)


def _listen(path: Path) -> socket.socket:
    """Bind, replacing the socket of a daemon that is gone. Raises KvtierError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        listener.bind(str(path))
        # Who may use it is decided by the credentials of each connection.
        os.chmod(path, 0o666)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise KvtierError(
            f"cannot listen at {path}: {error.strerror}",
            fix="another daemon may use this folder: see `kvtier status`, or choose node.runtime_dir",
        ) from error
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _drop(message: Message, fds: list[int]) -> None:
    close_all(fds)


def _nothing() -> None:
    """For callbacks that nobody set."""
