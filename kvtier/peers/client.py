"""The receiving side: objects of a peer into this node's slots, over several connections."""

from __future__ import annotations

import contextlib
import logging
import secrets
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtier.carriage import Carrier
from kvtier.errors import AuthError, KvtierError
from kvtier.messages.peers import Ask, Offer, PeerProof, PeerReady, Reply
from kvtier.peers.choice import Figures, Rates, choose
from kvtier.peers.coding import Coding, Codings
from kvtier.peers.fetch import Came, Fetch, Outcome, Wanted
from kvtier.peers.handshake import NONCE_BYTES, Identity, hello, prove
from kvtier.peers.lending import Borrower, Lending, Read
from kvtier.peers.stream import MAX_ASK_BYTES, StreamLost, Wire
from kvtier.peers.ways import Ways

_LOG = logging.getLogger(__name__)

_MOST_ADDRESS = 1 << 64


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
        self._fetches: set[Fetch] = set()
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
        run = Fetch(self, wanted, time.monotonic() + timeout_s, on_each, came or Came())
        with self._lock:
            if self._closed:
                return ["cancelled"] * len(wanted)
            self._fetches.add(run)
        try:
            return run.go(min(self._settings.streams, len(wanted)))
        finally:
            # Also when it was refused: another connection's read may go on.
            if late is not None:
                late += run.take_late()
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
