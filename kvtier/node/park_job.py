"""What is known of one park under way."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from kvtier.messages import Park
from kvtier.node.blocks import ConversationId, Private, Stored
from kvtier.node.conversations import Conversation, Head
from kvtier.node.copies import CopyJob
from kvtier.node.lookup import Query
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.receipts import Level, ParkReceipt, Reason


@dataclass(slots=True)
class ParkJob(CopyJob):
    """One park. metas: all objects that it needs stored, in token order; todo: those not known to be.

    nbytes, disk_nbytes: of all metas, in host memory and on disk.  rounds: how often
    others took something before all was there.  held: entries that the job keeps from leaving the disk.
    head: the conversation's new end.  replaces: keys of blocks where earlier ends are continued by this park.
    failure: why nothing will be kept.  lowered: why disk will not be reached.  retry_after_s: when that may
    be otherwise, where it is known.  gathered: everything is in host memory.  recorded: the conversation's
    record is on disk.  error_squares, value_squares: what a lossy codec lost, and of what, summed up.
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
    gathered: bool = False
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

    @property
    def name(self) -> ConversationId:
        """(tenant, conversation)."""
        return (self.message.tenant, self.message.conversation)

    def receipt(self, level: Level) -> ParkReceipt:
        """What became of it."""
        reason, detail = self.failure or self.lowered or ("", "")
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
        )
