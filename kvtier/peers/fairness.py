"""Turns: a bounded number at once, and peers in rotation, however many connections each of them opens."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """limit: how many have a turn at once. From any thread."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._lock = threading.Lock()
        # In order of whose turn it is; those who wait for one peer in order of arrival.
        self._waiting: OrderedDict[str, deque[threading.Event]] = OrderedDict()

    @contextmanager
    def of(self, peer: str) -> Iterator[None]:
        """Wait for a turn of this peer's, and give it back."""
        mine = threading.Event()
        with self._lock:
            self._waiting.setdefault(peer, deque()).append(mine)
            self._hand_out()
        mine.wait()
        try:
            yield
        finally:
            with self._lock:
                self._free += 1
                self._hand_out()

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            peer, queue = self._waiting.popitem(last=False)
            queue.popleft().set()
            self._free -= 1
            if queue:
                # To the end of the row.
                self._waiting[peer] = queue
