"""The client of a node's daemon: `connect()`, and everything that is not one worker's park or restore."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

from kvtier.arguments import DEFAULT_TENANT, Duration, name, optional_seconds, seconds
from kvtier.breaker import Backoff
from kvtier.client.attachment import MakeEngine
from kvtier.client.link import DEFAULT_BACKOFF, Link, LinkSettings
from kvtier.client.shards import Shards
from kvtier.client.worker import CALL_TIMEOUT_S, Worker
from kvtier.client.worker_inputs import Computing, ModelIdentity
from kvtier.explanation import Explanation
from kvtier.messages.calls import (
    Conversations,
    Done,
    Explain,
    Explained,
    Forget,
    Forgotten,
    Hint,
    ListConversations,
    ListModels,
    Locate,
    Located,
    Models,
    Ping,
    Pong,
    Retire,
    Show,
    Status,
    StatusIs,
)
from kvtier.objects import Shard
from kvtier.paths import default_runtime_dir, node_socket
from kvtier.receipts import ConversationInfo, ForgetReceipt, ModelInfo, StatusReport

if TYPE_CHECKING:
    from kvtier.client.worker_inputs import AnyPool
    from kvtier.keys import Tokens

EMBEDDED = "embedded:"
TIMEOUT_S = 5.0
FORGET_TIMEOUT_S = 60.0
PAGE = 1000


class Embedded(Protocol):
    """A daemon inside this process."""

    @property
    def socket_path(self) -> str | Path:
        """Of its node."""

    def close(self) -> None:
        """End it."""


def connect(
    path: str | Path | None = None,
    *,
    token_file: str | Path | None = None,
    timeout_s: Duration = TIMEOUT_S,
    required: bool = True,
    backoff: Backoff = DEFAULT_BACKOFF,
) -> Client:
    """Connect to this node's daemon.

    path: of its socket; by default where `kvtier up` makes it.  'embedded:' runs everything in this process,
    without Ray, until the client is closed.  token_file: for users who are not on the daemon's list.
    timeout_s: for each call, when it says nothing else.  required=False: succeed also without the daemon,
    and go on trying in the background.  backoff: between these attempts.

    Raises DaemonNotFound with the fix for what is at the path, AuthError, VersionMismatch, ConfigError.
    """
    limit_s = seconds("timeout_s", timeout_s)
    embedded: Embedded | None = None
    if path == EMBEDDED:
        embedded = cast("Embedded", importlib.import_module("kvtier.daemon.embedded").start())
        path = embedded.socket_path
    found = str(path or node_socket(default_runtime_dir()))
    settings = LinkSettings(found, token_file, limit_s, backoff)
    try:
        return Client(settings, required=required, embedded=embedded)
    except BaseException:
        if embedded is not None:
            embedded.close()
        raise


class Client:
    """Made by `connect`. All calls from any thread of the process that made it.

    When the daemon does not answer, calls raise DaemonNotFound: after timeout_s the first time, then at once
    until it is back.
    """

    def __init__(self, settings: LinkSettings, *, required: bool, embedded: Embedded | None = None) -> None:
        self._settings = settings
        self._required = required
        self._embedded = embedded
        self._link = Link(settings)
        try:
            self._link.start(required=required)
        except BaseException:
            self._link.close()
            raise

    @property
    def path(self) -> str:
        """Of the node's socket."""
        return self._settings.path

    @property
    def connected(self) -> bool:
        """Whether the daemon answered the last time."""
        return self._link.connected

    def attach(
        self,
        model: ModelIdentity,
        pool: AnyPool,
        *,
        shard: Shard,
        call_timeout_s: Duration = CALL_TIMEOUT_S,
        make_engine: MakeEngine | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        device: str = "",
        devices: int = 1,
        ranks: Shards | None = None,
    ) -> Worker:
        """Show the daemon this worker's KV memory, over connections of the worker's own.

        model: a Fingerprint.  pool: a Pool; a SharedPool, which the daemon maps and copies; or the layout of
        a contiguous cache.  shard: the slice that this rank holds.  call_timeout_s: for park, plan and
        restore to be answered.  make_engine: makes the copy engine from the slots' memory; by default the one
        for where the pool is, the CPU's or CUDA's.  config: the model's config.json, its folder or what it
        holds: with it, and what `prefilled` tells, the node weighs loading against computing.  device,
        devices: what computes, as its driver calls it (by default the pool's GPU), and how many together.

        ranks: the slices of all ranks at this node that serve the model together with this one: what they
        park and restore of a conversation is one act.

        Raises FingerprintError, GeometryError, ModelSpecError, TierUnavailable (a pool on a GPU without cupy,
        with the fix), DaemonNotFound (not with connect(required=False)).
        """
        return Worker(
            self._settings,
            model,
            pool,
            shard=shard,
            call_timeout_s=seconds("call_timeout_s", call_timeout_s),
            make_engine=make_engine,
            required=self._required,
            computing=Computing.of(config, device, devices),
            ranks=ranks,
        )

    def ping(self) -> None:
        """The empty call."""
        self._link.call(Ping(), Pong)

    def hint(
        self,
        conversation: str,
        *,
        tenant: str = DEFAULT_TENANT,
        returns_in_s: Duration | None = None,
        keep_for_s: Duration | None = None,
    ) -> None:
        """When the conversation is expected back, and how long from now it is worth keeping."""
        message = Hint(
            conversation=name("conversation", conversation),
            tenant=name("tenant", tenant),
            returns_in_s=optional_seconds("returns_in_s", returns_in_s),
            keep_for_s=optional_seconds("keep_for_s", keep_for_s),
        )
        self._link.call(message, Done)

    def locate(
        self, conversation: str, tokens: Tokens = (), *, tenant: str = DEFAULT_TENANT
    ) -> list[tuple[str, int, float]]:
        """(node, tokens held, expected seconds to the first token), the soonest first.

        Those seconds are of waiting, loading what is stored, pulling what another node has more of, and
        computing the rest; without the last where it is not known how fast workers compute, and 0.0 where
        nothing is known of a node's load.  Without a worker at this node, it is most tokens first.
        tokens: of the next turn: only what they begin with counts, where a worker is attached to this node.
        """
        # Only here: a client that names no tokens loads no numpy.
        from kvtier.keys import pack_tokens

        message = Locate(
            conversation=name("conversation", conversation),
            tenant=name("tenant", tenant),
            tokens=pack_tokens(tokens) if len(tokens) else b"",
        )
        return self._link.call(message, Located).nodes

    def forget(
        self, conversation: str, *, tenant: str = DEFAULT_TENANT, timeout_s: Duration = FORGET_TIMEOUT_S
    ) -> ForgetReceipt:
        """Erase the conversation, every branch of it; durable when this returns."""
        message = Forget(conversation=name("conversation", conversation), tenant=name("tenant", tenant))
        return self._link.call(message, Forgotten, seconds("timeout_s", timeout_s)).receipt

    def conversations(self, *, tenant: str = "") -> Iterator[ConversationInfo]:
        """Those parked here, in order of (tenant, conversation); '' for all tenants. Asked for in pages."""
        after: tuple[str, str] | None = None
        while True:
            page = self.conversations_page(tenant=tenant, after=after)
            yield from page.conversations
            if not (page.more and page.conversations):
                return
            last = page.conversations[-1]
            after = (last.tenant, last.conversation)

    def conversations_page(
        self, *, tenant: str = "", after: tuple[str, str] | None = None, limit: int = PAGE
    ) -> Conversations:
        """At most `limit` conversations that follow (tenant, conversation) `after`."""
        return self._link.call(ListConversations(tenant=tenant, after=after, limit=limit), Conversations)

    def show(self, conversation: str, *, tenant: str = DEFAULT_TENANT) -> ConversationInfo | None:
        """One conversation; None when it is not known here."""
        message = Show(conversation=name("conversation", conversation), tenant=name("tenant", tenant))
        return next(iter(self._link.call(message, Conversations).conversations), None)

    def explain(self, conversation: str, *, tenant: str = DEFAULT_TENANT) -> Explanation:
        """Where each part of the conversation lies, what it is worth there, and why it stays or goes."""
        message = Explain(conversation=name("conversation", conversation), tenant=name("tenant", tenant))
        return self._link.call(message, Explained).explanation

    def models(self) -> list[ModelInfo]:
        """Model fingerprints that are known here."""
        return self._link.call(ListModels(), Models).models

    def retire(self, fingerprint: str) -> ModelInfo:
        """KV of this model is worth nothing from now on, until a worker serves it again.

        fingerprint: as `models` has it, or the beginning of one that no other has.  Raises ProtocolError for
        one that is not known, is the beginning of several, or is served.
        """
        (retired,) = self._link.call(Retire(fingerprint=fingerprint), Models).models
        return retired

    def status(self) -> StatusReport:
        """The node, at this instant."""
        return self._link.call(Status(), StatusIs).report

    def close(self) -> None:
        """Close the connection, and end an embedded daemon. Workers are closed by themselves, before this."""
        self._link.close()
        if self._embedded is not None:
            self._embedded.close()
            self._embedded = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
