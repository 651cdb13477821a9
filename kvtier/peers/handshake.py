"""How two nodes find out that they belong to one cluster. Pure: nonces are arguments.

A mac is HMAC-SHA256 under the cluster's token over the side that makes it, both names, both nonces and the
epoch, each with its length in front.  So a proof is good for one connection, one direction and one pair of
nodes, and whoever listens learns nothing that opens another.  It says nothing of what follows on the
connection: against those who can change packets, and not only read them, there is TLS.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvtier.errors import AuthError, ConfigError, VersionMismatch
from kvtier.messages.peers import PeerHello, PeerProof

VERSION = 1
OLDEST_VERSION = 1
NONCE_BYTES = 32
MIN_TOKEN_BYTES = 16

Side: TypeAlias = Literal["caller", "called"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A node as its peers know it. epoch: grows with each start of the node."""

    node: str
    epoch: int
    token: bytes

    def __post_init__(self) -> None:
        if len(self.token) < MIN_TOKEN_BYTES:
            raise ConfigError(
                "cluster token",
                f"{len(self.token)} bytes are too few",
                fix=f"use at least {MIN_TOKEN_BYTES} random bytes on every node, the same on all",
            )

    def __repr__(self) -> str:
        return f"Identity(node={self.node!r}, epoch={self.epoch})"


def hello(own: Identity, wanted: str, nonce: bytes) -> PeerHello:
    """What the caller says first."""
    return PeerHello(node=own.node, wanted=wanted, oldest=OLDEST_VERSION, newest=VERSION, nonce=nonce)


def answer(own: Identity, greeting: PeerHello, nonce: bytes) -> PeerProof:
    """What the called one says. Raises AuthError when it is not who was wanted, VersionMismatch."""
    if greeting.wanted != own.node:
        raise AuthError(f"'{greeting.wanted}' was called, this is '{own.node}'", fix="check the addresses")
    if len(greeting.nonce) != NONCE_BYTES:
        raise AuthError(f"a nonce of {len(greeting.nonce)} bytes")
    version = min(greeting.newest, VERSION)
    if version < max(greeting.oldest, OLDEST_VERSION):
        raise VersionMismatch(
            f"node '{greeting.node}' speaks peer versions {greeting.oldest} to {greeting.newest}, this one "
            f"{OLDEST_VERSION} to {VERSION}",
            fix="install the same kvtier release, or one apart, on all nodes",
        )
    mac = _mac(own.token, "called", greeting, nonce, own.epoch)
    return PeerProof(mac=mac, node=own.node, epoch=own.epoch, version=version, nonce=nonce)


def prove(own: Identity, greeting: PeerHello, proof: PeerProof) -> PeerProof:
    """What the caller says to that. Raises AuthError when the other end does not know the token."""
    if len(proof.nonce) != NONCE_BYTES or proof.node != greeting.wanted:
        raise AuthError(f"'{proof.node}' answers where '{greeting.wanted}' should be")
    expected = _mac(own.token, "called", greeting, proof.nonce, proof.epoch)
    if not hmac.compare_digest(expected, proof.mac):
        raise AuthError(
            f"node '{greeting.wanted}' does not know this cluster's token",
            fix="give the same token to all nodes",
        )
    return PeerProof(mac=_mac(own.token, "caller", greeting, proof.nonce, proof.epoch))


def check(own: Identity, greeting: PeerHello, nonce: bytes, proof: PeerProof) -> None:
    """Whether the caller knows the token. Raises AuthError."""
    expected = _mac(own.token, "caller", greeting, nonce, own.epoch)
    if not hmac.compare_digest(expected, proof.mac):
        raise AuthError(f"node '{greeting.node}' does not know this cluster's token")


def _mac(token: bytes, side: Side, greeting: PeerHello, nonce: bytes, epoch: int) -> bytes:
    fields = [
        b"kvtier.peer",
        side.encode(),
        greeting.node.encode(),
        greeting.wanted.encode(),
        greeting.nonce,
        nonce,
        struct.pack("<Q", epoch),
    ]
    return hmac.digest(token, b"".join(struct.pack("<I", len(f)) + f for f in fields), "sha256")
