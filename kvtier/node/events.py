"""What reaches the core, and what it answers. Peers are named by strings that the shell gives out:

'client:N' and 'events:N' are connections of that role; 'disk' and 'gpu' are the tier services; a worker's
own name is 'worker:N'.  A Send to a worker goes out on its events connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvtier.messages.calls import Message


@dataclass(frozen=True, slots=True)
class Received:
    """A message from a peer, after its handshake."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Left:
    """The peer's connection is closed. Proves nothing about copies in its process."""

    peer: str


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """The process behind the peer is gone: none of its copies runs any more."""

    peer: str


@dataclass(frozen=True, slots=True)
class EventsJoined:
    """A worker's events connection is open. pid: of its process, as the kernel says; 0 where unknown."""

    worker: str
    pid: int = 0


@dataclass(frozen=True, slots=True)
class ArenaGrew:
    """Host memory is faulted in up to here: the tier has more room."""

    sub_arena: int
    ready_bytes: int


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the policies had learned before the node's start, by name."""

    sections: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Stimulus: TypeAlias = Received | Left | ProcessEnded | EventsJoined | ArenaGrew | Remembered | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message. fds: which descriptors go with it."""

    peer: str
    message: Message
    fds: Literal["", "arenas", "pool"] = ""
