"""Files of secrets that the settings name: checked when read, made durably when there is none."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Final

from kvtier.config.schema import Config
from kvtier.errors import ConfigError

TOKEN_MIN_BYTES: Final = 16
# What `up` makes itself is twice as long.
RAY_TOKEN_MIN_BYTES: Final = 32
SECRET_MIN_BYTES: Final = 32
_SECRET_MAX_BYTES: Final = 64 << 10


def read_secret(field: str, path: str | Path, min_bytes: int) -> bytes:
    """The secret in a file, without white space around it. Raises ConfigError under the name `field`."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(descriptor).st_mode
            data = os.read(descriptor, _SECRET_MAX_BYTES + 1) if stat.S_ISREG(mode) else b""
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            field, f"{path} cannot be read: {error.strerror}", fix="check the path and its permissions"
        ) from error
    if not stat.S_ISREG(mode):
        raise ConfigError(field, f"{path} is not a file", fix="name a regular file")
    if mode & 0o007:
        raise ConfigError(field, f"{path} is open to all users", fix=f"chmod o= {path}")
    secret = data.strip()
    if len(secret) < min_bytes:
        raise ConfigError(
            field,
            f"{path} holds {len(secret)} bytes; {min_bytes} are the least",
            fix=f"head -c 32 /dev/urandom | base64 > {path}",
        )
    if len(data) > _SECRET_MAX_BYTES:
        raise ConfigError(
            field, f"{path} is larger than 64 KiB", fix="name a file with nothing but the secret"
        )
    return secret


def tenant_secret(config: Config) -> bytes:
    """The secret in all block keys: access.tenant_secret_file, else <state_dir>/tenant_secret, made once.

    It is on the drive before this returns, since without it everything parked would be a miss.
    Raises ConfigError.
    """
    if config.access.tenant_secret_file:
        return read_secret("access.tenant_secret_file", config.access.tenant_secret_file, SECRET_MIN_BYTES)
    path = Path(config.node.state_dir) / "tenant_secret"
    if not path.exists():
        try:
            _make_secret(path)
        except OSError as error:
            raise ConfigError(
                "node.state_dir",
                f"{path} cannot be made: {error.strerror}",
                fix="name a folder that can be written",
            ) from error
    return read_secret("node.state_dir", path, SECRET_MIN_BYTES)


def _make_secret(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tenant_secret-")
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_hex(SECRET_MIN_BYTES).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        # A link fails where a rename would replace: of two daemons that start at once both use the first.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        _sync_folder(path.parent)
    finally:
        os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
