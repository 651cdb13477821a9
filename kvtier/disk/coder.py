"""From a payload to what stands on disk, and back: header page, codec, seal.

A raw block that is not sealed is the payload itself, and is written and read where it lies.  Everything else
goes through memory of a pool: encoded, then sealed under a key of its own.

The checksum of a sealed block's payload would tell whoever reads the drive which texts are equal, or equal to
one that they know.  So header and index hold it masked: combined by exclusive or with 64 bits that only the
key store can tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtier.checksum import checksum
from kvtier.disk.buffers import PAGE, StagingPool, padded
from kvtier.disk.codecs import CODECS, RAW
from kvtier.disk.fileops import Bytes
from kvtier.disk.header import UNSEALED, BlockHeader, Seal, associated, encode
from kvtier.disk.sealing import NONCE_BYTES, TAG_BYTES, seal, unseal
from kvtier.errors import CorruptObject
from kvtier.objects import ObjectMeta

if TYPE_CHECKING:
    from kvtier.disk.sealing import DataKey
    from kvtier.disk.vault import Vault

_LEAST_SAVING = 32


class KeyGone(CorruptObject):
    """The key of a sealed block is not in the key store: nobody can read it any more."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A block that is ready to be written. page: its header; body: what follows; key: None when unsealed."""

    page: bytes
    body: Bytes
    codec: str
    key: DataKey | None


class Coder:
    """Packs and unpacks the blocks of one store. Safe from any thread.

    vault: keys of sealed blocks; with one, every block is sealed.  staging_bytes: limit of the pool.
    """

    def __init__(self, store_id: bytes, vault: Vault | None, staging_bytes: int) -> None:
        self.store_id = store_id
        self.vault = vault
        self._staging = StagingPool(staging_bytes)

    # -- headers and rows

    def header(
        self, meta: ObjectMeta, sequence: int, *, codec: str, stored_bytes: int, sealed: bool
    ) -> BlockHeader:
        """The header of a write, as far as it is known without its seal."""
        masked = self.masked(meta, sequence) if sealed else meta
        return BlockHeader(masked, sequence, self.store_id, stored_bytes, codec)

    def masked(self, meta: ObjectMeta, sequence: int) -> ObjectMeta:
        """The same with its checksum masked; applied twice, unmasked."""
        assert self.vault is not None
        assert meta.checksum is not None
        return replace(meta, checksum=meta.checksum ^ self.vault.mask(sequence, meta.root.tenant))

    # -- packing

    @contextmanager
    def pack(
        self, meta: ObjectMeta, sequence: int, payload: Bytes, codec: str, item_bytes: int
    ) -> Iterator[Packed]:
        """What to write for a payload; its body is valid for the time of the block. Raises CodecMissing.

        Encoded only when that saves a page, and a thirty-second of all pages, since a raw block is read
        without a detour.  `payload` itself is the body when it is neither encoded nor sealed.
        """
        whole = padded(payload.nbytes)
        saving = max(PAGE, whole // _LEAST_SAVING // PAGE * PAGE)
        encoded_room = max(0, whole - saving) if codec != RAW else 0
        sealed_room = payload.nbytes + TAG_BYTES if self.vault is not None else 0
        with ExitStack() as stack:
            staged = payload[:0]
            if encoded_room + sealed_room:
                staged = stack.enter_context(self._staging.take(encoded_room + sealed_room))
            plain = staged[:encoded_room]
            nbytes = CODECS[codec].encode(payload, item_bytes, plain)
            if nbytes is None:
                codec, plain = RAW, payload
            else:
                plain = plain[:nbytes]
            if self.vault is None:
                header = self.header(meta, sequence, codec=codec, stored_bytes=plain.nbytes, sealed=False)
                yield Packed(encode(header), plain, codec, None)
            else:
                yield self._sealed(meta, sequence, plain, codec, staged[encoded_room:])

    def _sealed(self, meta: ObjectMeta, sequence: int, plain: Bytes, codec: str, into: Bytes) -> Packed:
        assert self.vault is not None
        key = self.vault.new_key(sequence, meta.root.tenant)
        nonce = os.urandom(NONCE_BYTES)
        header = self.header(meta, sequence, codec=codec, stored_bytes=plain.nbytes, sealed=True)
        header = replace(header, seal=Seal(nonce, UNSEALED.tag))
        seal(key, nonce, associated(encode(header)), plain, into)
        tag = into[plain.nbytes : plain.nbytes + TAG_BYTES].tobytes()
        page = encode(replace(header, seal=Seal(nonce, tag)))
        return Packed(page, into[: plain.nbytes], codec, key)

    # -- unpacking

    @contextmanager
    def room_to_unpack(self, codec: str, stored_bytes: int) -> Iterator[Bytes]:
        """Memory for a block as it is stored, and for what `unpack` needs besides."""
        with self._staging.take(self.unpack_bytes(codec, stored_bytes)) as room:
            yield room

    def unpack_bytes(self, codec: str, stored_bytes: int) -> int:
        """How much memory that is: for a sealed block its tag, and the encoded bytes out of their seal."""
        if self.vault is None:
            return stored_bytes
        return padded(stored_bytes + TAG_BYTES) + (stored_bytes if codec != RAW else 0)

    def unpack(self, header: BlockHeader, page: bytes, room: Bytes, into: Bytes) -> None:
        """Fill `into` with the payload. Raises CorruptObject, CodecMissing, TierUnavailable.

        header: of `page`.  room: `unpack_bytes` of memory, the stored bytes at its front.  When CorruptObject
        is raised, `into` holds anything.
        """
        nbytes = header.stored_bytes
        stored = room[:nbytes]
        if header.seal is not None:
            sealed = room[: nbytes + TAG_BYTES]
            sealed[nbytes:] = memoryview(header.seal.tag)
            behind = padded(nbytes + TAG_BYTES)
            stored = into if header.codec == RAW else room[behind : behind + nbytes]
            if stored.nbytes != nbytes:
                raise CorruptObject(f"{nbytes} raw bytes for a payload of {into.nbytes}")
            unseal(self._key(header), header.seal.nonce, associated(page), sealed, stored)
        if stored is not into:
            CODECS[header.codec].decode(stored, into)

    def fits(self, header: BlockHeader, payload: Bytes) -> bool:
        """Whether the payload has the checksum that its header, masked or not, says."""
        meta = header.meta if header.seal is None else self.masked(header.meta, header.sequence)
        return checksum(payload) == meta.checksum

    def _key(self, header: BlockHeader) -> DataKey:
        assert self.vault is not None
        key = self.vault.key(header.sequence)
        if key is None:
            raise KeyGone(f"the key of {header.meta.object_id} is not in the key store any more")
        return key
