"""Reads the master key, which wraps the tenants' keys, from a file that nobody else may read."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from kvtier.errors import ConfigError

MASTER_KEY_BYTES = 32
_FIELD = "disk.key_file"
_HEX = re.compile(rb"[0-9a-fA-F]+")
_MAKE = "make one with: (umask 077; openssl rand -hex 32 > FILE)"
# More than any key that is understood, so that too long a file is seen as such.
_READ_BYTES = 256


def read_master_key(path: Path) -> bytes:
    """The 32 bytes in the file: raw, or as 64 hexadecimal digits that a line end may follow.

    Raises ConfigError when the file cannot be read, may be read by others, or holds anything else.
    """
    try:
        # Not blocking, since a named pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        raise ConfigError(_FIELD, f"{path} cannot be read: {problem.strerror}", fix=_MAKE) from problem
    try:
        _check_file(path, os.fstat(fd))
        text = os.read(fd, _READ_BYTES)
    except OSError as problem:
        raise ConfigError(_FIELD, f"{path} cannot be read: {problem.strerror}", fix=_MAKE) from problem
    finally:
        os.close(fd)
    return _understood(path, text)


def _check_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(_FIELD, f"{path} is not a regular file", fix=_MAKE)
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(_FIELD, f"{path} is open to other users (mode {mode:o})", fix=f"chmod 600 {path}")


def _understood(path: Path, text: bytes) -> bytes:
    digits = text.rstrip(b"\r\n")
    if len(digits) == 2 * MASTER_KEY_BYTES and _HEX.fullmatch(digits):
        return bytes.fromhex(digits.decode("ascii"))
    if len(text) != MASTER_KEY_BYTES:
        raise ConfigError(_FIELD, f"{path} holds neither 32 bytes nor 64 hexadecimal digits", fix=_MAKE)
    if all(0x20 <= byte < 0x7F for byte in text):
        # Half as many digits as needed, or a passphrase: 32 random bytes never look like it.
        raise ConfigError(_FIELD, f"{path} holds 32 printable characters, not 32 random bytes", fix=_MAKE)
    return text
