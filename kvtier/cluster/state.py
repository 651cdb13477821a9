"""The state folder: made for its user alone, and used by one `up` or `down` at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kvtier.config.schema import RAY_TEMP_DIR_MAX_BYTES, Config
from kvtier.errors import ConfigError, KvtierError

_LOCK = "up.lock"


def prepare_dirs(config: Config) -> None:
    """Make state and runtime folder with mode 0700. Raises KvtierError if they are another user's."""
    for folder in (config.node.state_dir, config.node.runtime_dir):
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            owner = os.stat(folder).st_uid
        except OSError as error:
            raise KvtierError(
                f"the folder {folder} cannot be made: {error.strerror}",
                fix="set node.state_dir and node.runtime_dir to folders of yours",
            ) from error
        if owner != os.getuid():
            raise KvtierError(
                f"the folder {folder} belongs to user id {owner}", fix="set it to a folder of yours"
            )


def ray_folder(outer: str) -> str:
    """Where below the private cluster's folder Ray may live: it opens its own to all users of the machine.

    Raises ConfigError where the path would be too long for the sockets in it and is not protected above.
    """
    inner = os.path.join(outer, "r")
    if len(os.fsencode(inner)) <= RAY_TEMP_DIR_MAX_BYTES:
        return inner
    if os.stat(os.path.dirname(outer)).st_mode & 0o077:
        raise ConfigError(
            "ray.temp_dir",
            f"{outer} is longer than {RAY_TEMP_DIR_MAX_BYTES - 2} bytes",
            fix="name a shorter folder",
        )
    return outer


@contextlib.contextmanager
def lock(config: Config) -> Iterator[None]:
    """One `up` or `down` at a time for a state folder; a crash releases it."""
    path = Path(config.node.state_dir) / _LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode() or "unknown"
            raise KvtierError(
                f"another `up` or `down` works on {config.node.state_dir} (pid {holder})",
                fix="wait for it, or end it with `kvtier down`",
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)
