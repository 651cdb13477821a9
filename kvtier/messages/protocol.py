"""How messages travel between worker, client, node and tier services: frames and versions; no I/O here.

A frame is a 4-byte little-endian length and a msgpack map.  Field `type` names the message; fields that a
receiver does not know are ignored, so newer ends may add some.  Descriptors travel as SCM_RIGHTS beside
the first byte of the frame whose message says so.

Connections to the node's socket, by the role in Hello:
    client   request and answer, strictly in turn: what `connect()` opens
    events   opened by an attached worker after Attach; the node sends ParkDone, Released, RestoreDone
    disk     the disk service: the node sends DiskWrite, DiskRead, ..., it answers and announces
    gpu      the GPU service: the node sends PoolJoined, PoolLeft, Copy, CancelCopies; it answers Copied, and
             says GpuUsage
Connections to the GPU service's own socket:
    copy     opened by an attached worker: the service sends Copy and CancelCopies, the worker Copied; where
             the service copies, it sends LayerQueued; for a pool on a GPU that it maps, ProbePool, PoolProbed
             and PoolProven
"""

from __future__ import annotations

import struct

import msgspec

from kvtier.errors import MalformedMessage, MessageTooLarge, VersionMismatch
from kvtier.messages import calls as messages
from kvtier.messages import cluster as cluster_messages
from kvtier.messages import peers as peer_messages
from kvtier.messages import tiers as tier_messages
from kvtier.messages.calls import Hello, Message

VERSION = 1
OLDEST_VERSION = 1
MAX_FRAME_BYTES = 16 << 20
LENGTH = struct.Struct("<I")


class _Tagged(msgspec.Struct):
    """What all messages have in common on the wire."""

    type: str


_TAG_OF = msgspec.msgpack.Decoder(_Tagged)
_ENCODER = msgspec.msgpack.Encoder()
# Looking the class up by its tag is seven times as fast as decoding a union of all of them.
_BY_TAG: dict[str, type[Message]] = {
    str(kind.__struct_config__.tag): kind
    for module in (messages, tier_messages, peer_messages, cluster_messages)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
}
_DECODERS = {tag: msgspec.msgpack.Decoder(kind) for tag, kind in _BY_TAG.items()}


def encode(message: Message) -> bytes:
    """One frame, length included. Raises MessageTooLarge."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise MessageTooLarge(
            f"a {type(message).__name__} of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}",
            fix="send fewer tokens or pages in one call",
        )
    return LENGTH.pack(len(body)) + body


def decode(body: bytes | memoryview) -> Message:
    """The message in a frame's body. Raises MalformedMessage."""
    try:
        tag = _TAG_OF.decode(body).type
        decoder = _DECODERS.get(tag)
        if decoder is None:
            raise MalformedMessage(f"not a kvtier message: its type is {tag!r}")
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"not a kvtier message: {error}") from error


def body_length(buffer: bytes | bytearray, at: int = 0) -> int:
    """Length of the body that follows the 4 bytes at `at`. Raises MessageTooLarge."""
    length: int = LENGTH.unpack_from(buffer, at)[0]
    if length > MAX_FRAME_BYTES:
        raise MessageTooLarge(
            f"a frame of {length} bytes was announced; the limit is {MAX_FRAME_BYTES}",
            fix="check that both ends speak the kvtier protocol",
        )
    return length


def agree_version(hello: Hello, oldest: int = OLDEST_VERSION, newest: int = VERSION) -> int:
    """The newest version that both ends speak. Raises VersionMismatch."""
    version = min(hello.newest, newest)
    if version < max(hello.oldest, oldest):
        raise VersionMismatch(
            f"the peer speaks protocol versions {hello.oldest} to {hello.newest}, "
            f"this end {oldest} to {newest}",
            fix="install the same kvtier release, or one apart, at both ends",
        )
    return version
