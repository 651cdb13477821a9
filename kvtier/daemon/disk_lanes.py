"""The disk service's connection to a node, and the threads that carry out what came over it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from kvtier.host.arena import ArenaView
from kvtier.messages.calls import Message
from kvtier.messages.tiers import DiskUsage
from kvtier.messages.wire import Channel, ChannelLost

log = logging.getLogger(__name__)

# Jobs of one kind under way at once, each kind in threads of its own: a read waits for no write, and a write
# that somebody waits for waits for no spill.  Writes that come together share a flush, so it takes many of
# them to make small parks cheap.  Removals and looking after a sick drive ('rest'): one after the other.
_JOBS = {"write": 16, "spill": 2, "read": 4, "rest": 1}
_ANSWER_S = 10.0

Lane: TypeAlias = Literal["write", "spill", "read", "rest"]


class Running(NamedTuple):
    """A job that a thread is at. what: its message.  age_s: since the thread began."""

    what: str
    age_s: float


@dataclass(slots=True)
class Session:
    """One connection to a node, and its host memory. said: the counts that it knows."""

    channel: Channel
    arena: ArenaView
    lock: threading.Lock
    said: DiskUsage | None = None

    def send(self, message: Message) -> None:
        """From any thread. Raises ChannelLost."""
        with self.lock:
            self.channel.send(message, time.monotonic() + _ANSWER_S)

    def say(self, usage: DiskUsage) -> None:
        """Send the counts."""
        self.said = usage
        self.send(usage)


class Lanes:
    """Threads for each kind of job, and what they are at."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pools = {
            lane: ThreadPoolExecutor(jobs, thread_name_prefix=f"kvtier-disk-{lane}-job")
            for lane, jobs in _JOBS.items()
        }
        self._serials = itertools.count()
        self._lock = threading.Lock()
        self._running: dict[int, tuple[str, float]] = {}

    def close(self) -> None:
        """Return when nothing of them runs."""
        for pool in self._pools.values():
            pool.shutdown()

    def oldest(self) -> Running | None:
        """The job that has been under way for the longest; None when all threads are idle."""
        with self._lock:
            first = next(iter(self._running.values()), None)
        return None if first is None else Running(first[0], self._clock() - first[1])

    def submit(
        self, lane: Lane, work: Callable[[Session, Any], None], session: Session, message: Message
    ) -> None:
        """Have a thread of the lane do it. What it cannot carry out ends the connection."""
        what = type(message).__name__

        def run() -> None:
            serial = next(self._serials)
            with self._lock:
                self._running[serial] = (what, self._clock())
            try:
                work(session, message)
            except ChannelLost as error:
                # Part of an answer may have gone: nothing more can be said over this connection.
                log.info("the node could not be answered: %s", error)
                session.channel.shutdown()
            except BaseException:
                # The node would wait for an answer for ever; without the connection it knows.
                log.exception("%s was not carried out", what)
                session.channel.shutdown()
                raise
            finally:
                with self._lock:
                    del self._running[serial]

        self._pools[lane].submit(run)
