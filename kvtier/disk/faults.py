"""What an operating system's or SQLite's error means for the one who drives the tier."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from kvtier.errors import TierError, TierFull, TierUnavailable

_LOG = logging.getLogger(__name__)
# What a drive or its driver answers when these bytes are gone, as opposed to the whole device.
_UNREADABLE = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EBADMSG, errno.EREMOTEIO})
# SQLite quotes a damaged schema in its messages, which then are no text.
INDEX_ERRORS = (sqlite3.Error, UnicodeDecodeError)
# What may find no room on the file system.
INDEX_WRITE, SEGMENT_MAKING, BLOCK_WRITE = "writing the index", "making a segment", "writing"
FLUSH, GRAVES_WRITE = "flushing", "noting what was removed"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_unreadable(problem: OSError) -> bool:
    """Whether a failed read says that these bytes are lost."""
    return problem.errno in _UNREADABLE


class Faults:
    """Turns errors into the tier's own, says them in the log, and remembers the last one."""

    def __init__(self) -> None:
        self.last_error = ""
        self._no_room: dict[str, str] = {}

    @property
    def no_room(self) -> str:
        """What others leave no room for on the file system; '' when there is room."""
        return next(iter(self._no_room.values()), "")

    def worked(self, doing: str) -> None:
        """There is room for it (again)."""
        self._no_room.pop(doing, None)

    def unavailable(self, text: str) -> TierUnavailable:
        """The error to raise when the device or directory does not work."""
        self.last_error = text
        _LOG.error("disk tier: %s", text)
        return TierUnavailable(text, fix="check the drive, its mount and the kernel's log")

    def of_device(self, doing: str, problem: OSError, needed_bytes: int) -> TierError:
        """The error to raise for a failed system call: TierFull when others filled the file system."""
        if problem.errno not in _NO_ROOM:
            return self.unavailable(f"{doing} failed: {problem}")
        text = f"{doing}: the file system is full, though the tier is not"
        self.last_error = self._no_room[doing] = text
        _LOG.error("disk tier: %s", text)
        return TierFull(text, needed_bytes=needed_bytes, fix="free room on it, or lower disk.capacity_bytes")

    @contextmanager
    def of_index(self) -> Iterator[None]:
        """Turn SQLite's errors within the block into the tier's."""
        try:
            yield
        except INDEX_ERRORS as problem:
            if getattr(problem, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                full = OSError(errno.ENOSPC, str(problem))
                raise self.of_device(INDEX_WRITE, full, 0) from problem
            raise self.unavailable(f"the index failed: {problem}") from problem
