"""What a node's policies have learned, kept in one file across its restarts, by name of what learned it.

The file is a msgpack map: a version, a checksum, and the sections packed once more. It is replaced as a
whole: a crash leaves the old one or the new one. Of a damaged one nothing is taken, and all is learned anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgpack
import xxhash

log = logging.getLogger(__name__)
NAME: Final = "policy.state"
VERSION: Final = 1
_MOST_BYTES = 256 << 20


def read_sections(path: Path) -> dict[str, bytes]:
    """What was kept; nothing, with a warning, where it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.warning("%s cannot be read, so all is learned anew: %s", path, error.strerror)
        return {}
    try:
        return _unpacked(data)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        log.warning("%s is damaged, so all is learned anew: %s", path, error)
        return {}


def write_sections(path: Path, sections: Mapping[str, bytes]) -> None:
    """Replace what is kept, durably. Raises OSError."""
    body = msgpack.packb(dict(sections))
    data = msgpack.packb({"version": VERSION, "checksum": xxhash.xxh3_128_digest(body), "body": body})
    fresh = path.with_name(f"{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unpacked(data: bytes) -> dict[str, bytes]:
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is longer than {_MOST_BYTES} bytes")
    outer = msgpack.unpackb(data)
    if not isinstance(outer, dict) or outer.get("version") != VERSION:
        raise ValueError("it is of another version")
    body = outer["body"]
    if xxhash.xxh3_128_digest(body) != outer["checksum"]:
        raise ValueError("its checksum does not fit")
    sections = msgpack.unpackb(body)
    if not isinstance(sections, dict) or not all(
        isinstance(name, str) and isinstance(data, bytes) for name, data in sections.items()
    ):
        raise ValueError("it holds no sections")
    return sections


class PolicyState:
    """Keeps what was learned, now and then, in a thread of its own: a flush takes its time."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self._path = folder / NAME
        self._every_s = every_s
        self._due_s: float | None = None
        self._writer: threading.Thread | None = None
        self._kept: dict[str, bytes] = {}
        self._failed = False

    def read(self) -> dict[str, bytes]:
        """What was kept before."""
        self._kept = read_sections(self._path)
        return self._kept

    def tend(self, now_s: float, learned: Callable[[], Mapping[str, bytes]]) -> None:
        """Begin to write when it is time to. learned: called in this thread."""
        if self._due_s is None:
            self._due_s = now_s + self._every_s
        busy = self._writer is not None and self._writer.is_alive()
        if now_s < self._due_s or busy:
            return
        self._due_s = now_s + self._every_s
        sections = dict(learned())
        if sections != self._kept:
            self._kept = sections
            self._writer = threading.Thread(
                target=self._write, args=(sections,), name="kvtier-policy-state", daemon=True
            )
            self._writer.start()

    def close(self, learned: Mapping[str, bytes]) -> None:
        """Write what was learned last, and wait for that."""
        if self._writer is not None:
            self._writer.join()
        if dict(learned) != self._kept:
            self._write(learned)

    def _write(self, sections: Mapping[str, bytes]) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_sections(self._path, sections)
        except OSError as error:
            if not self._failed:
                log.warning("what was learned cannot be kept in %s: %s", self._path, error.strerror)
            self._failed = True
            with contextlib.suppress(OSError):
                self._path.with_name(f"{self._path.name}.new").unlink()
