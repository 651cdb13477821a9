"""What another node says of itself at the handshake, where no honest node says it."""

from __future__ import annotations

import msgspec
import pytest

from kvtier.errors import AuthError, MalformedMessage
from kvtier.messages import protocol
from kvtier.messages.peers import PeerProof
from kvtier.peers import handshake
from kvtier.peers.handshake import Identity

TOKEN = b"0123456789abcdef"
ONE, OTHER = Identity("a", 7, TOKEN), Identity("b", 3, TOKEN)


def travelled(proof: PeerProof) -> PeerProof:
    """As it comes out at the other end."""
    found = protocol.decode(protocol.encode(proof)[protocol.LENGTH.size :])
    assert isinstance(found, PeerProof)
    return found


@pytest.mark.parametrize("epoch", [-1, -(2**63)])
def test_an_epoch_below_none_is_no_message(epoch: int) -> None:
    with pytest.raises(MalformedMessage):
        travelled(PeerProof(epoch=epoch))


@pytest.mark.parametrize("epoch", [0, 8, 2**63, 2**64 - 1])
def test_any_other_epoch_than_that_of_the_proof_is_refused(epoch: int) -> None:
    greeting = handshake.hello(OTHER, "a", bytes(32))
    proof = handshake.answer(ONE, greeting, b"n" * 32)
    assert handshake.prove(OTHER, greeting, travelled(proof)).mac
    with pytest.raises(AuthError):
        handshake.prove(OTHER, greeting, travelled(msgspec.structs.replace(proof, epoch=epoch)))
