"""A link of a given rate between this process and another one, which has a network of its own. Needs root.

The other process calls `leave` first; then this one calls `lay`, and the other one `join`.  Both ends of a
veth pair send through a token bucket (tc-tbf); a veth's own delay is a few microseconds.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

HERE, THERE = "10.213.9.1", "10.213.9.2"
_NEWNET = 0x40000000


def leave() -> None:
    """Give this process a network of its own, with nothing in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


@contextmanager
def lay(other: int, mbit: int) -> Iterator[None]:
    """A link to the network of the process `other`, until the end of the block."""
    here, there = f"kvh{other}", f"kvt{other}"
    _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", str(other))
    try:
        _up(here, HERE, mbit)
        yield
    finally:
        # The pair goes with one of its ends, and that end with its network.
        subprocess.run(["ip", "link", "delete", here], check=False, capture_output=True)


def join(mbit: int) -> None:
    """Take the other end of the link."""
    _up(f"kvt{os.getpid()}", THERE, mbit)


def _up(device: str, address: str, mbit: int) -> None:
    _run("ip", "address", "add", f"{address}/30", "dev", device)
    _run("ip", "link", "set", device, "up")
    _run(
        "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb",
        "latency", "50ms",
    )  # fmt: skip


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)
