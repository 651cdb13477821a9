"""Sums over what the directory holds: for `ls`, `status`, quotas and policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvtier.directory.holders import Holders, Totals


class Amounts(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that a tier has any part of, their bytes in it before compression, and conversations.

    What two nodes hold counts at both.
    """

    host_blocks: int = 0
    host_bytes: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    conversations: int = 0


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One shard, or with `combine` the whole directory, at one instant.

    nodes, tenants: by name; held: by (node, tenant).  epochs: of the nodes.  absent: nodes that were heard of
    and hold nothing: lost, or waiting for a snapshot.  blocks, conversations: distinct ones, those of dead
    holders included until they are cleaned up.  rows: one for each block of each holder.  table_bytes: of the
    block table.
    """

    held: dict[tuple[str, str], Amounts]
    nodes: dict[str, Amounts]
    tenants: dict[str, Amounts]
    epochs: dict[str, int]
    absent: dict[str, int]
    blocks: int
    rows: int
    table_bytes: int
    conversations: int
    tombstones: int
    refused_runs: int


def summarise(
    holders: Holders,
    tenant_names: Sequence[str],
    absent: Iterable[tuple[str, int]],
    *,
    blocks: int,
    rows: int,
    table_bytes: int,
    conversations: int,
    tombstones: int,
    refused_runs: int,
) -> Summary:
    """The summary of one shard."""
    held: dict[tuple[str, str], Totals] = {}
    epochs: dict[str, int] = {}
    for holder in holders:
        epochs[holder.node] = max(holder.epoch, epochs.get(holder.node, -1))
        for tenant, totals in holder.totals.items():
            if not totals.nothing:
                held.setdefault((holder.node, tenant_names[tenant]), Totals()).add(totals)
    return _summary(
        held,
        epochs,
        dict(absent),
        blocks=blocks,
        rows=rows,
        table_bytes=table_bytes,
        conversations=conversations,
        tombstones=tombstones,
        refused_runs=refused_runs,
    )


def combine(shards: Iterable[Summary]) -> Summary:
    """The sums over all shards. A node that one shard waits for is absent, with its highest epoch."""
    every = list(shards)
    held: dict[tuple[str, str], Totals] = {}
    epochs: dict[str, int] = {}
    absent: dict[str, int] = {}
    for shard in every:
        for key, amounts in shard.held.items():
            held.setdefault(key, Totals()).add(_totals(amounts))
        for known, said in ((epochs, shard.epochs), (absent, shard.absent)):
            known.update({node: max(epoch, known.get(node, -1)) for node, epoch in said.items()})
    return _summary(
        held,
        epochs,
        absent,
        blocks=sum(s.blocks for s in every),
        rows=sum(s.rows for s in every),
        table_bytes=sum(s.table_bytes for s in every),
        conversations=sum(s.conversations for s in every),
        tombstones=sum(s.tombstones for s in every),
        refused_runs=sum(s.refused_runs for s in every),
    )


def _summary(
    held: dict[tuple[str, str], Totals], epochs: dict[str, int], absent: dict[str, int], **counts: int
) -> Summary:
    nodes: dict[str, Totals] = {node: Totals() for node in epochs}
    tenants: dict[str, Totals] = {}
    for (node, tenant), totals in held.items():
        nodes.setdefault(node, Totals()).add(totals)
        tenants.setdefault(tenant, Totals()).add(totals)
    return Summary(
        held={key: _amounts(t) for key, t in sorted(held.items())},
        nodes={node: _amounts(t) for node, t in sorted(nodes.items())},
        tenants={tenant: _amounts(t) for tenant, t in sorted(tenants.items())},
        epochs=epochs,
        absent=absent,
        **counts,
    )


def _amounts(totals: Totals) -> Amounts:
    return Amounts(
        totals.host_blocks, totals.host_bytes, totals.disk_blocks, totals.disk_bytes, totals.conversations
    )


def _totals(amounts: Amounts) -> Totals:
    return Totals(
        amounts.host_blocks,
        amounts.host_bytes,
        amounts.disk_blocks,
        amounts.disk_bytes,
        amounts.conversations,
    )
