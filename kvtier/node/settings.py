"""The numbers that the core works with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Settings of one node's core.

    batch_bytes: copies are asked for in batches of at most this, so that the end of each is soon.
    batches_in_flight: batches of one job that are under way at once: as many times batch_bytes may have to
    end before a job that is cut off is quiet.  plan_lease_s: longest a plan may hold blocks.
    copy_lease_s: time that a copy has before its right to a slot ends.  quiet_grace_s: how long after its
    deadline a restore waits for batches that still run.  wait_for_park_s: how long a plan waits for a
    park of the same conversation.  verify: check the sums again on the way from host memory to a pool.
    max_heads: branches that one conversation keeps.  disk_expected: whether the node is ready only with a
    disk tier.  spill_above: share of host memory above which what only it holds is written to disk ahead of
    need; 1 writes only when room is needed.  spill_batch_bytes: most that one such write holds.
    tenant_codecs: (tenant, codec) of those that want another one on disk than the rest.  host_pages: of what
    kind they are, for people.  ask_elsewhere_s: how long a plan waits for others; 0 on a node alone.
    retire_after_s: when a model's KV is worth nothing that no worker serves, while others serve its name.
    failure_domain: what may fail at once with this node; '' for the node alone.  move_bytes_per_s: what a
    node on its way out of service may give to others; 0 for nothing.  rebalance_bytes_per_s: what one that
    is full may, while it stays; 0 for nothing.  transport: by which it speaks to other
    nodes, for people.  prefetch_s: how far ahead of a return the disk is read, if that pays; 0: not at all.
    """

    node: str = "local"
    batch_bytes: int = 256 << 20
    batches_in_flight: int = 4
    plan_lease_s: float = 30.0
    copy_lease_s: float = 10.0
    quiet_grace_s: float = 1.0
    wait_for_park_s: float = 0.5
    verify: bool = True
    max_heads: int = 16
    software: str = ""
    disk_expected: bool = True
    spill_above: float = 1.0
    spill_batch_bytes: int = 32 << 20
    tenant_codecs: tuple[tuple[str, str], ...] = ()
    host_pages: str = ""
    ask_elsewhere_s: float = 0.0
    retire_after_s: float = 3600.0
    failure_domain: str = ""
    move_bytes_per_s: int = 0
    rebalance_bytes_per_s: int = 0
    transport: str = ""
    prefetch_s: float = 0.0
