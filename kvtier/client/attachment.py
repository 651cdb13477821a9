"""What one successful Attach gives a worker: its name, the mapped arena, a copy engine and an agent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier.breaker import Backoff
from kvtier.client.agent import Agent, AgentPorts, Mapping
from kvtier.client.link import Link
from kvtier.errors import KvtierError, VersionMismatch
from kvtier.messages import protocol
from kvtier.messages.calls import Attach, Attached, Message, Mode
from kvtier.messages.wire import Channel, close_all, expect, hello
from kvtier.paths import gpu_socket
from kvtier.receipts import Reason

if TYPE_CHECKING:
    from kvtier.gpu.engine import CopyEngine, Place, SlotMemory
    from kvtier.host.arena import ArenaView

COPY_CONNECT_S = 0.25
MakeEngine = Callable[["SlotMemory"], "CopyEngine"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """era: of the connection that it was made over. engine, arena: None where another process copies."""

    worker: str
    mode: Mode
    era: int
    agent: Agent
    engine: CopyEngine | None
    arena: ArenaView | None

    def stop(self, reason: Reason, detail: str) -> None:
        """End all its uses. Does not wait."""
        self.agent.stop(reason, detail)

    def quiet(self, timeout_s: float) -> bool:
        """After `stop`: whether all copies ended within the time."""
        self.agent.join()
        return self.engine is None or self.engine.wait_idle(timeout_s)

    def close(self) -> None:
        """Once it is quiet: end the engine's threads and unmap the arena."""
        ended = self.engine is None or self.engine.close()
        if self.arena is not None and ended:
            self.arena.close()


def attach(
    link: Link,
    channel: Channel,
    era: int,
    request: tuple[Attach, Sequence[int]],
    copying: tuple[Place, Mapping | None],
) -> Attachment:
    """Attach over a fresh control connection.

    request: with the descriptors that go with it.  copying: what makes the engine, where copies run here, and
    how the daemon comes to map the pool, where it is on a GPU and the daemon copies.
    Raises what the node refuses it with, DaemonNotFound, ProtocolError, TierUnavailable for an arena that is
    not what it should be, OSError.
    """
    message, pool_fds = request
    deadline_s = time.monotonic() + link.settings.timeout_s
    answer, fds = channel.exchange(protocol.encode(message), message.id, deadline_s, pool_fds)
    arena: ArenaView | None = None
    engine: CopyEngine | None = None
    events: Channel | None = None
    try:
        attached = expect(answer, Attached, channel.path)
        if message.ranks and not attached.joins_ranks:
            raise VersionMismatch(
                "this node's kvtier does not make one act of what several ranks do",
                fix="install the worker's release at the node, or attach without ranks",
            )
        if attached.mode == "worker":
            arena = _map(fds, attached)
            engine = copying[0](arena)
        token = link.token()
        events = Channel.open(
            link.settings.path, hello("events", worker=attached.worker, token=token), deadline_s
        )
        agent = _agent(link, attached, events, engine, era, copying[1])
        agent.start()
    except BaseException:
        if events is not None:
            events.close()
        if engine is not None:
            engine.close()
        if arena is not None:
            arena.close()
        raise
    finally:
        close_all(fds)
    return Attachment(attached.worker, attached.mode, era, agent, engine, arena)


def _map(fds: Sequence[int], attached: Attached) -> ArenaView:
    from kvtier.host.arena import ArenaView

    return ArenaView.shared(fds, attached.arena_bytes, attached.generation_slots)


def _agent(
    link: Link,
    attached: Attached,
    events: Channel,
    engine: CopyEngine | None,
    era: int,
    mapping: Mapping | None,
) -> Agent:
    # The GPU service may come up after this; its socket is then at the usual place.
    path = attached.gpu_socket or str(gpu_socket(Path(link.settings.path).parent))

    def open_copy() -> Channel:
        greeting = hello("copy", worker=attached.worker, token=link.token())
        return Channel.open(path, greeting, time.monotonic() + COPY_CONNECT_S)

    def lost(error: KvtierError) -> None:
        link.fail(era, error)

    def post(message: Message) -> None:
        link.post(message, era)

    ports = AgentPorts(
        worker=attached.worker,
        events=events,
        engine=engine,
        open_copy=open_copy,
        mapping=mapping,
        lost=lost,
        post=post,
    )
    return Agent(ports, Backoff())
