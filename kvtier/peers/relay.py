"""A connection that a carrier brings in calls: the end that asks, and the end that answers.

All that is said over it is what would be said over TCP: who they are, questions, objects and their sums.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np

from kvtier.carriage import MOST_CONNECTIONS, MOST_WAIT_S, PIECE_BYTES, Bytes, Carrier, Passing
from kvtier.peers.stream import StreamLost, Wire, left

_LOG = logging.getLogger(__name__)
_NOTHING: Bytes = np.empty(0, np.uint8)
# One that was not used for so long may make room for another; its caller begins a new one when it asks again.
_RESTING_S = 2.0
# What a caller says fits into the window of who it is said to, unless that one does not read any more.
_SAY_S = 5.0


class Relayed(Wire):
    """The end that asks. Nothing is sent before something is waited for, but by pieces."""

    def __init__(self, carrier: Carrier, node: str) -> None:
        self.way = carrier.name
        self._carrier, self._node = carrier, node
        self._connection = secrets.token_hex(16)
        self._begun = False
        self._said = bytearray()
        self._came = _NOTHING
        self._closed: Future[None] = Future()
        self._lock = threading.Lock()

    def _send_all(self, part: memoryview, until_s: float) -> None:
        for at in range(0, len(part), PIECE_BYTES):
            piece = part[at : at + PIECE_BYTES]
            if len(self._said) + len(piece) > PIECE_BYTES:
                self._call(0, until_s)
            self._said += piece

    def fill(self, into: memoryview, until_s: float) -> None:
        """See Wire."""
        target = np.frombuffer(into, np.uint8)
        at = 0
        try:
            while at < len(target):
                if not len(self._came):
                    self._came = self._call(min(len(target) - at, PIECE_BYTES), until_s)
                part, self._came = np.split(self._came, [len(target) - at])
                target[at : at + len(part)] = part
                at += len(part)
        except OSError as error:
            raise StreamLost(f"receiving by {self.way}: {error}") from error

    def _call(self, least: int, until_s: float) -> Bytes:
        """Say what is to be said; answers what came. Raises OSError."""
        left_s = left(until_s)
        said, self._said = np.frombuffer(self._said, np.uint8), bytearray()
        with self._lock:
            if self._closed.done():
                raise StreamLost("closed")
            first, self._begun = not self._begun, True
        call = Passing(self._connection, said, first, least, min(left_s, MOST_WAIT_S))
        try:
            answer = self._carrier.pass_on(self._node, call)
        except RuntimeError as error:
            # No thread could be started.
            raise StreamLost(f"{self.way}: {error}") from error
        waited: tuple[Future[Any], ...] = answer, self._closed
        wait(waited, left_s, FIRST_COMPLETED)
        if self._closed.done() or not answer.done():
            # One that has not begun would only keep others waiting.
            answer.cancel()
            raise StreamLost("closed" if self._closed.done() else "the time is over")
        came = answer.result()
        if came is None:
            raise StreamLost("the other end closed the connection")
        return came

    def close(self) -> None:
        """See Wire."""
        with self._lock:
            if self._closed.done():
                return
            self._closed.set_result(None)
            begun = self._begun
        if begun:
            # Nobody waits for it: where it is lost, the connection rests until another one takes its place.
            with contextlib.suppress(RuntimeError):
                self._carrier.pass_on(self._node, Passing(self._connection, _NOTHING, last=True))


class _Tunnel:
    """One connection at the end that answers. used_s: when it was called last, by time.monotonic()."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._in_use = threading.Lock()
        self.used_s = time.monotonic()

    def pass_on(self, call: Passing) -> Bytes | None:
        """None when the server ended it. Raises OSError."""
        with self._in_use:
            self.used_s = time.monotonic()
            if len(call.data):
                self._sock.settimeout(_SAY_S)
                self._sock.sendall(call.data.data)
            least = min(call.least, PIECE_BYTES)
            return self._heard(least, self.used_s + min(call.wait_s, MOST_WAIT_S)) if least else _NOTHING

    def _heard(self, least: int, until_s: float) -> Bytes | None:
        """`least` bytes, fewer when they do not come in time, and what else is there by then."""
        room = np.empty(PIECE_BYTES, np.uint8)
        at = 0
        while at < PIECE_BYTES:
            self._sock.settimeout(max(until_s - time.monotonic(), 0.0) if at < least else 0.0)
            try:
                got = self._sock.recv_into(room[at:].data)
            except (TimeoutError, BlockingIOError):
                break
            if not got:
                return room[:at] if at else None
            at += got
        return room[:at]

    def close(self) -> None:
        """From any thread: who waits is woken."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _LOG.debug("it has ended before: %s", error)
        with self._in_use:
            self._sock.close()


class Tunnels:
    """The end that answers: a connection to the node's own server for each that is called. From any thread.

    connect: a connection to that server, or None when it takes no more.
    """

    def __init__(self, connect: Callable[[], socket.socket | None]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._open: dict[str, _Tunnel] = {}
        self._closed = False

    def pass_on(self, call: Passing) -> Bytes | None:
        """See Carrier."""
        tunnel = None if call.last else self._tunnel(call)
        if tunnel is not None:
            try:
                came = tunnel.pass_on(call)
            except OSError as error:
                _LOG.debug("a connection ended: %s", error)
                came = None
            if came is not None:
                return came
        self._drop(call.connection)
        return None

    def close(self) -> None:
        """End all, and take no more."""
        with self._lock:
            self._closed = True
            tunnels = list(self._open)
        for name in tunnels:
            self._drop(name)

    def _tunnel(self, call: Passing) -> _Tunnel | None:
        with self._lock:
            if not call.first:
                return self._open.get(call.connection)
            longest = min(self._open, key=lambda name: self._open[name].used_s, default="")
            full = len(self._open) >= MOST_CONNECTIONS
            if self._closed or (full and self._open[longest].used_s > time.monotonic() - _RESTING_S):
                return None
        if full:
            self._drop(longest)
        sock = self._connect()
        if sock is None:
            return None
        made = _Tunnel(sock)
        with self._lock:
            if not self._closed and len(self._open) < MOST_CONNECTIONS:
                self._open[call.connection] = made
                return made
        made.close()
        return None

    def _drop(self, name: str) -> None:
        with self._lock:
            tunnel = self._open.pop(name, None)
        if tunnel is not None:
            tunnel.close()
