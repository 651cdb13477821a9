"""Messages between the nodes of a cluster, on the connections that carry KV from one to the other.

Both ends prove that they know the cluster's token without saying it, then the one that connected asks:

    PeerHello      ->              nonce
                   <-  PeerProof   nonce, and the token's mac over both nonces
    PeerProof      ->              the mac of the other side
                   <-  PeerReady   and the codecs that this side encodes with
    Want, Want...  ->              with one of these codecs, or without
                   <-  Sending     and, after the frame, nbytes of the object, or their encoding
                                   (peers/coding.py); reason '' says that they follow
    Ask            ->
                   <-  Reply       to what is no object: the directory's calls, and the nodes' own
"""

from __future__ import annotations

import msgspec

from kvtier.messages import Message


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
    epoch: int = 0
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

    codecs: that a Want may name; a node of an earlier release says none, and is told none.
    """

    reason: str = ""
    codecs: tuple[Offer, ...] = ()


class Want(Message, frozen=True, tag="want"):
    """Ask for one object. codec: to be encoded with; '' for the bytes.  item_bytes: width of its numbers."""

    block_key: bytes
    group: int
    shard: str
    codec: str = ""
    item_bytes: int = 0


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
    """

    nbytes: int = 0
    checksum: int = 0
    reason: str = ""
    codec: str = ""
