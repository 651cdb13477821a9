"""What several nodes say of one conversation, and what follows from it. Pure.

A state is what is known: the newest record of each node, and the tombstones.  `merge` takes the later record
of each node and all tombstones, so it does not matter in which order, how often and by which way messages
came. No clock takes part: a tombstone kills every record whose node had not carried it out when the record
was made, also one that was made at the same time elsewhere.  Forgetting wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from kvtier.directory.announcements import End, Record


class Stamp(NamedTuple):
    """Orders what one node says. snapshot: which of its snapshots in this epoch."""

    epoch: int
    snapshot: int
    version: int


@dataclass(frozen=True, slots=True)
class Said:
    """A node's newest record."""

    stamp: Stamp
    record: Record


@dataclass(frozen=True, slots=True)
class State:
    """All that is known of one conversation. said: by node. tombstones: ids."""

    said: Mapping[str, Said] = field(default_factory=dict)
    tombstones: frozenset[str] = frozenset()


NOTHING = State()
# (tokens, private) -> the first bytes of the key of the block that ends there, in the chain of the tokens at
# hand; None where they are fewer.
KeyAt: TypeAlias = Callable[[int, tuple[int, bytes] | None], bytes | None]


@dataclass(frozen=True, slots=True)
class Branch:
    """One end of a conversation, and the nodes that name it with the version of their record."""

    end: End
    nodes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation over all nodes. branches: the last parked first."""

    tenant: str
    name: str
    branches: tuple[Branch, ...]
    versions: Mapping[str, int]


def merge(one: State, other: State) -> State:
    """What both say together. Commutative, associative, idempotent; `NOTHING` changes nothing."""
    said = dict(one.said)
    for node, later in other.said.items():
        known = said.get(node)
        if known is None or _rank(later) > _rank(known):
            said[node] = later
    return State(said, one.tombstones | other.tombstones)


def living(state: State) -> dict[str, Said]:
    """By node the records that name ends and that no tombstone kills."""
    return {
        node: said
        for node, said in state.said.items()
        if said.record.ends and state.tombstones <= set(said.record.after)
    }


def view(tenant: str, name: str, state: State) -> Conversation | None:
    """The conversation as people and restores see it; None when no node has it."""
    alive = living(state)
    ends: dict[tuple[bytes, int], tuple[End, dict[str, int]]] = {}
    for node in sorted(alive):
        record = alive[node].record
        for end in record.ends:
            known, nodes = ends.setdefault((end.key, end.tokens), (end, {}))
            nodes[node] = record.version
            if end.parked_at_s > known.parked_at_s:
                ends[end.key, end.tokens] = (end, nodes)
    if not ends:
        return None
    order = sorted(ends.values(), key=lambda e: (-e[0].parked_at_s, -e[0].tokens, e[0].key))
    versions = {node: said.record.version for node, said in sorted(alive.items())}
    return Conversation(tenant, name, tuple(Branch(end, nodes) for end, nodes in order), versions)


def longest(conversation: Conversation, key_at: KeyAt) -> Branch | None:
    """The branch that is the longest front of the tokens behind `key_at`: times and versions do not count."""
    matching = [b for b in conversation.branches if key_at(b.end.tokens, b.end.private) == b.end.key]
    return max(matching, key=lambda b: b.end.tokens, default=None)


def _rank(said: Said) -> tuple[Stamp, bool, str]:
    # The end of a record may have its version.  Of other records with one stamp, which no sound node makes,
    # it must not matter which came first.
    return said.stamp, not said.record.ends, repr(said.record)
