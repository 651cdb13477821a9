"""The control connection of a client or worker: calls in turn, each with a deadline; it mends itself.

A call that fails or comes too late opens the circuit breaker (breaker.py): from then on calls are refused at
once, while one thread tries to connect again.  That thread exists only as long as it has something to do.
A connection on which an answer was missed is never used again, so a late answer meets nobody.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from kvtier.breaker import CHANCE, Backoff, Breaker
from kvtier.config.credentials import read_token
from kvtier.errors import DaemonNotFound, KvtierError, ProtocolError
from kvtier.messages import protocol
from kvtier.messages.calls import Message
from kvtier.messages.wire import Channel, ChannelLost, ChannelTimeout, close_all, expect, hello

Answer = TypeVar("Answer", bound=Message)
# Calls wait for posted messages to be answered, so these get little time.
POST_S = 1.0
DEFAULT_BACKOFF = Backoff()
# Prepares a fresh connection before anybody may call over it; gets the era that it will have.
Prepare = Callable[[Channel, int], None]


class Prepared(NamedTuple):
    """A request that is ready to be sent."""

    request_id: int
    frame: bytes


class LinkSettings(NamedTuple):
    """path: of the node's socket.  token_file: read for each connection, so that tokens may change."""

    path: str
    token_file: str | Path | None = None
    timeout_s: float = 5.0
    backoff: Backoff = DEFAULT_BACKOFF
    clock: Callable[[], float] = time.monotonic
    rng: Callable[[], float] = CHANCE


class Link:
    """See the module's text. All calls from any thread of the process that made it."""

    def __init__(
        self,
        settings: LinkSettings,
        prepare: Prepare | None = None,
        lost: Callable[[KvtierError], None] | None = None,
    ) -> None:
        """lost: called when a connection fails, by whoever saw it; must not wait."""
        self.settings = settings
        self._prepare = prepare
        self._lost = lost
        self._process = os.getpid()
        self._ids = itertools.count(2)
        self._calls = threading.Lock()
        self._changed = threading.Condition()
        self._breaker = Breaker(settings.backoff, settings.rng)
        self._channel: Channel | None = None
        self._mender: threading.Thread | None = None
        self._posted: deque[tuple[int, Message]] = deque()
        self._reason: KvtierError | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether calls go through at present."""
        return self._breaker.closed

    @property
    def era(self) -> int:
        """Number of the present connection."""
        return self._breaker.era

    @property
    def reason(self) -> str:
        """Why there is no connection, or was none the last time."""
        return str(self._reason or "")

    def start(self, *, required: bool) -> None:
        """Connect. Where that fails: raise if required, else go on in the background.

        A refusal (credentials, versions, arguments) is raised in any case.
        """
        self._breaker.begin_probe(self.settings.clock())
        if not self._probe() and self._reason is not None:
            if required or not isinstance(self._reason, DaemonNotFound):
                raise self._reason
            self._mend()

    def call(self, request: Message, kind: type[Answer], timeout_s: float | None = None) -> Answer:
        """One request and its answer. Raises what a Failed names, DaemonNotFound, ProtocolError."""
        prepared = self.prepare(request)
        self._renew(self.settings.timeout_s if timeout_s is None else timeout_s)
        return expect(self.exchange(prepared, timeout_s), kind, self.settings.path)

    def prepare(self, request: Message) -> Prepared:
        """Encode a request under an id of its own. Raises MessageTooLarge, and KvtierError after a fork."""
        self.check_process()
        request_id = next(self._ids)
        return Prepared(request_id, protocol.encode(msgspec.structs.replace(request, id=request_id)))

    def exchange(self, prepared: Prepared, timeout_s: float | None = None, era: int | None = None) -> Message:
        """Send and wait for the answer, which may be a Failed. era: of the only connection to send it over.

        Everything raised is a fault of the daemon or the connection: DaemonNotFound, ProtocolError.
        """
        limit_s = self.settings.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + limit_s
        if not self._breaker.closed:
            raise self._unavailable()
        if not self._calls.acquire(timeout=limit_s):
            raise ChannelTimeout("another call on this connection takes all the time allowed")
        try:
            channel, now = self._channel, self._breaker.era
            if channel is None or not self._breaker.closed or era not in (None, now):
                raise self._unavailable()
            try:
                answer, fds = channel.exchange(prepared.frame, prepared.request_id, deadline_s)
            except (ChannelLost, ProtocolError) as error:
                self.fail(now, error)
                raise
            except BaseException:
                # Interrupted in the middle: the answer may still come.
                self.fail(now, ChannelLost("a call was interrupted"))
                raise
            close_all(fds)
            if self._breaker.failures:
                with self._changed:
                    self._breaker.proved(now)
            return answer
        finally:
            self._calls.release()

    def post(self, message: Message, era: int) -> None:
        """Send a request in the background, over the connection of this era or not at all."""
        with self._changed:
            self._posted.append((era, message))
        self._mend()

    def fail(self, era: int, error: KvtierError) -> bool:
        """The connection of `era` is of no more use. Does not wait. False where it is not the present one."""
        with self._changed:
            if not self._breaker.failed(era, self.settings.clock()):
                return False
            self._reason = error
            if self._channel is not None:
                self._channel.shutdown()
        if self._lost is not None:
            self._lost(error)
        self._mend()
        return True

    def token(self) -> str:
        """What proves who this is; '' without a token file. Raises ConfigError."""
        return read_token(self.settings.token_file) if self.settings.token_file else ""

    def check_process(self) -> None:
        """Raise KvtierError in a process that was forked from the one that connected."""
        if os.getpid() != self._process:
            raise KvtierError(
                "this process was forked after it had connected to the daemon",
                fix="connect in the process that uses the connection",
            )

    def close(self) -> None:
        """Close the connection and end the background thread; again is no error."""
        if os.getpid() != self._process:
            # Threads and locks of the parent are in an unknown state here: only the descriptor is ours.
            if self._channel is not None:
                self._channel.close()
            return
        with self._changed:
            self._closed = True
            mender, channel = self._mender, self._channel
            if channel is not None:
                channel.shutdown()
            self._changed.notify_all()
        if mender is not None and mender is not threading.current_thread():
            mender.join()
        with self._calls:
            self._drop()

    def _renew(self, limit_s: float) -> None:
        """A daemon that ended since the last call may be back: wait for one attempt to connect to it."""
        with self._changed:
            channel, era, failures = self._channel, self._breaker.era, self._breaker.failures
            if channel is None or not self._breaker.closed or not channel.hung_up():
                return
        self.fail(era, ChannelLost(f"{self.settings.path} went away since the last call"))
        with self._changed:
            # One failure is the one above, the next is that of the attempt.
            self._changed.wait_for(
                lambda: self._breaker.closed or self._closed or self._breaker.failures > failures + 1, limit_s
            )

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _unavailable(self) -> DaemonNotFound:
        if self._closed:
            return DaemonNotFound("this connection was closed", fix="connect again")
        return DaemonNotFound(
            f"the daemon at {self.settings.path} does not answer and is tried again in the background; "
            f"the last attempt said: {self.reason}",
            fix="see `kvtier status`",
        )

    def _dial(self) -> Channel:
        deadline_s = time.monotonic() + self.settings.timeout_s
        channel = Channel.open(self.settings.path, hello("client", token=self.token()), deadline_s)
        try:
            if self._prepare is not None:
                self._prepare(channel, self._breaker.era + 1)
        except BaseException:
            channel.close()
            raise
        return channel

    def _probe(self) -> bool:
        """One attempt to connect, for which the right was taken."""
        with self._calls:
            self._drop()
        try:
            channel = self._dial()
        except (KvtierError, OSError) as error:
            with self._changed:
                self._reason = error if isinstance(error, KvtierError) else ChannelLost(str(error))
                self._breaker.probe_failed(self.settings.clock())
                self._changed.notify_all()
            return False
        with self._changed:
            self._channel = channel
            self._breaker.probe_succeeded()
            self._changed.notify_all()
        return True

    def _mend(self) -> None:
        """See to it that the background thread runs."""
        with self._changed:
            self._changed.notify_all()
            if self._mender is None and not self._closed:
                self._mender = threading.Thread(target=self._work, name="kvtier-link", daemon=True)
                self._mender.start()

    def _work(self) -> None:
        while (task := self._next_task()) is not None:
            task()

    def _next_task(self) -> Callable[[], object] | None:
        """Wait for something to do: a probe that is due, or a posted message. None ends the thread."""
        with self._changed:
            while not self._closed:
                now_s = self.settings.clock()
                if self._breaker.closed:
                    if not self._posted:
                        break
                    era, message = self._posted.popleft()
                    return partial(self._deliver, message, era)
                if self._breaker.begin_probe(now_s):
                    return self._probe
                self._changed.wait(self._breaker.wait_s(now_s))
            self._mender = None
            return None

    def _deliver(self, message: Message, era: int) -> None:
        try:
            self.exchange(self.prepare(message), POST_S, era)
        except KvtierError as error:
            # What is posted is advice: whoever has to know that it failed sees the state of the link.
            self._reason = error
