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

from kvtier.carriage import Bytes, Passing
from kvtier.cluster.members import Member, read_config
from kvtier.cluster.reconciler import Incarnation

# Calls at once; each brings a piece at most.
_CALLS = 16
# Of their threads, so many may be held by questions who is where: while Ray's head is away, those do not end.
_LOOKING = _CALLS // 2
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
    return read_config(member.config_text).cluster.directory_listen


class ActorCarrier:
    """A Carrier. find: an actor's handle by the name that is called, or None; may take long.

    call: carries a call to it, and waits for the answer so many seconds; raises OSError.
    """

    name = "ray"

    def __init__(
        self, find: Callable[[str], Any], call: Callable[[Any, Passing, float], Bytes | None]
    ) -> None:
        self._find, self._call = find, call
        self._changed = threading.Condition()
        self._known: dict[str, tuple[Any, float]] = {}
        # Whom a thread asks Ray for, and how many threads wait for what another one asks.
        self._finding: set[str] = set()
        self._waiting = 0
        self._calls = ThreadPoolExecutor(_CALLS, "kvtier-carry")

    def pass_on(self, node: str, call: Passing) -> Future[Bytes | None]:
        """See Carrier."""
        return self._calls.submit(self._carry, node, call)

    def _carry(self, node: str, call: Passing) -> Bytes | None:
        handle = self._handle(node, call)
        if handle is None:
            raise OSError(f"there is no actor of '{node}'")
        try:
            return self._call(handle, call, call.wait_s + _MORE_S)
        except OSError:
            with self._changed:
                if self._known[node][0] is handle:
                    # The next connection asks; those that are there go on with it, or end.
                    self._known[node] = handle, 0.0
            raise

    def _handle(self, node: str, call: Passing) -> Any:
        """Only a connection that begins asks Ray; one that is there goes on with the actor that is known."""
        with self._changed:
            handle, until_s = self._known.get(node, (None, 0.0))
            if until_s > time.monotonic() or not call.first:
                return handle
            if node in self._finding or self._all_look():
                return handle if handle is not None else self._found_by_another(node, call.wait_s)
            self._finding.add(node)
        try:
            handle = self._find(node)
            with self._changed:
                self._known[node] = handle, time.monotonic() + _KNOWN_S
        finally:
            with self._changed:
                self._finding.discard(node)
                self._changed.notify_all()
        return handle

    def _found_by_another(self, node: str, wait_s: float) -> Any:
        """With the lock. Raises OSError when nobody asks for it, or there is no answer in time."""
        if node in self._finding and not self._all_look():
            self._waiting += 1
            self._changed.wait_for(lambda: node not in self._finding, wait_s)
            self._waiting -= 1
            if node not in self._finding and node in self._known:
                return self._known[node][0]
        raise OSError(f"Ray does not say where '{node}' is")

    def _all_look(self) -> bool:
        return len(self._finding) + self._waiting >= _LOOKING
