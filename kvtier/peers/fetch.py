"""One fetch of objects from a peer: over several connections, or read in the peer's memory beside them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.checksum import checksum
from kvtier.errors import KvtierError, MalformedMessage
from kvtier.messages.peers import Sending, Taken, Want
from kvtier.objects import ObjectId
from kvtier.peers.choice import RAW
from kvtier.peers.coding import receive_encoded
from kvtier.peers.lending import AgentFailed, Read
from kvtier.peers.stream import StreamLost, Wire

if TYPE_CHECKING:
    from kvtier.peers.client import PeerClient

_LOG = logging.getLogger(__name__)

_MOST_ADDRESS = 1 << 64
# An object's index, and the codec by which it was asked for.
_Asked: TypeAlias = tuple[int, str]
# '' is success.
Outcome: TypeAlias = Literal["", "missing", "busy", "corrupt", "deadline", "cancelled", "peer_lost"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """into: uint8, writable, as long as the object. checksum: that its bytes must have; None: not known.

    item_bytes: width of its numbers; 0 where that is not known, and it is not worth encoding.
    """

    object_id: ObjectId
    into: npt.NDArray[np.uint8]
    checksum: int | None
    item_bytes: int = 0


@dataclass(slots=True)
class Came:
    """What a fetch has received. bytes: of objects; coded_bytes: of those that came encoded; wire_bytes: what
    all of it was on its way; relayed_bytes: of those that no TCP brought; lent_bytes: of those that were read
    in the other's memory.
    """

    bytes: int = 0
    coded_bytes: int = 0
    wire_bytes: int = 0
    relayed_bytes: int = 0
    lent_bytes: int = 0


class GivenUp(StreamLost):
    """A read goes on in the room of what was asked for."""


class Fetch:
    """One call of `PeerClient.fetch`, which see."""

    def __init__(
        self,
        client: PeerClient,
        wanted: Sequence[Wanted],
        until_s: float,
        on_each: Callable[[int, Outcome], None] | None,
        came: Came,
    ) -> None:
        self._client, self._wanted, self._until_s, self._on_each = client, wanted, until_s, on_each
        self._came = came
        self._lock = threading.Lock()
        self._todo = deque(range(len(wanted)))
        self._outcomes: dict[int, Outcome] = {}
        self._streams: set[Wire] = set()
        self._cancelled = False
        self._refused: KvtierError | None = None
        self._late: list[Read] = []

    def take_late(self) -> list[Read]:
        """Reads that were given up and have not ended; whoever takes them waits for them."""
        taken, self._late = self._late, []
        return taken

    def wait_for_late(self) -> None:
        """Until nothing writes any more that nobody has taken."""
        lending, reads = self._client.borrower.lending, self.take_late()
        if lending is not None and reads:
            quiet = threading.Event()
            lending.when_ended(reads, quiet.set)
            quiet.wait()

    def go(self, streams: int) -> list[Outcome]:
        threads = []
        try:
            for _ in range(streams - 1):
                thread = threading.Thread(target=self._work, name="kvtier-fetch")
                thread.start()
                threads.append(thread)
        except RuntimeError as error:
            _LOG.warning("receiving over %d connections instead of %d: %s", len(threads) + 1, streams, error)
        try:
            self._work()
        finally:
            for thread in threads:
                thread.join()
        if self._refused is not None:
            raise self._refused
        for index in range(len(self._wanted)):
            if index not in self._outcomes:
                self._ended(index, self._why())
        return [self._outcomes[index] for index in range(len(self._wanted))]

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            streams = list(self._streams)
        for stream in streams:
            stream.close()

    def _work(self) -> None:
        stream = self._client.idle_stream()
        while stream is not None:
            if self._use(stream, reused=True):
                return
            stream = self._client.idle_stream()
        try:
            stream = self._client.new_stream(self._until_s)
        except StreamLost:
            return
        except KvtierError as error:
            self._refused = error
            return
        self._use(stream, reused=False)

    def _use(self, stream: Wire, *, reused: bool) -> bool:
        """Receive over this connection; False when it was closed already, and another one is to be used."""
        asked: deque[_Asked] = deque()
        with self._lock:
            self._streams.add(stream)
        received = [0]
        clean = False
        try:
            self._receive_all(stream, asked, received)
            clean = True
        except (StreamLost, MalformedMessage) as error:
            busy = isinstance(error, GivenUp)
            if reused and not busy and not received[0] and self._why() == "peer_lost":
                with self._lock:
                    self._todo.extendleft(index for index, _ in reversed(asked))
                return False
            # Nobody else is asked for what did not come: it was under way, and would come late.
            for index, _ in asked:
                self._ended(index, self._why())
        finally:
            with self._lock:
                self._streams.discard(stream)
            if clean and not self._cancelled:
                self._client.give_back(stream)
            else:
                stream.close()
        return True

    def _receive_all(self, stream: Wire, asked: deque[_Asked], received: list[int]) -> None:
        if stream.way == Wire.way:
            self._client.borrower.introduce(stream, self._until_s)
        while not self._cancelled:
            while len(asked) < self._client.depth and self._ask(stream, asked):
                pass
            if not asked:
                return
            index, codec = asked[0]
            outcome = self._receive(stream, self._wanted[index], codec)
            received[0] += 1
            asked.popleft()
            if outcome is None:
                with self._lock:
                    self._todo.appendleft(index)
            else:
                self._ended(index, outcome)
        raise StreamLost("cancelled")

    def _ask(self, stream: Wire, asked: deque[_Asked]) -> bool:
        with self._lock:
            if not self._todo:
                return False
            index = self._todo.popleft()
        item_bytes = self._wanted[index].item_bytes
        lend = self._client.borrower.lends(stream, self._wanted[index].into)
        codec = self._client.codec_now(stream.way) if item_bytes and not lend else RAW
        asked.append((index, codec))
        key, group, shard = self._wanted[index].object_id
        want = Want(
            block_key=key,
            group=group,
            shard=shard,
            codec=codec,
            item_bytes=item_bytes if codec else 0,
            lend=lend,
        )
        stream.send(want, self._until_s)
        return True

    def _receive(self, stream: Wire, wanted: Wanted, asked: str) -> Outcome | None:
        """None: it is to be asked for once more."""
        head = stream.receive(Sending, self._until_s)
        if head.reason:
            return "busy" if head.reason == "busy" else "missing"
        if head.nbytes != wanted.into.nbytes:
            raise MalformedMessage(f"{head.nbytes} bytes come for a slot of {wanted.into.nbytes}")
        if head.address:
            if not 0 < head.address <= _MOST_ADDRESS - head.nbytes:
                raise MalformedMessage(f"an object at address {head.address}")
            return self._read_there(stream, wanted, head)
        if head.codec not in (RAW, asked):
            raise MalformedMessage(f"encoded by '{head.codec}' where '{asked}' was wanted")

        def came(nbytes: int, wire_bytes: int) -> None:
            self._client.came(stream.way, head.codec, nbytes)
            with self._lock:
                self._came.bytes += nbytes
                self._came.wire_bytes += wire_bytes
                self._came.coded_bytes += nbytes if head.codec else 0
                self._came.relayed_bytes += nbytes if stream.way != Wire.way else 0

        coding = self._client.coding(head.codec)
        if coding is None:
            found: int | None = stream.receive_object(wanted.into.data, self._until_s, came)
        else:
            found = receive_encoded(stream, coding.codec, wanted.into, self._until_s, came)
        return _checked(found, wanted, head)

    def _read_there(self, stream: Wire, wanted: Wanted, head: Sending) -> Outcome | None:
        """An object that is lent. Raises StreamLost when it is given up: its read goes on."""
        borrower = self._client.borrower
        remote, lending = borrower.remote, borrower.lending
        well: bool | None = False
        # Memory of a former start of the peer is not what the connection speaks of.
        if remote is not None and lending is not None and remote.epoch == stream.epoch:
            with contextlib.suppress(AgentFailed):
                read = lending.begin(remote, head.address, wanted.into)
                with self._lock:
                    self._late.append(read)
                well = lending.wait(read, lambda: self._why() != "peer_lost")
                if well is None:
                    raise GivenUp("a read in the peer's memory")
                with self._lock:
                    self._late.remove(read)
        stream.send(Taken(), self._until_s)
        if not well:
            borrower.failed()
            return None
        with self._lock:
            self._came.bytes += head.nbytes
            self._came.wire_bytes += head.nbytes
            self._came.lent_bytes += head.nbytes
        return _checked(checksum(wanted.into), wanted, head)

    def _why(self) -> Outcome:
        if self._cancelled:
            return "cancelled"
        return "deadline" if time.monotonic() >= self._until_s else "peer_lost"

    def _ended(self, index: int, outcome: Outcome) -> None:
        self._outcomes[index] = outcome
        if self._on_each is not None:
            self._on_each(index, outcome)


def _checked(found: int | None, wanted: Wanted, head: Sending) -> Outcome:
    expected = head.checksum if wanted.checksum is None else wanted.checksum
    return "" if found == expected == head.checksum else "corrupt"
