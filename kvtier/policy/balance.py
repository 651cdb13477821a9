"""Whether something idle is better given to a node with room than dropped where it is. Pure.

A node gives once its last tier is nearly full, and takes up to a smaller share of it: what lies between the
two keeps anything from going back and forth.
"""

from __future__ import annotations

from typing import Final

# Shares of what the last tier may hold.
_GIVES_ABOVE: Final = 0.95
_TAKES_UP_TO: Final = 0.8


def gives(used_bytes: int, capacity_bytes: int) -> bool:
    """Whether what comes next pushes out what is idle."""
    return used_bytes > _GIVES_ABOVE * capacity_bytes > 0


def takes_bytes(used_bytes: int, capacity_bytes: int) -> int:
    """What a node takes of others that are full."""
    return max(0, int(_TAKES_UP_TO * capacity_bytes) - used_bytes)


def pays(returns: float, recompute_s: float, move_s: float) -> bool:
    """Whether a conversation is worth its way to another node.

        returns * (recompute - move) > move

    returns: the chance that it comes back while it would be there.  recompute_s: what that takes then, were
    it dropped.  move_s: of its bytes between two nodes: now, and at its return, which may be at this one.
    """
    return returns * (recompute_s - move_s) > move_s
