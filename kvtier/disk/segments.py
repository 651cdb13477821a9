"""Segment files: preallocated, written and read around the page cache straight from the caller's memory."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from kvtier.disk.buffers import BOUNCE_BYTES, PAGE, Scratch, ScratchPool, is_page_aligned
from kvtier.disk.fileops import Bytes, FileOps
from kvtier.errors import CorruptObject

_LOG = logging.getLogger(__name__)
_SUFFIX = ".seg"
# What file systems answer to O_DIRECT that do not have it.
_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
# A commit rarely touches more segments.
_FLUSHERS = 4


class Segments:
    """The open segment files of one directory.

    Raises OSError as the system gives it: what an error means for an object is the tier's to say.
    `write_block`, `read_block` and `flush` may run at once from any thread, beside a `create`, an `open` or
    a `remove` of another segment.
    """

    def __init__(self, directory: str, ops: FileOps, *, scratch: int, direct: bool = True) -> None:
        self._directory = directory
        self._ops = ops
        self._pool = ScratchPool(scratch)
        self._fds: dict[int, int] = {}
        self._new: set[int] = set()
        self._direct = direct
        self._count_lock = threading.Lock()
        self._device_bytes = 0
        self._flushers = ThreadPoolExecutor(_FLUSHERS, thread_name_prefix="kvtier-disk-flush")

    @property
    def direct_io(self) -> bool:
        """Whether the page cache is bypassed; False once the file system refused."""
        return self._direct

    @property
    def device_bytes(self) -> int:
        """Bytes written to segments since this object was made, headers and padding included."""
        return self._device_bytes

    def numbers_on_disk(self) -> list[int]:
        """Numbers of the segment files that the directory holds."""
        return segment_numbers(self._ops.names(self._directory))

    def create(self, segment: int, nbytes: int, *, durable: bool = False) -> None:
        """Make a segment file of `nbytes`; when that fails, none is left.

        Unless it is made durable here, the first flush of it makes the file itself survive power loss:
        whoever waits for room does not.
        """
        path = self._path(segment)
        fd = self._ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            try:
                self._ops.posix_fallocate(fd, 0, nbytes)
                if durable:
                    self._ops.fsync(fd)
                    self._ops.fsync_directory(self._directory)
            finally:
                self._ops.close(fd)
            opened = self._open_file(path)
        except OSError:
            self._ops.unlink(path)
            raise
        if not durable:
            self._new.add(segment)
        self._fds[segment] = opened

    def is_new(self, segment: int) -> bool:
        """Whether the file may be gone after power loss, since it was not flushed yet."""
        return segment in self._new

    def open(self, segment: int, nbytes: int) -> int:
        """Open a segment and make it `nbytes` long again if it is not; answers the length found.

        A file that is missing counts as one of length 0: its objects are lost, its room is not.
        """
        path = self._path(segment)
        try:
            fd = self._open_file(path)
        except FileNotFoundError:
            self.create(segment, nbytes)
            return 0
        self._fds[segment] = fd
        found = self._ops.size(fd)
        if found < nbytes:
            self._ops.posix_fallocate(fd, 0, nbytes)
            self._ops.fsync(fd)
        return found

    def file_bytes(self, segment: int) -> int:
        """Length of the segment's file on disk, before it was opened."""
        fd = self._ops.open(self._path(segment), os.O_RDONLY)
        try:
            return self._ops.size(fd)
        finally:
            self._ops.close(fd)

    def remove(self, segment: int) -> None:
        """Close and delete a segment. The caller has made sure that nothing refers to it."""
        self._ops.close(self._fds.pop(segment))
        self._new.discard(segment)
        self.delete(segment)

    def delete(self, segment: int) -> None:
        """Delete the file of a segment that is not open."""
        self._ops.unlink(self._path(segment))
        self._ops.fsync_directory(self._directory)

    def write_block(self, segment: int, offset: int, header: bytes, payload: Bytes) -> None:
        """Write a header page and its payload, or its first part, padded with zeros to whole pages."""
        with self._pool.take() as scratch:
            scratch.header[:] = np.frombuffer(header, dtype=np.uint8)
            self._write_pages(self._fds[segment], offset, scratch, [scratch.header], payload)

    def write_part(self, segment: int, offset: int, payload: Bytes) -> None:
        """Write another part of a payload. offset: of the part itself; only the last part is padded."""
        with self._pool.take() as scratch:
            self._write_pages(self._fds[segment], offset, scratch, [], payload)

    def read_block(self, segment: int, offset: int, into: Bytes) -> bytes:
        """Read the payload, or its first part, into `into` and answer its header page.

        Raises CorruptObject when the file ends before the block does.
        """
        with self._pool.take() as scratch:
            self._read_pages(self._fds[segment], offset, scratch, [scratch.header], into)
            return scratch.header.tobytes()

    def read_part(self, segment: int, offset: int, into: Bytes) -> None:
        """Read another part of a payload, as `read_block` does. offset: of the part itself."""
        with self._pool.take() as scratch:
            self._read_pages(self._fds[segment], offset, scratch, [], into)

    def read_pages(self, segment: int, offset: int, into: Bytes) -> None:
        """Read whole pages into page-aligned memory.

        Raises CorruptObject when the file ends before.
        """
        self._read_all(self._fds[segment], [into], offset)

    def flush(self, segments: Sequence[int]) -> None:
        """Make everything written to these segments survive power loss."""
        for segment in segments:
            if not self._ops.linked(self._fds[segment]):
                raise FileNotFoundError(errno.ENOENT, "the segment file was deleted", self._path(segment))
        new = self._new.intersection(segments)
        calls = [
            partial(self._ops.fsync if segment in new else self._ops.fdatasync, self._fds[segment])
            for segment in segments
        ]
        if new:
            calls.append(partial(self._ops.fsync_directory, self._directory))
        self._ops.together(calls, self._flushers)
        self._new -= new

    def close(self) -> None:
        """Close every file, and give back scratch memory."""
        self._flushers.shutdown()
        self._pool.forget()
        while self._fds:
            self._ops.close(self._fds.popitem()[1])

    def _path(self, segment: int) -> str:
        return path_of(self._directory, segment)

    def _open_file(self, path: str) -> int:
        if self._direct:
            try:
                return self._open_direct(path)
            except OSError as refusal:
                if refusal.errno not in _REFUSALS:
                    raise
                self._direct = False
                _LOG.warning("%s does not allow O_DIRECT: segments go through the page cache", path)
        return self._ops.open(path, os.O_RDWR)

    def _open_direct(self, path: str) -> int:
        """Open with O_DIRECT and read a page, since some file systems refuse only then."""
        fd = self._ops.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            with self._pool.take() as scratch:
                self._ops.preadv(fd, [scratch.header], 0)
        except OSError:
            self._ops.close(fd)
            raise
        return fd

    def _write_pages(
        self, fd: int, offset: int, scratch: Scratch, front: list[Bytes], payload: Bytes
    ) -> None:
        if self._direct and not is_page_aligned(payload):
            self._write_all(fd, front, offset)
            self._write_bounced(fd, offset + sum(b.nbytes for b in front), scratch, payload)
        else:
            whole = payload.nbytes - payload.nbytes % PAGE
            self._write_all(fd, [*front, payload[:whole], *_fill_tail(scratch, payload[whole:])], offset)

    def _read_pages(self, fd: int, offset: int, scratch: Scratch, front: list[Bytes], into: Bytes) -> None:
        if self._direct and not is_page_aligned(into):
            self._read_all(fd, front, offset)
            self._read_bounced(fd, offset + sum(b.nbytes for b in front), scratch, into)
        else:
            whole = into.nbytes - into.nbytes % PAGE
            tail = [scratch.tail] if whole < into.nbytes else []
            self._read_all(fd, [*front, into[:whole], *tail], offset)
            into[whole:] = scratch.tail[: into.nbytes - whole]

    def _write_bounced(self, fd: int, offset: int, scratch: Scratch, payload: Bytes) -> None:
        for at in range(0, payload.nbytes, BOUNCE_BYTES):
            part = payload[at : at + BOUNCE_BYTES]
            whole = part.nbytes - part.nbytes % PAGE
            np.copyto(scratch.bounce[:whole], part[:whole])
            buffers = [scratch.bounce[:whole], *_fill_tail(scratch, part[whole:])]
            self._write_all(fd, buffers, offset + at)

    def _read_bounced(self, fd: int, offset: int, scratch: Scratch, into: Bytes) -> None:
        for at in range(0, into.nbytes, BOUNCE_BYTES):
            part = into[at : at + BOUNCE_BYTES]
            room = -(-part.nbytes // PAGE) * PAGE
            self._read_all(fd, [scratch.bounce[:room]], offset + at)
            np.copyto(part, scratch.bounce[: part.nbytes])

    def _write_all(self, fd: int, buffers: Sequence[Bytes], offset: int) -> None:
        rest = [b for b in buffers if b.nbytes]
        while rest:
            done = self._whole(self._ops.pwritev(fd, rest, offset))
            if done == 0:
                raise OSError(errno.EIO, "a write made no progress")
            with self._count_lock:
                self._device_bytes += done
            offset += done
            rest = _after(rest, done)

    def _read_all(self, fd: int, buffers: Sequence[Bytes], offset: int) -> None:
        rest = [b for b in buffers if b.nbytes]
        while rest:
            done = self._whole(self._ops.preadv(fd, rest, offset))
            if done == 0:
                raise CorruptObject(f"the segment ends at {offset}, in the middle of a block")
            offset += done
            rest = _after(rest, done)

    def _whole(self, done: int) -> int:
        """What of a short transfer counts: with O_DIRECT the next one must start on a page again."""
        return done - done % PAGE if self._direct else done


def segment_numbers(names: Iterable[str]) -> list[int]:
    """Numbers of the segment files among the names of a directory."""
    stems = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def path_of(directory: str, segment: int) -> str:
    """Where a segment's file is."""
    return os.path.join(directory, f"{segment:08d}{_SUFFIX}")


def _fill_tail(scratch: Scratch, rest: Bytes) -> list[Bytes]:
    if rest.nbytes == 0:
        return []
    scratch.tail[: rest.nbytes] = rest
    scratch.tail[rest.nbytes :] = 0
    return [scratch.tail]


def _after(buffers: Sequence[Bytes], done: int) -> list[Bytes]:
    """The buffers that are left when their first `done` bytes are through."""
    left = []
    for buffer in buffers:
        if done < buffer.nbytes:
            left.append(buffer[done:])
        done = max(0, done - buffer.nbytes)
    return left
