"""Bare connections to a daemon's sockets, for tests that say what no client would."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from kvtier.client.worker_inputs import WorkerPool, attach_request
from kvtier.messages import calls as m
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Message
from kvtier.messages.wire import Channel, hello
from kvtier.testing.kv_memory import SHARD, KvMemory

WAIT_S = 10.0


@contextlib.contextmanager
def raw(path: str) -> Iterator[socket.socket]:
    """A bare connection."""
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(WAIT_S)
        made.connect(path)
        yield made


def answers(connected: socket.socket) -> list[Message]:
    """Everything until the other end closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connected.recv(65536):
            data += more
    found = []
    while data:
        length = protocol.body_length(data[:4])
        found.append(protocol.decode(data[4 : 4 + length]))
        data = data[4 + length :]
    return found


@contextlib.contextmanager
def joined(path: str, role: Any = "client", worker: str = "") -> Iterator[Channel]:
    """A connection after its handshake."""
    channel = Channel.open(path, hello(role, worker=worker), time.monotonic() + WAIT_S)
    try:
        yield channel
    finally:
        channel.close()


def ask(channel: Channel, message: Message, fds: tuple[int, ...] = ()) -> Message:
    """One request and its answer."""
    request = msgspec.structs.replace(message, id=7)
    answer, got = channel.exchange(protocol.encode(request), 7, time.monotonic() + WAIT_S, fds)
    for fd in got:
        os.close(fd)
    return answer


def refused(channel: Channel, message: Message, error: str) -> None:
    """The request is answered by this error, in words, and the connection lives."""
    answer = ask(channel, message)
    assert isinstance(answer, Failed), answer
    assert (answer.error, bool(answer.message)) == (error, True), answer
    assert isinstance(ask(channel, m.Ping()), m.Pong)


def attach_of(kv: KvMemory) -> m.Attach:
    """What its worker would send."""
    return attach_request(kv.model, WorkerPool(kv.pool), SHARD)
