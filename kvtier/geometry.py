"""How many bytes the KV of some tokens is, for one rank: what the daemon has to know of a pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvtier.errors import GeometryError

EXACT = "exact"
# Lossy codecs: one byte for each value, and a scale for each head's vector of a token.
LOSSY = ("fp8", "int8")
SCALE_BYTES = 4
FIDELITIES = (EXACT, *LOSSY)
# What `kind` says in the description of a pool on a GPU, which handles name and no descriptor.
CUDA_IPC = "cuda-ipc"

GroupKind = Literal["full", "sliding", "state"]


@dataclass(frozen=True, slots=True)
class GroupGeometry:
    """One layer group of one shard.

    kind: 'full', 'sliding' (window_tokens set) or 'state' (a snapshot of state_bytes, no tokens).
    token_bytes: bytes of one token over all layers of the group in this shard; 0 for 'state'.
    lossy_token_bytes: the same under a lossy codec; 0 where there is none for this dtype or layout.
    """

    kind: GroupKind
    token_bytes: int
    window_tokens: int = 0
    state_bytes: int = 0
    lossy_token_bytes: int = 0

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
    """The KV of one shard: tokens in a block and in an engine page, and the layer groups.

    item_bytes: width of one number, for codecs that take numbers apart.
    """

    block_tokens: int
    page_tokens: int
    groups: tuple[GroupGeometry, ...]
    item_bytes: int = 2

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all groups that keep tokens."""
        return sum(g.token_bytes for g in self.groups)

    def at(self, fidelity: str) -> Geometry:
        """This geometry with the bytes that are stored at a fidelity.

        Raises GeometryError for an unknown fidelity, and for a lossy one of a group that has no codec.
        """
        if fidelity == EXACT:
            return self
        if fidelity not in LOSSY:
            raise GeometryError(f"fidelity '{fidelity}' is not known", fix=f"use one of {FIDELITIES}")
        for number, group in enumerate(self.groups):
            if not group.empty and not group.lossy_token_bytes:
                raise GeometryError(
                    f"layer group {number} ('{group.kind}') cannot be kept at fidelity '{fidelity}'",
                    fix="lossy codecs take fp32, fp16 and bf16 values with a head's values side by side",
                )
        lossy = tuple(replace(g, token_bytes=g.lossy_token_bytes) for g in self.groups)
        return replace(self, groups=lossy, item_bytes=1)
