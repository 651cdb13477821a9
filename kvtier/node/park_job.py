"""What is known of one park under way."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from kvtier.messages.calls import Park
from kvtier.node.blocks import ConversationId, Private, Stored
from kvtier.node.conversations import Conversation, Head
from kvtier.node.copies import CopyJob
from kvtier.node.lookup import Query
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.receipts import Level, ParkReceipt, Reason


@dataclass(slots=True, eq=False)
class ParkAct:
    """The parks of the same tokens by several ranks.

    slices: that make the whole.  jobs: of the ranks that have come and are not over.  others: held for those
    slices, `covered`, that no such job holds.  whole: every slice is there.  lost: why it will not be, in
    words.  head, replaces, conversation: as of ParkJob.  recording, recorded: the record is on its way to
    disk, or there.  reached: level that a job will get no further than.  over: all its jobs end now.
    """

    id: str
    key: tuple[ConversationId, tuple[str, ...], bytes]
    slices: tuple[str, ...]
    jobs: list[ParkJob] = field(default_factory=list)
    others: list[Stored] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    whole: bool = False
    lost: str = ""
    head: Head | None = None
    replaces: set[bytes] = field(default_factory=set)
    conversation: Conversation | None = None
    recording: bool = False
    recorded: bool = False
    reached: dict[str, Level] = field(default_factory=dict)
    over: bool = False


@dataclass(slots=True)
class ParkJob(CopyJob):
    """One park. metas: all objects that it needs stored, in token order; todo: those not known to be.

    nbytes, disk_nbytes: of all metas, in host memory and on disk.  rounds: how often
    others took something before all was there.  held: entries that the job keeps from leaving the disk.
    wish: the question for copies at other nodes, '' when it was not put; copies: tier by node, once they are
    known; short: why there are fewer than were asked for.  head: the conversation's new end.  replaces: keys
    of blocks where earlier ends are continued by this park.  failure: why nothing will be kept.  lowered: why
    disk will not be reached.  retry_after_s: when that may be otherwise, where it is known.  ready: all of
    its own is in host memory; gathered: so is what its other ranks park.  durable: its own is on disk.
    recorded: the conversation's record is on disk.  error_squares, value_squares: what a lossy codec lost,
    and of what, summed up.
    """

    message: Park = field(kw_only=True)
    root: Root = field(kw_only=True)
    query: Query = field(kw_only=True)
    private: Private | None = field(kw_only=True)
    metas: list[ObjectMeta] = field(kw_only=True)
    started_s: float = field(kw_only=True)
    todo: deque[ObjectMeta] = field(kw_only=True)
    nbytes: int = field(kw_only=True)
    disk_nbytes: int = field(kw_only=True)
    rounds: int = 0
    held: dict[ObjectId, Stored] = field(default_factory=dict)
    head: Head | None = None
    replaces: set[bytes] = field(default_factory=set)
    waiting_since_s: float | None = None
    released: bool = False
    ready: bool = False
    gathered: bool = False
    durable: bool = False
    act: ParkAct | None = None
    writes_running: int = 0
    recorded: bool = False
    objects_stored: int = 0
    bytes_stored: int = 0
    error_squares: float = 0.0
    value_squares: float = 0.0
    failure: tuple[Reason, str] | None = None
    lowered: tuple[Reason, str] | None = None
    retry_after_s: float | None = None
    conversation: Conversation | None = None
    wish: str = ""
    copies: dict[str, str] | None = None
    short: tuple[Reason, str] | None = None

    @property
    def others(self) -> int:
        """How many other nodes are to have it."""
        _, _, count = self.message.level.partition("copies=")
        return int(count) - 1 if count else 0

    @property
    def slices(self) -> int:
        """How many parts like this one make the whole."""
        return len(self.act.slices) if self.act is not None else 1

    @property
    def name(self) -> ConversationId:
        """(tenant, conversation)."""
        return (self.message.tenant, self.message.conversation)

    def receipt(self, level: Level, cost_per_hour: float | None = None) -> ParkReceipt:
        """What became of it. cost_per_hour: of keeping the conversation where it lies now."""
        reason, detail = self.failure or self.short or self.lowered or ("", "")
        kept = level != "none"
        return ParkReceipt(
            conversation=self.message.conversation,
            tenant=self.message.tenant,
            level=level,
            requested=self.message.level,
            released=self.released,
            tokens=self.query.end if kept else 0,
            objects_stored=self.objects_stored,
            objects_shared=max(0, len(self.metas) - self.objects_stored) if kept else 0,
            bytes_stored=self.bytes_stored,
            relative_error=math.sqrt(self.error_squares / self.value_squares) if self.value_squares else 0.0,
            version=self.conversation.version if self.conversation else 0,
            reason=reason,
            detail=detail,
            retry_after_s=self.retry_after_s,
            copies=self.copies or {},
            cost_per_hour=cost_per_hour,
        )
