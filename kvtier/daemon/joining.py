"""How a tier service joins its node: handshake, greeting, and the node's host memory."""

from __future__ import annotations

import time
from typing import Literal

from kvtier.errors import ProtocolError
from kvtier.host.arena import ArenaView
from kvtier.messages.tiers import Arenas, TierHello
from kvtier.messages.wire import Channel, close_all, hello


def join_node(
    path: str, role: Literal["disk", "gpu"], greeting: TierHello, timeout_s: float
) -> tuple[Channel, ArenaView, Arenas]:
    """Connect, and map the arenas; both are the caller's. Also what the node said of itself with them.

    Raises KvtierError, OSError.
    """
    deadline_s = time.monotonic() + timeout_s
    channel = Channel.open(path, hello(role), deadline_s)
    try:
        channel.send(greeting, deadline_s)
        message, fds = channel.recv(deadline_s)
        try:
            if not isinstance(message, Arenas):
                raise ProtocolError(f"the node sent {type(message).__name__} instead of its arenas")
            return channel, ArenaView.shared(fds, message.arena_bytes, message.generation_slots), message
        finally:
            close_all(fds)
    except BaseException:
        channel.close()
        raise
