"""The few system calls that the segments use, behind one object, so that tests can make them fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class FileOps(Protocol):
    """Each call has the meaning, and raises the OSError, of the one in `os` with its name."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int: ...

    def close(self, fd: int) -> None: ...

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int: ...

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int: ...

    def fdatasync(self, fd: int) -> None: ...

    def fsync(self, fd: int) -> None: ...

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None: ...

    def size(self, fd: int) -> int:
        """Length of the open file in bytes."""
        ...

    def linked(self, fd: int) -> bool:
        """Whether the open file still has a name; without one, nothing in it survives."""
        ...

    def unlink(self, path: str) -> None: ...

    def names(self, directory: str) -> list[str]:
        """Names of the files in a directory."""
        ...

    def fsync_directory(self, directory: str) -> None:
        """Make names created or removed in the directory survive power loss."""
        ...

    def together(self, calls: Sequence[Callable[[], None]], threads: Executor) -> None:
        """Make these calls in any order, or at once. When one of them raises, the others have ended, too."""
        ...


class OsFileOps:
    """The real ones."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        return os.pwritev(fd, [b.data for b in buffers], offset)

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        return os.preadv(fd, [b.data for b in buffers], offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        os.posix_fallocate(fd, offset, nbytes)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def linked(self, fd: int) -> bool:
        return os.fstat(fd).st_nlink > 0

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def names(self, directory: str) -> list[str]:
        return os.listdir(directory)

    def fsync_directory(self, directory: str) -> None:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def together(self, calls: Sequence[Callable[[], None]], threads: Executor) -> None:
        # Each flush sleeps until the drive answers: several take hardly longer than one.
        running = [threads.submit(call) for call in calls[1:]]
        try:
            for call in calls[:1]:
                call()
        finally:
            wait(running)
        for each in running:
            each.result()
