"""Which shard of the directory knows what: blocks by their keys' first bytes, conversations by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvtier.directory.announcements import HINT_BYTES
from kvtier.directory.rows import Keys

_HIGH = np.uint64(32)


def hints(keys: Iterable[bytes]) -> bytes:
    """What the directory keeps of these keys, one after the other."""
    return b"".join(key[:HINT_BYTES] for key in keys)


def shards_of(packed: bytes, shards: int) -> npt.NDArray[np.int64]:
    """The shard of each of the packed hints. Raises ValueError unless they are whole."""
    return (((_halves(packed)[:, 0] >> _HIGH) * np.uint64(shards)) >> _HIGH).astype(np.int64)


def table_keys(packed: bytes) -> Keys:
    """The 64 bits of each packed hint by which a shard knows it; others than those that chose the shard."""
    return _halves(packed)[:, 1].astype(np.uint64)


def shard_of_conversation(tenant: str, conversation: str, shards: int) -> int:
    """The shard that has a conversation's record."""
    return (name_hash(tenant, conversation) >> 32) * shards >> 32


def services_of(services: Sequence[str], shard: int) -> list[str]:
    """Who may have a shard of the directory: the first that is there. services: cluster.directory.

    With all there the shards go round the list; those of one that is lost are spread over the others.
    """
    first, turn = services[shard % len(services)], shard // len(services)
    others = [address for address in dict.fromkeys(services) if address != first]
    at = turn % len(others) if others else 0
    return [first, *others[at:], *others[:at]]


def digest_of(services: Sequence[str]) -> str:
    """By which two ends see that they go by the same list."""
    return hashlib.blake2b(" ".join(services).encode(), digest_size=8).hexdigest()


def name_hash(tenant: str, conversation: str) -> int:
    """64 bits of a conversation's name."""
    name = f"{len(tenant)}:{tenant}{conversation}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def _halves(packed: bytes) -> Keys:
    if len(packed) % HINT_BYTES:
        raise ValueError(f"{len(packed)} bytes are not hints of {HINT_BYTES} bytes each")
    # Big-endian, so that the first bytes are the highest.
    return np.frombuffer(packed, dtype=">u8").reshape(-1, 2)
