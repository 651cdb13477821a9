"""Waiting for something that has no event of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_STEP_S = 0.005


def wait_until(happened: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it happened within the time; asked every few milliseconds, at least once."""
    end_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not happened():
        if time.monotonic() >= end_s:
            return False
        pause.wait(_STEP_S)
    return True
