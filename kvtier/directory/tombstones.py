"""Tombstones of forgotten conversations: kept until every node that was known then has carried them out.

A node that is away stays waited for; when it is back, the answers to its announcements tell it what to
forget. Only a long bound, or its retirement, ends the wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from kvtier.directory.announcements import Tombstone

_NONE: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Grave:
    stone: Tombstone
    waits_for: set[str]
    done: set[str]


class Tombstones:
    """Those of one shard. keep_s: after so long a tombstone ends, whoever has not carried it out."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._graves: dict[str, _Grave] = {}
        self._by_name: dict[tuple[str, str], set[str]] = {}
        # By node: what it has to carry out, and what it need not keep any longer; dicts keep the order.
        self._open: dict[str, dict[str, None]] = {}
        self._over: dict[str, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._graves)

    def of(self, tenant: str, conversation: str) -> frozenset[str]:
        """Ids of the conversation's tombstones."""
        return frozenset(self._by_name.get((tenant, conversation), _NONE))

    def carried_out(self, node: str, stone: Tombstone, known: Iterable[str]) -> None:
        """The node has forgotten. known: nodes that may have the conversation, beside those it names."""
        grave = self._graves.get(stone.id)
        if grave is None:
            grave = self._graves[stone.id] = _Grave(stone, {*stone.nodes, *known}, set())
            self._by_name.setdefault((stone.tenant, stone.conversation), set()).add(stone.id)
            for waiting in grave.waits_for:
                self._open.setdefault(waiting, {})[stone.id] = None
        grave.done.add(node)
        self._not_waiting(grave, node)

    def for_node(self, node: str, at_most: int) -> tuple[Tombstone, ...]:
        """What the node has to carry out, the oldest first."""
        return tuple(self._graves[i].stone for i in islice(self._open.get(node, ()), at_most))

    def take_over(self, node: str, at_most: int) -> tuple[str, ...]:
        """Ids that the node need not keep any longer; each is told once.

        Should that be lost, the node names it again and it is carried out again, which changes nothing.
        """
        over = self._over.get(node, {})
        taken = tuple(islice(over, at_most))
        for stone_id in taken:
            del over[stone_id]
        return taken

    def retire(self, node: str) -> None:
        """The node will not come back: nobody waits for it."""
        for stone_id in list(self._open.get(node, ())):
            self._not_waiting(self._graves[stone_id], node)
        self._open.pop(node, None)
        self._over.pop(node, None)

    def expire(self, now_s: float) -> None:
        """End what is too old. now_s: Unix seconds."""
        for grave in [g for g in self._graves.values() if g.stone.at_s + self._keep_s < now_s]:
            self._end(grave)

    def _not_waiting(self, grave: _Grave, node: str) -> None:
        grave.waits_for.discard(node)
        self._open.get(node, {}).pop(grave.stone.id, None)
        if not grave.waits_for:
            self._end(grave)

    def _end(self, grave: _Grave) -> None:
        stone = grave.stone
        for node in grave.waits_for:
            self._open[node].pop(stone.id, None)
        for node in grave.done:
            self._over.setdefault(node, {})[stone.id] = None
        del self._graves[stone.id]
        name = (stone.tenant, stone.conversation)
        self._by_name[name].discard(stone.id)
        if not self._by_name[name]:
            del self._by_name[name]
