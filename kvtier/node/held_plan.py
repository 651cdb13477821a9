"""A plan that was answered, and what it keeps from leaving until it is restored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvtier.geometry import Geometry
from kvtier.messages.calls import Planned
from kvtier.node.blocks import Block
from kvtier.node.choosing import Chosen
from kvtier.node.coverage import Piece
from kvtier.node.elsewhere import Remotes
from kvtier.node.ranks import Slices
from kvtier.node.state import Worker
from kvtier.receipts import Plan


@dataclass(slots=True, eq=False)
class SharedPlan:
    """One plan of several ranks, of which each restores its part.

    worker: that made it.  answer: what it was told.  left: shards of the parts that no rank has taken, by the
    parts' ids.  took: names of the workers that have taken theirs.  lost: why the whole cannot be restored
    any more, in words; '' while it can.
    """

    plan_id: str
    worker: Worker
    answer: Planned
    left: dict[str, str] = field(default_factory=dict)
    took: set[str] = field(default_factory=set)
    lost: str = ""

    def part_of(self, worker: Worker) -> str:
        """The id of the part that a rank may take; '' for none, also once it has one."""
        if self.lost or worker.name in self.took:
            return ""
        return next((part for part, whose in self.left.items() if whose == worker.shard), "")


@dataclass(frozen=True, slots=True)
class HeldPlan:
    """A plan, and the pieces that it holds in host memory and pins on disk.

    blocks: in order; all of them, also those that are not loaded.  chosen: what the policy said.
    remotes: by shard, the node that has those pieces whose source is 'peer'.  shared: the plan that this is
    one rank's part of; plan.plan_id is the part's own id then, and the pieces are those of `shard`.
    """

    plan: Plan
    worker: Worker
    shard: str
    geometry: Geometry
    blocks: tuple[Block, ...]
    pieces: tuple[Piece, ...]
    until_s: float
    chosen: Chosen
    remotes: Remotes = field(default_factory=dict)
    shared: SharedPlan | None = None

    def parts(self, slices: Slices, answer: Planned) -> list[HeldPlan]:
        """What is held for each rank: of a worker without others, itself."""
        if not self.worker.ranks:
            return [self]
        shared = SharedPlan(self.plan.plan_id, self.worker, answer)
        parts: list[HeldPlan] = []
        for rank, shard in enumerate(self.worker.ranks):
            part = f"{self.plan.plan_id}/{rank}"
            shared.left[part] = shard
            own = replace(
                self,
                plan=replace(self.plan, plan_id=part),
                shard=shard,
                geometry=slices[shard] or self.geometry,
                pieces=tuple(piece for piece in self.pieces if piece.stored.meta.object_id.shard == shard),
                shared=shared,
            )
            parts.append(own)
        return parts
