"""Keep every core from falling asleep, without taking time from anybody.

On a virtual machine a message to a process whose core sleeps costs the time to wake that core, which may be
more than the call itself. A busy serving node has no sleeping cores, so both are worth knowing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import TracebackType

# The scheduler gives such a process only the time that nobody else wants.
_SPIN = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"


class CoresAwake:
    """One idle-priority loop for each core that this process may use; they end with the block."""

    def __init__(self) -> None:
        self._loops: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> CoresAwake:
        for core in os.sched_getaffinity(0):
            loop = subprocess.Popen([sys.executable, "-c", _SPIN])
            os.sched_setaffinity(loop.pid, {core})
            self._loops.append(loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for loop in self._loops:
            loop.kill()
            loop.wait()
