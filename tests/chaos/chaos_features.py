"""What a run has beside its faults: drawn from its seed, so that some have it and some have not."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

from kvtier.daemon.peer_codecs import codings

# With `full`: the node whose drive is small, and its settings.
SMALL = "c"
_SMALL_DISK = {"disk.capacity_bytes": 16 << 20, "disk.segment_bytes": 1 << 20}


@dataclass(frozen=True, slots=True)
class Features:
    """tls: all that goes between nodes is sealed.  coded: KV is encoded where a link was seen to be slow.
    damage: bytes of stores are flipped and cut off, and indexes lost.  full: what leaves a tier goes by its
    worth, and one node has so small a drive that it gives conversations away.  ranks: workers of the second
    model are two ranks each.
    """

    tls: bool = False
    coded: bool = False
    damage: bool = False
    full: bool = False
    ranks: bool = False

    @classmethod
    def drawn(cls, seed: int) -> Features:
        """Those of a seed; none that needs a package that is not here."""
        draw = random.Random(f"features of {seed}")
        chosen = {each.name: draw.random() < 0.5 for each in fields(cls)}
        chosen["coded"] = chosen["coded"] and bool(codings())
        return cls(**chosen)

    @property
    def fickle(self) -> frozenset[str]:
        """Nodes that drop what they promised, since their drive has no room for it."""
        return frozenset((SMALL,) if self.full else ())

    def settings(self, node: str) -> dict[str, Any]:
        """Of a node, by dotted name."""
        more: dict[str, Any] = {"cluster.wire_codec": "auto" if self.coded else "raw"}
        if self.full:
            # Its workers compute so slowly that moving pays; what is promised is loaded all the same.
            more |= {"policy.eviction": "cost", "policy.restore": "load"}
            more |= _SMALL_DISK if node == SMALL else {}
        return more


NO_FEATURES = Features()
