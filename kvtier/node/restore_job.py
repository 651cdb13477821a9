"""What is known of one restore under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvtier.node.copies import CopyJob, Pair
from kvtier.node.coverage import Piece
from kvtier.node.held_plan import HeldPlan
from kvtier.objects import ObjectId
from kvtier.receipts import Reason


@dataclass(slots=True)
class RestoreJob(CopyJob):
    """One restore. to_read: on disk; to_pull: at another node; to_copy: in host memory; reading: reads that
    have not ended.

    tried_again: objects whose first copy was wrong.  sources: of each object that has not arrived.  left: how
    many those are by source; arrived_s: when the last one of a source did.  by_layer: copy in one batch.
    ended: nothing more of it comes; its receipt goes out with those of the plan's other ranks.
    """

    held: HeldPlan = field(kw_only=True)
    deadline_s: float = field(kw_only=True)
    started_s: float = field(kw_only=True)
    by_layer: bool = False
    to_read: deque[Piece] = field(default_factory=deque)
    to_pull: deque[Piece] = field(default_factory=deque)
    to_copy: deque[Pair] = field(default_factory=deque)
    reading: int = 0
    copied: set[ObjectId] = field(default_factory=set)
    copied_bytes: int = 0
    read_s: float = 0.0
    copy_s: float = 0.0
    tried_again: set[ObjectId] = field(default_factory=set)
    sources: dict[ObjectId, str] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    arrived_s: dict[str, float] = field(default_factory=dict)
    reason: Reason = ""
    detail: str = ""
    ended: bool = False
