"""A connection between two nodes: frames, and the bytes of objects between them; and such a one over TCP."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from kvtier.checksum import PIECE_BYTES, combine, piece_sum
from kvtier.errors import MalformedMessage
from kvtier.messages.calls import Message
from kvtier.messages.protocol import LENGTH, body_length, decode, encode

M = TypeVar("M", bound=Message)
# The kernel's own window; what loopback and a 100 Gbit/s link at 0.2 ms need.
BUFFER_BYTES = 4 << 20
_MOST_PATHS = {
    socket.SO_RCVBUF: Path("/proc/sys/net/core/rmem_max"),
    socket.SO_SNDBUF: Path("/proc/sys/net/core/wmem_max"),
}
# Nothing that two nodes say to each other is longer, so nobody can make a node hold more: before both have
# proven who they are, and afterwards.
MAX_BODY_BYTES = 4096
MAX_ASK_BYTES = 4 << 20
# A socket takes no longer wait than its clock can count.
_MOST_WAIT_S = 86400.0
_TIMEVAL = struct.Struct("@ll")
# Python runs slowly where so many bytes have just gone through the processor's cache: as few steps as can be.
_PIECES_AT_ONCE = 32


class StreamLost(OSError):
    """The other end is gone, or took too long. Nothing more can be said over this connection."""


class Wire(ABC):
    """Not thread-safe, but for `close`. Times are deadlines by time.monotonic().

    epoch: of the other end, once it has proven who it is; for who keeps streams.  way: how it is reached.
    lends: ways by which the other end's memory may be read beside it.
    """

    epoch = 0
    way = "tcp"
    lends: tuple[str, ...] = ()

    @abstractmethod
    def _send_all(self, part: memoryview, until_s: float) -> None:
        """Raises OSError."""

    @abstractmethod
    def fill(self, into: memoryview, until_s: float) -> None:
        """Receive exactly as many bytes. Raises StreamLost."""

    @abstractmethod
    def close(self) -> None:
        """From any thread: whoever sends or receives gets StreamLost. Twice is no harm."""

    def send(self, message: Message, until_s: float, payload: Iterable[memoryview] = ()) -> int:
        """A frame, and the bytes that belong to it; answers how many those are. Raises StreamLost."""
        sent = 0
        try:
            self._send_all(memoryview(encode(message)), until_s)
            for part in payload:
                self._send_all(part, until_s)
                sent += len(part)
        except OSError as error:
            raise StreamLost(f"sending: {error}") from error
        return sent

    def receive(self, kind: type[M], until_s: float, most_bytes: int = MAX_BODY_BYTES) -> M:
        """The next frame, which has to be of this kind. Raises StreamLost, MalformedMessage."""
        message = self.receive_any(until_s, most_bytes)
        if not isinstance(message, kind):
            raise MalformedMessage(f"{type(message).__name__} where {kind.__name__} was expected")
        return message

    def receive_any(self, until_s: float, most_bytes: int = MAX_BODY_BYTES) -> Message:
        """The next frame. Raises StreamLost, MalformedMessage."""
        prefix = bytearray(LENGTH.size)
        self.fill(memoryview(prefix), until_s)
        length = body_length(bytes(prefix))
        if length > most_bytes:
            raise MalformedMessage(f"a frame of {length} bytes between nodes")
        body = bytearray(length)
        self.fill(memoryview(body), until_s)
        return decode(memoryview(body))

    def receive_object(
        self, into: memoryview, until_s: float, came: Callable[[int, int], None] = lambda *_: None
    ) -> int:
        """Fill `into` with an object's bytes; answers their checksum. Raises StreamLost.

        came: told of each part, (its bytes, the same in bytes of the connection).
        Many pieces are hashed at a time; what comes meanwhile waits in the kernel's window.
        """
        sums = []
        for at in range(0, len(into), _PIECES_AT_ONCE * PIECE_BYTES):
            part = into[at : at + _PIECES_AT_ONCE * PIECE_BYTES]
            self.fill(part, until_s)
            sums.append(piece_sum(part, at // PIECE_BYTES, len(part)))
            came(len(part), len(part))
        return combine(sums, len(into))


class Stream(Wire):
    """Over a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Under TLS a part of a record may be there without any more to come from the kernel.
        self._plain = not isinstance(sock, ssl.SSLSocket)
        if self._plain:
            # Who waits, waits in the kernel, for all that is wanted: one call for many packets.
            sock.settimeout(None)
        # Held by who sends or receives: under TLS nobody else may take the socket apart meanwhile.
        self._in_use = threading.Lock()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def begin_tls(self, until_s: float) -> None:
        """Agree on keys with the other end, on a TLS socket that has not done so. Raises OSError."""
        assert isinstance(self._sock, ssl.SSLSocket)
        with self._in_use:
            self._sock.settimeout(left(until_s))
            self._sock.do_handshake()

    def _send_all(self, part: memoryview, until_s: float) -> None:
        at = 0
        with self._in_use:
            while at < len(part):
                self._bound(socket.SO_SNDTIMEO, until_s)
                at += self._sock.send(part[at:])

    def fill(self, into: memoryview, until_s: float) -> None:
        """See Wire."""
        at = 0
        try:
            with self._in_use:
                while at < len(into):
                    self._bound(socket.SO_RCVTIMEO, until_s)
                    got = self._sock.recv_into(into[at:], 0, socket.MSG_WAITALL if self._plain else 0)
                    if not got:
                        raise StreamLost("the other end closed the connection")
                    at += got
        except OSError as error:
            raise StreamLost(f"receiving: {error}") from error

    def _bound(self, option: int, until_s: float) -> None:
        """Have the next call end by then."""
        left_s = left(until_s)
        if not self._plain:
            self._sock.settimeout(left_s)
            return
        seconds = int(left_s)
        micros = max(1, int((left_s - seconds) * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, micros))

    def close(self) -> None:
        """See Wire."""
        # The other end may have closed it before.  Not the TLS socket's own way: that ends TLS first, and who
        # sends just then would send in clear.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        with self._in_use:
            self._sock.close()


def connect(address: tuple[str, int], tls: ssl.SSLContext | None, until_s: float) -> Stream:
    """Open a connection. Raises StreamLost."""
    try:
        sock = socket.create_connection(address, timeout=left(until_s))
    except OSError as error:
        raise StreamLost(f"{address[0]}:{address[1]}: {error}") from error
    try:
        widen(sock, socket.SO_RCVBUF)
        if tls is not None:
            sock.settimeout(left(until_s))
            sock = tls.wrap_socket(sock, server_hostname=address[0])
        return Stream(sock)
    except OSError as error:
        sock.close()
        raise StreamLost(f"{address[0]}:{address[1]}: {error}") from error


def widen(sock: socket.socket, option: int) -> None:
    """Have a window of BUFFER_BYTES, in or out, where the machine allows it.

    Elsewhere it stays the kernel's, which grows by need: one that was asked for is cut, and never grows.
    """
    with contextlib.suppress(OSError, ValueError):
        if int(_MOST_PATHS[option].read_text()) >= BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def left(until_s: float) -> float:
    """Seconds until then. Raises TimeoutError when there are none."""
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the time is over")
    return min(left_s, _MOST_WAIT_S)
