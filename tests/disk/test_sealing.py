"""Sealing blocks, and reading the master key's file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.disk import sealing
from kvtier.disk.master_key import read_master_key
from kvtier.disk.sealing import NONCE_BYTES, TAG_BYTES, DataKey, seal, unseal
from kvtier.errors import ConfigError, CorruptObject

KEY = DataKey(7, "acme", bytes(range(32)))
NONCE = bytes(range(NONCE_BYTES))
AAD = b"header"
PLAIN = bytes(range(256)) * 17


def sealed(plain: bytes = PLAIN) -> bytes:
    into = bytearray(len(plain) + TAG_BYTES)
    assert seal(KEY, NONCE, AAD, plain, into) == len(into)
    return bytes(into)


@given(st.binary(max_size=5000), st.binary(max_size=64), st.integers(0, 40))
def test_what_was_sealed_comes_back(plain: bytes, aad: bytes, spare: int) -> None:
    box = np.full(len(plain) + TAG_BYTES + spare, 0xA5, np.uint8)
    written = seal(KEY, NONCE, aad, plain, box)
    assert written == len(plain) + TAG_BYTES
    assert (box[written:] == 0xA5).all()
    back = np.full(len(plain) + spare, 0xA5, np.uint8)
    unseal(KEY, NONCE, aad, box[:written], back)
    assert back[: len(plain)].tobytes() == plain
    assert (back[len(plain) :] == 0xA5).all()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("at", [0, len(PLAIN) - 1, len(PLAIN), len(PLAIN) + TAG_BYTES - 1])
def test_a_flipped_bit_of_bytes_or_tag_is_refused(at: int) -> None:
    with pytest.raises(CorruptObject):
        unseal(KEY, NONCE, AAD, flipped(sealed(), at), bytearray(len(PLAIN)))


@pytest.mark.parametrize(
    ("key", "nonce", "aad"),
    [
        (DataKey(7, "acme", flipped(KEY.key, 31)), NONCE, AAD),
        (KEY, flipped(NONCE, 0), AAD),
        (KEY, NONCE, flipped(AAD, 5)),
        (KEY, NONCE, AAD + b"\0"),
        (KEY, NONCE, b""),
    ],
)
def test_another_key_nonce_or_aad_is_refused(key: DataKey, nonce: bytes, aad: bytes) -> None:
    with pytest.raises(CorruptObject):
        unseal(key, nonce, aad, sealed(), bytearray(len(PLAIN)))


@pytest.mark.parametrize("length", [0, TAG_BYTES - 1, TAG_BYTES, len(PLAIN) + TAG_BYTES - 1])
def test_what_is_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CorruptObject):
        unseal(KEY, NONCE, AAD, sealed()[:length], bytearray(len(PLAIN)))


def test_too_little_room_is_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        seal(KEY, NONCE, AAD, PLAIN, bytearray(len(PLAIN) + TAG_BYTES - 1))
    with pytest.raises(ValueError, match="do not fit"):
        unseal(KEY, NONCE, AAD, sealed(), bytearray(len(PLAIN) - 1))


def test_a_known_answer() -> None:
    # Test case 14 of the GCM specification: AES-256, key, nonce and block of zeros.
    into = bytearray(32)
    seal(DataKey(0, "", bytes(32)), bytes(12), b"", bytes(16), into)
    assert into.hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"


def test_repr_hides_the_key() -> None:
    for text in (repr(KEY), str(KEY), f"{KEY}"):
        assert "acme" in text
        assert repr(KEY.key)[2:-1] not in text
        assert KEY.key.hex() not in text
        assert "key=b" not in text


def test_without_the_package_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    sealing.aes_gcm.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"kvtier\[encryption\]"):
            sealed()
    finally:
        sealing.aes_gcm.cache_clear()


def test_too_old_a_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryptography.hazmat.primitives.ciphers.aead.AESGCM", object)
    sealing.aes_gcm.cache_clear()
    try:
        with pytest.raises(ConfigError, match="47 or newer"):
            sealed()
    finally:
        sealing.aes_gcm.cache_clear()


def test_the_vault_is_imported_without_the_package() -> None:
    code = "import sys, kvtier.disk.vault, kvtier.disk.sealing; assert 'cryptography' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


# -- the master key's file


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "master.key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


RAW = bytes(range(100, 132))


@pytest.mark.parametrize(
    "content",
    [RAW, RAW.hex().encode(), RAW.hex().upper().encode() + b"\n", RAW.hex().encode() + b"\r\n"],
)
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_is_32_bytes_or_64_digits(tmp_path: Path, content: bytes, mode: int) -> None:
    assert read_master_key(key_file(tmp_path, content, mode)) == RAW


@pytest.mark.parametrize(
    "content",
    [
        b"",
        RAW[:31],
        RAW + b"\n",
        RAW.hex().encode()[:-1],
        RAW.hex().encode() + b"0",
        b"x" * 64,
        b"0123456789abcdef0123456789abcdef",
        b" " + RAW.hex().encode(),
        b"a" * 100_000,
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="openssl rand -hex 32"):
        read_master_key(key_file(tmp_path, content))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610])
def test_a_file_open_to_others_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_master_key(key_file(tmp_path, RAW, mode))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_master_key(tmp_path / "none")
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_master_key(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_master_key(pipe)


def test_a_link_to_a_key_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(key_file(tmp_path, RAW))
    assert read_master_key(link) == RAW


def test_no_error_shows_the_key(tmp_path: Path) -> None:
    secret = b"0123456789abcdef0123456789abcdef"
    with pytest.raises(ConfigError) as refused:
        read_master_key(key_file(tmp_path, secret))
    assert secret.decode() not in str(refused.value)
