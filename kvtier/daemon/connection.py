"""The listening side of a Unix socket: connections, their handshake, and the processes behind them."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier.config.credentials import Access, read_token
from kvtier.config.load import Config
from kvtier.daemon.loop import Loop
from kvtier.errors import KvtierError, MalformedMessage, ProtocolError
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Hello, Message, Welcome
from kvtier.messages.wire import FrameBuffer, close_all, receive

log = logging.getLogger(__name__)

# linux/socket.h; Python has no name for it yet. A descriptor of the peer's process that cannot be forged.
_SO_PEERPIDFD = 77
_UCRED = struct.Struct("3i")
_BACKLOG = 128
# A greeting comes at once from whoever means to speak: silent connections are held neither long nor in
# numbers.
_GREETING_S = 5.0
_UNGREETED_MOST = 128
# Above the first, what a peer asks is not read until it has read its answers. That is for those that ask and
# answer in turn; a service may be writing to us before it reads, so it is only bounded: above the last bounds
# a connection ends. An answer has 16 MiB at most; a service or a worker's agent reads while it works, so what
# waits for it is some hundred bytes for each block or park under way.
_PAUSE_BYTES = 4 << 20
_TURNS_MOST_BYTES, _STREAM_MOST_BYTES = 64 << 20, 256 << 20
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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
        self._outbox_bytes = 0
        self._in_turn = True
        self._paused = False
        self._watched_for = (True, False)
        self.closed = False
        self.on_message: Callable[[Message, list[int]], None] = _drop
        self.on_close: Callable[[], None] = _nothing
        loop.watch(connected.fileno(), self._ready)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, now or as soon as the other end takes it. Nothing is sent once closed."""
        if self.closed:
            return
        frame = memoryview(protocol.encode(message))
        self._outbox.append((frame, tuple(fds)))
        self._outbox_bytes += len(frame)
        self._flush()
        most = _TURNS_MOST_BYTES if self._in_turn else _STREAM_MOST_BYTES
        if self._outbox_bytes > most:
            log.warning("a peer that does not read is let go: %d bytes wait for it", self._outbox_bytes)
            self.close()

    def streams(self) -> None:
        """The other end may write before it reads: from here on it is always read."""
        self._in_turn = False

    def close(self) -> None:
        """End the connection."""
        if self.closed:
            return
        self.closed = True
        self._outbox.clear()
        self._outbox_bytes = 0
        self._loop.unwatch(self._socket.fileno())
        self._frames.clear()
        self._socket.close()
        self._forget(self)
        on_close = self.on_close
        # They name this connection as a rule, and what the collector set aside frees no cycles.
        self.on_message, self.on_close = _drop, _nothing
        on_close()

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
        if self.closed:
            return
        if not self._paused:
            if self._fill():
                self._deliver()
        elif self._outbox_bytes <= _PAUSE_BYTES // 2:
            self._paused = False
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
            while not (self.closed or self._paused) and (body := self._frames.peek()) is not None:
                message, fds = protocol.decode(body), self._frames.take()
                self.on_message(message, fds)
                self._paused = self._in_turn and self._outbox_bytes > _PAUSE_BYTES
            if not self.closed:
                self._watch()
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
                break
            except OSError:
                self.close()
                return
            self._outbox_bytes -= sent
            if sent < len(rest):
                self._outbox[0] = (rest[sent:], ())
            else:
                self._outbox.popleft()
        self._watch()

    def _watch(self) -> None:
        wanted = (not self._paused, bool(self._outbox))
        if wanted != self._watched_for:
            self._watched_for = wanted
            self._loop.watch_for(self._socket.fileno(), readable=wanted[0], writable=wanted[1])


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
        # Those that have not greeted, the oldest first, and when each came.
        self._ungreeted: dict[Connection, float] = {}
        # resting: the listening socket is not watched until the next tick.  starved: that was said.
        self._resting = self._starved = False
        self._socket = _listen(path)
        self._inode = os.stat(path).st_ino
        loop.watch(self._socket.fileno(), self._accept)
        loop.at_ticks(self._tick)

    def close(self) -> None:
        """Take no more, end all connections, remove the socket's file if it is still ours."""
        self._loop.not_at_ticks(self._tick)
        if not self._resting:
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
            self._not_taken(error)
            return
        self._starved = False
        connection = Connection(self._loop, accepted, self._gone)
        self._connections.add(connection)
        self._ungreeted[connection] = time.monotonic()
        if len(self._ungreeted) > _UNGREETED_MOST:
            # Whoever means to speak has done so by now.
            next(iter(self._ungreeted)).close()
        connection.on_message = lambda message, fds: self._greet(connection, message, fds)

    def _not_taken(self, error: OSError) -> None:
        """Nobody came after all, or there is no descriptor left for them: those that are here go on."""
        if error.errno not in _NO_DESCRIPTORS:
            log.warning("a connection was not taken: %s", error)
            return
        if not self._starved:
            log.error("connections wait until there is room for them: %s", error)
        # They stay in the queue, which would call again at once and for ever.
        self._resting = self._starved = True
        self._loop.unwatch(self._socket.fileno())

    def _gone(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._ungreeted.pop(connection, None)

    def _tick(self) -> None:
        if self._resting:
            self._resting = False
            self._loop.watch(self._socket.fileno(), self._accept)
        late_s = time.monotonic() - _GREETING_S
        for connection in [c for c, came_s in self._ungreeted.items() if came_s < late_s]:
            log.warning("a connection that did not greet within %g s is let go", _GREETING_S)
            connection.close()

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
        del self._ungreeted[connection]
        if message.role != "client":
            connection.streams()
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
