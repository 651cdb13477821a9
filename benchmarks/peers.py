"""A conversation from one node's memory into another's over loopback, against plain TCP of as many streams.

The sender is a process of its own.  The limit sends the same bytes from the same memory into the same memory
over as many connections, without frames, keys or sums.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.lines import Line, alternate, rate_line, table
from kvtier.checksum import checksum
from kvtier.objects import ObjectId
from kvtier.peers.client import ClientSettings, PeerClient, Wanted
from kvtier.peers.handshake import Identity
from kvtier.peers.server import Opened, PeerServer, ServerSettings
from kvtier.peers.stream import BUFFER_BYTES

_TOKEN = b"a token of a benchmark"
_MIB = 1 << 20


class _Memory:
    """The sender's: `count` objects, one after the other."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.data = np.random.default_rng(1).integers(0, 256, count * nbytes, np.uint8)
        self._nbytes = nbytes
        self._sums = [checksum(self._object(index)) for index in range(count)]

    def _object(self, index: int) -> np.ndarray:
        return self.data[index * self._nbytes : (index + 1) * self._nbytes]

    @contextmanager
    def open(self, object_id: ObjectId, peer: str) -> Iterator[Opened | str]:
        """See ObjectSource."""
        index = int.from_bytes(object_id.block_key, "big")
        yield Opened(self._object(index), self._sums[index])


def _send_plainly(listener: socket.socket, data: memoryview, streams: int) -> None:
    share = len(data) // streams
    while True:
        connected, _ = listener.accept()
        at = connected.recv(1)[0] * share
        threading.Thread(target=_send, args=(connected, data[at : at + share]), daemon=True).start()


def _send(connected: socket.socket, data: memoryview) -> None:
    with connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        connected.sendall(data)


def _sender(pipe: Connection, count: int, nbytes: int, streams: int) -> None:
    memory = _Memory(count, nbytes)
    server = PeerServer(Identity("sender", 1, _TOKEN), memory, ServerSettings(streams=streams))
    plain = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_send_plainly, args=(plain, memory.data.data, streams), daemon=True).start()
    pipe.send((server.port, plain.getsockname()[1]))
    pipe.recv()
    server.close()


def _receive(port: int, into: memoryview, which: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        connected.send(bytes([which]))
        at = 0
        while at < len(into):
            at += connected.recv_into(into[at:])


def _plain(port: int, into: memoryview, streams: int) -> None:
    share = len(into) // streams
    parts = [into[index * share : (index + 1) * share] for index in range(streams)]
    threads = [threading.Thread(target=_receive, args=(port, part, n)) for n, part in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pulls(mib: int, object_mib: int, streams: int, rounds: int) -> Iterator[Line]:
    """GB/s of a conversation of `mib`, in objects of `object_mib`."""
    count, nbytes = mib // object_mib, object_mib * _MIB
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    sender = context.Process(target=_sender, args=(other, count, nbytes, streams))
    sender.start()
    peer_port, plain_port = pipe.recv()
    into = np.zeros(count * nbytes, np.uint8)
    client = PeerClient(
        Identity("receiver", 1, _TOKEN), "sender", ("127.0.0.1", peer_port), ClientSettings(streams=streams)
    )
    wanted = [
        Wanted(ObjectId(index.to_bytes(32, "big"), 0, "s"), into[index * nbytes : (index + 1) * nbytes], None)
        for index in range(count)
    ]

    def pull() -> None:
        assert client.fetch(wanted, 120.0) == [""] * count

    try:
        limits, works = alternate([lambda: _plain(plain_port, into.data, streams)], pull, rounds)
        name = f"pull of {mib} MiB in objects of {object_mib} MiB over {streams} streams"
        yield rate_line(name, count * nbytes, limits, works, limit_is="plain TCP of as many streams")
    finally:
        client.close()
        pipe.send(None)
        sender.join()


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--mib", type=int, default=1024, help="of the conversation; as much memory, twice")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lines = [
        line
        for object_mib, streams in ((8, 1), (8, 2), (8, 4))
        for line in pulls(arguments.mib, object_mib, streams, arguments.rounds)
    ]
    print("\n".join(line.json() for line in lines) if arguments.json else table(lines))


if __name__ == "__main__":
    main()
