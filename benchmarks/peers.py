"""A conversation from one node's memory into another's, against plain TCP of as many streams.

Over loopback, or with --link-mbit, as root, over a link of that rate; there once with bytes that no codec
makes smaller, and once with numbers like those of KV in bfloat16, encoded where that pays.  The sender is a
process of its own.  The limit sends the same bytes from the same memory into the same memory over as many
connections, without frames, keys or sums.  With --way nixl the objects are read in the sender's memory, over
loopback, by what UCX_TLS allows (tcp: not through memory that both processes share); the limit is then what
the same client reads by TCP.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import numpy as np

from benchmarks import shaped
from kvtier.bench.lines import Line, alternate, rate_line, table
from kvtier.checksum import checksum
from kvtier.disk.codecs import CODECS
from kvtier.objects import ObjectId
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.coding import Codings, measured
from kvtier.peers.fetch import Came, Wanted
from kvtier.peers.handshake import Identity
from kvtier.peers.lending import Lending, agent_name
from kvtier.peers.nixl_agent import NixlAgent
from kvtier.peers.server import Opened, PeerServer, ServerSettings
from kvtier.peers.stream import BUFFER_BYTES

_TOKEN = b"a token of a benchmark"
_MIB = 1 << 20


def _lending(node: str, memory: np.ndarray) -> Lending:
    lending = Lending(NixlAgent(agent_name(node, 1)), [memory])
    lending.start()
    assert lending.wait_ready()
    return lending


def _codings() -> Codings:
    return {"planes-zstd": measured(CODECS["planes-zstd"])}


class _Memory:
    """The sender's: `count` objects, one after the other."""

    def __init__(self, count: int, nbytes: int, *, like_kv: bool) -> None:
        self._nbytes = nbytes
        random = np.random.default_rng(1)
        self.data = random.integers(0, 256, count * nbytes, np.uint8)
        if like_kv:
            for index in range(count):
                numbers = random.standard_normal(nbytes // 2, np.float32).view(np.uint32) >> 16
                self._object(index)[:] = numbers.astype(np.uint16).view(np.uint8)
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


def _sender(
    pipe: Connection, count: int, nbytes: int, streams: int, mbit: int, like_kv: bool, lent: bool = False
) -> None:
    host = "127.0.0.1"
    if mbit:
        shaped.leave()
        pipe.send("alone")
        pipe.recv()
        shaped.join(mbit)
        host = shaped.THERE
    memory = _Memory(count, nbytes, like_kv=like_kv)
    lending = _lending("sender", memory.data) if lent else None
    settings = ServerSettings(host=host, streams=streams, codecs=_codings(), lending=lending)
    server = PeerServer(Identity("sender", 1, _TOKEN), memory, settings)
    plain = socket.create_server((host, 0))
    threading.Thread(target=_send_plainly, args=(plain, memory.data.data, streams), daemon=True).start()
    pipe.send((server.port, plain.getsockname()[1]))
    pipe.recv()
    server.close()


def _receive(address: tuple[str, int], into: memoryview, which: int) -> None:
    with socket.create_connection(address) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        connected.send(bytes([which]))
        at = 0
        while at < len(into):
            at += connected.recv_into(into[at:])


def _plain(address: tuple[str, int], into: memoryview, streams: int) -> None:
    share = len(into) // streams
    parts = [into[index * share : (index + 1) * share] for index in range(streams)]
    threads = [threading.Thread(target=_receive, args=(address, part, n)) for n, part in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pulls(mib: int, object_mib: int, streams: int, rounds: int, mbit: int, like_kv: bool) -> Iterator[Line]:
    """GB/s of a conversation of `mib`, in objects of `object_mib`. mbit: rate of the link; 0: loopback."""
    count, nbytes = mib // object_mib, object_mib * _MIB
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    sender = context.Process(target=_sender, args=(other, count, nbytes, streams, mbit, like_kv))
    sender.start()
    with ExitStack() as stack:
        stack.callback(sender.join)
        stack.callback(pipe.send, None)
        host = "127.0.0.1"
        if mbit:
            pipe.recv()
            stack.enter_context(shaped.lay(sender.pid or 0, mbit))
            pipe.send("laid")
            host = shaped.THERE
        peer_port, plain_port = pipe.recv()
        into = np.zeros(count * nbytes, np.uint8)
        settings = ClientSettings(streams=streams, codecs=_codings())
        client = PeerClient(Identity("receiver", 1, _TOKEN), "sender", (host, peer_port), settings)
        stack.callback(client.close)
        wanted = [
            Wanted(ObjectId(n.to_bytes(32, "big"), 0, "s"), into[n * nbytes : (n + 1) * nbytes], None, 2)
            for n in range(count)
        ]

        came = Came()

        def pull() -> None:
            assert client.fetch(wanted, 120.0, came=came) == [""] * count

        limits, works = alternate([lambda: _plain((host, plain_port), into.data, streams)], pull, rounds)
        way = f"a link of {mbit} Mbit/s" if mbit else "loopback"
        what = "like KV" if like_kv else "of chance"
        name = f"pull of {mib} MiB {what} in objects of {object_mib} MiB over {way}, {streams} streams"
        yield rate_line(
            name,
            count * nbytes,
            limits,
            works,
            limit_is="plain TCP of as many streams",
            mbit=[round(count * nbytes * 8e-6 / took_s) for took_s in works],
            wire_of_kv=round(came.wire_bytes / came.bytes, 3),
            coded=round(came.coded_bytes / came.bytes, 3),
        )


def lent(mib: int, object_mib: int, streams: int, rounds: int) -> Iterator[Line]:
    """GB/s of a conversation of `mib` that is read in the sender's memory, against TCP by the same client."""
    count, nbytes = mib // object_mib, object_mib * _MIB
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    sender = context.Process(target=_sender, args=(other, count, nbytes, streams, 0, False, True))
    sender.start()
    with ExitStack() as stack:
        stack.callback(sender.join)
        stack.callback(pipe.send, None)
        port, _ = pipe.recv()
        into = np.zeros(count * nbytes, np.uint8)
        lending = _lending("receiver", into)
        stack.callback(lending.close, 10.0)
        wanted = [
            Wanted(ObjectId(n.to_bytes(32, "big"), 0, "s"), into[n * nbytes : (n + 1) * nbytes], None)
            for n in range(count)
        ]
        came = Came()

        def pulled(lent: bool) -> Callable[[], None]:
            settings = ClientSettings(streams=streams, lending=lending if lent else None)
            client = PeerClient(Identity("receiver", 1, _TOKEN), "sender", ("127.0.0.1", port), settings)
            stack.callback(client.close)

            def pull() -> None:
                assert client.fetch(wanted, 120.0, came=came if lent else None) == [""] * count

            return pull

        limits, works = alternate([pulled(False)], pulled(True), rounds)
        assert came.lent_bytes == came.bytes, "all of it was read there"
        name = f"pull of {mib} MiB by NIXL in objects of {object_mib} MiB over loopback, {streams} streams"
        yield rate_line(name, count * nbytes, limits, works, limit_is="the same client by TCP")


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--mib", type=int, default=1024, help="of the conversation; as much memory, twice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link-mbit", type=int, default=0, help="rate of the link; 0: loopback")
    parser.add_argument("--way", choices=("tcp", "nixl"), default="tcp")
    arguments = parser.parse_args()
    # Loopback is no slower than any codec.
    kinds = (False, True) if arguments.link_mbit else (False,)
    lines = [
        line
        for streams in (1, 2, 4)
        if arguments.way == "nixl"
        for line in lent(arguments.mib, 8, streams, arguments.rounds)
    ] or [
        line
        for streams in (1, 2, 4)
        for like_kv in kinds
        for line in pulls(arguments.mib, 8, streams, arguments.rounds, arguments.link_mbit, like_kv)
    ]
    print("\n".join(line.json() for line in lines) if arguments.json else table(lines))


if __name__ == "__main__":
    main()
