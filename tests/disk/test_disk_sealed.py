"""Encryption at rest: what stands on the drive tells nothing, and a destroyed key takes its block with it."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash

from kvtier.checksum import checksum
from kvtier.cli.main import run
from kvtier.disk import coder
from kvtier.disk.buffers import padded
from kvtier.disk.fsck import fsck
from kvtier.disk.header import HEADER_BYTES, HeaderUnsupported, associated, decode
from kvtier.disk.scrub import Scrubber
from kvtier.disk.vault import Vault
from kvtier.errors import ConfigError, CorruptObject, TierUnavailable
from kvtier.testing.tier_kit import ROOT, content, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
MASTER_KEY = bytes(range(32))
CODECS = ["raw", "planes-zstd"]


def on_the_drive(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


# -- what stands on the drive


@pytest.mark.parametrize("codec", CODECS)
def test_neither_payload_nor_checksum_stands_on_the_drive(sealed: Bench, codec: str) -> None:
    datas = {n: sealed.numbers(n) for n in range(4)}
    for n, data in datas.items():
        sealed.fill(n, data, codec)
    sealed.tier.close()
    drive = on_the_drive(sealed.directory)
    assert ROOT.tenant.encode() in drive, "what is looked for would be found"
    for data in datas.values():
        assert data[:32] not in drive
        assert data[NBYTES // 2 : NBYTES // 2 + 16] not in drive
        assert struct.pack("<Q", checksum(data)) not in drive
        assert struct.pack(">Q", checksum(data)) not in drive
    sealed.open()
    assert sealed.there() == set(datas)
    for meta in sealed.tier.objects():
        assert meta.checksum in {checksum(data) for data in datas.values()}


def test_unsealed_they_would_be_found(bench: Bench) -> None:
    data = bench.numbers(1)
    bench.fill(1, data, "raw")
    bench.tier.close()
    drive = on_the_drive(bench.directory)
    assert data[:32] in drive
    assert struct.pack("<Q", checksum(data)) in drive


def test_without_the_mask_the_checksum_would_be_found(sealed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vault, "mask", lambda *_: 0)
    data = sealed.numbers(1)
    sealed.fill(1, data, "raw")
    sealed.tier.close()
    assert struct.pack("<Q", checksum(data)) in on_the_drive(sealed.directory)
    sealed.open()


def test_equal_payloads_look_different(sealed: Bench) -> None:
    data = content(1, NBYTES)
    slots = [sealed.fill(n, data, "raw") for n in range(2)]
    blocks = []
    for slot in slots:
        with open(sealed.segment(slot.address[0]), "rb") as file:
            blocks.append(os.pread(file.fileno(), HEADER_BYTES + NBYTES, slot.address[1]))
    assert blocks[0][HEADER_BYTES:][:64] != blocks[1][HEADER_BYTES:][:64]
    seals = [decode(block[:HEADER_BYTES]).seal for block in blocks]
    assert seals[0] is not None
    assert seals[0] != seals[1]
    assert decode(blocks[0][:HEADER_BYTES]).meta.checksum != decode(blocks[1][:HEADER_BYTES]).meta.checksum
    assert sealed.tier.usage().used_bytes == 2 * (HEADER_BYTES + padded(NBYTES)), "no page for tags"


def test_a_reader_that_knows_no_seals_refuses(sealed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = sealed.fill(1, sealed.numbers(1), "raw")
    with open(sealed.segment(slot.address[0]), "rb") as file:
        page = os.pread(file.fileno(), HEADER_BYTES, slot.address[1])
    monkeypatch.setattr("kvtier.disk.header._KNOWN_FEATURES", 0)
    with pytest.raises(HeaderUnsupported, match="0x1"):
        decode(page)


# -- damage and forgery


@pytest.mark.parametrize("codec", CODECS)
def test_flips_anywhere_are_misses_that_heal(sealed: Bench, codec: str) -> None:
    """In ciphertext, header, nonce and tag."""
    draw, data = random.Random(3), sealed.numbers(1)
    sealed.fill(2, sealed.numbers(2), codec)
    slot = sealed.fill(1, data, codec)
    stored = sealed.tier._ledger.readable(slot).stored_bytes
    special = [64, 75, 76, 91, HEADER_BYTES, HEADER_BYTES + stored - 1]
    for at in [*special, *(draw.randrange(HEADER_BYTES + stored) for _ in range(30))]:
        slot = found(sealed.tier, default_meta(1, NBYTES).object_id)
        sealed.flip(slot.address[0], (slot.address[1] + at) * 8 + draw.randrange(8))
        with pytest.raises(CorruptObject):
            get(sealed.tier, slot)
        assert sealed.find(1) is None
        assert get(sealed.tier, sealed.fill(1, data, codec)) == data
        assert sealed.read(2) == sealed.numbers(2)
    assert sealed.tier.stats().quarantined_total == 36


def forged(page: bytes, at: int, value: bytes) -> bytes:
    """The page with other bytes, and a sum of its own that fits."""
    changed = page[:at] + value + page[at + len(value) :]
    return changed[:-8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(changed[:-8]))


def rewritten(bench: Bench, at: int, value: bytes) -> None:
    """Object 1's header forged, index and books made to agree with it as far as they can."""
    slot = found(bench.tier, default_meta(1, NBYTES).object_id)
    with open(bench.segment(slot.address[0]), "r+b") as file:
        page = os.pread(file.fileno(), HEADER_BYTES, slot.address[1])
        os.pwrite(file.fileno(), forged(page, at, value), slot.address[1])
        os.fsync(file.fileno())


def test_a_forged_header_fails_the_tag_though_its_own_sum_fits(
    sealed: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed.fill(1, sealed.numbers(1), "raw")
    entry = sealed.tier._ledger.find(default_meta(1, NBYTES).object_id)
    assert entry is not None
    masked = sealed.tier._store.coder.masked(entry.meta, entry.generation).checksum
    assert masked is not None
    rewritten(sealed, 56, struct.pack("<Q", masked ^ 1))
    monkeypatch.setattr(type(sealed.tier._store), "check_header", lambda _, __, page: decode(page))
    with pytest.raises(CorruptObject, match="tag"):
        sealed.read(1)


def test_swapped_blocks_and_headers_fail(sealed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sealed blocks of one tenant; the header's own check is off, so the seal alone is left."""
    first, second = (sealed.fill(n, sealed.numbers(n), "raw") for n in (1, 2))
    with open(sealed.segment(0), "r+b") as file:
        fd = file.fileno()
        blocks = [os.pread(fd, HEADER_BYTES + NBYTES, s.address[1]) for s in (first, second)]
        os.pwrite(fd, blocks[1][HEADER_BYTES:], first.address[1] + HEADER_BYTES)
        os.pwrite(fd, blocks[0][:HEADER_BYTES], second.address[1])
    monkeypatch.setattr(type(sealed.tier._store), "check_header", lambda _, __, page: decode(page))
    for n in (1, 2):
        with pytest.raises(CorruptObject, match="tag"):
            sealed.read(n)


def test_a_seal_that_covers_no_header_lets_a_forged_one_through(
    sealed: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coder, "associated", lambda _: b"")
    sealed.fill(1, sealed.numbers(1), "raw")
    rewritten(sealed, 56, bytes(8))
    monkeypatch.setattr(type(sealed.tier._store), "check_header", lambda _, __, page: decode(page))
    assert sealed.read(1) == sealed.numbers(1)


def test_the_tag_covers_every_byte_of_the_page_but_itself_and_the_sum() -> None:
    page = bytes(range(256)) * 16
    plain = associated(page)
    for at in range(HEADER_BYTES):
        changed = page[:at] + bytes([page[at] ^ 1]) + page[at + 1 :]
        assert (associated(changed) == plain) == (76 <= at < 92 or at >= HEADER_BYTES - 8)


# -- openings that are refused, before anything changed


def files(directory: Path) -> dict[str, bytes]:
    paths = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "LOCK")
    return {str(p): p.read_bytes() for p in paths}


def is_refused(bench: Bench, error: type[Exception], match: str) -> None:
    before = files(bench.directory)
    with pytest.raises(error, match=match) as refusal:
        bench.open()
    assert getattr(refusal.value, "fix", "")
    assert files(bench.directory) == before


def test_a_sealed_store_is_refused_without_its_keys_and_with_others(sealed: Bench, tmp_path: Path) -> None:
    sealed.fill(0, sealed.numbers(0), "raw")
    sealed.tier.close()
    sealed.master_key = None
    is_refused(sealed, TierUnavailable, "no key store was given")
    sealed.master_key = b"x" * 32
    is_refused(sealed, ConfigError, "master key")
    sealed.master_key = MASTER_KEY
    vault = sealed.directory.parent / "vault"
    os.rename(vault, tmp_path / "aside")
    is_refused(sealed, TierUnavailable, "no key for it")
    shutil.rmtree(vault)
    os.rename(tmp_path / "aside", vault)
    sealed.open()
    assert sealed.there() == {0}


def test_a_key_store_older_than_the_blocks_is_refused(sealed: Bench) -> None:
    sealed.fill(0, sealed.numbers(0), "raw")
    sealed.tier.close()
    vault = sealed.directory.parent / "vault"
    older = sealed.directory.parent / "older"
    shutil.copytree(vault, older)
    sealed.open()
    sealed.fill(1, sealed.numbers(1), "raw")
    sealed.tier.close()
    os.rename(vault, sealed.directory.parent / "newer")
    os.rename(older, vault)
    is_refused(sealed, TierUnavailable, "older than the blocks")
    shutil.rmtree(vault)
    os.rename(sealed.directory.parent / "newer", vault)
    sealed.open()
    assert sealed.there() == {0, 1}


def test_an_unsealed_store_stays_readable_and_new_blocks_are_sealed(bench: Bench) -> None:
    bench.fill(0, bench.numbers(0), "raw")
    bench.fill(1, bench.numbers(1), "planes-lz4")
    bench.tier.close()
    bench.master_key = MASTER_KEY
    bench.open()
    for n in (2, 3):
        bench.fill(n, bench.numbers(n), CODECS[n % 2])
    assert bench.there() == {0, 1, 2, 3}
    bench.reopen()
    assert bench.there() == {0, 1, 2, 3}
    bench.tier.close()
    db = sqlite3.connect(bench.directory / "index.sqlite")
    assert db.execute("SELECT sealed FROM objects ORDER BY sequence").fetchall() == [(0,), (0,), (1,), (1,)]
    db.close()
    bench.master_key = None
    is_refused(bench, TierUnavailable, "no key store")
    bench.master_key = MASTER_KEY
    bench.open()


# -- scrub and fsck


def test_the_scrub_unseals_and_finds_what_is_damaged(sealed: Bench) -> None:
    slots = [sealed.fill(n, sealed.numbers(n), CODECS[n % 2]) for n in range(6)]
    for n in (2, 3):
        sealed.flip(slots[n].address[0], (slots[n].address[1] + HEADER_BYTES + 999) * 8)
    scrubber = Scrubber(sealed.tier._store, 1 << 30, lambda: False, sealed.tier._mover.quarantine)
    now_s = 0.0
    while scrubber.stats.passes < 1:
        now_s += scrubber.step(now_s)
    assert scrubber.stats.found_bad == 2
    assert sealed.there() == {0, 1, 4, 5}


def test_fsck_with_and_without_the_keys(sealed: Bench) -> None:
    for n in range(6):
        sealed.fill(n, sealed.numbers(n), CODECS[n % 2])
    slot = found(sealed.tier, default_meta(2, NBYTES).object_id)
    sealed.tier.close()
    assert fsck(sealed.directory, open_vault=sealed.open_vault).is_clean
    sealed.flip(slot.address[0], (slot.address[1] + HEADER_BYTES + 999) * 8)
    report = fsck(sealed.directory)
    assert report.is_clean, "nobody can tell, so nothing is called corrupt"
    assert (report.objects, report.unchecked) == (6, 6)
    assert report.unchecked_why == ["sealed, key store not given"]
    report = fsck(sealed.directory, open_vault=sealed.open_vault)
    assert (report.objects, report.damaged_payloads, report.unchecked) == (5, 1, 0)


def test_the_command_takes_the_keys(
    sealed: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slot = sealed.fill(1, sealed.numbers(1), "raw")
    sealed.tier.close()
    sealed.flip(slot.address[0], (slot.address[1] + HEADER_BYTES + 999) * 8)
    where, keys, key_file = str(sealed.directory), str(sealed.directory.parent / "vault"), tmp_path / "key"
    key_file.write_text(MASTER_KEY.hex())
    key_file.chmod(0o600)
    assert run(["fsck", where]) == 0
    assert "1: sealed, key store not given" in capsys.readouterr().out
    assert run(["fsck", where, "--keys-directory", keys, "--key-file", str(key_file)]) == 1
    assert "1 payloads" in capsys.readouterr().out
    assert run(["fsck", where, "--keys-directory", keys]) == 2
    assert run(["fsck", where, "--keys-directory", where, "--key-file", str(key_file)]) == 2


@pytest.mark.parametrize("with_keys", [True, False])
def test_a_rebuilt_index_brings_nothing_forgotten_back(sealed: Bench, with_keys: bool) -> None:
    """Even where the file that says what ended is lost as well as the index."""
    for n in range(6):
        sealed.fill(n, sealed.numbers(n), CODECS[n % 2])
    copy = sealed.copy_data()
    sealed.forget(1, 4)
    sealed.put_back(copy)
    sealed.tier.close()
    os.unlink(sealed.directory / "index.sqlite")
    with pytest.raises(TierUnavailable, match="fsck"):
        sealed.open()
    report = fsck(sealed.directory, repair=True, open_vault=sealed.open_vault if with_keys else None)
    assert report.objects == 4, "the opening of the copy has noted which blocks have no key"
    sealed.open()
    assert sealed.there() == {0, 2, 3, 5}
