"""What is known of one park under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvtier.messages import Park
from kvtier.node.blocks import ConversationId
from kvtier.node.conversations import Conversation
from kvtier.node.copies import CopyJob
from kvtier.node.lookup import Query
from kvtier.objects import ObjectMeta, Root
from kvtier.receipts import Level, ParkReceipt, Reason


@dataclass(slots=True)
class ParkJob(CopyJob):
    """One park. metas: all objects that it needs stored, in token order; todo: those not known to be.

    failure: why nothing will be kept.  lowered: why disk will not be reached.  gathered: everything is in
    host memory.  written: the last write that it waits for has been asked for.
    """

    message: Park = field(kw_only=True)
    root: Root = field(kw_only=True)
    query: Query = field(kw_only=True)
    private: tuple[int, bytes] | None = field(kw_only=True)
    metas: list[ObjectMeta] = field(kw_only=True)
    started_s: float = field(kw_only=True)
    todo: deque[ObjectMeta] = field(kw_only=True)
    waiting_since_s: float | None = None
    released: bool = False
    gathered: bool = False
    writes_running: int = 0
    recorded: bool = False
    objects_stored: int = 0
    bytes_stored: int = 0
    failure: tuple[Reason, str] | None = None
    lowered: tuple[Reason, str] | None = None
    conversation: Conversation | None = None

    @property
    def name(self) -> ConversationId:
        """(tenant, conversation)."""
        return (self.message.tenant, self.message.conversation)

    def receipt(self, level: Level, retry_after_s: float | None) -> ParkReceipt:
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
            objects_shared=len(self.metas) - self.objects_stored if kept else 0,
            bytes_stored=self.bytes_stored,
            version=self.conversation.version if self.conversation else 0,
            reason=reason,
            detail=detail,
            retry_after_s=retry_after_s,
        )
