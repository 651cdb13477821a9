"""Memory lent between two ends in one process, by an Agent that does what a test wants, or by NIXL."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass

import numpy as np

from kvtier.peers.lending import Agent, AgentFailed, Bytes, Lending, agent_name
from kvtier.peers.nixl_agent import NixlAgent


class LentMemory:
    """One array that both ends register, given out from its front on."""

    def __init__(self, nbytes: int) -> None:
        self.all: Bytes = np.zeros(nbytes, np.uint8)
        self._at = 0

    def clear(self) -> None:
        """Nobody uses any of it."""
        self._at = 0

    def room(self, content: Bytes) -> Bytes:
        """A part with this content."""
        part = self.all[self._at : self._at + content.nbytes]
        self._at += content.nbytes
        part[:] = content
        return part


@dataclass(slots=True)
class FakeRead:
    """One of a FakeAgent's. well: None as long as it goes on."""

    source: Bytes
    into: Bytes
    well: bool | None = None
    lost: bool = False
    released: bool = False

    def end(self, *, well: bool = True) -> None:
        """Now: half of it is there when it does not end well."""
        nbytes = self.into.nbytes if well else self.into.nbytes // 2
        self.into[:nbytes] = self.source[:nbytes]
        self.well = well


class FakeAgent:
    """An Agent whose reads end at once; or when the test says so, once `holds`. Metadata is its name.

    begun: a permit for each read that was held.  refuses: no read can be begun.  fails: they end badly.
    loses: they are held, and lost.
    """

    name = "fake"

    def __init__(self, own: str) -> None:
        self.own = own
        self.holds = self.refuses = self.fails = self.loses = False
        self.no_room = False
        self.begun = threading.Semaphore(0)
        self.reads: list[FakeRead] = []
        self.loaded: list[str] = []
        self.forgotten: list[str] = []
        self._known: set[str] = set()

    def register(self, memory: Bytes) -> None:
        """See Agent."""
        if self.no_room:
            raise AgentFailed("no memory may be locked")

    def metadata(self) -> bytes:
        """See Agent."""
        return self.own.encode()

    def load(self, metadata: bytes) -> str:
        """See Agent."""
        self.loaded.append(metadata.decode())
        self._known.add(self.loaded[-1])
        return self.loaded[-1]

    def forget(self, remote: str) -> None:
        """See Agent."""
        self.forgotten.append(remote)
        self._known.remove(remote)

    def begin(self, remote: str, address: int, into: Bytes) -> FakeRead:
        """See Agent."""
        assert remote in self._known
        if self.refuses:
            raise AgentFailed("it was not begun")
        there = (ctypes.c_uint8 * into.nbytes).from_address(address)
        read = FakeRead(np.frombuffer(memoryview(there), np.uint8), into)
        self.reads.append(read)
        if self.holds or self.loses:
            read.lost = self.loses
            self.begun.release()
        else:
            read.end(well=not self.fails)
        return read

    def ended(self, read: object) -> bool | None:
        """See Agent."""
        assert isinstance(read, FakeRead) and not read.released
        return read.well

    def lost(self, read: object) -> bool:
        """See Agent."""
        assert isinstance(read, FakeRead)
        return read.lost

    def release(self, read: object) -> None:
        """See Agent."""
        assert isinstance(read, FakeRead)
        read.released = True


def lending_of(way: str, node: str, epoch: int, memory: LentMemory) -> Lending:
    """Ready, by a FakeAgent ('fake') or NIXL ('nixl'). Raises AgentFailed where that is not installed."""
    name = agent_name(node, epoch)
    agent: Agent = FakeAgent(name) if way == FakeAgent.name else NixlAgent(name)
    lending = Lending(agent, [memory.all])
    lending.start()
    assert lending.wait_ready()
    return lending
