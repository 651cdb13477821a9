"""What a drive does to a node's store, and what may be missing there from then on."""

from __future__ import annotations

import math
import os
import random
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from chaos_ledger import Chat
from chaos_text import Text

from kvtier.disk.fsck import fsck
from kvtier.testing.kv_memory import BLOCK_TOKENS

# live flip: while the service runs.  The others while it does not.
Kind: TypeAlias = Literal["live flip", "flip", "cut", "index"]
# How often, against each other: after the last one all that a node has promised may be missing.
KINDS: dict[Kind, int] = {"live flip": 4, "flip": 4, "cut": 2, "index": 1}
_PAGE = 4096


class _Listed(NamedTuple):
    segment: int
    at: int
    stored_bytes: int

    @property
    def room(self) -> int:
        """With its header, in whole pages."""
        return _PAGE + -(-self.stored_bytes // _PAGE) * _PAGE


class Excuses:
    """Of one node: how many objects were damaged at most, and in which places something was missing.

    A place is a block by what stands before it, so one object is missing in one place, whoever asks for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._most = 0.0
        self._places: set[Hashable] = set()

    @property
    def some(self) -> bool:
        """Whether there is any damage."""
        return self._most > 0

    def more(self, objects: float) -> None:
        """So many objects have been damaged, at most."""
        with self._lock:
            self._most += objects

    def known(self, place: Hashable) -> bool:
        """Whether something was missing there before."""
        return place in self._places

    def excuse(self, place: Hashable) -> bool:
        """Whether damage can be why something is missing there."""
        with self._lock:
            if place not in self._places and len(self._places) < self._most:
                self._places.add(place)
            return place in self._places


def place_of(chat: Chat, text: Text, found_tokens: int) -> Hashable:
    """Where what is missing begins, of a text of which so many tokens came back."""
    start = found_tokens - found_tokens % BLOCK_TOKENS
    return (chat.model, chat.tenant, text.cut(start + 1).normal())


def damage(directory: Path, kind: Kind, draw: random.Random) -> float:
    """Carry it out; answers how many objects may be damaged by it."""
    if kind == "index":
        return _lose_index(directory)
    listed = _listed(directory)
    if not listed:
        return 0
    hit = draw.choice(listed)
    path = directory / "segments" / f"{hit.segment:08d}.seg"
    if kind == "cut":
        if path.stat().st_size > hit.at:
            os.truncate(path, hit.at)
        return sum(each.segment == hit.segment and each.at + each.room > hit.at for each in listed)
    try:
        _flip(path, hit.at + draw.randrange(_PAGE + hit.stored_bytes), 1 << draw.randrange(8))
    except FileNotFoundError:
        # Empty by now, and deleted.
        return 0
    return 1


def _flip(path: Path, at: int, bits: int) -> None:
    file = os.open(path, os.O_RDWR)
    try:
        found = os.pread(file, 1, at)
        if found:
            os.pwrite(file, bytes([found[0] ^ bits]), at)
        os.fsync(file)
        # Who reads past the page cache reads the same as who does not.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _lose_index(directory: Path) -> float:
    """It is deleted, and made anew as people do; names of conversations are lost with it."""
    for path in directory.glob("index.sqlite*"):
        path.unlink()
    fsck(directory, repair=True)
    return math.inf


def _listed(directory: Path) -> list[_Listed]:
    """What the index lists, by a copy of it; nothing where that is torn, since it is written to just now."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "index.sqlite"
        for end in ("", "-wal"):
            source = directory / f"index.sqlite{end}"
            if source.exists():
                shutil.copyfile(source, f"{copy}{end}")
        database = sqlite3.connect(copy)
        try:
            rows = database.execute("SELECT segment, at, stored_bytes FROM objects")
            return [_Listed(*row) for row in rows]
        except sqlite3.Error:
            return []
        finally:
            database.close()
