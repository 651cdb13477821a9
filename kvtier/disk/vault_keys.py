"""How the vault's keys wrap one another.

    master key    from a file; never stored in the vault
    tenant key    32 random bytes, wrapped by a key derived from the master key
    data key      32 random bytes, wrapped by a key derived from its tenant's key

Wrapping is AES-256-GCM under a random nonce: it authenticates what the wrapped key belongs to, where AES-KW
takes no such names, and it is the cipher that the blocks need anyway.  A random nonce is good for at most
2^32 wraps under one key (NIST SP 800-38D, 8.3); so data keys have a wrapping key for every 2^24 generations.
Derivation is HMAC-SHA256 over a label and names of fixed length.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING

from kvtier.disk.sealing import KEY_BYTES, NONCE_BYTES, TAG_BYTES, aes_gcm
from kvtier.errors import CorruptObject

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

WRAPPED_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES
STORE_ID_BYTES = 16
_WINDOW_BITS = 24


class TenantKey:
    """One tenant's unwrapped key. `number` names it in the vault and is never used for another."""

    def __init__(self, number: int, tenant: str, key: bytes, store_id: bytes) -> None:
        self.number = number
        self.tenant = tenant
        self._key = key
        self._store_id = store_id
        self._latest: tuple[int, AESGCM] | None = None

    def wrap(self, generation: int, data_key: bytes) -> bytes:
        """The data key of a generation, WRAPPED_BYTES long."""
        return _wrap(self._cipher(generation), data_key, _number(generation))

    def unwrap(self, generation: int, wrapped: bytes) -> bytes:
        """The data key again. Raises CorruptObject when it is not this tenant's, store's and generation's."""
        what = f"the key of generation {generation}"
        return _unwrap(self._cipher(generation), wrapped, _number(generation), what)

    def mask(self, generation: int) -> int:
        """64 bits that nobody without the key can tell from random ones; the same each time."""
        names = self._store_id + _number(generation)
        return int.from_bytes(_derived(self._key, b"kvtier mask 1", names)[:8], "little")

    def _cipher(self, generation: int) -> AESGCM:
        window = generation >> _WINDOW_BITS
        latest = self._latest
        if latest is None or latest[0] != window:
            names = self._store_id + _number(window)
            latest = (window, aes_gcm()(_derived(self._key, b"kvtier data keys 1", names)))
            self._latest = latest
        return latest[1]


class MasterKey:
    """What the vault does with the master key of one store."""

    def __init__(self, key: bytes, store_id: bytes) -> None:
        if len(key) != KEY_BYTES or len(store_id) != STORE_ID_BYTES:
            raise ValueError(f"a master key has {KEY_BYTES} bytes and a store id {STORE_ID_BYTES}")
        self._store_id = store_id
        self._cipher = aes_gcm()(_derived(key, b"kvtier tenant keys 1", store_id))
        self.check = _derived(key, b"kvtier check 1", store_id)

    def wrap(self, number: int, tenant: str, tenant_key: bytes) -> bytes:
        """A tenant's key, WRAPPED_BYTES long."""
        return _wrap(self._cipher, tenant_key, self._names(number, tenant))

    def unwrap(self, number: int, tenant: str, wrapped: bytes) -> bytes:
        """The tenant's key again. Raises CorruptObject when it is another tenant's or store's."""
        return _unwrap(self._cipher, wrapped, self._names(number, tenant), f"the key of tenant {tenant!r}")

    def tenant(self, number: int, tenant: str, wrapped: bytes) -> TenantKey:
        """A tenant's key, ready for use. Raises CorruptObject as `unwrap` does."""
        return TenantKey(number, tenant, self.unwrap(number, tenant, wrapped), self._store_id)

    def _names(self, number: int, tenant: str) -> bytes:
        return self._store_id + _number(number) + tenant.encode()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _derived(key: bytes, label: bytes, names: bytes) -> bytes:
    return hmac.digest(key, label + b"\0" + names, "sha256")


def _wrap(cipher: AESGCM, key: bytes, names: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, key, names)


def _unwrap(cipher: AESGCM, wrapped: bytes, names: bytes, what: str) -> bytes:
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], names)
    except InvalidTag as problem:
        raise CorruptObject(f"{what} does not unwrap", fix="what it sealed is lost, as a miss") from problem
