"""The holders of a shard: each is one snapshot of one node in one epoch, and what was announced since.

A holder that is superseded, or whose node is lost, dies at once: its totals go, its rows and records stay
behind and are passed over.  Its number is used again once both have been cleansed of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvtier.directory.block_table import HOLDERS, Mask
from kvtier.errors import KvtierError


@dataclass(slots=True)
class Totals:
    """Blocks that a tier has any part of, their bytes in it, and conversations."""

    host_blocks: int = 0
    host_bytes: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    conversations: int = 0

    def add(self, other: Totals) -> None:
        """Count the other's as well."""
        self.host_blocks += other.host_blocks
        self.host_bytes += other.host_bytes
        self.disk_blocks += other.disk_blocks
        self.disk_bytes += other.disk_bytes
        self.conversations += other.conversations

    @property
    def nothing(self) -> bool:
        """Whether there is none of anything."""
        return not (self.host_blocks or self.disk_blocks or self.conversations)


@dataclass(slots=True)
class Holder:
    """One of them. rows: of the block table. totals: by the tenant's number."""

    number: int
    node: str
    epoch: int
    snapshot: int
    rows: int = 0
    totals: dict[int, Totals] = field(default_factory=dict)

    def total(self, tenant: int) -> Totals:
        """The tenant's, made where there were none."""
        return self.totals.setdefault(tenant, Totals())


class Holders:
    """All holders of a shard. alive: by number, shared with the block table."""

    def __init__(self, alive: Mask) -> None:
        self._alive = alive
        self._living: dict[int, Holder] = {}
        self._by_snapshot: dict[tuple[str, int, int], Holder] = {}
        self._free: list[int] = []
        self._next = 0
        self._buried: list[tuple[int, int, int]] = []

    def __iter__(self) -> Iterator[Holder]:
        return iter(self._living.values())

    def __len__(self) -> int:
        return len(self._living)

    @property
    def buried(self) -> int:
        """Numbers of dead holders that cannot be used again yet."""
        return len(self._buried)

    def add(self, node: str, epoch: int, snapshot: int) -> Holder:
        """A new one. Raises KvtierError when all numbers are taken."""
        if not self._free and self._next == HOLDERS:
            raise KvtierError(f"a shard of the directory has {HOLDERS} holders", fix="retire nodes that left")
        number = self._free.pop() if self._free else self._next
        self._next = max(self._next, number + 1)
        self._alive[number] = True
        holder = self._living[number] = Holder(number, node, epoch, snapshot)
        self._by_snapshot[node, epoch, snapshot] = holder
        return holder

    def of(self, node: str, epoch: int, snapshot: int) -> Holder:
        """The living holder of this snapshot. Raises KeyError."""
        return self._by_snapshot[node, epoch, snapshot]

    def get(self, number: int) -> Holder | None:
        """The living holder of this number."""
        return self._living.get(number)

    def bury(self, holder: Holder, rebuild: int, sweep: int) -> None:
        """It is dead. rebuild, sweep: the counts of those at which nothing of it is left."""
        self._alive[holder.number] = False
        del self._living[holder.number]
        del self._by_snapshot[holder.node, holder.epoch, holder.snapshot]
        self._buried.append((holder.number, rebuild, sweep))

    def reuse(self, rebuilds: int, sweeps: int) -> None:
        """So many rebuilds and sweeps have ended."""
        clean = [b for b in self._buried if b[1] <= rebuilds and b[2] <= sweeps]
        if clean:
            self._free += [number for number, _, _ in clean]
            self._buried = [b for b in self._buried if b[1] > rebuilds or b[2] > sweeps]
