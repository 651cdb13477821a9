"""Messages over one Unix socket, blocking, each wait with a deadline. `protocol.py` says what travels."""

from __future__ import annotations

import array
import contextlib
import math
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from kvtier import errors
from kvtier.errors import (
    AuthError,
    ConfigError,
    DaemonNotFound,
    KvtierError,
    MalformedMessage,
    ProtocolError,
    TierFull,
    TraceError,
    VersionMismatch,
)
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Hello, Message, Role, Welcome
from kvtier.paths import NODE_SOCKET

# Least room for a read, and the longest buffer that is kept between frames. Memory that is taken and given
# back for each long frame would be faulted in anew each time, which costs more than the frame's copies.
_ROOM_BYTES = 32 << 10
_KEPT_BYTES = 1 << 20
MAX_DESCRIPTORS = 64
_PREFIX = protocol.LENGTH.size
_INT_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)
# As numbers: operators of Python's flag types cost more than the rest of a read.
_CUT = int(socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))
_TIMEVAL = struct.Struct("ll")
_START = "start it with `kvtier up`, or pass the path of its socket"

Answer = TypeVar("Answer", bound=Message)


class ChannelLost(DaemonNotFound):
    """The other end went away, or never was there."""


class ChannelTimeout(ChannelLost):
    """The other end did not answer within the time allowed."""


class FrameBuffer:
    """Cuts a stream of bytes into frames, wherever reads happened to end, and keeps each frame's descriptors.

    A read ends behind the piece of the stream that descriptors came with, and that piece begins a frame: so
    they belong to the last frame that began before the end of their read.
    """

    __slots__ = ("_begin", "_buffer", "_end", "_fds", "_fed", "_taken", "_wanted")

    def __init__(self) -> None:
        self._buffer = bytearray(_ROOM_BYTES)
        # What came and was not taken is [_begin, _end) of the buffer; it belongs to a frame of _wanted bytes.
        self._begin = self._end = self._wanted = 0
        # How much of the stream came and was taken, for descriptors.
        self._fed = self._taken = 0
        self._fds: list[tuple[int, list[int]]] = []

    def room(self, nbytes: int = 0) -> memoryview:
        """Where the next read may put what it gives: `nbytes` or more, and the rest of a frame that began."""
        nbytes = max(nbytes, _ROOM_BYTES, self._wanted - (self._end - self._begin))
        if len(self._buffer) - self._end < nbytes:
            left = self._buffer[self._begin : self._end]
            if len(left) + nbytes > len(self._buffer):
                self._buffer = bytearray(len(left) + nbytes)
            self._buffer[: len(left)] = left
            self._begin, self._end = 0, len(left)
        return memoryview(self._buffer)[self._end :]

    def feed(self, nbytes: int, fds: list[int]) -> None:
        """One read put so many bytes into `room`, and gave these descriptors."""
        self._end += nbytes
        self._fed += nbytes
        if fds:
            self._fds.append((self._fed, fds))

    def peek(self) -> memoryview | None:
        """The next whole frame's body, or None. Raises MessageTooLarge for what was announced.

        Good until the next call of `room`.
        """
        at, here = self._begin, self._end - self._begin
        if here < _PREFIX:
            return None
        self._wanted = _PREFIX + protocol.body_length(self._buffer, at)
        if here < self._wanted:
            return None
        return memoryview(self._buffer)[at + _PREFIX : at + self._wanted]

    def take(self) -> list[int]:
        """Drop the frame that `peek` gave; answers its descriptors, which are the caller's from here on."""
        self._begin += self._wanted
        self._taken += self._wanted
        self._wanted = 0
        if self._begin == self._end:
            self._begin = self._end = 0
            if len(self._buffer) > _KEPT_BYTES:
                self._buffer = bytearray(_ROOM_BYTES)
        found: list[int] = []
        while self._fds and self._fds[0][0] <= self._taken:
            found += self._fds.pop(0)[1]
        return found

    def clear(self) -> None:
        """Drop everything and close the descriptors that nobody took."""
        self._begin = self._end = self._wanted = 0
        while self._fds:
            close_all(self._fds.pop()[1])


class Channel:
    """A connected socket that carries messages.

    One thread may receive while others send, if the senders share a lock.  A ProtocolError closes it.
    After a ChannelTimeout it is of no more use for requests: the late answer may still come.
    """

    __slots__ = ("_frames", "_poll", "_socket", "path", "welcome")

    def __init__(self, connected: socket.socket, path: str) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)
        self._frames = FrameBuffer()
        self.path = path
        self.welcome: Welcome | None = None

    @classmethod
    def open(cls, path: str, hello: Hello, deadline_s: float) -> Channel:
        """Connect and shake hands. deadline_s: on the clock of time.monotonic().

        Raises DaemonNotFound with the fix for what is at the path, AuthError, VersionMismatch, ProtocolError.
        """
        channel = cls(_connect(path, deadline_s), path)
        try:
            answer, fds = channel.exchange(protocol.encode(hello), hello.id, deadline_s)
            close_all(fds)
            welcome = expect(answer, Welcome, path)
            if not hello.oldest <= welcome.version <= hello.newest:
                raise VersionMismatch(
                    f"{path} speaks protocol version {welcome.version}, "
                    f"this end {hello.oldest} to {hello.newest}",
                    fix="install the same kvtier release, or one apart, at both ends",
                )
        except BaseException:
            channel.close()
            raise
        channel.welcome = welcome
        return channel

    def fileno(self) -> int:
        """For selectors; -1 when closed."""
        return self._socket.fileno()

    def exchange(
        self, frame: bytes, request_id: int, deadline_s: float, fds: Sequence[int] = ()
    ) -> tuple[Message, list[int]]:
        """Send an encoded request and wait for its answer. Raises as `send_frame` and `recv`."""
        self.send_frame(frame, deadline_s, fds)
        answer, received = self.recv(deadline_s)
        # A peer that could not read the request knows no id to repeat.
        unread = isinstance(answer, Failed) and answer.id == 0
        if answer.id != request_id and not unread:
            close_all(received)
            self.close()
            raise MalformedMessage(f"{self.path} answered request {answer.id} instead of {request_id}")
        return answer, received

    def send(self, message: Message, deadline_s: float, fds: Sequence[int] = ()) -> None:
        """Send one message, its descriptors beside the first byte. Raises MessageTooLarge, ChannelLost."""
        self.send_frame(protocol.encode(message), deadline_s, fds)

    def send_frame(self, frame: bytes, deadline_s: float, fds: Sequence[int] = ()) -> None:
        """Send an encoded message. Raises ChannelLost; after it part of the frame may have gone."""
        rest = memoryview(frame)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while rest:
            try:
                sent = self._socket.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait_writable(deadline_s)
            except OSError as error:
                raise ChannelLost(f"{self.path} went away: {error.strerror}", fix=_START) from error
            else:
                rest, ancillary = rest[sent:], []

    def recv(self, deadline_s: float) -> tuple[Message, list[int]]:
        """The next message and the descriptors that came with it, which are the caller's from here on.

        Raises ChannelTimeout, ChannelLost, MalformedMessage, MessageTooLarge.
        """
        while (received := self._pop()) is None:
            remaining_s = deadline_s - time.monotonic()
            if not self._poll.poll(math.ceil(max(0.0, remaining_s) * 1000)) and remaining_s <= 0:
                raise ChannelTimeout(f"{self.path} did not answer in time", fix="see `kvtier status`")
            self._fill()
        return received

    def recv_ready(self) -> list[tuple[Message, list[int]]]:
        """All whole messages that are here now, after one read that does not wait. Raises as `recv`."""
        self._fill()
        received: list[tuple[Message, list[int]]] = []
        try:
            while (one := self._pop()) is not None:
                received.append(one)
        except ProtocolError:
            for _, fds in received:
                close_all(fds)
            raise
        return received

    def hung_up(self) -> bool:
        """Whether the other end is known to be gone. Does not wait."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def shutdown(self) -> None:
        """End the connection; wakes a thread that waits in `recv`. Safe from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and descriptors that nobody claimed. No other thread may be using the channel."""
        self._frames.clear()
        self._socket.close()

    def _pop(self) -> tuple[Message, list[int]] | None:
        try:
            body = self._frames.peek()
            return None if body is None else (protocol.decode(body), self._frames.take())
        except ProtocolError:
            self.close()
            raise

    def _fill(self) -> None:
        try:
            nbytes, cut = receive(self._socket, self._frames)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelLost(f"{self.path} went away: {error.strerror}", fix=_START) from error
        if cut:
            self.close()
            raise MalformedMessage(f"{self.path} sent more than {MAX_DESCRIPTORS} descriptors at once")
        if not nbytes:
            raise ChannelLost(f"{self.path} closed the connection", fix=_START)

    def _wait_writable(self, deadline_s: float) -> None:
        remaining_s = deadline_s - time.monotonic()
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        if not poll.poll(math.ceil(max(0.0, remaining_s) * 1000)):
            raise ChannelTimeout(f"{self.path} takes no more messages", fix="see `kvtier status`")


def receive(connected: socket.socket, into: FrameBuffer) -> tuple[int, bool]:
    """One read: the number of bytes (0 at the end), and whether some of the descriptors were cut off.

    Raises OSError; BlockingIOError when a non-blocking socket has nothing.
    """
    room = into.room()
    nbytes, ancillary, flags, _ = connected.recvmsg_into([room], _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == _RIGHTS:
            fds += array.array("i", content[: len(content) - len(content) % _INT_BYTES])
    into.feed(nbytes, fds)
    return nbytes, flags & _CUT != 0


def expect(answer: Message, kind: type[Answer], path: str) -> Answer:
    """The answer, if it is of this kind. Raises what a Failed names, MalformedMessage for another kind."""
    if isinstance(answer, kind):
        return answer
    if isinstance(answer, Failed):
        raise error_of(answer)
    raise MalformedMessage(f"{path} answered with {type(answer).__name__}, not {kind.__name__}")


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that came with a message and are not wanted."""
    for fd in fds:
        os.close(fd)


def hello(role: Role, *, token: str = "", worker: str = "") -> Hello:
    """This release's Hello."""
    return Hello(
        id=1,
        role=role,
        oldest=protocol.OLDEST_VERSION,
        newest=protocol.VERSION,
        token=token,
        worker=worker,
    )


def error_of(failed: Failed) -> KvtierError:
    """The exception that a Failed stands for; KvtierError itself when its class is not known here."""
    kind = getattr(errors, failed.error, None)
    if not (isinstance(kind, type) and issubclass(kind, KvtierError)):
        return KvtierError(f"{failed.error}: {failed.message}", fix=failed.fix)
    # Some take other arguments than what travels: message and fix are whole already.
    error: KvtierError = kind.__new__(kind)
    KvtierError.__init__(error, failed.message, fix=failed.fix)
    if isinstance(error, ConfigError):
        error.field = failed.message.partition(": ")[0]
    elif isinstance(error, TierFull):
        error.needed_bytes = 0
    elif isinstance(error, TraceError):
        error.line = 0
    return error


def _connect(path: str, deadline_s: float) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A blocking connect is the only one that waits for room in a busy listener's queue.
        remaining_s = max(1e-3, deadline_s - time.monotonic())
        limit = _TIMEVAL.pack(int(remaining_s), int(remaining_s % 1 * 1e6))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connected.connect(path)
    except OSError as error:
        connected.close()
        raise _not_found(path, error) from error
    except BaseException:
        connected.close()
        raise
    return connected


def _not_found(path: str, error: OSError) -> KvtierError:
    """What to tell someone who could not connect, by what is at the path."""
    if isinstance(error, BlockingIOError):
        return ChannelTimeout(f"the daemon at {path} does not take connections", fix="see `kvtier status`")
    if isinstance(error, PermissionError):
        return AuthError(
            f"this user may not open {path}", fix="add the user to the socket's group, or run as its owner"
        )
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        if error.strerror is None:
            return ChannelLost(f"{path} cannot be a socket: {error}", fix="use a path under 108 bytes")
        return ChannelLost(f"there is no socket at {path}", fix=_START)
    if stat.S_ISDIR(mode):
        return ChannelLost(f"{path} is a folder", fix=f"pass the socket in it: {Path(path, NODE_SOCKET)}")
    if not stat.S_ISSOCK(mode):
        return ChannelLost(f"{path} is a file, not a socket", fix="pass the path of the daemon's socket")
    return ChannelLost(f"nobody listens at {path}: its daemon has ended", fix=_START)
