"""Blocks on their way to or from the drive, in parts that several threads carry out at once.

A large block in one request leaves the other threads idle when there are few blocks, and its checksum for
the end.  In parts, every thread has something to move, and one part is checked while others are still read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from kvtier.checksum import PIECE_BYTES

Part = Callable[[], None]
End = Callable[[BaseException | None], BaseException | None]
# Some parts of this length keep a drive as busy as it gets; with smaller ones it is slower.
_PART_BYTES = 32 << 20
_LEAST_PART_BYTES = 2 << 20


def part_bytes(total_bytes: int, threads: int) -> int:
    """Into parts of which length to cut, so that each thread gets one: whole pieces of the checksum."""
    even = -(-total_bytes // threads)
    return -(-min(max(even, _LEAST_PART_BYTES), _PART_BYTES) // PIECE_BYTES) * PIECE_BYTES


def cuts(nbytes: int, step: int) -> list[tuple[int, int]]:
    """(from, to) of the parts of a block; one of them when it is empty."""
    return [(at, min(at + step, nbytes)) for at in range(0, max(nbytes, 1), step)]


class Transfer:
    """The parts of one block. `end` is called once, after the last of them, by the thread that had it.

    end: is given the first part's problem or None, and answers the problem of the whole block or None.
    After a problem the parts that have not begun are passed over.
    """

    def __init__(self, parts: Sequence[Part], end: End) -> None:
        self.future: Future[None] = Future()
        # It runs from now on: whoever holds it cannot take the block back.
        self.future.set_running_or_notify_cancel()
        self._parts = parts
        self._end = end
        self._lock = threading.Lock()
        self._left = len(parts)
        self._problem: BaseException | None = None

    def run(self) -> None:
        """The only part, here. Raises the block's problem."""
        (part,) = self._parts
        try:
            self._carry_out(part)
        except BaseException:
            # What `end` made of it, as a rule.
            self.future.result()
            raise
        self.future.result()

    def submit(self, pool: Executor) -> Future[None]:
        """All parts by the threads of a pool."""
        for part in self._parts:
            pool.submit(self._carry_out, part)
        return self.future

    def _carry_out(self, part: Part) -> None:
        try:
            if self._problem is None:
                part()
        except BaseException as raised:
            with self._lock:
                self._problem = self._problem or raised
            raise
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._finish()

    def _finish(self) -> None:
        try:
            problem = self._end(self._problem)
        except BaseException as raised:
            self.future.set_exception(raised)
            raise
        if problem is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(problem)


def failed(problem: BaseException) -> Part:
    """A part that fails at once: what could not even begin is told like everything else."""

    def part() -> None:
        raise problem

    return part
