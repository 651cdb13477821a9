"""The sending side: answers peers out of this node's host memory."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvtier.errors import AuthError, ConfigError, KvtierError, MalformedMessage
from kvtier.messages.peers import (
    Ask,
    Introduce,
    Introduced,
    Offer,
    PeerHello,
    PeerProof,
    PeerReady,
    Reply,
    Sending,
    Taken,
    Want,
)
from kvtier.objects import KEY_BYTES, ObjectId
from kvtier.peers.choice import RAW
from kvtier.peers.coding import WIDTHS, Codings, encoded
from kvtier.peers.fairness import Turns
from kvtier.peers.handshake import NONCE_BYTES, Identity, answer, check
from kvtier.peers.lending import Lending
from kvtier.peers.relay import Tunnels
from kvtier.peers.stream import BUFFER_BYTES, MAX_ASK_BYTES, Stream, StreamLost, widen

_LOG = logging.getLogger(__name__)
_BACKLOG = 64
# Before the next try, where a connection could not be taken.
_REST_S = 0.1
# Objects that one connection holds open at once.
_MOST_LENT = 8


@dataclass(frozen=True, slots=True)
class Opened:
    """An object that stays where it is while it is open. data: uint8 [nbytes]."""

    data: npt.NDArray[np.uint8]
    checksum: int


class ObjectSource(Protocol):
    """Where this node's objects are."""

    def open(self, object_id: ObjectId, peer: str) -> AbstractContextManager[Opened | str]:
        """The object, held until the end of the block, or why not: 'missing' or 'busy'. From any thread."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """host, port: to listen on; port 0 takes a free one.  streams: objects that are sent at once.
    connections: that are open at once.  stall_s: a peer that takes nothing for so long is dropped, since
    what it was promised cannot be evicted.  idle_s: a connection that asks for nothing for so long is closed.
    tls: None sends in clear.  codecs: by which KV may be encoded for who wants it so.
    lending: by which others may read objects where they lie.
    """

    host: str = "127.0.0.1"
    port: int = 0
    streams: int = 4
    connections: int = 256
    handshake_s: float = 5.0
    stall_s: float = 10.0
    idle_s: float = 300.0
    tls: ssl.SSLContext | None = None
    codecs: Codings = field(default_factory=dict)
    lending: Lending | None = None


@dataclass(slots=True)
class Sent:
    """What a server did so far. bytes: of objects; wire_bytes: what they were on their way."""

    objects: int = 0
    bytes: int = 0
    wire_bytes: int = 0
    refused: int = 0
    dropped: int = 0


class PeerServer:
    """Serves until `close`. Raises ConfigError when the address cannot be listened on.

    source: None where there are no objects.  answer: to the questions of peers, from any thread, with the
    asking node's name; what it raises of KvtierError is the reply's reason.
    """

    def __init__(
        self,
        own: Identity,
        source: ObjectSource | None,
        settings: ServerSettings,
        answer: Callable[[bytes, str], bytes] | None = None,
    ) -> None:
        self._own, self._source, self._settings = own, source, settings
        self._reply_to = answer
        self._turns = Turns(settings.streams)
        self._lock = threading.Lock()
        self._open: dict[Stream, threading.Thread] = {}
        self._closing = threading.Event()
        self.sent = Sent()
        # Connections that come in calls instead, in clear: none where there is TLS.
        self.tunnels = Tunnels(self._tunnelled)
        try:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            self._listener = socket.create_server(
                (settings.host, settings.port), family=family, backlog=_BACKLOG
            )
        except OSError as error:
            raise ConfigError("cluster.listen", f"{settings.host}:{settings.port}: {error}") from error
        # Accepted connections inherit it; later it would not widen the window any more.
        widen(self._listener, socket.SO_SNDBUF)
        self._thread = threading.Thread(target=self._accept, name="kvtier-peers", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """That it listens on."""
        port: int = self._listener.getsockname()[1]
        return port

    def close(self) -> None:
        """Stop listening, cut all connections, and wait for their ends."""
        with self._lock:
            self._closing.set()
            streams = dict(self._open)
        # Closing a listener does not wake who waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.tunnels.close()
        for stream in streams:
            stream.close()
        for thread in streams.values():
            thread.join()

    def _accept(self) -> None:
        starved = False
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                # Such as no descriptor left, or a caller who is gone: it passes, but not at once.
                if not (starved or self._closing.is_set()):
                    _LOG.error("peers wait until they can be taken: %s", error)
                starved = True
                self._closing.wait(_REST_S)
                continue
            starved = False
            if not self._take(sock):
                sock.close()

    def _take(self, sock: socket.socket) -> bool:
        """Serve a connection, unless there are too many, or no thread is to be had."""
        with self._lock:
            if self._closing.is_set() or len(self._open) >= self._settings.connections:
                self.sent.refused += 1
                return False
            stream = Stream(sock)
            thread = threading.Thread(
                target=self._serve, args=(stream, sock), name="kvtier-peer", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                self.sent.refused += 1
                _LOG.warning("a peer was refused: %s", error)
                return False
            # It may have ended already, but not taken itself out: that needs the lock.
            self._open[stream] = thread
            return True

    def _tunnelled(self) -> socket.socket | None:
        """See Tunnels."""
        if self._settings.tls is not None:
            return None
        ours, theirs = socket.socketpair()
        # No window that grows by itself.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        if self._take(ours):
            return theirs
        ours.close()
        theirs.close()
        return None

    def _serve(self, stream: Stream, sock: socket.socket) -> None:
        secured = stream
        # Objects that stay open for the other end to read, in the order of the answers.
        lent: deque[ExitStack] = deque()
        try:
            if self._settings.tls is not None:
                wrapped = self._settings.tls.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False
                )
                secured = Stream(wrapped)
                self._now_open(stream, secured)
                secured.begin_tls(time.monotonic() + self._settings.handshake_s)
            peer = self._let_in(secured)
            while True:
                wait_s = self._settings.stall_s if lent else self._settings.idle_s
                asked = secured.receive_any(time.monotonic() + wait_s, MAX_ASK_BYTES)
                if isinstance(asked, Want) and self._source is not None:
                    self._send(secured, self._source, asked, peer, lent)
                elif isinstance(asked, Taken) and lent:
                    lent.popleft().close()
                elif isinstance(asked, Introduce):
                    secured.send(self._introduced(asked), time.monotonic() + self._settings.stall_s)
                elif isinstance(asked, Ask) and self._reply_to is not None:
                    self._reply(secured, self._reply_to, asked, peer)
                else:
                    raise MalformedMessage(f"nobody here answers {type(asked).__name__}")
        except StreamLost as error:
            _LOG.debug("a peer is gone: %s", error)
            with self._lock:
                self.sent.dropped += bool(lent)
        except (KvtierError, OSError) as error:
            with self._lock:
                self.sent.refused += 1
            _LOG.warning("a peer was refused: %s", error)
        finally:
            for held in lent:
                held.close()
            secured.close()
            stream.close()
            with self._lock:
                self._open.pop(stream, None)
                self._open.pop(secured, None)

    def _now_open(self, plain: Stream, secured: Stream) -> None:
        """The socket under TLS took the plain one's place: `close` has to find it, also before they agree."""
        with self._lock:
            thread = self._open.pop(plain, None)
            if self._closing.is_set() or thread is None:
                raise StreamLost("closed")
            self._open[secured] = thread

    def _let_in(self, stream: Stream) -> str:
        until_s = time.monotonic() + self._settings.handshake_s
        greeting = stream.receive(PeerHello, until_s)
        nonce = secrets.token_bytes(NONCE_BYTES)
        try:
            proof = answer(self._own, greeting, nonce)
        except KvtierError as error:
            stream.send(PeerProof(reason=error.message, node=self._own.node), until_s)
            raise
        stream.send(proof, until_s)
        try:
            check(self._own, greeting, nonce, stream.receive(PeerProof, until_s))
        except AuthError as error:
            stream.send(PeerReady(reason=error.message), until_s)
            raise
        lending = self._settings.lending
        lends = (lending.way,) if lending is not None else ()
        stream.send(PeerReady(codecs=self._offers(), lends=lends), until_s)
        return greeting.node

    def _introduced(self, asked: Introduce) -> Introduced:
        lending = self._settings.lending
        return Introduced(metadata=lending.metadata if lending and lending.way == asked.way else b"")

    def _offers(self) -> tuple[Offer, ...]:
        streams = self._settings.streams
        known = {name: each.of_all(streams) for name, each in self._settings.codecs.items()}
        return tuple(Offer(name, each.ratio, each.encode_bytes_per_s) for name, each in known.items())

    def _reply(self, stream: Stream, answer: Callable[[bytes, str], bytes], asked: Ask, peer: str) -> None:
        try:
            reply = Reply(body=answer(asked.body, peer))
        except KvtierError as error:
            reply = Reply(reason=error.message)
        stream.send(reply, time.monotonic() + self._settings.stall_s)

    def _send(
        self, stream: Stream, source: ObjectSource, want: Want, peer: str, lent: deque[ExitStack]
    ) -> None:
        if len(want.block_key) != KEY_BYTES:
            raise AuthError(f"node '{peer}' asks for a key of {len(want.block_key)} bytes")
        object_id = ObjectId(want.block_key, want.group, want.shard)
        with self._turns.of(peer), ExitStack() as held:
            found = held.enter_context(source.open(object_id, peer))
            until_s = time.monotonic() + self._settings.stall_s
            if isinstance(found, str):
                stream.send(Sending(reason=found), until_s)
                return
            nbytes = len(found.data)
            lending = self._settings.lending if want.lend and len(lent) < _MOST_LENT else None
            if lending is not None and (address := lending.address_of(found.data)):
                head = Sending(nbytes=nbytes, checksum=found.checksum, address=address)
                stream.send(head, until_s)
                self._count(nbytes, nbytes)
                lent.append(held.pop_all())
                return
            coding = self._settings.codecs.get(want.codec) if want.item_bytes in WIDTHS else None
            parts: Iterable[memoryview] = (found.data.data,)
            if coding is not None:
                parts = encoded(coding.codec, want.item_bytes, found.data)
            head = Sending(nbytes=nbytes, checksum=found.checksum, codec=want.codec if coding else RAW)
            try:
                wire_bytes = stream.send(head, until_s, parts)
            except StreamLost:
                with self._lock:
                    self.sent.dropped += 1
                raise
            self._count(nbytes, wire_bytes)

    def _count(self, nbytes: int, wire_bytes: int) -> None:
        with self._lock:
            self.sent.objects += 1
            self.sent.bytes += nbytes
            self.sent.wire_bytes += wire_bytes
