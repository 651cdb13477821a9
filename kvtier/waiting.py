"""Waiting for something that has no event of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

_STEP_S = 0.005


def join_all(threads: Iterable[threading.Thread], timeout_s: float) -> bool:
    """Whether all of them ended within the time."""
    end_s = time.monotonic() + timeout_s
    alive = False
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
        alive = alive or thread.is_alive()
    return not alive


def wait_until(happened: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it happened within the time; asked every few milliseconds, at least once."""
    end_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not happened():
        if time.monotonic() >= end_s:
            return False
        pause.wait(_STEP_S)
    return True
