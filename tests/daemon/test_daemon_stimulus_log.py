"""The stimulus log's file: in order, without waiting, and a truthful end when the drive cannot follow."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvtier.client.client import connect
from kvtier.daemon import node_service, stimulus_log
from kvtier.daemon.embedded import Embedded
from kvtier.daemon.stimulus_log import StimulusLog
from kvtier.errors import KvtierError
from kvtier.node.journal import read
from kvtier.testing.gates import Gate
from kvtier.testing.node_bench import until


@pytest.fixture
def gate(tmp_path: Path) -> Any:
    gate = Gate(tmp_path / "drive")
    yield gate
    gate.open()


@pytest.fixture
def slow(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A drive whose writes wait at the gate, on the thread that aiofiles gives them."""

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            gate.come()
            return super().write(data) or 0

    _opens(File, monkeypatch)
    return gate


def _opens(kind: type[io.FileIO], monkeypatch: pytest.MonkeyPatch) -> None:
    from aiofiles.threadpool import _open as opened

    async def open_sync(path: Any, *args: Any, **how: Any) -> Any:
        file = await opened(path, "ab", buffering=0)
        file._file.close()
        file._file = kind(path, "ab")
        return file

    class Opened:
        def __init__(self, path: Any) -> None:
            self._path = path

        async def __aenter__(self) -> Any:
            self._file = await open_sync(self._path)
            return self._file

        async def __aexit__(self, *what: Any) -> None:
            await self._file.close()

    monkeypatch.setattr(stimulus_log.aiofiles, "open", lambda path, *args, **how: Opened(path))


def entries(path: Path) -> list[Any]:
    return list(msgpack.Unpacker(io.BytesIO(path.read_bytes())))


def packed(number: int) -> bytes:
    data: bytes = msgpack.packb({"n": number, "pad": bytes(100)})
    return data


def test_everything_is_there_in_order_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for first in (0, 500):
        log = StimulusLog(path)
        log.open()
        for number in range(first, first + 500):
            log.write(packed(number))
        assert log.close(10.0)
        assert log.close(10.0)
    assert [entry["n"] for entry in entries(path)] == list(range(1000))
    assert (log.ended, log.lost) == ("", 0)


def test_a_slow_drive_is_not_waited_for(tmp_path: Path, slow: Gate) -> None:
    path = tmp_path / "log"
    log = StimulusLog(path)
    log.open()
    slow.shut()
    log.write(packed(0))
    slow.wait_held()
    for number in range(1, 200):
        log.write(packed(number))
    assert path.read_bytes() == b""
    slow.open()
    assert log.close(10.0)
    assert [entry["n"] for entry in entries(path)] == list(range(200))


def test_beyond_the_bound_the_log_ends_without_a_hole_and_says_so(tmp_path: Path, slow: Gate) -> None:
    path = tmp_path / "log"
    log = StimulusLog(path, bound_bytes=50 * len(packed(0)))
    log.open()
    slow.shut()
    for number in range(100):
        log.write(packed(number))
    assert log.ended
    slow.open()
    # Also when the drive has caught up: what comes after a hole cannot be replayed.
    until(lambda: path.stat().st_size > 0, "the drive goes on")
    log.write(packed(100))
    assert log.close(10.0)
    found = entries(path)
    kept = [entry["n"] for entry in found[:-1]]
    assert kept == list(range(len(kept)))
    assert 49 <= len(kept) <= 51
    assert "too slow" in found[-1]["ended"]
    assert list(read(io.BytesIO(path.read_bytes()))) == found[:-1]
    assert log.lost == 101 - len(kept)


def test_what_cannot_be_written_leaves_no_torn_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 3 * len(packed(0)) // 2

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            left = room - os.fstat(self.fileno()).st_size
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(bytes(data)[:left]) or 0

    _opens(Full, monkeypatch)
    path = tmp_path / "log"
    log = StimulusLog(path)
    log.open()
    log.write(packed(0))
    until(lambda: path.stat().st_size, "the first is there")
    log.write(packed(1))
    until(lambda: log.ended, "the drive is full")
    log.write(packed(2))
    assert log.close(10.0)
    assert [entry["n"] for entry in entries(path)] == [0]
    assert path.read_bytes() == packed(0)
    assert log.lost >= 1


def test_a_file_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KvtierError, match="cannot be opened"):
        StimulusLog(tmp_path / "missing" / "log").open()


def test_a_node_goes_on_and_its_status_says_that_the_log_has_ended(
    make_daemon: Callable[..., Embedded],
    tmp_path: Path,
    slow: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_service, "StimulusLog", lambda path: StimulusLog(path, bound_bytes=2000))
    slow.shut()
    daemon = make_daemon(log__stimulus_log=str(tmp_path / "log"))
    with connect(daemon.socket_path) as client:
        until(lambda: any("stimulus log" in w for w in client.status().warnings), "the status says it")
        client.ping()
    slow.open()
