"""One daemon per directory, and a directory of a known format."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path

from kvtier.errors import ConfigError, TierUnavailable

FORMAT_VERSION = 2
_LOCK = "LOCK"
FORMAT = "FORMAT"
_NEW_FORMAT = "FORMAT.new"
_NOT_OURS_BUT_FINE = frozenset({"lost+found", _LOCK, _NEW_FORMAT})


class DirectoryLock:
    """Holds a data directory for this process, and knows its store id and whether it has sealed blocks.

    Creates the directory and its format file when they are not there.  Raises ConfigError when the
    directory holds something else, TierUnavailable when another process holds it, when a newer version
    wrote it, or when it cannot be used.  new_id: store id of a directory that has none; drawn by default.
    """

    def __init__(self, directory: Path, new_id: bytes = b"") -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(directory)
            self._fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as problem:
            raise TierUnavailable(
                f"directory {directory} cannot be used: {problem.strerror}",
                fix="check that it is mounted, writable, and owned by the daemon's user",
            ) from problem
        try:
            self._take()
            self.store_id, self.sealed = _format(directory, new_id)
        except OSError as problem:
            os.close(self._fd)
            raise TierUnavailable(f"directory {directory} cannot be used: {problem}") from problem
        except TierUnavailable:
            os.close(self._fd)
            raise

    def still_held(self) -> bool:
        """Whether the lock's file is still the one in the directory: false once that was deleted or moved."""
        try:
            now = place_of(self.directory / _LOCK)
        except OSError:
            return False
        return now == place_of(self._fd)

    def was_moved(self) -> bool:
        """Whether the lock's file was moved away, or the directory with it, and not deleted."""
        return not self.still_held() and os.fstat(self._fd).st_nlink > 0

    def note_sealed(self) -> None:
        """Say in the format file, durably, that blocks may be sealed: before the first one is."""
        if not self.sealed:
            _write_format(self.directory, self.store_id, sealed=True)
            self.sealed = True

    def release(self) -> None:
        """Let another process have the directory."""
        os.close(self._fd)

    def _take(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise TierUnavailable(
                f"directory {self.directory} is in use by process {holder}",
                fix="stop that daemon, or give this one another directory",
            ) from problem
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)


def _refuse_foreign(directory: Path) -> None:
    if (directory / FORMAT).exists():
        return
    foreign = sorted(name for name in os.listdir(directory) if name not in _NOT_OURS_BUT_FINE)
    if foreign:
        raise ConfigError(
            "disk.directory",
            f"{directory} is not empty and not a kvtier directory: it holds {foreign[0]!r}",
            fix="name an empty directory, or one that kvtier made",
        )


def _format(directory: Path, new_id: bytes) -> tuple[bytes, bool]:
    """Store id, and whether blocks are sealed, from the format file, which is made when it is not there."""
    path = directory / FORMAT
    if not path.exists():
        _write_format(directory, new_id or secrets.token_bytes(16), sealed=False)
        sync_directory(directory.parent)
    try:
        said = json.loads(path.read_bytes())
        version = said["version"]
        store_id = bytes.fromhex(said["store_id"])
        sealed = bool(said.get("sealed", False))
    except (ValueError, KeyError, TypeError) as problem:
        raise TierUnavailable(
            f"{path} cannot be understood: {problem}",
            fix="restore the file, or start with an empty directory",
        ) from problem
    if version != FORMAT_VERSION:
        raise TierUnavailable(
            f"directory {directory} has format version {version}; this kvtier knows {FORMAT_VERSION}",
            fix="use the kvtier that wrote it, or another directory, or empty this one",
        )
    return store_id, sealed


def _write_format(directory: Path, store_id: bytes, *, sealed: bool) -> None:
    said = {"kvtier": "disk", "version": FORMAT_VERSION, "store_id": store_id.hex(), "sealed": sealed}
    text = json.dumps(said)
    new = directory / _NEW_FORMAT
    with open(new, "w", encoding="ascii") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, directory / FORMAT)
    sync_directory(directory)


def place_of(file: Path | int) -> tuple[int, int]:
    """Device and number of a file, by its name or as it is open: two that are the same are one file."""
    found = os.stat(file)
    return found.st_dev, found.st_ino


def sync_directory(directory: Path) -> None:
    """Make names made or removed in the directory survive power loss."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
