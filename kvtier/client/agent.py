"""The thread of an attached worker that takes the node's events and carries out copies.

It waits on three things: the events connection, the copy connection to the GPU service, and a wake-up for
what other threads put in its outbox.  Copies run on the engine's threads.  When the events connection ends,
the node is lost, and so is the attachment; when the copy connection ends only copies are, and it is opened
again.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from kvtier.breaker import CHANCE, Backoff
from kvtier.client.page_use import PageUse, ParkUse, RestoreUse
from kvtier.errors import GeometryError, KvtierError, MalformedMessage, ProtocolError
from kvtier.messages.calls import CopiesEnded, Message, ParkDone, Released, RestoreDone
from kvtier.messages.tiers import (
    CancelCopies,
    Copied,
    Copy,
    LayerQueued,
    PoolProbed,
    PoolProven,
    ProbePool,
)
from kvtier.messages.wire import Channel, ChannelLost, close_all
from kvtier.receipts import Reason

if TYPE_CHECKING:
    from kvtier.gpu.engine import CopyBatch, CopyEngine, CopyItem, CopyResult, StreamEvent
    from kvtier.gpu.layers import LayerBatch
    from kvtier.gpu.shared_pool import MappablePool

Use: TypeAlias = PageUse[Any]
SEND_S = 1.0
UNMAPPED_MS = 5


@dataclass(frozen=True, slots=True)
class Mapping:
    """A pool on a GPU for the GPU service to map.

    refused: it cannot, or what it maps is something else.  Attaches anew, and answers whether that was
    begun: not while the present attachment is still being made.
    """

    pool: MappablePool
    refused: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class AgentPorts:
    """What an agent is connected to.

    events: its own from now on.  engine: None where the GPU service copies.  open_copy: opens the copy
    connection.  lost: the node is gone.  post: sends a request to the node in the background.
    """

    worker: str
    events: Channel
    engine: CopyEngine | None
    open_copy: Callable[[], Channel]
    lost: Callable[[KvtierError], None]
    post: Callable[[Message], None]
    mapping: Mapping | None = None


class Agent:
    """See the module's text."""

    def __init__(self, ports: AgentPorts, backoff: Backoff) -> None:
        self._ports = ports
        self._backoff = backoff
        self._lock = threading.Lock()
        self._uses: dict[int, Use] = {}
        self._ending: tuple[Reason, str] | None = None
        self._outbox: deque[tuple[int, Copied]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._copy: Channel | None = None
        self._service_event: Callable[[int], StreamEvent] | None = None
        self._copy_era = 0
        self._unmapped = ""
        self._copy_failures = 0
        self._copy_due_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name="kvtier-agent", daemon=True)

    # --- from other threads -----------------------------------------------------------------------------

    def start(self) -> None:
        """Try to open the copy connection, so that a park right away finds it; then run."""
        self._tend_copy()
        self._thread.start()

    def add(self, use: Use) -> bool:
        """Take charge of a use before its request is sent; False when the attachment is over."""
        with self._lock:
            if self._ending is not None:
                return False
            self._uses[use.request] = use
        use.when_finished(partial(self._drop, use))
        self._nudge()
        return True

    def forget(self, use: Use) -> None:
        """The request was refused: the node knows nothing of it."""
        with self._lock:
            self._uses.pop(use.request, None)

    def end(self, use: Use, reason: Reason, detail: str) -> None:
        """End one use from this side, and tell the node once its copies have ended."""
        use.end(reason, detail, self._copies_ended)
        self._cancel(use)

    def stop(self, reason: Reason, detail: str) -> None:
        """End all uses and the thread. Does not wait; again is no error."""
        with self._lock:
            if self._ending is None:
                self._ending = (reason, detail)
        self._nudge()

    def join(self) -> None:
        """Wait for the thread, and close what it used."""
        self._thread.join()
        with self._lock:
            wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)

    @property
    def uses(self) -> list[Use]:
        """Those not finished."""
        with self._lock:
            return list(self._uses.values())

    def _drop(self, use: Use) -> None:
        # A shared pool's use has its receipt before it is quiet, and then still waits for the node's word.
        use.when_released(partial(self.forget, use))

    def _copies_ended(self, jobs: list[str]) -> None:
        self._ports.post(CopiesEnded(worker=self._ports.worker, jobs=jobs))

    def _cancel(self, use: Use) -> None:
        if self._ports.engine is not None:
            for job in use.jobs:
                self._ports.engine.cancel(job)

    def _nudge(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: KvtierError = ChannelLost("the worker's agent ended")
        try:
            # What came together with the handshake's answer wakes nobody.
            self._take_events()
            while self._ending is None:
                self._turn()
        except (ChannelLost, ProtocolError) as failure:
            error = failure
        finally:
            if self._ending is None:
                self.stop("daemon_unavailable", str(error))
                self._ports.lost(error)
            self._end_all()
            self._ports.events.close()
            self._close_copy()

    def _turn(self) -> None:
        """Wait for something and do it. Raises ChannelLost or ProtocolError when the node is lost."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._ports.events, select.POLLIN)
        if self._copy is not None:
            poll.register(self._copy, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._patience_ms())}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._ports.events.fileno() in ready:
            self._take_events()
        self._tend_copy()
        mapping = self._ports.mapping
        if self._unmapped and mapping is not None and mapping.refused(self._unmapped):
            self._unmapped = ""
        self._expire(time.monotonic())

    def _patience_ms(self) -> int | None:
        if self._unmapped:
            return UNMAPPED_MS
        moments = [use.limit_s for use in self.uses if not use.ended_here]
        if self._copy is None:
            moments.append(self._copy_due_s)
        if not moments:
            return None
        return math.ceil(max(0.0, min(moments) - time.monotonic()) * 1000)

    def _take_events(self) -> None:
        for message, fds in self._ports.events.recv_ready():
            close_all(fds)
            self._take_event(message)

    def _take_event(self, message: Message) -> None:
        if not isinstance(message, Released | ParkDone | RestoreDone):
            raise MalformedMessage(f"{type(message).__name__} is not an event")
        use = self._use(message.request)
        if isinstance(use, ParkUse):
            if isinstance(message, Released):
                use.said_released()
            elif isinstance(message, ParkDone):
                self._over(use, cut_off=message.receipt.level == "none")
                use.said_done(message.receipt)
        elif isinstance(use, RestoreUse) and isinstance(message, RestoreDone):
            self._over(use, cut_off=bool(message.receipt.reason))
            use.said_done(message.receipt)

    def _over(self, use: Use, *, cut_off: bool) -> None:
        """Batches that the node cut off may run here, or never come: it frees their slots when told so."""
        if cut_off and self._ports.engine is not None:
            use.stop_copies(self._copies_ended)
            self._cancel(use)

    def _use(self, request: int) -> Use | None:
        with self._lock:
            return self._uses.get(request)

    def _expire(self, now_s: float) -> None:
        for use in self.uses:
            if use.limit_s <= now_s and not use.ended_here:
                self.end(use, "deadline", "the daemon did not finish it in time")

    def _end_all(self) -> None:
        reason, detail = self._ending or ("daemon_unavailable", "the agent ended")
        for use in self.uses:
            use.end(reason, detail)
            self._cancel(use)

    # --- copies -----------------------------------------------------------------------------------------

    def _tend_copy(self) -> None:
        """Keep the copy connection: open it when due, send what waits, take what came."""
        try:
            if self._copy is None:
                if time.monotonic() < self._copy_due_s:
                    return
                self._copy = self._ports.open_copy()
                self._copy_era += 1
                self._copy_failures = 0
                self._offer_pool(self._copy)
            self._serve_copy(self._copy)
        except (KvtierError, OSError):
            self._lose_copy()

    def _serve_copy(self, channel: Channel) -> None:
        received = channel.recv_ready()
        for message, fds in received:
            close_all(fds)
            if isinstance(message, Copy):
                self._begin(message)
            elif isinstance(message, CancelCopies) and self._ports.engine is not None:
                self._ports.engine.cancel(message.job)
            elif isinstance(message, LayerQueued):
                self._layer_queued(message)
            elif isinstance(message, PoolProbed) and self._ports.mapping is not None:
                self._judge(channel, self._ports.mapping, message)
        while self._outbox:
            era, answer = self._outbox.popleft()
            if era == self._copy_era:
                channel.send(answer, time.monotonic() + SEND_S)

    def _offer_pool(self, channel: Channel) -> None:
        """Begin the probe after which the GPU service may copy."""
        if self._ports.mapping is not None:
            challenge = self._ports.mapping.pool.challenge()
            probe = ProbePool(pages=list(challenge.pages), nonce=challenge.nonce)
            channel.send(probe, time.monotonic() + SEND_S)

    def _judge(self, channel: Channel, mapping: Mapping, message: PoolProbed) -> None:
        from kvtier.gpu.shared_pool import Answer

        ok = message.ok and mapping.pool.judge(Answer(message.seen, message.written))
        why = message.detail or "it sees other memory than the pool's"
        try:
            self._service_event = mapping.pool.listen(message.events) if ok else None
        except KvtierError as error:
            ok, why = False, str(error)
        channel.send(PoolProven(ok=ok), time.monotonic() + SEND_S)
        if not ok:
            self._unmapped = why

    def _layer_queued(self, message: LayerQueued) -> None:
        from kvtier.gpu.engine import Reached

        use = self._use(message.request)
        if use is None or use.order.layers is None:
            return
        if message.event is None:
            use.order.layers.arrived(message.layer, Reached())
        elif self._service_event is not None:
            use.order.layers.arrived(message.layer, self._service_event(message.event))

    def _begin(self, message: Copy) -> None:
        use, engine = self._use(message.request), self._ports.engine
        if use is None or engine is None or not use.admit(message.job, message.direction):
            self._answer(_refused(message, "cancelled"))
            return
        items = items_of(message)
        part = use.order.layers.begin(items, message.last) if use.order.layers is not None else None
        if use.order.layers is not None and part is None:
            # Somebody computes with a layer that this batch would write again.
            use.copy_ended()
            self._answer(_refused(message, "cancelled"))
            return
        try:
            batch = batch_of(message, items, use, part)
            engine.submit(batch, partial(self._copied, use, part, self._copy_era))
        except GeometryError as error:
            if part is not None:
                part.ended(False)
            use.copy_ended()
            self._answer(_refused(message, f"error: {error}"))
        if not use.open:
            engine.cancel(message.job)

    def _answer(self, answer: Copied) -> None:
        self._outbox.append((self._copy_era, answer))

    def _copied(self, use: Use, part: LayerBatch | None, era: int, result: CopyResult) -> None:
        """Called by the engine, from a thread of its own."""
        if part is not None:
            part.ended(result.ok)
        self._outbox.append((era, Copied.of(result)))
        self._nudge()
        use.copy_ended()

    def _lose_copy(self) -> None:
        """No queued batch starts; the node hears of the jobs once the running ones have ended."""
        self._copy_failures += 1
        delay_s = self._backoff.delay_s(self._copy_failures, CHANCE())
        self._copy_due_s = time.monotonic() + delay_s
        if self._copy is None:
            return
        self._close_copy()
        # Where the GPU service copies, only it, or its end, can say that copies ended.
        for use in self.uses if self._ports.engine is not None else ():
            if use.open:
                use.stop_copies(self._copies_ended)
                self._cancel(use)

    def _close_copy(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        self._service_event = None
        self._outbox.clear()


def items_of(message: Copy) -> tuple[CopyItem, ...]:
    """What a batch consists of, as the engine takes it."""
    # The engine's room is only needed, and only imported, where copies are run.
    from kvtier.gpu.engine import CopyItem

    return tuple(
        CopyItem(
            item.group,
            item.start,
            item.tokens,
            item.first_valid,
            item.slot_id,
            item.generation,
            (item.arena, item.offset),
            item.nbytes,
            item.checksum,
        )
        for item in message.items
    )


def batch_of(message: Copy, items: tuple[CopyItem, ...], use: Use, part: LayerBatch | None) -> CopyBatch:
    """A batch as the engine takes it. part: of the use's layers, where they are told of."""
    from kvtier.gpu.engine import CopyBatch

    order = use.order
    return CopyBatch(
        message.job,
        message.batch,
        message.direction,
        use.binding,
        items,
        message.checksums if message.direction == "gather" else message.verify,
        after=order.after,
        after_layers=order.after_layers,
        on_layer=part.on_layer if part is not None and order.by_layer else None,
        fidelity=message.fidelity,
    )


def _refused(message: Copy, reason: str) -> Copied:
    return Copied(
        job=message.job,
        batch=message.batch,
        ok=False,
        checksums=[None] * len(message.items),
        failed=[(index, reason) for index in range(len(message.items))],
    )
