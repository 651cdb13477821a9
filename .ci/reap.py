"""Run a command, then end every process that it or its children left behind, and name them.

python3 reap.py -- COMMAND [ARGUMENT ...]        exits with the command's own code
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PATIENCE_S = 10.0


def children() -> list[int]:
    """Process ids below this process, nearest first; orphans come here since it is their reaper."""
    found: list[int] = []
    pending = [os.getpid()]
    while pending:
        pid = pending.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                below = [int(child) for child in task.read_text().split()]
            except OSError:
                continue
            found += below
            pending += below
    return found


def name(pid: int) -> str:
    """The command line of a process, for people."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    except OSError:
        return "?"


def collect() -> None:
    """Take the exit codes of children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def end_all() -> None:
    """SIGTERM to all that is left, SIGKILL after a while."""
    collect()
    left = children()
    for pid in left:
        print(f"still running, ended now: {pid} {name(pid)}", file=sys.stderr)
    deadline_s = time.monotonic() + PATIENCE_S
    while left:
        kill = signal.SIGTERM if time.monotonic() < deadline_s else signal.SIGKILL
        for pid in left:
            try:
                os.kill(pid, kill)
            except ProcessLookupError:
                continue
        time.sleep(0.2)
        collect()
        left = children()


def main() -> int:
    """Run the command after `--`."""
    command = sys.argv[sys.argv.index("--") + 1 :]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The command gets ^C too and ends by itself; this process must outlive it to clean up. Not SIG_IGN: the
    # command would inherit that.
    signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    finally:
        end_all()


if __name__ == "__main__":
    sys.exit(main())
