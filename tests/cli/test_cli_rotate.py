"""`kvtier rotate`: afterwards the new master key opens the store, and the old one does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.cli.main import run
from kvtier.disk.tier import DiskTier
from kvtier.disk.vault import Vault
from kvtier.errors import ConfigError
from kvtier.testing.tier_kit import TierKit, content, default_meta, found, get, put

pytest.importorskip("cryptography")

NBYTES = 70_001
OLD, NEW = bytes(range(32)), bytes(range(100, 132))


class Sealed:
    """A store of one sealed block, its key store, and two key files."""

    def __init__(self, folder: Path) -> None:
        self.directory, self.keys = folder / "data", folder / "keys"
        self.old, self.new = folder / "old.key", folder / "new.key"
        for path, key in ((self.old, OLD), (self.new, NEW)):
            path.write_bytes(key)
            path.chmod(0o600)
        tier = self.open(OLD)
        put(TierKit(make=lambda: tier), tier, 1, NBYTES)
        tier.close()

    def open(self, key: bytes) -> DiskTier:
        def vault(store_id: bytes) -> Vault:
            return Vault(self.keys, store_id, key)

        return DiskTier(self.directory, 4 << 20, segment_bytes=1 << 20, open_vault=vault)

    def opens_with(self, key: bytes) -> bool:
        try:
            tier = self.open(key)
        except ConfigError:
            return False
        try:
            return get(tier, found(tier, default_meta(1, NBYTES).object_id)) == content(1, NBYTES)
        finally:
            tier.close()

    def rotate(self, present: Path, wanted: Path) -> int:
        files = ["--key-file", str(present), "--new-key-file", str(wanted)]
        return run(["rotate", str(self.directory), "--keys-directory", str(self.keys), *files])


@pytest.fixture
def sealed(tmp_path: Path) -> Sealed:
    return Sealed(tmp_path)


def test_the_new_key_opens_and_the_old_one_does_not(
    sealed: Sealed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (sealed.opens_with(OLD), sealed.opens_with(NEW)) == (True, False)
    assert sealed.rotate(sealed.old, sealed.new) == 0
    assert "new.key" in capsys.readouterr().out
    assert (sealed.opens_with(OLD), sealed.opens_with(NEW)) == (False, True)
    assert sealed.rotate(sealed.old, sealed.new) == 2, "the old key is not the key store's any more"
    assert sealed.rotate(sealed.new, sealed.old) == 0
    assert sealed.opens_with(OLD)


def test_what_cannot_be_rotated_stays_as_it_was(
    sealed: Sealed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sealed.rotate(sealed.new, sealed.old) == 2
    tier = sealed.open(OLD)
    assert sealed.rotate(sealed.old, sealed.new) == 2
    assert "in use" in capsys.readouterr().err
    tier.close()
    sealed.new.chmod(0o644)
    assert sealed.rotate(sealed.old, sealed.new) == 2
    files = ["--key-file", str(sealed.old), "--new-key-file", str(sealed.old)]
    assert run(["rotate", str(tmp_path), "--keys-directory", str(sealed.keys), *files]) == 2
    assert run(["rotate", str(sealed.directory), "--keys-directory", str(tmp_path), *files]) == 2
    assert (sealed.opens_with(OLD), sealed.opens_with(NEW)) == (True, False)
