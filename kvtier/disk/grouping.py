"""One flush and one index transaction for all commits that come while another one is under way.

The first caller leads: it carries its own commit out at once, alone.  Whoever comes meanwhile waits, and
when the leader is done, one of them leads for all of them together.  So a single caller waits for nobody,
and many share the cost of a flush.  A caller returns only after its own commit was carried out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

Work = TypeVar("Work")
CarryOut: TypeAlias = Callable[[Sequence[Work]], Sequence[BaseException | None]]


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Work]):
    """A caller's work; `done` wakes it: carried out, failed, or to lead."""

    work: Work
    done: threading.Event = field(default_factory=threading.Event)
    carried_out: bool = False
    failure: BaseException | None = None


class Group(Generic[Work]):
    """Callers from any thread; one of them at a time carries out one or several works."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: list[_Waiting[Work]] = []
        self._led = False

    def submit(self, work: Work, carry_out: CarryOut[Work]) -> None:
        """Return when the work was carried out. Raises what went wrong with it.

        carry_out: the same for all; returns for each work None or what went wrong with it.  What it raises
        itself is raised in every caller whose work it was given.  It comes with each call, since whoever has
        a group and is held by it could be freed by no reference count (see daemon/collector.py).
        """
        own = _Waiting(work)
        with self._lock:
            self._queue.append(own)
            leads = not self._led
            self._led = True
        if not leads:
            own.done.wait()
        if not own.carried_out and own.failure is None:
            self._lead(carry_out)
        if own.failure is not None:
            raise own.failure

    def _lead(self, carry_out: CarryOut[Work]) -> None:
        """Carry out everything that waits, the caller's own work among it, and hand over."""
        with self._lock:
            group, self._queue = self._queue, []
        try:
            failures = carry_out([waiting.work for waiting in group])
        except BaseException as problem:
            self._finish(group, [problem] * len(group))
            raise
        self._finish(group, failures)

    def _finish(self, group: Sequence[_Waiting[Work]], failures: Sequence[BaseException | None]) -> None:
        for waiting, failure in zip(group, failures, strict=True):
            waiting.failure = failure
            waiting.carried_out = failure is None
        with self._lock:
            if self._queue:
                self._queue[0].done.set()
            else:
                self._led = False
        for waiting in group:
            waiting.done.set()
