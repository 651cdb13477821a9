"""Answers the questions of other nodes: each goes to the core as a stimulus, and back with its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvtier.errors import MalformedMessage, ProtocolError, TierUnavailable
from kvtier.host.sysmem import Bytes
from kvtier.host.tier import HostTier
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Message
from kvtier.messages.cluster import KEEP_MOST_S, PEER, Erase, Erased, GaveBack, Keep, Lend, Lent, WhatIs
from kvtier.node.limits import check_seconds
from kvtier.objects import ObjectId
from kvtier.peers.server import Opened
from kvtier.tier import Slot

# Longest that a question waits for the core: a read from disk, and the disk's flush of an erasure.
_ANSWER_S = {WhatIs: 2.0, Lend: 5.0, Erase: 15.0}
# And beyond the time that a Keep names itself.
_KEEP_MORE_S = 1.0


class _Question:
    """One that waits. given_up: its answer comes too late."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.answer: Message | None = None
        self.given_up = False


class PeerLender:
    """An ObjectSource over the core. Its methods may be called from any thread.

    tell: hands the core a message from a peer of this name, in the loop's thread, soon.
    buried: told of each tombstone that was carried out here, before who asked for it is.
    """

    def __init__(
        self,
        host: HostTier,
        tell: Callable[[str, Message], None],
        buried: Callable[[Erased], None],
    ) -> None:
        self._host = host
        self._tell = tell
        self._buried = buried
        self._lock = threading.Lock()
        self._serial = 0
        self._waiting: dict[str, _Question] = {}
        self._closed = False

    def answer(self, body: bytes, peer: str) -> bytes:
        """See PeerServer. Raises MalformedMessage, ProtocolError."""
        message = protocol.decode(body[protocol.LENGTH.size :])
        if not isinstance(message, WhatIs | Erase | Keep):
            raise MalformedMessage(f"nodes do not ask each other for {type(message).__name__}")
        if isinstance(message, Keep) and message.owner != peer:
            raise MalformedMessage(f"node '{peer}' asks in the name of '{message.owner}'")
        if isinstance(message, Keep):
            check_seconds("timeout_s", message.timeout_s)
        found = self._ask(message)
        if found is None:
            raise TierUnavailable("the node did not answer in time")
        if isinstance(found, Failed):
            raise ProtocolError(found.message, fix=found.fix)
        if isinstance(found, Erased):
            if not found.ok:
                raise TierUnavailable("it is not erased on disk yet")
            self._buried(found)
        return protocol.encode(found)

    @contextmanager
    def open(self, object_id: ObjectId, peer: str) -> Iterator[Opened | str]:
        """See ObjectSource."""
        key, group, shard = object_id
        lent = self._ask(Lend(block_key=key, group=group, shard=shard))
        if not isinstance(lent, Lent) or lent.item is None:
            yield lent.reason if isinstance(lent, Lent) and lent.reason == "missing" else "busy"
            return
        item = lent.item
        try:
            slot = Slot(item.slot_id, item.generation, (item.arena, item.offset), item.nbytes)
            assert item.checksum is not None, "what is committed has a checksum"
            yield Opened(self._view(slot), item.checksum)
        finally:
            self._tell(self._name(), GaveBack(loan=lent.loan))

    def answered(self, peer: str, message: Message) -> None:
        """The core answers a question; in the loop's thread."""
        with self._lock:
            question = self._waiting.pop(peer, None)
            late = question is None or question.given_up
            if question is not None and not late:
                question.answer = message
                question.answered.set()
        if late and isinstance(message, Lent) and message.loan:
            self._tell(self._name(), GaveBack(loan=message.loan))

    def close(self) -> None:
        """Whoever waits, or asks later, is told nothing more."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, {}
        for question in waiting.values():
            question.answered.set()

    def _view(self, slot: Slot) -> Bytes:
        return self._host.view(slot)

    def _ask(self, message: Message) -> Message | None:
        name, question = self._name(), _Question()
        with self._lock:
            if self._closed:
                return None
            self._waiting[name] = question
        self._tell(name, message)
        question.answered.wait(_longest_s(message))
        with self._lock:
            question.given_up = question.answer is None
        return question.answer

    def _name(self) -> str:
        with self._lock:
            self._serial += 1
            return f"{PEER}{self._serial}"


def _longest_s(message: Message) -> float:
    if isinstance(message, Keep):
        return min(max(message.timeout_s, 0.0), KEEP_MOST_S) + _KEEP_MORE_S
    return _ANSWER_S[type(message)]
