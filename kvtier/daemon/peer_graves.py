"""Tombstones that this node has carried out, on its drive: they outlive it and the directory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgpack
import msgspec

from kvtier.errors import KvtierError
from kvtier.messages.cluster import Stone
from kvtier.node.limits import MOST_PAST

_NAME = "tombstones"
_LOG = logging.getLogger(__name__)


class PeerGraves:
    """A file in node.state_dir to which each change is appended and flushed. From any thread.

    Raises KvtierError when it cannot be read or written.
    """

    def __init__(self, state_dir: str | Path) -> None:
        self._path = Path(state_dir) / _NAME
        self._lock = threading.Lock()
        self._stones: dict[str, Stone] = {}
        # Ids of those that are over, the oldest first.
        self._past: dict[str, None] = {}
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._read()
            self._rewrite()
            self._file: BinaryIO = self._path.open("ab", buffering=0)
        except OSError as error:
            raise KvtierError(f"{self._path}: {error.strerror}", fix="check node.state_dir") from error

    def stones(self) -> tuple[Stone, ...]:
        """All of them."""
        with self._lock:
            return tuple(self._stones.values())

    def past(self) -> tuple[str, ...]:
        """Ids of those that are over."""
        with self._lock:
            return tuple(self._past)

    def of(self, stone: Stone) -> Stone:
        """The stone of this name as it is kept: with the nodes that were known at its beginning."""
        with self._lock:
            return self._stones.get(stone.id, stone)

    def add(self, stone: Stone) -> bool:
        """Keep one for good; answers whether it is on the drive."""
        with self._lock:
            if stone.id in self._stones:
                return True
            if not self._append([msgspec.to_builtins(stone)]):
                return False
            self._stones[stone.id] = stone
            return True

    def over(self, ids: Iterable[str]) -> None:
        """Of these only the names are kept. Should that be lost, they are kept longer, which does no harm."""
        with self._lock:
            known = [stone_id for stone_id in ids if stone_id in self._stones]
            for stone_id in known:
                self._is_over(stone_id)
            if known:
                self._append(known)

    def _is_over(self, stone_id: str) -> None:
        self._stones.pop(stone_id, None)
        self._past[stone_id] = None
        while len(self._past) > MOST_PAST:
            del self._past[next(iter(self._past))]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, entries: Iterable[object]) -> bool:
        data = b"".join(msgpack.packb(entry) for entry in entries)
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(data)
            os.fsync(self._file.fileno())
        except OSError:
            written = 0
        if written != len(data):
            # Half an entry would hide all that come after it.
            os.ftruncate(self._file.fileno(), end)
            return False
        return True

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            try:
                for entry in msgpack.Unpacker(file):
                    self._take(entry)
            except (ValueError, msgpack.exceptions.UnpackException) as damage:
                # What a crash left half written at the end was never answered for.
                _LOG.warning(
                    "%s is damaged: what follows its %d sound entries is dropped: %s",
                    self._path,
                    len(self._stones),
                    damage,
                )

    def _take(self, entry: object) -> None:
        if isinstance(entry, str):
            self._is_over(entry)
        else:
            stone = msgspec.convert(entry, Stone)
            self._stones[stone.id] = stone

    def _rewrite(self) -> None:
        """Of those that are over, only the names; the new file takes the old one's place as a whole."""
        beside = self._path.with_suffix(".new")
        with beside.open("wb") as file:
            for stone in self._stones.values():
                file.write(msgpack.packb(msgspec.to_builtins(stone)))
            for stone_id in self._past:
                file.write(msgpack.packb(stone_id))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
