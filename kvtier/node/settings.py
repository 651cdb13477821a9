"""The numbers that the core works with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Settings of one node's core.

    batch_bytes: copies are asked for in batches of at most this, so that the end of each is soon.
    batches_in_flight: batches of one job that run at once.  plan_lease_s: longest a plan may hold blocks.
    copy_lease_s: time that a copy has before its right to a slot ends.  quiet_grace_s: how long after its
    deadline a restore waits for batches that still run.  wait_for_park_s: how long a plan waits for a
    park of the same conversation.  verify: check the sums again on the way from host memory to a pool.
    max_heads: branches that one conversation keeps.  disk_expected: whether the node is ready only with a
    disk tier.
    """

    node: str = "local"
    batch_bytes: int = 256 << 20
    batches_in_flight: int = 2
    plan_lease_s: float = 30.0
    copy_lease_s: float = 10.0
    quiet_grace_s: float = 1.0
    wait_for_park_s: float = 0.5
    verify: bool = True
    max_heads: int = 16
    software: str = ""
    disk_expected: bool = True
