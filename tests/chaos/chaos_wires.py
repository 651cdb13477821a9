"""The links between nodes: each is a small proxy on loopback that can be cut, left hanging, or made slow.

One thread with an event loop carries all of them, so the nodes' processes need no rights for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

# open: as fast as it goes.  cut: connections are refused and ended.  hole: nothing comes through and nobody
# is told.  deaf: only what is asked comes through, no answer does.  slow: bytes_per_s and delay_s.
State: TypeAlias = Literal["open", "cut", "hole", "deaf", "slow"]
STATES: tuple[State, ...] = ("cut", "hole", "deaf", "slow")
_CHUNK = 65536
# A handshake, or an alert.
_TLS_RECORDS = (0x16, 0x15)


@dataclass(slots=True, eq=False)
class Wire:
    """From one node to one address of another. bytes_per_s, delay_s: while it is slow.

    changed: set when its state is another one, which has an event of its own.  sealed, clear: how many
    directions of connections began with a record of TLS, and how many did not.
    """

    listen: tuple[str, int]
    target: tuple[str, int]
    state: State = "open"
    bytes_per_s: float = 100e3
    delay_s: float = 0.02
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    sealed: int = 0
    clear: int = 0
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Wires:
    """All links, from `start` to `close`. Methods from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._wires: list[Wire] = []
        self._servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._run, name="wires", daemon=True)
        self._thread.start()

    def add(self, listen: tuple[str, int], target: tuple[str, int]) -> Wire:
        """A link that is open; who connects to `listen` is at `target`."""
        wire = Wire(listen, target)
        asyncio.run_coroutine_threadsafe(self._serve(wire), self._loop).result(10.0)
        return wire

    def put(self, wire: Wire, state: State, bytes_per_s: float = 100e3, delay_s: float = 0.02) -> None:
        """Another state, also for what is under way."""

        def change() -> None:
            wire.bytes_per_s, wire.delay_s = bytes_per_s, delay_s
            wire.state = state
            before, wire.changed = wire.changed, asyncio.Event()
            before.set()
            if state == "cut":
                for writer in list(wire.open):
                    writer.transport.abort()

        self._loop.call_soon_threadsafe(change)

    def close(self) -> None:
        """End all of them."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _serve(self, wire: Wire) -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            wire.tasks.add(task)
            # Only `close` cancels it, and nobody waits for its result.
            with contextlib.suppress(asyncio.CancelledError):
                await self._carry(wire, reader, writer)
            wire.tasks.discard(task)

        self._wires.append(wire)
        self._servers.append(await asyncio.start_server(accepted, *wire.listen))

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        tasks = [task for wire in self._wires for task in wire.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if wire.state == "cut":
            writer.transport.abort()
            return
        wire.open.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            while wire.state == "hole":
                await wire.changed.wait()
            back, there = await asyncio.open_connection(*wire.target)
            wire.open.add(there)
            both = (_pump(wire, reader, there, asks=True), _pump(wire, back, writer, asks=False))
            await asyncio.gather(*both)
        except OSError:
            pass
        finally:
            for end in (writer, there):
                if end is not None:
                    wire.open.discard(end)
                    end.transport.abort()


async def _pump(
    wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool
) -> None:
    first = True
    while data := await reader.read(_CHUNK):
        if first:
            is_sealed, first = data[0] in _TLS_RECORDS, False
            wire.sealed, wire.clear = wire.sealed + is_sealed, wire.clear + (not is_sealed)
        while wire.state == "hole" or (wire.state == "deaf" and not asks):
            await wire.changed.wait()
        if wire.state == "slow":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wire.changed.wait(), wire.delay_s + len(data) / wire.bytes_per_s)
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
