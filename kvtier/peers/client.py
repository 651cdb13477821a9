"""The receiving side: objects of a peer into this node's slots, over several connections."""

from __future__ import annotations

import contextlib
import logging
import secrets
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.carriage import Carrier
from kvtier.checksum import checksum
from kvtier.errors import AuthError, KvtierError, MalformedMessage
from kvtier.messages.peers import Ask, Offer, PeerProof, PeerReady, Reply, Sending, Taken, Want
from kvtier.objects import ObjectId
from kvtier.peers.choice import RAW, Figures, Rates, choose
from kvtier.peers.coding import Coding, Codings, receive_encoded
from kvtier.peers.handshake import NONCE_BYTES, Identity, hello, prove
from kvtier.peers.lending import AgentFailed, Borrower, Lending, Read
from kvtier.peers.stream import MAX_ASK_BYTES, StreamLost, Wire
from kvtier.peers.ways import Ways

_LOG = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """streams: connections to one peer.  depth: objects asked for ahead on each, so that the way there and
    back is not waited for.  connect_s: for a connection and its handshake.  codecs: by which KV may come
    encoded, where the other end has them too and it pays (choice.py).  carrier: see Ways.
    lending: objects are read in the other end's memory, where it can do that too and their room is there.
    """

    streams: int = 4
    depth: int = 2
    connect_s: float = 2.0
    tls: ssl.SSLContext | None = None
    codecs: Codings = field(default_factory=dict)
    carrier: Carrier | None = None
    lending: Lending | None = None


class PeerClient:
    """One peer. `fetch` may be called from several threads; each call has connections of its own.

    Raises nothing for a peer that is away or slow: the outcomes say it.  A peer that does not know the
    cluster's token is told by `AuthError` from `fetch`.
    """

    def __init__(self, own: Identity, node: str, address: tuple[str, int], settings: ClientSettings) -> None:
        self._own, self._node, self._settings = own, node, settings
        self._ways = Ways(node, address, settings.tls, settings.carrier)
        self.borrower = Borrower(node, settings.lending)
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._asking: set[Wire] = set()
        self._fetches: set[_Fetch] = set()
        self._closed = False
        # By way: one says nothing of the other.
        self._rates: defaultdict[str, Rates] = defaultdict(Rates)
        # What both ends have, once a connection was made.
        self._offers: dict[str, Figures] = {}
        self.epoch = 0
        # A peer of a smaller epoch is one that was given up and runs on: nothing is taken from it.
        self.least_epoch = 0

    def fetch(
        self,
        wanted: Sequence[Wanted],
        timeout_s: float,
        on_each: Callable[[int, Outcome], None] | None = None,
        came: Came | None = None,
        late: list[Read] | None = None,
    ) -> list[Outcome]:
        """Receive the objects; answers an outcome for each, in order.

        on_each: told (index, outcome) as each ends, from a thread of the fetch's.  came: counted up.  When
        this returns, nothing writes into any `into` any more.  What ended otherwise than '' may have been
        written in part.

        late: takes reads in the peer's memory that were given up and go on (see Lending.when_ended): with it
        this returns by the deadline, and nothing writes into their room only when they have ended.  Without
        it this waits for them.
        """
        run = _Fetch(self, wanted, time.monotonic() + timeout_s, on_each, came or Came())
        with self._lock:
            if self._closed:
                return ["cancelled"] * len(wanted)
            self._fetches.add(run)
        try:
            outcomes = run.go(min(self._settings.streams, len(wanted)))
            if late is not None:
                late += run.take_late()
            return outcomes
        finally:
            run.wait_for_late()
            with self._lock:
                self._fetches.discard(run)
                for rates in self._rates.values() if not self._fetches else ():
                    rates.pause()

    def ask(self, body: bytes, timeout_s: float) -> bytes:
        """Ask what is no object, and wait for the answer.

        Raises StreamLost when none came in time, KvtierError with the other end's reason for giving none.
        """
        until_s = time.monotonic() + timeout_s
        while (stream := self.idle_stream()) is not None:
            # The other end may have closed it since.
            with contextlib.suppress(StreamLost):
                return self._ask_over(stream, body, until_s)
        return self._ask_over(self.new_stream(until_s), body, until_s)

    def _ask_over(self, stream: Wire, body: bytes, until_s: float) -> bytes:
        try:
            with self._lock:
                if self._closed:
                    raise StreamLost("closed")
                self._asking.add(stream)
            stream.send(Ask(body=body), until_s)
            reply = stream.receive(Reply, until_s, MAX_ASK_BYTES)
        except BaseException:
            stream.close()
            raise
        finally:
            with self._lock:
                self._asking.discard(stream)
        self.give_back(stream)
        if reply.reason:
            raise KvtierError(f"node '{self._node}': {reply.reason}")
        return reply.body

    def cancel(self) -> None:
        """End all fetches that run, soon; they answer 'cancelled' for what has not arrived."""
        with self._lock:
            running = list(self._fetches)
        for run in running:
            run.cancel()

    def close(self) -> None:
        """Cancel, and close all connections; who waits for an answer gets StreamLost."""
        with self._lock:
            self._closed = True
        self.cancel()
        with self._lock:
            streams, self._idle = [*self._idle, *self._asking], []
        for stream in streams:
            stream.close()

    def idle_stream(self) -> Wire | None:
        """A connection of an earlier fetch; the peer may have closed it since."""
        while True:
            with self._lock:
                stream = self._idle.pop() if self._idle else None
            if stream is None or (stream.epoch >= self.least_epoch and not self._ways.outdated(stream.way)):
                return stream
            stream.close()

    def new_stream(self, until_s: float) -> Wire:
        """A connection that is ready to be asked. Raises StreamLost, AuthError, MalformedMessage."""
        until_s = min(until_s, time.monotonic() + self._settings.connect_s)
        try:
            return self._greeted(self._ways.open(until_s), until_s)
        except _AnotherNode:
            if not self._ways.no_tcp():
                raise
            return self._greeted(self._ways.open(until_s), until_s)

    def _greeted(self, stream: Wire, until_s: float) -> Wire:
        try:
            greeting = hello(self._own, self._node, secrets.token_bytes(NONCE_BYTES))
            stream.send(greeting, until_s)
            proof = stream.receive(PeerProof, until_s)
            if proof.reason:
                refused = AuthError if proof.node in ("", self._node) else _AnotherNode
                raise refused(f"node '{self._node}' refuses this node: {proof.reason}")
            stream.send(prove(self._own, greeting, proof), until_s)
            ready = stream.receive(PeerReady, until_s)
            if ready.reason:
                raise AuthError(f"node '{self._node}' refuses this node: {ready.reason}")
            stream.epoch, stream.lends = proof.epoch, ready.lends
            if proof.epoch < self.least_epoch:
                raise StreamLost(f"node '{self._node}' of an earlier start answers")
            self._hear_of(ready.codecs, proof.epoch)
            self._ways.reached(stream.way)
            return stream
        except BaseException:
            self._ways.lost(stream.way)
            stream.close()
            raise

    def give_back(self, stream: Wire) -> None:
        """Keep a connection on which nothing is under way."""
        with self._lock:
            if not self._closed:
                self._idle.append(stream)
                return
        stream.close()

    @property
    def depth(self) -> int:
        """Objects asked for ahead on one connection."""
        return self._settings.depth

    @property
    def way(self) -> str:
        """By which the node was reached last; '' before it was."""
        return self.borrower.way or self._ways.way

    def codec_now(self, way: str) -> str:
        """By which objects are best asked for; '' for none. way: of the connection."""
        with self._lock:
            return choose(self._rates[way].measured(time.monotonic()), self._offers)

    def coding(self, name: str) -> Coding | None:
        """One of those that this end decodes."""
        return self._settings.codecs.get(name)

    def came(self, way: str, codec: str, nbytes: int) -> None:
        """So many bytes of KV have arrived just now."""
        with self._lock:
            self._rates[way].came(codec, nbytes, time.monotonic())

    def _hear_of(self, offers: Sequence[Offer], epoch: int) -> None:
        streams = self._settings.streams
        known: dict[str, Figures] = {}
        for offer in offers:
            coding = self._settings.codecs.get(offer.codec)
            if coding is not None:
                decode = coding.of_all(streams).decode_bytes_per_s
                known[offer.codec] = Figures(offer.ratio, offer.encode_bytes_per_s, decode)
        with self._lock:
            self._offers = known
            if epoch != self.epoch:
                # Of a former start of the peer nothing that was measured counts.
                self.epoch = epoch
                self._rates.clear()


class _AnotherNode(AuthError):
    """Who answers at the address is not the node that was called."""


class _GivenUp(StreamLost):
    """A read goes on in the room of what was asked for."""


class _Fetch:
    """One call of `fetch`."""

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
            busy = isinstance(error, _GivenUp)
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
        if remote is not None and lending is not None:
            with contextlib.suppress(AgentFailed):
                read = lending.begin(remote, head.address, wanted.into)
                with self._lock:
                    self._late.append(read)
                well = lending.wait(read, lambda: self._why() != "peer_lost")
                if well is None:
                    raise _GivenUp("a read in the peer's memory")
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
