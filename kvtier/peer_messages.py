"""Messages between the nodes of a cluster, on the connections that carry KV from one to the other.

Both ends prove that they know the cluster's token without saying it, then the one that connected asks:

    PeerHello      ->              nonce
                   <-  PeerProof   nonce, and the token's mac over both nonces
    PeerProof      ->              the mac of the other side
                   <-  PeerReady
    Want, Want...  ->
                   <-  Sending     and, after the frame, nbytes of the object; reason '' says that they follow
    Ask            ->
                   <-  Reply       to what is no object: the directory's calls, and the nodes' own
"""

from __future__ import annotations

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


class PeerReady(Message, frozen=True, tag="peer_ready"):
    """The caller is let in. reason: why it is not; then the connection is closed."""

    reason: str = ""


class Want(Message, frozen=True, tag="want"):
    """Ask for one object."""

    block_key: bytes
    group: int
    shard: str


class Ask(Message, frozen=True, tag="peer_ask"):
    """A question to whoever serves at the other end. body: in its own language."""

    body: bytes


class Reply(Message, frozen=True, tag="peer_reply"):
    """Answer to an Ask. reason: '' or why there is none."""

    body: bytes = b""
    reason: str = ""


class Sending(Message, frozen=True, tag="sending"):
    """Answer to a Want, in turn. reason: '' or why nothing follows: 'missing' or 'busy'."""

    nbytes: int = 0
    checksum: int = 0
    reason: str = ""
