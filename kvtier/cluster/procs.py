"""Processes that are ours: named by pid and start time, found by session, ended with a grace.

A pid alone may name a stranger by the time it is used; with its start time (and the boot) it cannot.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Fields of /proc/PID/stat, counted after the name in brackets (proc_pid_stat(5)).
_STATE, _SESSION, _START_TICKS = 0, 3, 19


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """One life of a pid. start_ticks: since boot, from /proc/PID/stat."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class _Stat:
    process: Process
    session: int
    zombie: bool


def boot_id() -> str:
    """Names this boot of the machine: start times mean nothing in another one."""
    return _BOOT_ID.read_text().strip()


def identify(pid: int) -> Process | None:
    """The process that has this pid now, unless it is only waiting to be reaped."""
    stat = _stat(pid)
    return None if stat is None or stat.zombie else stat.process


def alive(process: Process) -> bool:
    """Whether this very process runs still."""
    return identify(process.pid) == process


def session_members(leader: Process, marker: str) -> list[Process]:
    """The processes of the session that `leader` opened, and of nobody else.

    A session's number cannot be given out again while a member lives.  Should all be gone and the number
    be somebody else's, `marker` tells: this NAME=value stands in the environment of each process of ours.
    """
    present = _stat(leader.pid)
    if present is not None and present.process != leader:
        return []
    wanted = os.fsencode(marker)
    found = []
    for name in os.listdir("/proc"):
        stat = _stat(int(name)) if name.isdigit() else None
        if (
            stat is not None
            and not stat.zombie
            and stat.session == leader.pid
            and stat.process.start_ticks >= leader.start_ticks
            and wanted in _environment(stat.process.pid).split(b"\0")
        ):
            found.append(stat.process)
    return sorted(found)


def send(process: Process, number: signal.Signals) -> bool:
    """Signal this very process; False if it is gone. Raises PermissionError for another user's."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # The pidfd was opened first: what alive() then confirms is what the signal reaches.
        if not alive(process):
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def wait_ended(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Wait until all have ended; answers those that have not in time."""
    deadline_s = time.monotonic() + timeout_s
    for process in processes:
        _wait_one(process, deadline_s)
    return [process for process in processes if alive(process)]


def _wait_one(process: Process, deadline_s: float) -> None:
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if alive(process):
            select.select([handle], [], [], max(0.0, deadline_s - time.monotonic()))
    finally:
        os.close(handle)


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(Process(pid, int(fields[_START_TICKS])), int(fields[_SESSION]), fields[_STATE] in ("Z", "X"))


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
