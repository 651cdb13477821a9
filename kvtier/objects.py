"""What is stored, and how it is named.

An object is (block key, layer group, shard).  The key names the tokens, and through its chain the whole
prefix, tenant, model and fidelity; group and shard say which part of the KV of these tokens it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

KEY_BYTES = 32


class ObjectId(NamedTuple):
    """Names one stored object.

    block_key: 32 bytes; group: index into the model's layer groups; shard: `Shard.name`.
    """

    block_key: bytes
    group: int
    shard: str

    def __str__(self) -> str:
        return f"{self.block_key.hex()[:16]}/g{self.group}/{self.shard}"


@dataclass(frozen=True, slots=True)
class Shard:
    """The slice of layers and KV heads that one rank holds. Ranks with equal slices share objects."""

    first_layer: int
    layers: int
    first_head: int
    heads: int

    @property
    def name(self) -> str:
        """Canonical name, equal for equal slices: 'L0+32.H0+8'."""
        return f"L{self.first_layer}+{self.layers}.H{self.first_head}+{self.heads}"


@dataclass(frozen=True, slots=True)
class Root:
    """What every block of a chain has in common: the start of the chain.

    key: the root key, 32 bytes, from `keys.root_key`.  fingerprint: 32 bytes of weights identity.
    fidelity: 'exact' or the name of a lossy codec.
    """

    key: bytes
    tenant: str
    fingerprint: bytes
    fidelity: str
    block_tokens: int


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    """Everything about an object but its bytes; enough to rebuild an index from.

    start: position of the block's first token.  tokens: tokens in the block; fewer than the root's
    block_tokens in a tail.  first_valid: rows [0, first_valid) are not stored (a sliding layer no longer
    had them); 0 otherwise.  nbytes: stored length.  checksum: see `checksum.py`; None until known.
    """

    object_id: ObjectId
    root: Root
    parent_key: bytes
    start: int
    tokens: int
    first_valid: int
    nbytes: int
    checksum: int | None = None

    @property
    def is_tail(self) -> bool:
        """Whether the block is shorter than a full one."""
        return self.tokens < self.root.block_tokens
