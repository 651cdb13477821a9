"""The form in which a conversation's record lies in the index: with a checksum, so that damage is seen.

One byte of version, then xxh3-64 (little-endian) over the tenant, the conversation, the record's number and
the body, then the body.  It detects accidents, not attackers.
"""

from __future__ import annotations

import xxhash

from kvtier.errors import CorruptObject

_VERSION = b"\x01"
_SUM_BYTES = 8
_HEAD_BYTES = len(_VERSION) + _SUM_BYTES


def frame(tenant: str, conversation: str, version: int, body: bytes) -> bytes:
    """The body as the index keeps it for this conversation at this version."""
    return _VERSION + _sum(tenant, conversation, version, body) + body


def unframe(tenant: str, conversation: str, version: int, data: bytes) -> bytes:
    """The reverse of `frame`. Raises CorruptObject when anything differs from what was framed."""
    body = data[_HEAD_BYTES:]
    if data[:_HEAD_BYTES] != _VERSION + _sum(tenant, conversation, version, body):
        raise CorruptObject("the record of a conversation is damaged")
    return body


def _sum(tenant: str, conversation: str, version: int, body: bytes) -> bytes:
    hasher = xxhash.xxh3_64()
    for part in (tenant.encode(), conversation.encode(), str(version).encode(), body):
        # With their lengths: or what moved from one part to the next would go unseen.
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.intdigest().to_bytes(_SUM_BYTES, "little")
