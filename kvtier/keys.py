"""Keys: the names of blocks. A block's key names its tokens and, through its parent's key, the whole prefix.

    tenant secret = HMAC(H(cluster secret), tenant)
    root key      = H(root:   tenant secret, tenant, fingerprint, fidelity, block_tokens)
    block key     = H(block:  parent key, token count, length of extra, extra, tokens)
    engine key    = H(engine: tenant secret, fingerprint, fidelity, scheme, scheme version, extra, digest)

H is SHA-256.  Every kind of key starts with a tag of its own, and every field has a fixed length or its
length in front, so that no bytes can move from one field to the next, and no input is the beginning of
another one (which also rules out length extension).  The tenant's secret makes keys unguessable from outside
the tenant.  SHA-256 and not BLAKE2b: on processors with SHA instructions hashlib computes a key of 256 tokens
in 0.9 to 1.3 us, BLAKE2b in 1.4 to 1.9; both are sound with 256 bits.  The choice is final: another hash is
another name for everything that is stored.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.errors import ConfigError, FingerprintError, GeometryError, TokensError
from kvtier.objects import KEY_BYTES, Root

TOKEN_BYTES = 4
MIN_SECRET_BYTES = 16
MAX_TOKEN = 2**32 - 1

Packed: TypeAlias = bytes | bytearray | memoryview
# (token position, digest): LoRA, multimodal and cache-salt digests, each named by its caller.
Extra: TypeAlias = tuple[int, bytes]
Tokens: TypeAlias = Sequence[int] | npt.NDArray[Any] | memoryview

_BLOCK_TAG = b"kvtier.b"
_ROOT_TAG = b"kvtier.r"
_ENGINE_TAG = b"kvtier.e"
_TENANT_TAG = b"kvtier.t"
_AT_POSITION = 0
_PRIVATE = 1


class BlockRef(NamedTuple):
    """One block of a chain. start: position of its first token; tokens: how many, fewer in a tail."""

    key: bytes
    parent: bytes
    start: int
    tokens: int


def tenant_secret(cluster_secret: bytes, tenant: str) -> bytes:
    """The tenant's own 32 secret bytes. Raises ConfigError for a short secret or an unusable name."""
    if len(cluster_secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            "cluster_secret",
            f"{len(cluster_secret)} bytes are too few",
            fix=f"use at least {MIN_SECRET_BYTES} random bytes, such as `openssl rand -out FILE 32` gives",
        )
    # HMAC pads short keys with zeros, so two secrets could meet; hashed first, they cannot.
    mac_key = hashlib.sha256(cluster_secret).digest()
    return hmac.digest(mac_key, _TENANT_TAG + _tenant_bytes(tenant), "sha256")


def root_key(secret: bytes, tenant: str, fingerprint: bytes, fidelity: str, block_tokens: int) -> bytes:
    """The start of every chain of a tenant, model, fidelity and block size; 32 bytes.

    secret: from `tenant_secret`.  fingerprint: 32 bytes.  Raises ConfigError, FingerprintError,
    GeometryError.
    """
    _check_root(secret, fingerprint, fidelity)
    if not 1 <= block_tokens <= MAX_TOKEN:
        raise GeometryError(f"block_tokens is {block_tokens}", fix="use a positive number, such as 256")
    fields = (secret, _tenant_bytes(tenant), fingerprint, fidelity.encode(), struct.pack("<I", block_tokens))
    return hash_fields(_ROOT_TAG, fields)


def make_root(secret: bytes, tenant: str, fingerprint: bytes, fidelity: str, block_tokens: int) -> Root:
    """The Root that `chain` starts from. Arguments and errors are those of `root_key`."""
    key = root_key(secret, tenant, fingerprint, fidelity, block_tokens)
    return Root(key, tenant, fingerprint, fidelity, block_tokens)


def block_key(parent: bytes, tokens: Packed, extra: bytes = b"") -> bytes:
    """The key of the block that follows `parent`; 32 bytes.

    parent: the key before it, 32 bytes.  tokens: packed uint32, little-endian; their number is a part of the
    key, so a tail never has the key of a longer block.  extra: as `encode_extras` gives it.
    """
    header = struct.pack("<II", len(tokens) // TOKEN_BYTES, len(extra))
    return hashlib.sha256(b"".join((_BLOCK_TAG, parent, header, extra, tokens))).digest()


def tail_key(parent: bytes, tokens: Packed, count: int, extra: bytes = b"") -> bytes:
    """The key of a tail of `count` tokens: the first ones of `tokens`, which is packed. Raises TokensError.

    For finding a chain's end: try the lengths that are recorded under `parent`.
    """
    if not 0 < count <= len(tokens) // TOKEN_BYTES:
        raise TokensError(f"a tail of {count} tokens does not fit {len(tokens) // TOKEN_BYTES} tokens")
    return block_key(parent, memoryview(tokens)[: count * TOKEN_BYTES], extra)


def engine_key(
    secret: bytes,
    fingerprint: bytes,
    *,
    fidelity: str,
    scheme: str,
    scheme_version: str,
    digest: bytes,
    extra: bytes = b"",
) -> bytes:
    """The key of a block that an engine names by a digest of its own and not by tokens; 32 bytes.

    secret: from `tenant_secret`.  scheme, scheme_version: how the engine computes `digest`, such as 'sglang'
    and '1'.  extra: what the engine's digest leaves out, such as a cache salt.  Raises ConfigError,
    FingerprintError, TokensError.
    """
    _check_root(secret, fingerprint, fidelity)
    if not (scheme and scheme_version and digest):
        raise TokensError("an engine key needs a scheme, its version and a digest")
    fields = (secret, fingerprint, fidelity.encode(), scheme.encode(), scheme_version.encode(), extra, digest)
    return hash_fields(_ENGINE_TAG, fields)


def chain(
    root: Root,
    tokens: Packed,
    extras: Sequence[Extra] = (),
    *,
    parent: bytes | None = None,
    first_position: int = 0,
    private: Extra | None = None,
) -> list[BlockRef]:
    """Cut packed tokens into blocks of root.block_tokens, a shorter tail last, and key each of them.

    extras: each digest enters the block that holds its position; those before `first_position` are in the
    parent's key already.  parent, first_position: go on after a known full block; both or neither.
    private: (position, salt): the salt enters every block that holds or follows the position, so nothing
    from there on is shared with a chain of another salt.  No tokens give no blocks.  Raises TokensError.
    """
    found = walk(root, tokens, extras, parent=parent, first_position=first_position, private=private)
    before = _chain_start(root, parent, first_position)
    size, start, end = root.block_tokens, first_position, first_position + _checked_count(tokens)
    refs = []
    for key in found:
        refs.append(BlockRef(key, before, start, min(size, end - start)))
        before, start = key, start + size
    return refs


def walk(
    root: Root,
    tokens: Packed,
    extras: Sequence[Extra] = (),
    *,
    parent: bytes | None = None,
    first_position: int = 0,
    private: Extra | None = None,
) -> Iterator[bytes]:
    """The keys of `chain`, one by one: as many are hashed as are taken. Raises TokensError, at once."""
    count = _checked_count(tokens)
    size = root.block_tokens
    key = _chain_start(root, parent, first_position)
    extra_of = _extras_by_block(extras, private, size, first_position, first_position + count)
    return _hashed(key, memoryview(tokens).cast("B"), size, first_position, extra_of)


def _hashed(
    key: bytes, tokens: memoryview, size: int, start: int, extra_of: Mapping[int, bytes]
) -> Iterator[bytes]:
    """The same bytes as block_key hashes; written out since it runs for every block of every lookup."""
    plain = struct.pack("<II", size, 0)
    sha256, join, step = hashlib.sha256, b"".join, size * TOKEN_BYTES
    full_bytes = len(tokens) - len(tokens) % step
    for at in range(0, full_bytes, step):
        extra = extra_of.get(start) if extra_of else None
        head = plain if extra is None else struct.pack("<II", size, len(extra)) + extra
        key = sha256(join((_BLOCK_TAG, key, head, tokens[at : at + step]))).digest()
        yield key
        start += size
    if full_bytes < len(tokens):
        yield block_key(key, tokens[full_bytes:], extra_of.get(start, b""))


def encode_extras(at: Iterable[Extra], salt: bytes | None) -> bytes:
    """The `extra` of one block: its (offset in the block, digest) pairs in order, and its private salt.

    Each entry is kind (1 byte), offset (u32), length (u32), digest; b'' when there is nothing.
    """
    entries = [(_AT_POSITION, offset, digest) for offset, digest in sorted(at)]
    if salt is not None:
        entries.append((_PRIVATE, 0, salt))
    return b"".join(struct.pack("<BII", kind, offset, len(d)) + d for kind, offset, d in entries)


def pack_tokens(tokens: Tokens) -> bytes:
    """Token ids as packed uint32, little-endian: what `chain` and `block_key` take.

    tokens: any sequence of integers, an integer array of one dimension (NumPy, or what converts to it, such
    as a CPU tensor), or a contiguous uint32 buffer, which is copied once.  Empty is allowed.  Raises
    TokensError for what is negative, above 2^32 - 1, or not an integer, and for plain bytes: cast them with
    memoryview(b).cast('I') when they are packed already.
    """
    if isinstance(tokens, (bytes, bytearray, str)):
        raise TokensError(
            f"{type(tokens).__name__} is not a list of tokens",
            fix="for packed uint32 bytes give memoryview(b).cast('I')",
        )
    if isinstance(tokens, (memoryview, array)) or hasattr(tokens, "__array__"):
        return _pack_array(np.asarray(tokens))
    if not isinstance(tokens, Sequence):
        raise TokensError(f"{type(tokens).__name__} is not a sequence of tokens", fix="give a list")
    try:
        packed = array("I", tokens)
    except OverflowError:
        raise TokensError("a token id is negative or above 2^32 - 1") from None
    except TypeError:
        raise TokensError("a token id is not an integer", fix="give token ids, not text or floats") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _pack_array(ids: npt.NDArray[Any]) -> bytes:
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "ui"):
        raise TokensError(
            f"tokens are an array of {ids.dtype} with {ids.ndim} dimensions", fix="give one row of integers"
        )
    # An unsigned buffer of 1-byte items is far likelier packed bytes than a vocabulary of 256.
    if ids.dtype == np.uint8:
        raise TokensError("tokens are an array of uint8", fix="view packed bytes as uint32")
    wide = ids.dtype.itemsize > TOKEN_BYTES or ids.dtype.kind == "i"
    if wide and ids.size and (int(ids.min()) < 0 or int(ids.max()) > MAX_TOKEN):
        raise TokensError("a token id is negative or above 2^32 - 1")
    return ids.astype("<u4", copy=False).tobytes()


def hash_fields(tag: bytes, fields: Iterable[bytes]) -> bytes:
    """SHA-256 over a tag and fields, each with its length (u64) in front."""
    return hashlib.sha256(tag + b"".join(struct.pack("<Q", len(f)) + f for f in fields)).digest()


def _tenant_bytes(tenant: str) -> bytes:
    try:
        encoded = tenant.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("tenant", "the name is not valid Unicode", fix="use another name") from error
    if not encoded:
        raise ConfigError("tenant", "the name is empty", fix="give one, such as 'default'")
    return encoded


def _check_root(secret: bytes, fingerprint: bytes, fidelity: str) -> None:
    if len(secret) != KEY_BYTES:
        raise ConfigError("tenant_secret", f"has {len(secret)} bytes", fix="use keys.tenant_secret")
    if len(fingerprint) != KEY_BYTES:
        raise FingerprintError(
            f"a fingerprint has {KEY_BYTES} bytes, not {len(fingerprint)}", fix="use Fingerprint(...).digest"
        )
    if not fidelity:
        raise ConfigError("fidelity", "is empty", fix="use 'exact', or a lossy codec's name")


def _checked_count(tokens: Packed) -> int:
    nbytes = memoryview(tokens).nbytes
    if nbytes % TOKEN_BYTES:
        raise TokensError(f"{nbytes} bytes are not packed uint32", fix="use keys.pack_tokens")
    return nbytes // TOKEN_BYTES


def _chain_start(root: Root, parent: bytes | None, first_position: int) -> bytes:
    if first_position < 0 or first_position % root.block_tokens:
        raise TokensError(
            f"first_position {first_position} is not a multiple of block_tokens {root.block_tokens}",
            fix="go on after a full block",
        )
    if parent is None or first_position == 0:
        if first_position or parent not in (None, root.key):
            raise TokensError("parent and first_position belong together", fix="give both or neither")
        return root.key
    if len(parent) != KEY_BYTES:
        raise TokensError(f"a parent key has {KEY_BYTES} bytes, not {len(parent)}")
    return parent


def _extras_by_block(
    extras: Sequence[Extra], private: Extra | None, size: int, begin: int, end: int
) -> dict[int, bytes]:
    """block start -> encoded extra, for the blocks in [begin, end) that have one."""
    at: dict[int, list[Extra]] = {}
    for position, digest in extras:
        if not 0 <= position < end:
            raise TokensError(f"an extra stands at position {position}, the tokens end at {end}")
        if position >= begin:
            at.setdefault(position - position % size, []).append((position % size, digest))
    if private is None:
        return {start: encode_extras(pairs, None) for start, pairs in at.items()}
    position, salt = private
    if position < 0 or not salt:
        raise TokensError("private needs a position from 0 on and a salt that is not empty")
    encoded = {start: encode_extras(pairs, None) for start, pairs in at.items()}
    alone = encode_extras((), salt)
    for start in range(max(position - position % size, begin), end, size):
        encoded[start] = encode_extras(at[start], salt) if start in at else alone
    return encoded
