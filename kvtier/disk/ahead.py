"""Makes segments before they are needed: to find room takes a busy file system up to half a second."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvtier.background import step_back
from kvtier.errors import TierError

_SICK_DEVICE_S = 60.0


class AheadThread:
    """Calls `make` until it answers False, whenever it is woken, until `stop`.

    make: answers whether there was something to make.  Raises TierError, and is asked again after a while.
    """

    def __init__(self, make: Callable[[], bool]) -> None:
        self._make = make
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-disk-ahead", daemon=True)
        self._wanted.set()
        self._thread.start()

    def wake(self) -> None:
        """Room became low."""
        self._wanted.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        step_back()
        while self._wanted.wait() and not self._stopping.is_set():
            self._wanted.clear()
            try:
                while not self._stopping.is_set() and self._make():
                    pass
            except TierError:
                # It was said where it was noticed, and whoever needs the room hears it himself.
                self._stopping.wait(_SICK_DEVICE_S)
                self._wanted.set()
