"""The disk tier does what every tier promises: with O_DIRECT, through the page cache, encoded, sealed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from kvtier.checksum import Buffer
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.store import OpenVault
from kvtier.disk.tier import DiskTier
from kvtier.disk.vault import Vault
from kvtier.testing.tier_contract import TierContract, TierKit
from kvtier.testing.tier_machine import tier_machine
from kvtier.tier import Slot, Tier

CAPACITY_BYTES = 4 << 20
SEGMENT_BYTES = 1 << 20


class CodedTier(DiskTier):
    """Encodes what it is given, without being asked."""

    def write(self, slot: Slot, data: Buffer, codec: str = "planes-zstd", item_bytes: int = 2) -> None:
        super().write(slot, data, codec, item_bytes)


def _open_vault(directory: Path) -> OpenVault:
    return lambda store_id: Vault(directory.parent / "vault", store_id, bytes(32))


def _kit(directory: Path, *, direct: bool = True, sealed: bool = False) -> TierKit:
    def make() -> DiskTier:
        tier = CodedTier if sealed else DiskTier
        return tier(
            directory,
            CAPACITY_BYTES,
            segment_bytes=SEGMENT_BYTES,
            direct=direct,
            open_vault=_open_vault(directory) if sealed else None,
        )

    def reopen(tier: Tier) -> Tier:
        tier.close()
        return make()

    def corrupt(_: Tier, slot: Slot) -> None:
        segment, at = slot.address
        with open(directory / "segments" / f"{segment:08d}.seg", "r+b") as file:
            where = at + HEADER_BYTES + slot.nbytes // 2
            old = os.pread(file.fileno(), 1, where)[0]
            os.pwrite(file.fileno(), bytes([old ^ 0x10]), where)
            os.fsync(file.fileno())

    return TierKit(make=make, reopen=reopen, corrupt=corrupt)


class TestDiskTier(TierContract):
    @pytest.fixture
    def kit(self, tmp_path: Path) -> TierKit:
        return _kit(tmp_path / "store", direct=True)


class TestBufferedDiskTier(TierContract):
    @pytest.fixture
    def kit(self, tmp_path: Path) -> TierKit:
        return _kit(tmp_path / "store", direct=False)


class TestSealedDiskTier(TierContract):
    @pytest.fixture
    def kit(self, tmp_path: Path) -> TierKit:
        return _kit(tmp_path / "store", sealed=True)


def _fresh() -> DiskTier:
    folder = Path(tempfile.mkdtemp(prefix="kvtier-test-"))
    return DiskTier(folder / "store", CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)


def _throw_away(tier: Tier) -> None:
    assert isinstance(tier, DiskTier)
    tier.close()
    shutil.rmtree(tier.directory.parent)


TestDiskTierMachine = tier_machine(
    TierKit(make=_fresh, dispose=_throw_away, sizes=(4096, 1, 200_000)), max_examples=15, steps=25
)
