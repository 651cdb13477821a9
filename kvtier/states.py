"""The states of an object in a tier, and the moves that are allowed: the one table.

In host memory          absent -> filling -> present -> leased -> present -> evicting -> absent
                        filling or leased -> limbo (the right ended, a copy may still run) -> absent
On disk                 absent -> writing -> durable -> evicting -> absent
                        durable -> quarantined (a check failed) -> absent
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where an object stands in one tier."""

    ABSENT = "absent"
    FILLING = "filling"
    PRESENT = "present"
    LEASED = "leased"
    LIMBO = "limbo"
    EVICTING = "evicting"
    WRITING = "writing"
    DURABLE = "durable"
    QUARANTINED = "quarantined"

    # Enum hashes the name, in Python; members are compared by identity, and every move is looked up.
    __hash__ = object.__hash__


ALLOWED: frozenset[tuple[State, State]] = frozenset(
    {
        (State.ABSENT, State.FILLING),
        (State.FILLING, State.PRESENT),
        (State.FILLING, State.ABSENT),
        (State.FILLING, State.LIMBO),
        (State.PRESENT, State.LEASED),
        (State.PRESENT, State.EVICTING),
        (State.LEASED, State.PRESENT),
        (State.LEASED, State.LIMBO),
        (State.LIMBO, State.ABSENT),
        (State.LIMBO, State.PRESENT),
        (State.EVICTING, State.ABSENT),
        (State.ABSENT, State.WRITING),
        (State.WRITING, State.DURABLE),
        (State.WRITING, State.ABSENT),
        (State.DURABLE, State.LEASED),
        (State.LEASED, State.DURABLE),
        (State.DURABLE, State.EVICTING),
        (State.DURABLE, State.QUARANTINED),
        (State.LEASED, State.QUARANTINED),
        (State.QUARANTINED, State.ABSENT),
    }
)


def check_move(before: State, after: State) -> None:
    """Raise AssertionError when `before` -> `after` is not in the table: a bug, never an input error."""
    if (before, after) not in ALLOWED:
        raise AssertionError(f"state {before.value} -> {after.value} is not allowed")
