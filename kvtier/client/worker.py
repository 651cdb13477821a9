"""A serving worker's side: park, plan and restore against the node's daemon.

None of these calls raises for what the daemon cannot do at present: without it a park keeps nothing, a plan
computes everything, and both say 'daemon_unavailable'.  A caller's mistake is raised before anything is sent.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from kvtier.arguments import DEFAULT_TENANT, Duration, name, one_of, optional_seconds, seconds
from kvtier.client.agent import Mapping
from kvtier.client.attachment import Attachment, MakeEngine, attach
from kvtier.client.handles import QUIET_S, ParkHandle, RestoreHandle
from kvtier.client.link import Link, LinkSettings
from kvtier.client.page_use import CopyOrder, ParkUse, RestoreUse, missed
from kvtier.client.shards import Shards
from kvtier.client.worker_calls import WorkerCalls, cancel, copies_here
from kvtier.client.worker_inputs import (
    NO_FRONT,
    NOTHING_KNOWN,
    Computing,
    Front,
    ModelIdentity,
    WorkerPlan,
    WorkerPool,
    attach_request,
    extras_list,
    pack,
    page_bytes,
    shown,
)
from kvtier.errors import DaemonNotFound, KvtierError
from kvtier.messages.calls import (
    CODECS,
    Detach,
    Done,
    DropPlan,
    JoinPlan,
    MakePlan,
    Park,
    ParkStarted,
    Planned,
    Prefilled,
    Restore,
    RestoreStarted,
)
from kvtier.messages.wire import Channel
from kvtier.objects import Shard
from kvtier.receipts import ASKED_LEVELS, AskedLevel, RestoreReceipt, TokenRange

if TYPE_CHECKING:
    from kvtier.client.worker_inputs import AnyPool
    from kvtier.gpu.engine import StreamEvent
    from kvtier.gpu.pool import Binding

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 1.0
# The node ends what is late by itself; only after this time the worker does.
RESTORE_GRACE_S = 0.1
# Where it has to wait for the copies of other ranks to end.
RANKS_GRACE_S = 1.5
PARK_GRACE_S = 1.0
DETACH_S = 1.0
SHARES = ("prefix", "conversation")
TAKES = ("all_or_nothing", "fronts", "both")


class Worker:
    """Made by `Client.attach`. All calls from any thread of the process that made it."""

    def __init__(
        self,
        settings: LinkSettings,
        model: ModelIdentity,
        pool: AnyPool,
        *,
        shard: Shard,
        call_timeout_s: float,
        make_engine: MakeEngine | None,
        required: bool,
        computing: Computing = NOTHING_KNOWN,
        ranks: Shards | None = None,
    ) -> None:
        self._pool = WorkerPool(pool)
        self._place = self._pool.place(make_engine)
        self._request = attach_request(model, self._pool, shard, computing, ranks)
        self._grace_s = RANKS_GRACE_S if self._request.ranks else RESTORE_GRACE_S
        self._requests = itertools.count(1)
        self._attachment: Attachment | None = None
        self._lost: list[Attachment] = []
        self._former = ""
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._closed = False
        self._link = Link(settings, self._prepare, self._on_lost)
        self._calls = WorkerCalls(self._link, call_timeout_s)
        try:
            self._link.start(required=required)
        except BaseException:
            self.close()
            raise

    @property
    def attached(self) -> bool:
        """Whether the daemon takes calls at present."""
        return self._link.connected

    @property
    def detail(self) -> str:
        """Why it does not, or did not the last time."""
        return self._link.reason

    # --- serving calls ----------------------------------------------------------------------------------

    def park(
        self,
        conversation: str,
        tokens: Any,
        pages: Any,
        *,
        tenant: str = DEFAULT_TENANT,
        level: AskedLevel = "host",
        returns_in_s: Duration | None = None,
        keep_for_s: Duration | None = None,
        share: Literal["prefix", "conversation"] = "prefix",
        private_from: int = 0,
        extras: Sequence[tuple[int, bytes]] = (),
        fidelity: str = "exact",
        after: Front = NO_FRONT,
        codec: str = "",
        stop: str = "",
        timeout_s: Duration = 30.0,
        stream: Any = None,
        layer_events: Sequence[Any] = (),
    ) -> ParkHandle:
        """Store the KV of `tokens`, which lies in `pages`, under the conversation's name.

        tokens: all of them, as `keys.pack_tokens` takes them.  pages: page ids in order of position, one
        list or one for each layer group, or a Binding.  share, private_from: 'conversation' shares nothing
        from token private_from on.  extras: (position, digest) of LoRA, images, cache salts.  fidelity:
        'exact', or a lossy codec, 'fp8' or 'int8', at about half the bytes: what it stores answers only plans
        of the same fidelity, and the receipt tells the relative error.  after: a known front, whose tokens
        are not sent and not keyed again.  level: 'host', 'disk', or 'copies=2' to 'copies=4' for so many
        nodes in failure domains of their own that have it, in memory or on disk.  codec: lossless, for what
        of the conversation is written to disk from now on: 'raw', 'lz4', 'planes-lz4' or 'planes-zstd'; ''
        for what was asked before, or else what the tenant or the node has.  stop: why the output ended,
        'end_turn' or 'tool_use': eviction by worth tells by it how soon the next turn comes.  timeout_s: for
        the asked level to be reached.

        stream: what writes the pages' KV: nothing is read before all that is queued there now has run.  A
        torch or cupy stream, a handle, what `mark` gave, or None for the caller's current stream of the
        pool's device; neither the caller nor the stream waits.  layer_events: instead of it, one event for
        each layer of the pool, recorded already, after which the layer's pages may be read: the park begins
        with layer 0 while the last layers are still computed.  What `mark` gives, or torch's or cupy's own.

        The pages must not change before `released` is set on what is returned.  Raises ConfigError,
        TokensError, GeometryError, MessageTooLarge: before anything is sent, or as the node refuses it;
        TierUnavailable when the GPU is lost.
        """
        limit_s = seconds("timeout_s", timeout_s)
        one_of("level", level, ASKED_LEVELS)
        one_of("share", share, SHARES)
        if codec:
            one_of("codec", codec, CODECS)
        names = (name("conversation", conversation), name("tenant", tenant))
        packed, count = pack(tokens, after)
        binding = self._bound(pages, count)
        order = self._order_of(stream, layer_events)
        attachment = self._attachment
        use = ParkUse(
            next(self._requests),
            binding,
            limit_s=time.monotonic() + limit_s + PARK_GRACE_S,
            copies_here=copies_here(attachment),
            names=names,
            level=level,
        )
        use.order = order
        message = Park(
            worker="" if attachment is None else attachment.worker,
            request=use.request,
            conversation=conversation,
            tenant=tenant,
            tokens=packed,
            after_key=after.key,
            after_tokens=after.tokens,
            extras=extras_list(extras),
            held_from=list(binding.bases),
            level=level,
            share=share,
            private_from=private_from,
            fidelity=name("fidelity", fidelity),
            returns_in_s=optional_seconds("returns_in_s", returns_in_s),
            keep_for_s=optional_seconds("keep_for_s", keep_for_s),
            timeout_s=limit_s,
            pages=[] if use.copies_here else page_bytes(binding),
            codec=codec,
            stop=stop,
            events=[] if use.copies_here else self._pool.event_numbers(order),
        )
        self._calls.begin(attachment, use, (message, ParkStarted), self._calls.timeout_s)
        return ParkHandle(use, lambda: cancel(attachment, use))

    def plan(
        self,
        conversation: str | None,
        tokens: Any,
        *,
        tenant: str = DEFAULT_TENANT,
        extras: Sequence[tuple[int, bytes]] = (),
        fidelity: str = "exact",
        after: Front = NO_FRONT,
        lease_s: Duration = 10.0,
        timeout_s: Duration | None = None,
        deadline_s: Duration | None = None,
        takes: Literal["all_or_nothing", "fronts", "both"] = "fronts",
        waiting: int = 0,
        prefill_wait_s: Duration = 0.0,
        most_tokens: int | None = None,
        by_layer: bool = False,
    ) -> WorkerPlan:
        """What of `tokens` is stored, and how to bring it back; what it names is held for lease_s.

        conversation: None looks up by prefix alone.  fidelity: that it was parked at.  after: a front found
        before, to look on from there.  For a node that weighs loading against computing: deadline_s, when all
        that is loaded must be there, from now; takes, what the engine can use: all that is stored or nothing,
        any front, or also computing the front while the rest is loaded; waiting, requests in its prefill
        queue; prefill_wait_s, until it could begin to compute this one.  most_tokens: no more than these are
        loaded: what ranks at several nodes have agreed on.  by_layer: it is going to be restored so, and a
        deadline would leave nothing of what it cuts off: nothing is planned that may be late.  With `ranks`
        the plan is one for all of them, and names what every one has; the others `join` it.
        Give a plan that will not be restored to `drop`.  Raises ConfigError, TokensError, MessageTooLarge.
        """
        known = "" if conversation is None else name("conversation", conversation)
        packed, count = pack(tokens, after)
        attachment = self._attachment
        message = MakePlan(
            worker="" if attachment is None else attachment.worker,
            conversation=known,
            tenant=name("tenant", tenant),
            tokens=packed,
            after_key=after.key,
            after_tokens=after.tokens,
            extras=extras_list(extras),
            fidelity=name("fidelity", fidelity),
            lease_s=seconds("lease_s", lease_s),
            deadline_s=optional_seconds("deadline_s", deadline_s),
            takes=takes,
            waiting=waiting,
            prefill_wait_s=seconds("prefill_wait_s", prefill_wait_s),
            most_tokens=most_tokens,
            by_layer=by_layer,
        )
        one_of("takes", takes, TAKES)
        limit_s = self._calls.timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)
        try:
            return self._planned(message, attachment, limit_s)
        except DaemonNotFound as error:
            everything = (TokenRange(0, count, "compute"),)
            return WorkerPlan(
                "", known, tenant, count, everything, reason="daemon_unavailable", detail=str(error)
            )

    def join(self, plan_id: str) -> WorkerPlan:
        """The plan that another rank made for all, for this one's part of it: give it to `restore`.

        plan_id: of that plan, as the ranks tell each other.  A plan that has ended, or is for other ranks,
        loads nothing, with reason 'lease_expired'.  Raises ConfigError.
        """
        attachment = self._attachment
        worker = "" if attachment is None else attachment.worker
        message = JoinPlan(worker=worker, plan_id=name("plan_id", plan_id))
        try:
            return self._planned(message, attachment, self._calls.timeout_s)
        except DaemonNotFound as error:
            return WorkerPlan("", "", "", 0, (), reason="daemon_unavailable", detail=str(error))

    def _planned(
        self, message: MakePlan | JoinPlan, attachment: Attachment | None, limit_s: float
    ) -> WorkerPlan:
        if attachment is None:
            raise DaemonNotFound(self._link.reason or "not attached")
        answer = self._calls.exchange(self._link.prepare(message), attachment, limit_s, Planned)
        return WorkerPlan.of(answer, attachment.era)

    def restore(
        self, plan: WorkerPlan, pages: Any, *, deadline_s: Duration, stream: Any = None
    ) -> RestoreReceipt:
        """Carry out a plan. deadline_s: from now; what comes later is cut off: compute it.

        stream: what used the pages last: nothing is written before all that is queued there now has run; see
        `park`.  Returns once no copy into the pages is queued or running, or names the pages for which that
        cannot be proven as `busy` (page 0 stands for all of a contiguous cache).  Raises ConfigError,
        GeometryError; TierUnavailable when the GPU is lost.
        """
        return self.restore_async(plan, pages, deadline_s=deadline_s, stream=stream).result()

    def restore_async(
        self,
        plan: WorkerPlan,
        pages: Any,
        *,
        deadline_s: Duration,
        stream: Any = None,
        by_layer: bool = False,
    ) -> RestoreHandle:
        """Like `restore`, but returns once it is under way. The pages belong to it until it is done.

        by_layer: bring layer 0 first, then the next, over all tokens at once, for who waits for the handle's
        layers.  The deadline then cuts off all or nothing of what is in host memory.
        """
        limit_s = seconds("deadline_s", deadline_s)
        binding = self._bound(pages, plan.load_tokens)
        layers = self._pool.layer_events(self._place)
        order = CopyOrder(self._place.after(stream), layers=layers, by_layer=by_layer)
        attachment = self._attachment
        use = RestoreUse(
            next(self._requests),
            binding,
            limit_s=time.monotonic() + limit_s + self._grace_s,
            copies_here=copies_here(attachment),
            plan=plan,
        )
        use.order = order
        handle = RestoreHandle(use, lambda: cancel(attachment, use), layers)
        if not plan.plan_id:
            use.said_done(missed(plan, plan.reason or "no_match", plan.detail))
            return handle
        if attachment is not None and attachment.era != plan.era:
            use.said_done(missed(plan, "lease_expired", "the daemon was lost since the plan was made"))
            return handle
        message = Restore(
            worker="" if attachment is None else attachment.worker,
            request=use.request,
            plan_id=plan.plan_id,
            deadline_s=limit_s,
            by_layer=by_layer,
            layers=by_layer and not use.copies_here,
            events=[] if use.copies_here else self._pool.event_numbers(order),
            pages=[] if use.copies_here else page_bytes(binding),
        )
        patience_s = min(self._calls.timeout_s, limit_s + RESTORE_GRACE_S)
        self._calls.begin(attachment, use, (message, RestoreStarted), patience_s)
        return handle

    def mark(self, stream: Any = None) -> StreamEvent:
        """An event for all that is queued on a stream so far, for `park(..., layer_events=...)`.

        stream: as in `park`.  Set at once for a pool in host memory.  Raises GeometryError, also while the
        stream is captured into a graph; TierUnavailable.
        """
        return self._place.after(stream)

    def drop(self, plan: WorkerPlan) -> None:
        """The plan will not be used: what it holds is let go, in the background."""
        self._link.check_process()
        if plan.plan_id:
            self._link.post(DropPlan(plan_id=plan.plan_id), plan.era)

    def prefilled(self, tokens: int, seconds: float, *, past: int = 0) -> None:
        """Tell, in the background, that computing `tokens` tokens after `past` in the cache took so long.

        From these the node learns when computing is sooner than loading. seconds: of the device, without the
        time in a queue. Of batches of several requests none need be told.
        """
        self._link.check_process()
        attachment = self._attachment
        if attachment is not None and tokens > 0 and past >= 0 and seconds > 0:
            message = Prefilled(worker=attachment.worker, past=past, tokens=tokens, seconds=float(seconds))
            self._link.post(message, attachment.era)

    # --- its end ----------------------------------------------------------------------------------------

    def close(self, wait_s: Duration = QUIET_S) -> None:
        """Detach. Parks get up to wait_s until their pages are released, then all copies are cancelled.

        Afterwards nothing of the daemon's memory is mapped and no thread is left; again is no error.  Raises
        KvtierError when a copy does not end: the memory then stays mapped, since it is still in use.
        """
        limit_s = time.monotonic() + seconds("wait_s", wait_s)
        if os.getpid() != self._process:
            self._link.close()
            return
        self._closed = True
        attachment = self._attachment
        if attachment is not None:
            for use in attachment.agent.uses:
                if isinstance(use, ParkUse) and self._link.connected:
                    use.released.wait(max(0.0, limit_s - time.monotonic()))
            attachment.stop("cancelled", "the worker was closed")
            if attachment.quiet(QUIET_S) and self._link.connected:
                self._detach(attachment)
        self._link.close()
        self._retire()
        if self._lost:
            raise KvtierError("a copy of this worker does not end", fix="end the process")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mapping(self, era: int) -> Mapping | None:
        """How the daemon comes to map the pool, where it shall."""
        mapped = self._pool.mapped
        if mapped is None:
            return None

        def refused(why: str) -> bool:
            self._pool.copy_here()
            if not self._link.fail(era, DaemonNotFound(f"the daemon cannot map the pool: {why}")):
                return False
            log.warning("the daemon cannot map the pool, so this process copies: %s", why)
            return True

        return Mapping(mapped, refused)

    def _bound(self, pages: Any, tokens: int) -> Binding:
        binding = self._pool.bind(pages, tokens)
        self._pool.check_place(binding, self._place)
        return binding

    def _order_of(self, stream: Any, layer_events: Sequence[Any]) -> CopyOrder:
        """What a park comes after. Raises GeometryError."""
        if not len(layer_events):
            return CopyOrder(self._place.after(stream))
        self._pool.check_layers(len(layer_events), stream)
        return CopyOrder(after_layers=tuple(self._place.event(event) for event in layer_events))

    def _detach(self, attachment: Attachment) -> None:
        try:
            self._link.call(Detach(worker=attachment.worker), Done, DETACH_S)
        except KvtierError:
            # The node then learns of the end from the closed sockets and the process.
            return

    # --- attaching --------------------------------------------------------------------------------------

    def _prepare(self, channel: Channel, era: int) -> None:
        """Attach over a new connection, once nothing of the one before is in use."""
        self._retire()
        if self._lost:
            raise DaemonNotFound("copies of the lost connection still run")
        if self._closed:
            raise DaemonNotFound("the worker is closed")
        message = shown(self._request, self._pool, self._place)
        request = (msgspec.structs.replace(message, replaces=self._former), self._pool.fds)
        self._attachment = attach(self._link, channel, era, request, (self._place, self._mapping(era)))
        self._former = ""

    def _retire(self) -> None:
        """Give back what earlier attachments hold, as far as no copy uses it."""
        with self._lock:
            if self._attachment is not None:
                self._lost.append(self._attachment)
                self._attachment = None
            for attachment in list(self._lost):
                attachment.stop("daemon_unavailable", self._link.reason)
                if attachment.quiet(QUIET_S):
                    attachment.close()
                    self._lost.remove(attachment)
                    self._former = attachment.worker

    def _on_lost(self, error: KvtierError) -> None:
        attachment = self._attachment
        if attachment is not None:
            attachment.stop("daemon_unavailable", str(error))
