"""Questions to the directory's services, and their answers, as bytes. Each names the shard that it is for."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import msgspec

from kvtier.directory.announcements import Announcement, Answer
from kvtier.directory.lookups import Hits
from kvtier.directory.merge import Conversation
from kvtier.errors import MalformedMessage
from kvtier.messages.cluster import Load


class Tell(msgspec.Struct, frozen=True, tag="tell"):
    """A message of a stream. address: host:port at which the node's peers reach it. Answered by Answer.

    load: of the node, as it is now.  services: a digest of the list of services that it goes by.
    """

    announcement: Announcement
    address: str
    load: Load | None = None
    services: str = ""


class Find(msgspec.Struct, frozen=True, tag="find"):
    """Who has these blocks? asked: by shard packed hints. Answered by Found."""

    tenant: str
    asked: list[tuple[int, bytes]]


class GetConversation(msgspec.Struct, frozen=True, tag="get"):
    """One conversation. Answered by Page. after: tombstones that the asker knows of; they count as well."""

    shard: int
    tenant: str
    conversation: str
    after: tuple[str, ...] = ()


class GetAfter(msgspec.Struct, frozen=True, tag="after"):
    """A page of conversations of each of these shards; see `Conversations.after`. Answered by Page."""

    shards: list[int]
    tenant: str
    after: tuple[str, str] | None
    at_most: int


class GetNodes(msgspec.Struct, frozen=True, tag="nodes"):
    """Every node that this service has heard of. Answered by Nodes."""


Call: TypeAlias = Tell | Find | GetConversation | GetAfter | GetNodes


class Found(msgspec.Struct, frozen=True):
    """Answer to Find, in its order. addresses, loads: of the nodes in it."""

    hits: list[Hits]
    addresses: dict[str, str]
    loads: dict[str, Load] = msgspec.field(default_factory=dict)


class Page(msgspec.Struct, frozen=True):
    """Answer to GetConversation and GetAfter. loads: of the nodes in the one that was asked for."""

    conversations: list[Conversation]
    loads: dict[str, Load] = msgspec.field(default_factory=dict)


class Node(msgspec.Struct, frozen=True):
    """A node. here: it was heard of lately.  load: as it said last."""

    node: str
    epoch: int
    address: str
    here: bool
    load: Load | None = None


class Nodes(msgspec.Struct, frozen=True):
    """Answer to GetNodes."""

    nodes: list[Node]


Told: TypeAlias = Answer | Found | Page | Nodes
T = TypeVar("T", Answer, Found, Page, Nodes)

_encode = msgspec.msgpack.Encoder().encode
_call = msgspec.msgpack.Decoder(Call)
# Made here and not at the first answer: msgspec crashes where two threads decode a class for the first time.
_answers: dict[type[Told], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Answer, Found, Page, Nodes)
}


def pack(what: Call | Told) -> bytes:
    """A call or an answer as bytes."""
    return _encode(what)


def unpack_call(body: bytes) -> Call:
    """The reverse of `pack`. Raises MalformedMessage."""
    try:
        call: Call = _call.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"not a call to the directory: {error}") from error
    return call


def unpack_answer(body: bytes, kind: type[T]) -> T:
    """An answer of this kind. Raises MalformedMessage."""
    try:
        answer: T = _answers[kind].decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"not an answer of the directory: {error}") from error
    return answer
