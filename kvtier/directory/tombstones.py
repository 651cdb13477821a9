"""Tombstones of forgotten conversations: kept until every node that was known then has carried them out.

Known to whoever forgot, to the shard, or to a node that has carried it out: one that has just started for the
first time may have heard of few.

A node that is away stays waited for; when it is back, the answers to its announcements tell it what to
forget. Only a long bound, or its retirement, ends the wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from kvtier.directory.announcements import Tombstone

_NONE: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Grave:
    stone: Tombstone
    waits_for: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)


class Tombstones:
    """Those of one shard. keep_s: after so long a tombstone ends, whoever has not carried it out."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._graves: dict[str, _Grave] = {}
        self._by_name: dict[tuple[str, str], set[str]] = {}
        # By node: what it has to carry out, and what it need not keep any longer, with the message whose
        # answer said so, (epoch, number); dicts keep the order.
        self._open: dict[str, dict[str, None]] = {}
        self._over: dict[str, dict[str, tuple[int, int] | None]] = {}

    def __len__(self) -> int:
        return len(self._graves)

    def of(self, tenant: str, conversation: str) -> frozenset[str]:
        """Ids of the conversation's tombstones."""
        return frozenset(self._by_name.get((tenant, conversation), _NONE))

    def carried_out(self, node: str, stone: Tombstone, known: Iterable[str]) -> None:
        """The node has forgotten. known: nodes that may have the conversation, beside those it names."""
        if stone.id in self._over.get(node, _NONE):
            # It is over, and the node has not heard of that: what was parked since does not name it.
            return
        grave = self._graves.get(stone.id)
        if grave is None:
            grave = self._graves[stone.id] = _Grave(stone)
            self._by_name.setdefault((stone.tenant, stone.conversation), set()).add(stone.id)
            self._wait_for(grave, known)
        self._wait_for(grave, stone.nodes)
        grave.done.add(node)
        self._not_waiting(grave, node)

    def for_node(self, node: str, at_most: int) -> tuple[Tombstone, ...]:
        """What the node has to carry out, the oldest first."""
        return tuple(self._graves[i].stone for i in islice(self._open.get(node, ()), at_most))

    def over_for(self, node: str, epoch: int, number: int, at_most: int) -> tuple[str, ...]:
        """Ids that the node need not keep any longer, for the answer to this message of its stream.

        An answer may be lost, so each is told until a later message of the same epoch: a node sends that
        when it has taken in the answer to the one before.
        """
        over = self._over.get(node, {})
        for stone_id, (told_epoch, told) in [(i, at) for i, at in islice(over.items(), at_most) if at]:
            if told_epoch == epoch and told < number:
                del over[stone_id]
        telling = tuple(islice(over, at_most))
        over.update(dict.fromkeys(telling, (epoch, number)))
        return telling

    def retire(self, node: str) -> None:
        """The node will not come back: nobody waits for it."""
        for stone_id in list(self._open.get(node, ())):
            self._graves[stone_id].retired.add(node)
            self._not_waiting(self._graves[stone_id], node)
        self._open.pop(node, None)
        self._over.pop(node, None)

    def expire(self, now_s: float) -> None:
        """End what is too old. now_s: Unix seconds."""
        for grave in [g for g in self._graves.values() if g.stone.at_s + self._keep_s < now_s]:
            self._end(grave)

    def _wait_for(self, grave: _Grave, nodes: Iterable[str]) -> None:
        for node in {*nodes} - grave.waits_for - grave.done - grave.retired:
            grave.waits_for.add(node)
            self._open.setdefault(node, {})[grave.stone.id] = None

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
