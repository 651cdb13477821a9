"""Segment files: alignment, short transfers, and the fall back from O_DIRECT."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvtier.disk.buffers import BOUNCE_BYTES, PAGE
from kvtier.disk.fileops import Bytes, OsFileOps
from kvtier.disk.segments import Segments
from kvtier.errors import CorruptObject

SEGMENT_BYTES = 4 << 20
LENGTHS = [0, 1, 4095, 4096, 4097, BOUNCE_BYTES, BOUNCE_BYTES + 4097, 3 * BOUNCE_BYTES - 1]
HEADER = bytes(range(256)) * 16


class SpyOps(OsFileOps):
    """Notes what is transferred, owns to at most `most` bytes a call, and refuses O_DIRECT if told so.

    What is moved is a whole number of pages, since O_DIRECT takes nothing else.
    """

    def __init__(self, *, most: int = 1 << 40, refuse_open: bool = False, refuse_read: bool = False) -> None:
        self.most = most
        self.refuse_open = refuse_open
        self.refuse_read = refuse_read
        self.refusal = errno.EINVAL
        self.addresses: list[int] = []
        self._direct: set[int] = set()

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT and self.refuse_open:
            raise OSError(self.refusal, "no O_DIRECT here")
        fd = super().open(path, flags, mode)
        self._direct.discard(fd)
        if flags & os.O_DIRECT:
            self._direct.add(fd)
        return fd

    def _cut(self, buffers: Sequence[Bytes]) -> list[Bytes]:
        self.addresses += [b.ctypes.data for b in buffers]
        left, cut = -(-self.most // PAGE) * PAGE, []
        for buffer in buffers:
            cut.append(buffer[:left])
            left -= cut[-1].nbytes
        return [b for b in cut if b.nbytes]

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        return min(self.most, super().pwritev(fd, self._cut(buffers), offset))

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        if self.refuse_read and fd in self._direct:
            raise OSError(self.refusal, "no O_DIRECT here")
        return min(self.most, super().preadv(fd, self._cut(buffers), offset))


def make(tmp_path: Path, ops: SpyOps, *, direct: bool = True) -> Segments:
    segments = Segments(str(tmp_path), ops, scratch=2, direct=direct)
    segments.create(0, SEGMENT_BYTES)
    return segments


def memory(nbytes: int, shift: int) -> Bytes:
    """nbytes of page-aligned memory moved by `shift` bytes, with noise and 64 bytes of 0xEE around."""
    room = np.frombuffer(mmap.mmap(-1, nbytes + 3 * PAGE), dtype=np.uint8)
    room[:] = 0xEE
    view = room[PAGE + shift : PAGE + shift + nbytes]
    view[:] = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    return view


def surroundings(view: Bytes) -> Bytes:
    base = view.base
    assert isinstance(base, np.ndarray)
    start = view.ctypes.data - base.ctypes.data
    return np.concatenate([base[:start], base[start + view.nbytes :]])


@pytest.mark.parametrize("most", [1 << 40, 3 * PAGE, PAGE + 1])
@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("direct", [True, False])
def test_every_length_comes_back_and_nothing_beside_it(
    tmp_path: Path, direct: bool, shift: int, most: int
) -> None:
    segments = make(tmp_path, SpyOps(most=most), direct=direct)
    for nbytes in LENGTHS:
        segments.write_block(0, PAGE, HEADER, memory(nbytes, shift))
        into = memory(nbytes, shift)
        into[:] = 0
        assert segments.read_block(0, PAGE, into) == HEADER
        assert np.array_equal(into, memory(nbytes, shift))
        assert (surroundings(into) == 0xEE).all()
    segments.close()
    raw = (tmp_path / "00000000.seg").read_bytes()
    last = LENGTHS[-1]
    assert raw[2 * PAGE + last : 2 * PAGE + last + 1] == b"\0", "the padding shows a neighbour's byte"
    assert not any(raw[:PAGE])


def test_aligned_memory_is_written_and_read_where_it_is(tmp_path: Path) -> None:
    ops = SpyOps()
    segments = make(tmp_path, ops)
    if not segments.direct_io:
        pytest.skip("this file system refuses O_DIRECT")
    payload, into = memory(2 << 20, 0), memory(2 << 20, 0)
    ops.addresses.clear()
    segments.write_block(0, 0, HEADER, payload)
    segments.read_block(0, 0, into)
    assert payload.ctypes.data in ops.addresses
    assert into.ctypes.data in ops.addresses
    assert len(ops.addresses) == 4, "header and payload go in one call"
    ops.addresses.clear()
    segments.write_block(0, 0, HEADER, memory(2 << 20, 8))
    assert all(address % PAGE == 0 for address in ops.addresses)
    segments.close()


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refusal", ["open", "read"])
def test_refused_direct_io_falls_back_once_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refusal: str, answer: int
) -> None:
    ops = SpyOps(refuse_open=refusal == "open", refuse_read=refusal == "read")
    ops.refusal = answer
    segments = make(tmp_path, ops)
    segments.create(1, SEGMENT_BYTES)
    assert not segments.direct_io
    assert sum("O_DIRECT" in record.message for record in caplog.records) == 1
    segments.write_block(1, 0, HEADER, memory(5000, 8))
    into = memory(5000, 0)
    into[:] = 0
    segments.read_block(1, 0, into)
    assert np.array_equal(into, memory(5000, 8))
    segments.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("keep", [0, PAGE, PAGE + 100, 5 * PAGE, 6 * PAGE + 7])
def test_a_short_read_is_never_taken_for_a_whole_one(tmp_path: Path, direct: bool, keep: int) -> None:
    segments = make(tmp_path, SpyOps(), direct=direct)
    segments.write_block(0, 0, HEADER, memory(6 * PAGE + 100, 0))
    os.truncate(tmp_path / "00000000.seg", keep)
    for shift in (0, 8):
        with pytest.raises(CorruptObject):
            segments.read_block(0, 0, memory(6 * PAGE + 100, shift))
    segments.close()


def test_a_write_without_progress_is_an_error(tmp_path: Path) -> None:
    ops = SpyOps()
    segments = make(tmp_path, ops)
    ops.most = 0
    with pytest.raises(OSError, match="no progress"):
        segments.write_block(0, 0, HEADER, memory(PAGE, 0))
    segments.close()


def test_a_segment_that_cannot_be_made_leaves_no_file(tmp_path: Path) -> None:
    class FullOps(SpyOps):
        def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
            raise OSError(errno.ENOSPC, "full")

    segments = Segments(str(tmp_path), FullOps(), scratch=1)
    with pytest.raises(OSError, match="full"):
        segments.create(0, SEGMENT_BYTES)
    assert segments.numbers_on_disk() == []


def test_truncated_and_missing_segments_get_their_length_back(tmp_path: Path) -> None:
    segments = make(tmp_path, SpyOps())
    segments.create(1, SEGMENT_BYTES)
    segments.close()
    os.truncate(tmp_path / "00000000.seg", 100)
    os.unlink(tmp_path / "00000001.seg")
    assert segments.numbers_on_disk() == [0]
    assert segments.open(0, SEGMENT_BYTES) == 100
    assert segments.open(1, SEGMENT_BYTES) == 0
    assert [segments.file_bytes(n) for n in (0, 1)] == [SEGMENT_BYTES] * 2
    segments.close()


def test_a_deleted_file_cannot_be_flushed(tmp_path: Path) -> None:
    segments = make(tmp_path, SpyOps())
    segments.flush([0])
    os.unlink(tmp_path / "00000000.seg")
    with pytest.raises(FileNotFoundError):
        segments.flush([0])
    segments.close()


class MeetingOps(OsFileOps):
    """Each flush waits until all of them are under way; the one of `bad` fails."""

    def __init__(self, flushes: int, bad: str = "") -> None:
        self.meeting = threading.Barrier(flushes)
        self.bad = bad
        self.ended: list[str] = []

    def _come(self, what: str) -> None:
        self.meeting.wait(20)
        if what == self.bad:
            raise OSError(errno.EIO, what)
        self.ended.append(what)

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self._come("file")

    def fsync_directory(self, directory: str) -> None:
        super().fsync_directory(directory)
        self._come("directory")


def test_several_new_segments_and_their_names_are_flushed_at_once(tmp_path: Path) -> None:
    ops = MeetingOps(4)
    segments = Segments(str(tmp_path), ops, scratch=1)
    for number in range(3):
        segments.create(number, SEGMENT_BYTES)
    segments.flush([0, 1, 2])
    assert sorted(ops.ended) == ["directory", "file", "file", "file"]
    assert not any(segments.is_new(number) for number in range(3))
    segments.close()


def test_when_one_of_the_flushes_fails_the_segments_stay_new(tmp_path: Path) -> None:
    ops = MeetingOps(3, bad="directory")
    segments = Segments(str(tmp_path), ops, scratch=1)
    for number in range(2):
        segments.create(number, SEGMENT_BYTES)
    with pytest.raises(OSError, match="directory"):
        segments.flush([0, 1])
    assert ops.ended == ["file", "file"], "the others have ended too"
    assert segments.is_new(0)
    assert segments.is_new(1)
    segments.close()


def test_closed_segments_hold_no_scratch_memory(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("/dev/zero")

    gc.collect()  # what other tests left
    before = mapped()
    segments = make(tmp_path, SpyOps())
    segments.write_block(0, 0, HEADER, memory(4097, 1))
    assert mapped() > before
    segments.close()
    assert mapped() == before
