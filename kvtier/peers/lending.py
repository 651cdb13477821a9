"""Objects that are read straight out of another node's memory, by a library that writes into this node's.

Such a read cannot be called back: what is given up goes on writing.  So each read is kept until the library
says that it ended, well or not, and only then is the room it writes into anybody's again.  Questions, who is
who, and checksums stay with the connection; see `messages/peers.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.messages.peers import Introduce, Introduced
from kvtier.peers.stream import MAX_ASK_BYTES, Wire

_LOG = logging.getLogger(__name__)
Bytes: TypeAlias = npt.NDArray[np.uint8]
# So long is a node's memory not tried again, where it could not be read.
RETRY_S = 60.0
# Between two looks at a read: soon at first, since most take less than a millisecond; of what was given up.
_FIRST_LOOK_S, _LOOK_S, _LATE_LOOK_S = 50e-6, 1e-3, 20e-3
# What the first one may take to learn of the other's memory.
_INTRODUCE_S = 2.0
# Those whose memory something may still write into.
_KEPT: list[Lending] = []


class AgentFailed(OSError):
    """The library cannot do what it was asked for, and has not begun it."""


class Agent(Protocol):
    """A library that reads memory of other processes, as far as it is used. From any thread.

    name: of the way, as reports call it.
    """

    name: str

    def register(self, memory: Bytes) -> None:
        """What others may read, and what this one reads into. May take seconds. Raises AgentFailed."""

    def metadata(self) -> bytes:
        """What another process needs in order to read what is registered. Raises AgentFailed."""

    def load(self, metadata: bytes) -> str:
        """Know another process; answers its agent's own name. Raises AgentFailed."""

    def forget(self, remote: str) -> None:
        """No more of this process; nothing is being read from it. Raises AgentFailed."""

    def begin(self, remote: str, address: int, into: Bytes) -> object:
        """Read from there into registered memory. Raises AgentFailed when nothing was begun."""

    def ended(self, read: object) -> bool | None:
        """None as long as it may write; then whether all of it is there."""

    def lost(self, read: object) -> bool:
        """Whether it will not bring everything any more. It may still write."""

    def release(self, read: object) -> None:
        """Of one that has ended."""


class Remote:
    """Another node's memory in one start of that node. pending: reads that have not ended; late: given up."""

    def __init__(self, node: str, epoch: int) -> None:
        self.node, self.epoch, self.name = node, epoch, agent_name(node, epoch)
        self.failed = False
        self.pending = self.late = 0

    @property
    def usable(self) -> bool:
        """Whether more is to be read so."""
        return not (self.failed or self.late)


class Read:
    """One that was begun. Looked at by one thread at a time."""

    def __init__(self, lending: Lending, remote: Remote, handle: object, into: Bytes) -> None:
        self._lending, self._handle = lending, handle
        self.remote, self.into = remote, into
        self.ended: bool | None = None

    def look(self) -> bool | None:
        """None as long as it may write into its room; then whether all of it came."""
        if self.ended is None:
            self.ended = self._lending.look(self._handle)
            if self.ended is not None:
                self._lending.has_ended(self.remote, self.ended)
        return self.ended

    def lost(self) -> bool:
        """Whether nobody needs to wait for it. It may still write."""
        lost = self.ended is None and self._lending.lost(self._handle)
        if lost:
            self.remote.failed = True
        return lost


def agent_name(node: str, epoch: int) -> str:
    """Of the agent in this start of the node."""
    return f"{node}/{epoch}"


class Lending:
    """This node's memory for others to read, and theirs for this one. From any thread.

    memory: what is registered, by `start`, on a thread of its own; nothing is lent or read so before that.
    """

    def __init__(self, agent: Agent, memory: Sequence[Bytes]) -> None:
        self._agent, self._memory = agent, list(memory)
        self.way = agent.name
        # Of what is registered; empty before it is, and where it cannot be.
        self.metadata = b""
        self._lock = threading.Lock()
        self._remotes: dict[str, Remote] = {}
        self._late: list[tuple[list[Read], Callable[[], None]]] = []
        self._changed = threading.Condition(self._lock)
        self._closing = False
        self._registered = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvtier-lending", daemon=True)

    def start(self) -> None:
        """Begin to register. Raises RuntimeError where no thread can be started."""
        self._thread.start()

    def wait_ready(self) -> bool:
        """Once registering has ended: whether there is something to read."""
        self._registered.wait()
        return bool(self.metadata)

    def close(self, within_s: float) -> bool:
        """After all who read: wait for reads that are late; False when some may still write.

        Then the memory is kept, as long as this object and the process live.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        # It looks at what is late until nothing is.
        self._thread.join(within_s)
        if self._thread.is_alive():
            why = (
                f"{self.late} reads have not ended" if self._registered.is_set() else "it is being registered"
            )
            _LOG.error("memory for %s is kept until the process ends: %s", self.way, why)
            _KEPT.append(self)
            return False
        del self._agent
        self._memory.clear()
        return True

    def address_of(self, data: Bytes) -> int:
        """Where others read it; 0 when they cannot."""
        at = data.ctypes.data
        inside = any(
            m.ctypes.data <= at and at + data.nbytes <= m.ctypes.data + m.nbytes for m in self._memory
        )
        return at if inside and data.nbytes and self.metadata else 0

    def remote(self, node: str, epoch: int, metadata: bytes) -> Remote | None:
        """The memory of a node that has introduced itself; None when it cannot be read now."""
        with self._lock:
            for known in list(self._remotes.values()):
                outdated = known.failed or known.epoch != epoch
                if known.node == node and outdated and not known.pending:
                    del self._remotes[known.name]
                    self._forget(known.name)
            found = self._remotes.get(agent_name(node, epoch))
            if found is None:
                found = Remote(node, epoch)
                try:
                    said = self._agent.load(metadata)
                    if said != found.name:
                        self._forget(said)
                        raise AgentFailed(f"it is '{said}' that answers")
                except AgentFailed as error:
                    _LOG.warning("node '%s' cannot be read by %s: %s", node, self.way, error)
                    return None
                self._remotes[found.name] = found
            return found if found.usable else None

    def begin(self, remote: Remote, address: int, into: Bytes) -> Read:
        """Read from there into registered memory. Raises AgentFailed when nothing was begun."""
        with self._lock:
            if not remote.usable:
                raise AgentFailed("it is not read so any more")
            remote.pending += 1
        try:
            return Read(self, remote, self._agent.begin(remote.name, address, into), into)
        except AgentFailed as error:
            _LOG.warning("node '%s' cannot be read by %s: %s", remote.node, self.way, error)
            self.has_ended(remote, well=False)
            raise

    @staticmethod
    def wait(read: Read, given_up: Callable[[], bool]) -> bool | None:
        """Whether all of it came; None when it is given up or lost, and may still write."""
        pause_s = _FIRST_LOOK_S
        while (ended := read.look()) is None and not given_up() and not read.lost():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S)
        return ended

    def look(self, handle: object) -> bool | None:
        """See Agent.ended; what has ended is let go."""
        ended = self._agent.ended(handle)
        if ended is not None:
            try:
                self._agent.release(handle)
            except AgentFailed as error:
                _LOG.warning("a read that has ended is not let go: %s", error)
        return ended

    def lost(self, handle: object) -> bool:
        """See Agent."""
        return self._agent.lost(handle)

    def has_ended(self, remote: Remote, well: bool) -> None:
        """One read of it has."""
        with self._lock:
            remote.pending -= 1
            remote.failed = remote.failed or not well

    def when_ended(self, reads: Sequence[Read], then: Callable[[], None]) -> None:
        """Call `then` when none of these, which were given up, writes any more: it may be never.

        From a thread of this object's.  Until then nothing more is read from that node so.
        """
        for read in reads:
            _LOG.warning(
                "a read of %d bytes from node '%s' by %s was given up and goes on: its room is kept",
                read.into.nbytes,
                read.remote.node,
                self.way,
            )
        with self._changed:
            for read in reads:
                read.remote.late += 1
            self._late.append((list(reads), then))
            self._changed.notify_all()

    @property
    def late(self) -> int:
        """Reads that were given up and have not ended."""
        with self._lock:
            return sum(len(reads) for reads, _ in self._late)

    def _work(self) -> None:
        self._register()
        self._registered.set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._late or self._closing)
                if not self._late:
                    return
                waiting = list(self._late)
            for each in waiting:
                reads, then = each
                if all([read.look() is not None for read in reads]):
                    with self._lock:
                        self._late.remove(each)
                        for read in reads:
                            read.remote.late -= 1
                    _LOG.warning("reads of node '%s' that were late have ended", reads[0].remote.node)
                    then()
            time.sleep(_LATE_LOOK_S)

    def _register(self) -> None:
        try:
            for memory in self._memory:
                self._agent.register(memory)
            self.metadata = self._agent.metadata()
        except AgentFailed as error:
            _LOG.error(
                "host memory cannot be registered for %s, and TCP is used: %s; RDMA locks all of it: raise "
                "the limit (LimitMEMLOCK=infinity, ulimit -l unlimited)",
                self.way,
                error,
            )

    def _forget(self, name: str) -> None:
        try:
            self._agent.forget(name)
        except AgentFailed as error:
            _LOG.debug("%s: %s", name, error)


class Borrower:
    """How one peer's memory is read, if it is. From any thread. lending: None where this end cannot."""

    def __init__(self, node: str, lending: Lending | None) -> None:
        self._node, self.lending = node, lending
        self._asking = threading.Lock()
        self._from_s = 0.0
        self.remote: Remote | None = None

    @property
    def way(self) -> str:
        """As reports call it; '' when the peer's memory is not read so now."""
        return self.lending.way if self.lending and self.remote and self.remote.usable else ""

    def introduce(self, stream: Wire, until_s: float) -> None:
        """Learn of the other end's memory, where both can and it is time, on a connection that is idle.

        Raises StreamLost, MalformedMessage.
        """
        if self.lending is None or not self.lending.metadata or self.lending.way not in stream.lends:
            return
        until_s = min(until_s, time.monotonic() + _INTRODUCE_S)
        if not self._asking.acquire(timeout=max(until_s - time.monotonic(), 0.0)):
            return
        try:
            known = self.remote
            if known is not None and known.epoch == stream.epoch and not known.failed:
                return
            if known is not None and known.epoch != stream.epoch:
                self.remote, self._from_s = None, 0.0
            if time.monotonic() >= self._from_s:
                stream.send(Introduce(way=self.lending.way), until_s)
                said = stream.receive(Introduced, until_s, MAX_ASK_BYTES).metadata
                self.failed()
                if said:
                    self.remote = self.lending.remote(self._node, stream.epoch, said)
        finally:
            self._asking.release()

    def failed(self) -> None:
        """The peer is not asked how its memory is read again for a while."""
        self._from_s = time.monotonic() + RETRY_S

    def lends(self, stream: Wire, into: Bytes) -> bool:
        """Whether an object for this room is to be asked for so, on this connection."""
        remote = self.remote
        return (
            self.lending is not None
            and remote is not None
            and remote.usable
            and remote.epoch == stream.epoch
            # Where only another way is left, the memory cannot be reached either.
            and stream.way == Wire.way
            and self.lending.address_of(into) != 0
        )
