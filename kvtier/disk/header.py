"""The page in front of every object on disk that says what follows it.

A block on disk is one page of 4096 bytes and then the payload.  The page repeats everything that the
index knows of the object, so a read can check that these bytes are the ones asked for without trusting
the index, and an index can be rebuilt from the segments alone.

    at     bytes  field
    0      8      magic
    8      2      version
    10     2      length of the body
    12     4      features that a reader must know: 1, the block is sealed
    16     16     id of the store
    32     8      sequence number of the write
    40     8      payload length
    48     8      stored length, after the codec
    56     8      checksum of the payload; masked in a sealed block
    64     12     nonce of a sealed block
    76     16     tag of a sealed block
    92     4      reserved, zero
    96     ...    body: a msgpack map with names, keys and positions, then zeros
    4088   8      xxh3-64 of the 4088 bytes before

All numbers are little-endian.

A sealed block's stored bytes are encrypted, after the codec.  Its tag covers them and all of this page but
the tag and the page's own sum, so a block under another header, or a header changed, fails.  `mask` (see
`coder.py`) keeps the checksum of what is sealed from those who can read the drive.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

from kvtier.checksum import NAME as CHECKSUM_NAME
from kvtier.checksum import Buffer
from kvtier.disk.codecs import RAW
from kvtier.errors import CorruptObject
from kvtier.objects import ObjectId, ObjectMeta, Root

HEADER_BYTES = 4096
VERSION = 1

MAGIC = b"KVTBLK\r\n"
_FIXED = struct.Struct("<8sHHI16sQQQQ12s16s4s")
_SUM = struct.Struct("<Q")
_SUM_AT = HEADER_BYTES - _SUM.size
_BODY_ROOM = _SUM_AT - _FIXED.size
_TAG_AT, _TAG_END = 76, 92
_SEALED = 1
_KNOWN_FEATURES = _SEALED
_RESERVED = bytes(4)


class HeaderError(CorruptObject):
    """The page in front of a payload is not a header that can be used."""


class NotAHeader(HeaderError):
    """The magic is missing: nothing was written here, or something else."""


class HeaderDamaged(HeaderError):
    """The header's own checksum does not fit, or its fields cannot be understood."""


class HeaderUnsupported(HeaderError):
    """A newer version, or a feature, that this code does not know."""


@dataclass(frozen=True, slots=True)
class Seal:
    """How a block is sealed. nonce: 12 bytes; tag: 16 bytes, zeros until they are known."""

    nonce: bytes
    tag: bytes


UNSEALED = Seal(bytes(12), bytes(16))


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a header says.

    meta: the object, its checksum known; masked in a sealed block.  sequence: grows with every write of
    the store and is never used twice.  store_id: 16 bytes, one per directory.  stored_bytes: length on disk,
    without padding.
    """

    meta: ObjectMeta
    sequence: int
    store_id: bytes
    stored_bytes: int
    codec: str = RAW
    checksum_name: str = CHECKSUM_NAME
    seal: Seal | None = None


def encode(header: BlockHeader) -> bytes:
    """The 4096 bytes of a header. Raises ValueError when its names do not fit into the page."""
    meta = header.meta
    body: bytes = msgpack.packb(_body(header))
    if len(body) > _BODY_ROOM:
        raise ValueError(f"tenant, shard and codec names of {meta.object_id} do not fit into a header page")
    seal = header.seal or UNSEALED
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        len(body),
        0 if header.seal is None else _SEALED,
        header.store_id,
        header.sequence,
        meta.nbytes,
        header.stored_bytes,
        meta.checksum,
        seal.nonce,
        seal.tag,
        _RESERVED,
    )
    page = (fixed + body).ljust(_SUM_AT, b"\0")
    return page + _SUM.pack(xxhash.xxh3_64_intdigest(page))


def decode(page: Buffer, *, check: bool = True) -> BlockHeader:
    """The header in `page`, 4096 bytes. Raises NotAHeader, HeaderUnsupported, HeaderDamaged.

    check: whether the header's own checksum is compared; off in tests that show what it is for.
    """
    raw = bytes(page)
    if len(raw) != HEADER_BYTES or not raw.startswith(MAGIC):
        raise NotAHeader("no block header here")
    _, version, body_bytes, features, store_id, sequence, nbytes, stored, payload_sum, *rest = (
        _FIXED.unpack_from(raw)
    )
    if version > VERSION:
        raise HeaderUnsupported(
            f"block header of version {version}; this is version {VERSION}", fix="use a newer kvtier"
        )
    if check and _SUM.unpack_from(raw, _SUM_AT)[0] != xxhash.xxh3_64_intdigest(raw[:_SUM_AT]):
        raise HeaderDamaged("the header's checksum does not fit")
    nonce, tag, reserved = rest
    seal = Seal(nonce, tag) if features & _SEALED else None
    if features & ~_KNOWN_FEATURES or reserved != _RESERVED or (seal is None and any(nonce + tag)):
        raise HeaderUnsupported(f"block header with unknown features {features:#x}", fix="use a newer kvtier")
    if version < 1 or body_bytes > _BODY_ROOM:
        raise HeaderDamaged("version or body length out of bounds")
    fields = _unpack_body(raw[_FIXED.size : _FIXED.size + body_bytes])
    return BlockHeader(
        meta=_meta(fields, nbytes, payload_sum),
        sequence=sequence,
        store_id=store_id,
        stored_bytes=stored,
        codec=_field(fields, "codec", str),
        checksum_name=_field(fields, "checksum", str),
        seal=seal,
    )


def associated(page: Buffer) -> bytes:
    """What of a header page a sealed block's tag covers: all but the tag and the page's own sum."""
    raw = bytes(page)
    return raw[:_TAG_AT] + raw[_TAG_END:_SUM_AT]


def _body(header: BlockHeader) -> dict[str, object]:
    meta, root = header.meta, header.meta.root
    return {
        "block_key": meta.object_id.block_key,
        "group": meta.object_id.group,
        "shard": meta.object_id.shard,
        "root_key": root.key,
        "tenant": root.tenant,
        "fingerprint": root.fingerprint,
        "fidelity": root.fidelity,
        "block_tokens": root.block_tokens,
        "parent_key": meta.parent_key,
        "start": meta.start,
        "tokens": meta.tokens,
        "first_valid": meta.first_valid,
        "codec": header.codec,
        "checksum": header.checksum_name,
    }


def _unpack_body(body: bytes) -> Mapping[str, object]:
    try:
        fields = msgpack.unpackb(body)
    except ValueError as problem:
        raise HeaderDamaged(f"the header's body cannot be read: {problem}") from problem
    if not isinstance(fields, dict):
        raise HeaderDamaged("the header's body is not a map")
    return fields


def _meta(fields: Mapping[str, object], nbytes: int, payload_sum: int) -> ObjectMeta:
    root = Root(
        key=_field(fields, "root_key", bytes),
        tenant=_field(fields, "tenant", str),
        fingerprint=_field(fields, "fingerprint", bytes),
        fidelity=_field(fields, "fidelity", str),
        block_tokens=_field(fields, "block_tokens", int),
    )
    object_id = ObjectId(
        _field(fields, "block_key", bytes), _field(fields, "group", int), _field(fields, "shard", str)
    )
    return ObjectMeta(
        object_id=object_id,
        root=root,
        parent_key=_field(fields, "parent_key", bytes),
        start=_field(fields, "start", int),
        tokens=_field(fields, "tokens", int),
        first_valid=_field(fields, "first_valid", int),
        nbytes=nbytes,
        checksum=payload_sum,
    )


def _field(fields: Mapping[str, object], name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:
        raise HeaderDamaged(f"the header's field {name!r} is missing or not {kind.__name__}")
    return value
