"""What the demo does, in which order, and what is written down of it. Pure.

A round is one turn of every conversation, in one process of its own.  Rounds alternate in direction, so
that those who spoke last speak first: some of them are still in host memory.  The daemon is killed between
the second and the third round, so the third finds everything on disk only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from kvtier.cli.demo.texts import Conversation, Share

NEW_TOKENS = 16
BLOCK_TOKENS = 64
HOST_BYTES = 96 << 20
DISK_BYTES = 4 << 30
KILL_BEFORE_ROUND = 2

Source = Literal["host", "disk", "both", "none"]


class TurnJob(msgspec.Struct, frozen=True):
    """One turn to serve. before: the transcript's ids, empty in the first round; message: ids to add."""

    conversation: str
    round: int
    share: Share
    before: list[int]
    message: list[int]

    @property
    def name(self) -> str:
        """Of the turn's files."""
        return f"{self.round}-{self.conversation}"


class TurnRecord(msgspec.Struct, frozen=True, tag="turn"):
    """What became of a turn. reply: new ids.  sources: restored tokens by tier."""

    conversation: str
    round: int
    reply: list[int]
    restored_tokens: int
    sources: dict[str, int]
    restored_bytes: int
    restore_s: float
    ttft_s: float
    reason: str
    park_level: str
    park_reason: str
    cache_bytes: int


class Usage(msgspec.Struct, frozen=True):
    """Bytes in use of a tier, and its capacity."""

    used_bytes: int
    capacity_bytes: int


class RoundJob(msgspec.Struct, frozen=True):
    """For a serving process.

    socket: the daemon's; '' runs one with these settings inside the process.  kill_self: end with kill -9.
    device: what runs the model: 'cpu', 'cuda:0', or 'auto' for a GPU where torch finds one.
    """

    model: str
    threads: int
    device: str
    socket: str
    settings: dict[str, str | int]
    turns: list[TurnJob]
    logits: str
    kill_self: bool


class ReferenceJob(msgspec.Struct, frozen=True):
    """For the process that never meets the daemon: the same turns, and what the served ones restored."""

    model: str
    threads: int
    device: str
    turns: list[TurnJob]
    records: list[TurnRecord]
    logits: str


class MakeJob(msgspec.Struct, frozen=True):
    """For the process that makes the model."""

    model: str
    seed: int


class ReferenceRecord(msgspec.Struct, frozen=True, tag="reference"):
    """The reference of a turn: its new ids; error: why there is none."""

    conversation: str
    round: int
    reply: list[int]
    error: str = ""


class Recomputed(msgspec.Struct, frozen=True, tag="recomputed"):
    """Time to first token of a turn whose whole sequence was computed."""

    conversation: str
    round: int
    ttft_s: float


class RoundEnd(msgspec.Struct, frozen=True, tag="end"):
    """Last word of a serving process: what is in each tier. place: what copied where, as status names it."""

    tiers: dict[str, Usage]
    place: str = ""


@dataclass(slots=True)
class Transcripts:
    """Every conversation's ids so far."""

    conversations: Sequence[Conversation]
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def heard(self, job: TurnJob, reply: Sequence[int]) -> None:
        """Add a turn."""
        self.tokens[job.conversation] = [*job.before, *job.message, *reply]


def rounds_of(conversations: Sequence[Conversation]) -> int:
    """How many rounds there are: the longest conversation's messages."""
    return max(len(conversation.messages) for conversation in conversations)


def order_of(conversations: Sequence[Conversation], number: int) -> list[Conversation]:
    """Who speaks in a round, in order."""
    speaking = [c for c in conversations if len(c.messages) > number]
    return speaking[::-1] if number % 2 else speaking


def source_of(record: TurnRecord) -> Source:
    """Where the turn's restored KV came from."""
    used = [tier for tier in ("host", "disk") if record.sources.get(tier, 0)]
    if len(used) == 1:
        return "host" if used[0] == "host" else "disk"
    return "both" if used else "none"
