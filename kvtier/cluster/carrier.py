"""Bytes between nodes that TCP does not connect, in calls of their actors; grip.py makes the calls.

Slow, so nothing travels like this where TCP can (kvtier/peers/ways.py).  Nothing is decided here: who may
ask, and whether what came is right, both ends find out as they do over TCP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec

from kvtier.carriage import Bytes, Passing
from kvtier.cluster.members import Member
from kvtier.cluster.reconciler import Incarnation
from kvtier.config_schema import Config

# Calls at once; each brings a piece at most.
_CALLS = 16
# Beyond what the other end waits for itself.
_MORE_S = 5.0
# So long is what Ray says of who is where believed; also that there is nobody.
_KNOWN_S = 2.0
_DIRECTORY = "directory@"


def actor_of(called: str, members: Iterable[Member], alive: Iterable[Incarnation]) -> Incarnation | None:
    """The newest actor of a node by its name, or of the service 'directory@host:port'; None: nobody."""
    if called.startswith(_DIRECTORY):
        role, address = "directory", called.removeprefix(_DIRECTORY)
        there = {m.node for m in members if _directory_at(m) == address}
    else:
        role, there = "host", {m.node for m in members if m.name == called}
    found = [who for who in alive if who.role == role and who.node in there]
    return max(found, key=lambda who: who.epoch, default=None)


def _directory_at(member: Member) -> str:
    return msgspec.json.decode(member.config_text, type=Config).cluster.directory_listen


class ActorCarrier:
    """A Carrier. find: an actor's handle by the name that is called, or None; may take long.

    call: carries a call to it, and waits for the answer so many seconds; raises OSError.
    """

    name = "ray"

    def __init__(
        self, find: Callable[[str], Any], call: Callable[[Any, Passing, float], Bytes | None]
    ) -> None:
        self._find, self._call = find, call
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Any, float]] = {}
        self._calls = ThreadPoolExecutor(_CALLS, "kvtier-carry")

    def pass_on(self, node: str, call: Passing) -> Future[Bytes | None]:
        """See Carrier."""
        return self._calls.submit(self._carry, node, call)

    def _carry(self, node: str, call: Passing) -> Bytes | None:
        handle = self._handle(node, new=call.first)
        if handle is None:
            raise OSError(f"there is no actor of '{node}'")
        try:
            return self._call(handle, call, call.wait_s + _MORE_S)
        except OSError:
            with self._lock:
                self._known.pop(node, None)
            raise

    def _handle(self, node: str, *, new: bool) -> Any:
        """new: a connection begins; one that is there goes on with the actor that it began with."""
        now_s = time.monotonic()
        with self._lock:
            handle, until_s = self._known.get(node, (None, 0.0))
        if until_s > now_s or (handle is not None and not new):
            return handle
        handle = self._find(node)
        with self._lock:
            self._known[node] = handle, time.monotonic() + _KNOWN_S
        return handle
