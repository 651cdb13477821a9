"""What a process that lives long takes: descriptors, threads and memory, from one audit to the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from chaos_nodes import Broken

# Whatever was started when.
_MOST_DESCRIPTORS = 400


class Size(NamedTuple):
    """Of a process. kib: resident."""

    descriptors: int
    threads: int
    kib: int

    @classmethod
    def of(cls, pid: int) -> Size:
        """Now. Raises OSError."""
        proc = Path(f"/proc/{pid}")
        kib = int((proc / "statm").read_text().split()[1]) * 4
        return cls(len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")), kib)

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.kib} KiB"


# By how much a process may grow after the first audit that it lived to see, at which it has served a round
# under load: five times what was seen in ten rounds.  Each of 128 segments has a descriptor, each connection
# of a peer one and a thread, and pools have 50 threads at most, each started when it is needed first; memory
# holds what was learned and which names were forgotten.  What leaks by one piece a call is far beyond this.
GROWS_MOST = Size(descriptors=150, threads=60, kib=48 << 10)


class Growth:
    """See the module's text."""

    def __init__(self) -> None:
        # By pid: the size at the first audit, and how many there were.
        self._first: dict[int, tuple[Size, int]] = {}

    def saw(self, who: str, pid: int, size: Size) -> int:
        """It has this size; answers how many audits it has lived to see. Raises Broken where it has grown."""
        first, audits = self._first.get(pid, (size, 0))
        self._first[pid] = (first, audits + 1)
        if size.descriptors > _MOST_DESCRIPTORS:
            raise Broken(f"{who} has {size.descriptors} descriptors open")
        if any(now - then > most for now, then, most in zip(size, first, GROWS_MOST, strict=True)):
            raise Broken(f"{who} GROWS: {first} at its first audit, {size} {audits} later")
        return audits + 1
