"""Ranks of one model at a rig: what all of them ask for, and what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtier.geometry import Geometry
from kvtier.messages.calls import JoinPlan, Planned
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import drain, problems
from kvtier.testing.rig_uses import PLAIN, RigPark, RigRestore, RigWorker

PAIR = ("L0+2.H0+1", "L0+2.H1+1")


def ranks_of(
    rig: CoreRig, shards: Sequence[str] = PAIR, geometries: Sequence[Geometry] = (), **how: Any
) -> list[RigWorker]:
    """A worker for each shard. geometries: of each; by default PLAIN."""
    shapes = [*geometries, *[PLAIN] * len(shards)]
    return [
        rig.attach(shape, shard=shard, ranks=list(shards), **how)
        for shape, shard in zip(shapes, shards, strict=False)
    ]


def park_all(rig: CoreRig, ranks: Sequence[RigWorker], tokens: int = 10, **how: Any) -> list[RigPark]:
    """All of them park the conversation 'chat', to its end."""
    parks = [rig.park(rank, "chat", range(tokens), **how) for rank in ranks]
    rig.run()
    return parks


def resume_all(
    rig: CoreRig, ranks: Sequence[RigWorker], tokens: int = 12, **how: Any
) -> tuple[Planned, list[RigRestore]]:
    """The first one plans, all join, and begin to restore."""
    planned = rig.plan(ranks[0], "chat", range(tokens), **how)
    joined = [rig.ask(JoinPlan(worker=rank.name, plan_id=planned.plan.plan_id), rank.peer) for rank in ranks]
    assert all(one.plan == planned.plan for one in joined)
    uses = [rig.restore(rank, one, range(tokens)) for rank, one in zip(ranks, joined, strict=True)]
    return planned, uses


def tokens_of(uses: Sequence[RigRestore]) -> list[int]:
    """What each receipt says to be in place."""
    return [use.receipt.tokens for use in uses]


def levels(uses: Sequence[RigPark]) -> list[tuple[str, str]]:
    """Level and reason of each receipt."""
    return [(use.receipt.level, use.receipt.reason) for use in uses]


def at_rest(rig: CoreRig, *, died: bool = False) -> None:
    """Let everything end, and see that nothing is wrong. died: who did has parks without a receipt."""
    drain(rig)
    found = problems(rig)
    if died:
        found = [problem for problem in found if "receipts for" not in problem]
    assert found == []
