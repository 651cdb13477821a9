"""Messages between the nodes of a cluster, on the connections that carry KV from one to the other.

Both ends prove that they know the cluster's token without saying it, then the one that connected asks:

    PeerHello      ->              nonce
                   <-  PeerProof   nonce, and the token's mac over both nonces
    PeerProof      ->              the mac of the other side
                   <-  PeerReady   the codecs that this side encodes with, and ways to read its memory
    Want, Want...  ->              with one of these codecs, or without
                   <-  Sending     and, after the frame, nbytes of the object, or their encoding
                                   (peers/coding.py); reason '' says that they follow
    Introduce      ->              by one of the ways that were named
                   <-  Introduced  what has to be known of this side's memory (peers/lending.py)
    Want, Want...  ->              to be lent
                   <-  Sending     where the object lies, instead of its bytes; it stays there until
    Taken          ->              which is said of those that are lent in the order of their answers
    Ask            ->
                   <-  Reply       to what is no object: the directory's calls, and the nodes' own
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvtier.messages.calls import Message


class PeerHello(Message, frozen=True, tag="peer_hello"):
    """First message of a connection between nodes. node: who connects; wanted: whom it calls."""

    node: str
    wanted: str
    oldest: int
    newest: int
    nonce: bytes


class PeerProof(Message, frozen=True, tag="peer_proof"):
    """Proof of knowing the token; from the one that was called with its name, epoch and nonce.

    reason: why there is none; then the connection is closed.
    """

    mac: bytes = b""
    node: str = ""
    epoch: Annotated[int, msgspec.Meta(ge=0)] = 0
    version: int = 0
    nonce: bytes = b""
    reason: str = ""


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A codec that a node encodes with. ratio: bytes of KV for each encoded one, expected."""

    codec: str
    ratio: float
    encode_bytes_per_s: float


class PeerReady(Message, frozen=True, tag="peer_ready"):
    """The caller is let in. reason: why it is not; then the connection is closed.

    codecs: that a Want may name; a node of an earlier release says none, and is told none.  lends: ways by
    which its memory may be read; likewise.
    """

    reason: str = ""
    codecs: tuple[Offer, ...] = ()
    lends: tuple[str, ...] = ()


class Introduce(Message, frozen=True, tag="peer_introduce"):
    """Ask how the other end's memory is read. way: one of `PeerReady.lends`."""

    way: str


class Introduced(Message, frozen=True, tag="peer_introduced"):
    """Answer to Introduce. metadata: in the language of that way; empty: not now."""

    metadata: bytes = b""


class Want(Message, frozen=True, tag="want"):
    """Ask for one object. codec: to be encoded with; '' for the bytes.  item_bytes: width of its numbers.

    lend: it will be read where it lies, if the other end says where.
    """

    block_key: bytes
    group: int
    shard: str
    codec: str = ""
    item_bytes: int = 0
    lend: bool = False


class Taken(Message, frozen=True, tag="peer_taken"):
    """The object that was lent first, of those that are, is not read any more."""


class Ask(Message, frozen=True, tag="peer_ask"):
    """A question to whoever serves at the other end. body: in its own language."""

    body: bytes


class Reply(Message, frozen=True, tag="peer_reply"):
    """Answer to an Ask. reason: '' or why there is none."""

    body: bytes = b""
    reason: str = ""


class Sending(Message, frozen=True, tag="sending"):
    """Answer to a Want, in turn. reason: '' or why nothing follows: 'missing' or 'busy'.

    nbytes, checksum: of the object itself.  codec: the one that was wanted, or '' for the bytes.
    address: where it is lent; 0: its bytes follow.
    """

    nbytes: int = 0
    checksum: int = 0
    reason: str = ""
    codec: str = ""
    address: int = 0
