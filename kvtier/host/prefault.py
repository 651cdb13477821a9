"""Faulting an arena in, in the background, so that it can serve from its first part on.

The first touch of a fresh page costs ten times a copy, so no copy should meet one; and an owner that first
faulted in all of a large arena would not answer for minutes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvtier.errors import TierUnavailable

STEP_BYTES = 64 << 20


class Prefaulter:
    """Faults sub-arenas in, one step of each in turn.

    populate(sub_arena, offset, nbytes) does a step; on_ready(sub_arena, ready_bytes) hears that the first
    ready_bytes may be used by now.  Both are called on the thread that runs `run`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        populate: Callable[[int, int, int], None],
        on_ready: Callable[[int, int], None],
        *,
        step_bytes: int = STEP_BYTES,
    ) -> None:
        self._sizes = tuple(sizes)
        self._populate = populate
        self._on_ready = on_ready
        self._step_bytes = step_bytes
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._complete = False
        self._failure: TierUnavailable | None = None

    def start(self) -> None:
        """Run on a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="kvtier-prefault", daemon=True)
        self._thread.start()

    def skip(self) -> None:
        """Call everything ready without touching it."""
        for sub_arena, size in enumerate(self._sizes):
            self._on_ready(sub_arena, size)
        self._complete = True
        self._ended.set()

    def run(self) -> None:
        """Run to the end, to `stop`, or to the first failure, which `wait` raises."""
        try:
            for offset in range(0, max(self._sizes), self._step_bytes):
                for sub_arena, size in enumerate(self._sizes):
                    if self._stop.is_set():
                        return
                    end = min(offset + self._step_bytes, size)
                    if offset < end:
                        self._populate(sub_arena, offset, end - offset)
                        self._on_ready(sub_arena, end)
            self._complete = True
        except TierUnavailable as failure:
            self._failure = failure
        finally:
            self._ended.set()

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for the end; answers whether all is ready. Raises TierUnavailable when a step failed."""
        self._ended.wait(timeout_s)
        if self._failure is not None:
            raise self._failure
        return self._complete

    def stop(self) -> None:
        """End after the step that runs, and wait for that."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
