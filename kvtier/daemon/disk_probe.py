"""What the disk service tries on its drive: a block that is never listed, and O_DIRECT."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from kvtier.disk.entry import room_for
from kvtier.disk.fileops import FileOps
from kvtier.disk.lock import FORMAT
from kvtier.disk.tier import DiskTier
from kvtier.errors import ConfigError, StaleSlot, TierFull
from kvtier.objects import KEY_BYTES, ObjectId, ObjectMeta, Root
from kvtier.tier import Slot

# Written, and never listed, to see whether a drive works.
_PROBE = ObjectMeta(
    ObjectId(b"\0" * KEY_BYTES, 0, "probe"),
    Root(b"\0" * KEY_BYTES, "", b"\0" * KEY_BYTES, "exact", 16),
    b"\0" * KEY_BYTES,
    0,
    16,
    0,
    1,
)
PROBE_ROOM_BYTES = room_for(_PROBE.nbytes)
_MOUNTS = Path("/proc/self/mountinfo")


def write_probe(tier: DiskTier) -> None:
    """Write and flush a block that is never listed; a store without room for it only has to flush.

    Raises as a write and a commit do.
    """
    try:
        slot = tier.reserve(_PROBE, holder="probe")
    except TierFull:
        tier.try_flush()
        return
    try:
        tier.write(slot, bytes(_PROBE.nbytes))
        tier.flush(slot)
    finally:
        _give_up(tier, slot)


def check_direct_io(directory: Path, ops: FileOps) -> None:
    """Raise ConfigError where the store's folder cannot be read past the page cache."""
    try:
        fd = ops.open(str(directory / FORMAT), os.O_RDONLY | os.O_DIRECT)
        try:
            # Some file systems refuse only the transfer.
            page = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.uint8)
            ops.preadv(fd, [page], 0)
        finally:
            ops.close(fd)
    except OSError as error:
        raise ConfigError(
            "disk.direct_io",
            f"{directory} lies on {_file_system(directory)}, which does not take O_DIRECT: {error.strerror}",
            fix='choose a folder on a local drive (ext4, xfs), or set disk.direct_io = "auto"',
        ) from error


def _give_up(tier: DiskTier, slot: Slot) -> None:
    try:
        tier.abort(slot, quiet=True)
    except StaleSlot:
        # A write that failed has given it up.
        return


def _file_system(directory: Path) -> str:
    """Kind of the file system that a folder lies on, as the kernel's list of mounts has it."""
    device = os.stat(directory).st_dev
    place = f"{os.major(device)}:{os.minor(device)}"
    for line in _MOUNTS.read_text(errors="replace").splitlines():
        front, _, back = line.partition(" - ")
        if place in front.split()[2:3]:
            return back.split()[0]
    return "a file system"
