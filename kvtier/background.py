"""Threads that nobody waits for step back behind those that somebody waits for."""

from __future__ import annotations

import os
import threading

# A contended processor gives a thread with this much more `nice` a third of what it gives another.  With much
# more, whoever waits for the interpreter's lock while such a thread has it would wait for long.
NICER = 5


def step_back() -> None:
    """From now on the calling thread leaves the processor to others that want it."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
