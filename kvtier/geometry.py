"""How many bytes the KV of some tokens is, for one rank: what the daemon has to know of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GroupKind = Literal["full", "sliding", "state"]


@dataclass(frozen=True, slots=True)
class GroupGeometry:
    """One layer group of one shard.

    kind: 'full', 'sliding' (window_tokens set) or 'state' (a snapshot of state_bytes, no tokens).
    token_bytes: bytes of one token over all layers of the group in this shard; 0 for 'state'.
    """

    kind: GroupKind
    token_bytes: int
    window_tokens: int = 0
    state_bytes: int = 0

    @property
    def empty(self) -> bool:
        """Whether this shard has none of the group's layers: there is nothing to store of it."""
        return not (self.token_bytes or self.state_bytes)

    def object_bytes(self, tokens: int, first_valid: int = 0) -> int:
        """Stored length of an object of `tokens` tokens whose first `first_valid` rows are absent."""
        if self.kind == "state":
            return self.state_bytes
        return (tokens - first_valid) * self.token_bytes

    def needed_from(self, tokens: int) -> int:
        """First position whose KV is needed to go on after `tokens` tokens.

        A sliding layer with window W computes token n from the W-1 tokens before it and itself, so it
        needs [n-W+1, n).
        """
        if self.kind == "sliding":
            return max(0, tokens - self.window_tokens + 1)
        return 0 if self.kind == "full" else tokens


@dataclass(frozen=True, slots=True)
class Geometry:
    """The KV of one shard: tokens in a block and in an engine page, and the layer groups."""

    block_tokens: int
    page_tokens: int
    groups: tuple[GroupGeometry, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all groups that keep tokens."""
        return sum(g.token_bytes for g in self.groups)
