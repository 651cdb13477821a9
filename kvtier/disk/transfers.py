"""Blocks on their way to or from the drive, in parts that several threads carry out at once.

A large block in one request leaves the other threads idle when there are few blocks, and its checksum for
the end.  How long a part is, is decided when a thread becomes free, by all that waits then: long parts keep
the drive as busy as it gets, and towards the end shorter ones let all threads end together, with little left
to check.  What was read is checked by threads of their own, while its reader reads on: parts that begin
together end together, and the drive would stand still for as long as all of them are hashed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from kvtier.checksum import PIECE_BYTES
from kvtier.errors import TierUnavailable

Check = Callable[[], None]
# Moves the bytes from .. to .. of a block, and answers what is left to do about them, if anything is.
Part = Callable[[int, int], Check | None]
End = Callable[[BaseException | None], BaseException | None]
# Some parts of this length keep a drive as busy as it gets; with smaller ones it is slower.
_PART_BYTES = 32 << 20
_LEAST_PART_BYTES = 2 << 20
# To hand less than this to another thread takes longer than to check it.
_LEAST_HANDED_OVER_BYTES = 1 << 20


def part_bytes(left_bytes: int, threads: int) -> int:
    """How long the next part is, of all that is left to move: whole pieces of the checksum."""
    even = -(-left_bytes // threads)
    return -(-min(max(even, _LEAST_PART_BYTES), _PART_BYTES) // PIECE_BYTES) * PIECE_BYTES


class Transfer:
    """One block. `end` is called once, after the last of its parts, by the thread that had it.

    whole: in one part.  end: is given the first part's problem or None, and answers the problem of the whole
    block or None.  After a problem the parts that have not begun are passed over.
    """

    def __init__(self, nbytes: int, part: Part, end: End, *, whole: bool = False) -> None:
        self.nbytes = nbytes
        self.future: Future[None] = Future()
        # It runs from now on: whoever holds it cannot take the block back.
        self.future.set_running_or_notify_cancel()
        self._part = part
        self._end = end
        self._whole = whole
        self._lock = threading.Lock()
        self._taken_bytes = self._under_way = 0
        self._all_taken = False
        self._problem: BaseException | None = None

    def take(self, step: int) -> tuple[int, int] | None:
        """(from, to) of the next part that nobody has, `step` bytes at most; an empty block has one, too.

        None when there are no more.  Whoever takes a part has to carry it out.
        """
        with self._lock:
            if self._all_taken:
                return None
            at = self._taken_bytes
            end = self.nbytes if self._whole else min(at + step, self.nbytes)
            self._taken_bytes, self._all_taken = end, end == self.nbytes
            self._under_way += 1
            return at, end

    def carry_out(self, at: int, end: int, checks: Executor | None = None) -> None:
        """A part that was taken. Raises its problem. checks: where a long part is checked; else here."""
        handed_over = False
        try:
            check = self._part(at, end) if self._problem is None else None
            if check is not None and checks is not None and end - at >= _LEAST_HANDED_OVER_BYTES:
                checks.submit(self._carry_out_check, check)
                handed_over = True
            elif check is not None:
                check()
        except BaseException as raised:
            self._note(raised)
            raise
        finally:
            if not handed_over:
                self._ended()

    def run(self) -> None:
        """All of it as one part, here. Raises the block's problem."""
        part = self.take(self.nbytes + 1)
        assert part is not None, "it was begun already"
        try:
            self.carry_out(*part)
        except BaseException:
            # What `end` made of it, as a rule.
            self.future.result()
            raise
        self.future.result()

    def refuse(self, problem: BaseException) -> None:
        """End it with a problem, before any part of it was taken."""
        self._note(problem)
        part = self.take(self.nbytes + 1)
        assert part is not None, "it was begun already"
        self.carry_out(*part)

    def _carry_out_check(self, check: Check) -> None:
        try:
            check()
        except BaseException as raised:
            self._note(raised)
            raise
        finally:
            self._ended()

    def _note(self, problem: BaseException) -> None:
        with self._lock:
            self._problem = self._problem or problem

    def _ended(self) -> None:
        """A part has ended, however."""
        with self._lock:
            self._under_way -= 1
            last = self._all_taken and not self._under_way
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


class Lane:
    """Threads that carry transfers out, in order of arrival.

    checks: threads for what is left to do about long parts.  prepare: called by each thread first.
    """

    def __init__(
        self,
        threads: int,
        name: str,
        checks: Executor | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.threads = threads
        self._checks = checks
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=prepare)
        self._changed = threading.Condition()
        self._waiting: deque[Transfer] = deque()
        self._left_bytes = self._at_work = 0
        self._closed = False

    def submit(self, transfers: Sequence[Transfer]) -> list[Future[None]]:
        """Begin them; each one's future says how it ended: with TierUnavailable, once the lane closes."""
        more = self._queue(transfers)
        if more is None:
            for transfer in transfers:
                transfer.refuse(TierUnavailable("the disk tier is closed"))
        for _ in range(more or 0):
            self._pool.submit(self._work)
        return [transfer.future for transfer in transfers]

    def _queue(self, transfers: Sequence[Transfer]) -> int | None:
        """Take them on; answers how many more threads they need. None: the lane takes nothing any more."""
        with self._changed:
            if self._closed:
                return None
            self._waiting.extend(transfers)
            self._left_bytes += sum(transfer.nbytes for transfer in transfers)
            parts = len(self._waiting) + self._left_bytes // _LEAST_PART_BYTES
            more = min(self.threads - self._at_work, parts)
            self._at_work += more
            return more

    def close(self) -> None:
        """Take nothing more, return when everything was carried out, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._at_work)
        self._pool.shutdown()

    def _work(self) -> None:
        """Parts until there are none."""
        no_more = False
        try:
            while (taken := self._take()) is not None:
                transfer, part = taken
                transfer.carry_out(*part, self._checks)
            no_more = True
        finally:
            if not no_more:
                # The block's future tells the problem; the others go on.
                self._pool.submit(self._work)

    def _take(self) -> tuple[Transfer, tuple[int, int]] | None:
        """The next part, or None when the thread that asks is not needed any more."""
        with self._changed:
            while self._waiting:
                part = self._waiting[0].take(part_bytes(self._left_bytes, self.threads))
                if part is not None:
                    self._left_bytes -= part[1] - part[0]
                    return self._waiting[0], part
                self._waiting.popleft()
            self._at_work -= 1
            self._changed.notify_all()
            return None


def failed(problem: BaseException) -> Part:
    """A part that fails at once: what could not even begin is told like everything else."""

    def part(at: int, end: int) -> None:
        raise problem

    return part
