"""The vault's own folder: closed to other users, held by one process."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from kvtier.disk.lock import sync_directory
from kvtier.errors import ConfigError, TierUnavailable

DATABASE = "vault.sqlite"
NEW_DATABASE = "vault.new"
_LOCK = "LOCK"
_FIELD = "disk.keys_directory"
_OURS = (DATABASE, NEW_DATABASE, _LOCK)


class VaultFolder:
    """Holds the folder for this process; made, with mode 0700, when it is not there.

    Raises ConfigError when others may read it or it holds something else, TierUnavailable when another
    process holds it or it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.database = directory / DATABASE
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o700, parents=True)
                sync_directory(directory.parent)
            _refuse_unfit(directory)
            self._fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise TierUnavailable(
                f"the key vault {directory} cannot be used: {problem.strerror}",
                fix="check that it is mounted, writable, and owned by the daemon's user",
            ) from problem
        try:
            self._take()
        except OSError as problem:
            os.close(self._fd)
            raise TierUnavailable(
                f"the key vault {directory} is in use by another process",
                fix="stop that daemon, or give this store a vault of its own",
            ) from problem

    def still_there(self) -> bool:
        """Whether the folder is still the one that was opened: false once it was deleted or moved."""
        try:
            now = os.stat(self.directory / _LOCK)
        except OSError:
            return False
        then = os.fstat(self._fd)
        return (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino)

    def release(self) -> None:
        """Let another process have the folder."""
        os.close(self._fd)

    def _take(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def holds_vault(directory: Path) -> bool:
    """Whether a vault is in the folder. Raises TierUnavailable when that cannot be seen."""
    try:
        os.stat(directory / DATABASE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as problem:
        raise TierUnavailable(
            f"the key vault {directory} cannot be looked into: {problem.strerror}",
            fix="check its owner and mode",
        ) from problem
    return True


def _refuse_unfit(directory: Path) -> None:
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    if mode & 0o077:
        raise ConfigError(
            _FIELD, f"{directory} is open to other users (mode {mode:o})", fix=f"chmod 700 {directory}"
        )
    if (directory / DATABASE).exists():
        return
    foreign = sorted(name for name in os.listdir(directory) if not name.startswith(_OURS))
    if foreign:
        raise ConfigError(
            _FIELD,
            f"{directory} is not empty and not a key vault: it holds {foreign[0]!r}",
            fix="name a folder of its own, apart from the data",
        )
