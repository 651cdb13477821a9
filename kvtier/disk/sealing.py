"""Seals a stored block with AES-256-GCM, from memory to memory.

The package `cryptography` is loaded with the first key, so that a store without encryption needs none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from kvtier.checksum import Buffer
from kvtier.errors import ConfigError, CorruptObject

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
# cryptography's least version with encrypt_into and decrypt_into.
_NEEDED = "47"


@dataclass(frozen=True, slots=True)
class DataKey:
    """The key of one stored block. Its repr does not show it.

    generation: the write that it belongs to; never used twice in a store.  tenant_key: which of the
    tenant's keys wraps it, so that one made before `destroy_tenant` is not kept under the next.
    """

    generation: int
    tenant: str
    key: bytes = field(repr=False)
    tenant_key: int = 0


@cache
def aes_gcm() -> type[AESGCM]:
    """The cipher's class. Raises ConfigError where the package is missing or too old."""
    fix = "pip install 'kvtier[encryption]'"
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as problem:
        raise ConfigError("disk.encryption", "needs the package cryptography", fix=fix) from problem
    if not hasattr(AESGCM, "encrypt_into"):
        raise ConfigError("disk.encryption", f"needs cryptography {_NEEDED} or newer", fix=fix)
    return AESGCM


def seal(key: DataKey, nonce: bytes, aad: bytes, plain: Buffer, into: Buffer) -> int:
    """Encrypt `plain` into the front of `into`; answers the bytes written, TAG_BYTES more than `plain` has.

    nonce: NONCE_BYTES that this key sees once.  aad: what else must be the same to unseal.  into:
    writable, apart from `plain`.  Raises ValueError when it is too short.
    """
    source = memoryview(plain)  # type: ignore[arg-type]  # typeshed does not know that arrays are buffers
    room = memoryview(into)  # type: ignore[arg-type]  # as above
    needed = source.nbytes + TAG_BYTES
    if room.nbytes < needed:
        raise ValueError(f"{needed} bytes do not fit into {room.nbytes}")
    return aes_gcm()(key.key).encrypt_into(nonce, source, aad, room[:needed])


def unseal(key: DataKey, nonce: bytes, aad: bytes, sealed: Buffer, into: Buffer) -> None:
    """Decrypt `sealed` into the front of `into`, which gets TAG_BYTES less than `sealed` has.

    Raises CorruptObject when key, nonce, aad, bytes or tag are not those of the sealing; `into` then
    holds anything.  Raises ValueError when `into` is too short.
    """
    source = memoryview(sealed)  # type: ignore[arg-type]  # as above
    room = memoryview(into)  # type: ignore[arg-type]  # as above
    nbytes = source.nbytes - TAG_BYTES
    if nbytes < 0:
        raise CorruptObject(f"{source.nbytes} sealed bytes are less than a tag")
    if room.nbytes < nbytes:
        raise ValueError(f"{nbytes} bytes do not fit into {room.nbytes}")
    cipher = aes_gcm()(key.key)
    from cryptography.exceptions import InvalidTag

    try:
        cipher.decrypt_into(nonce, source, aad, room[:nbytes])
    except InvalidTag as problem:
        raise CorruptObject(f"the sealed bytes of generation {key.generation} fail their tag") from problem
