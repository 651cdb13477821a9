"""The vault's promises one by one: keys, tenants, masks, rotation, and what it refuses to open."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier.disk import vault as vault_module
from kvtier.disk.sealing import DataKey
from kvtier.disk.vault import Vault
from kvtier.errors import ConfigError, CorruptObject, KvtierError, ObjectExists, TierUnavailable

STORE, OTHER_STORE = b"s" * 16, b"o" * 16
MASTER, OTHER_MASTER = b"m" * 32, b"n" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


@pytest.fixture
def vault(folder: Path) -> Iterator[Vault]:
    opened = Vault(folder, STORE, MASTER)
    yield opened
    opened.close()


def kept(vault: Vault, *generations: int, tenant: str = "acme") -> list[DataKey]:
    keys = [vault.new_key(generation, tenant) for generation in generations]
    assert vault.keep(keys) == ()
    return keys


def reopened(vault: Vault, master: bytes = MASTER) -> Vault:
    vault.close()
    return Vault(vault.directory, STORE, master)


def sql(vault: Vault, *statements: str) -> None:
    """Change the file behind the vault's back, while it is closed."""
    vault.close()
    db = sqlite3.connect(vault.directory / "vault.sqlite")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


# -- keys


def test_a_kept_key_comes_back(vault: Vault) -> None:
    keys = kept(vault, 5, 3, 9)
    assert [vault.key(g) for g in (5, 3, 9)] == keys
    assert len({key.key for key in keys}) == 3
    assert vault.key(4) is None
    assert list(vault.generations()) == [3, 5, 9]


def test_a_new_key_is_not_kept(vault: Vault) -> None:
    vault.new_key(1, "acme")
    assert vault.key(1) is None
    assert list(vault.generations()) == []


def test_keys_survive_closing(vault: Vault) -> None:
    keys = kept(vault, 1, 2) + kept(vault, 3, tenant="other")
    mask = vault.mask(1, "acme")
    again = reopened(vault)
    assert [again.key(g) for g in (1, 2, 3)] == keys
    assert again.mask(1, "acme") == mask
    again.close()


def test_a_generation_is_kept_once(vault: Vault) -> None:
    (first,) = kept(vault, 1)
    second = [vault.new_key(2, "acme"), vault.new_key(1, "acme")]
    with pytest.raises(ObjectExists):
        vault.keep(second)
    assert vault.key(1) == first
    assert vault.key(2) is None


def test_destroyed_is_destroyed_and_the_rest_stays(vault: Vault) -> None:
    one, _, three = kept(vault, 1, 2, 3)
    vault.destroy([2, 77])
    vault.destroy([])
    assert [vault.key(g) for g in (1, 2, 3)] == [one, None, three]
    again = reopened(vault)
    assert [again.key(g) for g in (1, 2, 3)] == [one, None, three]
    again.close()


def test_destroy_takes_the_vaults_own_listing(vault: Vault) -> None:
    kept(vault, *range(100))
    vault.destroy(g for g in vault.generations() if g % 2)
    assert list(vault.generations()) == list(range(0, 100, 2))


def test_slots_are_used_again(vault: Vault) -> None:
    sizes = []
    for start in range(0, 6000, 1000):
        kept(vault, *range(start, start + 1000))
        vault.destroy(range(start, start + 1000))
        sizes.append((vault.directory / "vault.sqlite").stat().st_size)
    assert sizes[-1] == sizes[0]


@pytest.mark.parametrize("generation", [-1, 1 << 63])
def test_a_generation_has_bounds(vault: Vault, generation: int) -> None:
    with pytest.raises(ValueError, match="out of bounds"):
        vault.new_key(generation, "acme")


def test_the_greatest_generation_is_kept(vault: Vault) -> None:
    (key,) = kept(vault, (1 << 63) - 1)
    assert vault.key(key.generation) == key


def test_listing_goes_on_over_many(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault_module, "_LISTED_AT_ONCE", 7)
    kept(vault, *range(50))
    assert list(vault.generations()) == list(range(50))


def test_threads_do_not_disturb_each_other(vault: Vault) -> None:
    errors: list[str] = []

    def work(number: int) -> None:
        try:
            for turn in range(12):
                generations = [number * 10_000 + turn * 10 + i for i in range(10)]
                keys = kept(vault, *generations, tenant=f"t{(number + turn) % 3}")
                if any(vault.key(key.generation) != key for key in keys):
                    errors.append("another key")
                vault.destroy(generations[:5])
        except (KvtierError, AssertionError) as problem:
            errors.append(repr(problem))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(vault.generations())) == 4 * 12 * 5


# -- tenants


def test_a_shredded_tenant_is_gone_and_another_is_not(vault: Vault) -> None:
    kept(vault, 1, 2, 3)
    (other,) = kept(vault, 4, tenant="other")
    assert vault.destroy_tenant("acme") == 3
    assert [vault.key(g) for g in (1, 2, 3)] == [None] * 3
    assert vault.key(4) == other
    assert vault.destroy_tenant("acme") == 0
    with pytest.raises(CorruptObject, match="acme"):
        vault.mask(1, "acme")
    again = reopened(vault)
    assert list(again.generations()) == [4]
    again.close()


def test_a_key_from_before_the_shredding_is_not_kept(vault: Vault) -> None:
    early = vault.new_key(1, "acme")
    other = vault.new_key(2, "other")
    vault.destroy_tenant("acme")
    late = vault.new_key(3, "acme")
    assert vault.keep([early, other, late]) == (1,)
    assert [vault.key(g) for g in (1, 2, 3)] == [None, other, late]


def test_a_returning_tenant_has_another_key(vault: Vault) -> None:
    kept(vault, 1)
    before = vault.mask(1, "acme")
    vault.destroy_tenant("acme")
    kept(vault, 1)
    assert vault.mask(1, "acme") != before


def test_masks_differ_by_tenant_and_generation(vault: Vault) -> None:
    kept(vault, 0)
    kept(vault, 1, tenant="other")
    masks = [vault.mask(g, t) for t in ("acme", "other") for g in range(200)]
    assert len(set(masks)) == len(masks)
    assert all(0 <= mask < 1 << 64 for mask in masks)
    assert max(masks) >> 60


def test_more_tenants_than_are_kept_in_memory(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault_module, "_TENANTS_IN_MEMORY", 3)
    keys = [key for i in range(10) for key in kept(vault, i, tenant=f"t{i}")]
    assert [vault.key(i) for i in range(10)] == keys
    assert len(vault._tenants) <= 3
    assert vault.destroy_tenant("t0") == 1
    assert vault.key(0) is None


# -- the master key


def test_another_master_key_is_refused_and_nothing_changes(vault: Vault) -> None:
    (key,) = kept(vault, 1)
    vault.close()
    path = vault.directory / "vault.sqlite"
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="master key") as refused:
        Vault(vault.directory, STORE, OTHER_MASTER)
    assert refused.value.fix
    assert path.read_bytes() == before
    again = Vault(vault.directory, STORE, MASTER)
    assert again.key(1) == key
    again.close()


def test_a_rotated_master_key_opens_and_the_old_one_does_not(vault: Vault) -> None:
    keys = kept(vault, 1) + kept(vault, 2, tenant="other")
    masks = [vault.mask(1, "acme"), vault.mask(2, "other")]
    vault.rotate_master(OTHER_MASTER)
    assert [vault.key(1), vault.key(2)] == keys
    keys += kept(vault, 3, tenant="third")
    vault.close()
    with pytest.raises(ConfigError, match="master key"):
        Vault(vault.directory, STORE, MASTER)
    again = Vault(vault.directory, STORE, OTHER_MASTER)
    assert [again.key(g) for g in (1, 2, 3)] == keys
    assert [again.mask(1, "acme"), again.mask(2, "other")] == masks
    again.close()


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_master_key_has_32_bytes(folder: Path, length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Vault(folder, STORE, b"m" * length)
    assert not folder.exists()


# -- rows that are not where they belong


SWAP = "UPDATE keys SET slot = CASE generation WHEN 1 THEN {2} WHEN 2 THEN {1} END WHERE generation IN (1, 2)"


def slots(vault: Vault, table: str = "keys", name: str = "generation") -> dict[object, int]:
    vault.close()
    db = sqlite3.connect(vault.directory / "vault.sqlite")
    found = dict(db.execute(f"SELECT {name}, slot FROM {table}"))
    db.close()
    return found


def test_a_key_moved_to_another_generation_does_not_unwrap(vault: Vault) -> None:
    kept(vault, 1, 2)
    three = kept(vault, 3)[0]
    at = slots(vault)
    sql(vault, SWAP.format(None, at[1], at[2]))
    again = Vault(vault.directory, STORE, MASTER)
    for generation in (1, 2):
        with pytest.raises(CorruptObject, match=f"generation {generation}"):
            again.key(generation)
    assert again.key(3) == three
    again.close()


def test_a_key_given_to_another_tenant_does_not_unwrap(vault: Vault) -> None:
    kept(vault, 1)
    kept(vault, 2, tenant="other")
    sql(vault, "UPDATE keys SET tenant = (SELECT tenant FROM tenants WHERE name = 'other')")
    again = Vault(vault.directory, STORE, MASTER)
    with pytest.raises(CorruptObject):
        again.key(1)
    assert again.key(2) is not None
    again.close()


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE tenants SET name = 'other'",
        "UPDATE tenants SET tenant = 77; UPDATE keys SET tenant = 77",
        "UPDATE slots SET wrapped = zeroblob(60) WHERE slot = (SELECT slot FROM tenants)",
    ],
)
def test_a_tenants_key_under_another_name_does_not_unwrap(vault: Vault, spoil: str) -> None:
    kept(vault, 1)
    sql(vault, *spoil.split(";"))
    again = Vault(vault.directory, STORE, MASTER)
    with pytest.raises(CorruptObject, match="tenant"):
        again.key(1)
    again.close()


def test_a_row_copied_from_another_store_does_not_unwrap(vault: Vault, tmp_path: Path) -> None:
    kept(vault, 1)
    other = Vault(tmp_path / "other", OTHER_STORE, MASTER)
    kept(other, 1)
    other.close()
    attach = f"ATTACH '{other.directory / 'vault.sqlite'}' AS other"
    sql(
        vault,
        attach,
        "UPDATE slots SET wrapped = (SELECT wrapped FROM other.slots o WHERE o.slot = slots.slot)",
    )
    again = Vault(vault.directory, STORE, MASTER)
    with pytest.raises(CorruptObject):
        again.key(1)
    again.close()


# -- opening


def test_exists_says_whether_a_vault_is_there(folder: Path) -> None:
    assert not Vault.exists(folder)
    folder.mkdir(mode=0o700)
    assert not Vault.exists(folder)
    Vault(folder, STORE, MASTER).close()
    assert Vault.exists(folder)


def test_the_files_are_closed_to_others(vault: Vault) -> None:
    kept(vault, 1)
    assert vault.directory.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o077 for path in vault.directory.iterdir()}
    assert "vault.sqlite-wal" in modes
    assert set(modes.values()) == {0}


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o755])
def test_a_folder_open_to_others_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 700"):
        Vault(folder, STORE, MASTER)
    assert list(folder.iterdir()) == []


def test_a_folder_of_something_else_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "FORMAT").write_text("{}")
    with pytest.raises(ConfigError, match="FORMAT"):
        Vault(folder, STORE, MASTER)


def test_one_process_at_a_time(vault: Vault) -> None:
    with pytest.raises(TierUnavailable, match="in use"):
        Vault(vault.directory, STORE, MASTER)
    kept(vault, 1)


def test_a_vault_of_another_store_is_refused(vault: Vault) -> None:
    kept(vault, 1)
    vault.close()
    with pytest.raises(ConfigError, match="another store"):
        Vault(vault.directory, OTHER_STORE, MASTER)


def test_a_newer_version_is_refused(vault: Vault) -> None:
    sql(vault, "PRAGMA user_version=2")
    with pytest.raises(TierUnavailable, match="version 2"):
        Vault(vault.directory, STORE, MASTER)


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 300])
def test_a_file_that_is_no_vault_is_refused_and_left_alone(folder: Path, content: bytes) -> None:
    folder.mkdir(mode=0o700)
    (folder / "vault.sqlite").write_bytes(content)
    with pytest.raises(TierUnavailable):
        Vault(folder, STORE, MASTER)
    assert (folder / "vault.sqlite").read_bytes() == content


def test_a_creation_that_was_cut_off_begins_again(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    for name in ("vault.new", "vault.new-journal"):
        (folder / name).write_bytes(b"half")
    vault = Vault(folder, STORE, MASTER)
    kept(vault, 1)
    vault.close()
    assert sorted(os.listdir(folder)) == ["LOCK", "vault.sqlite"]


def test_an_unusable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierUnavailable, match="cannot be used"):
        Vault(tmp_path / "file" / "vault", STORE, MASTER)
    assert not Vault.exists(tmp_path / "file" / "vault")


def test_an_unreadable_folder_is_said(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    vault.close()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("kvtier.disk.vault_folder.os.stat", refuse)
    with pytest.raises(TierUnavailable, match="Permission denied"):
        Vault.exists(vault.directory)
    with pytest.raises(TierUnavailable, match="Permission denied"):
        Vault(vault.directory, STORE, MASTER)


CHANGES: list[Callable[[Vault], object]] = [
    lambda v: v.keep([DataKey(9, "acme", b"k" * 32, 1)]),
    lambda v: v.destroy([1]),
    lambda v: v.new_key(9, "fresh"),
    lambda v: v.destroy_tenant("acme"),
    lambda v: v.rotate_master(OTHER_MASTER),
]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_promised_in_a_folder_that_was_moved(
    vault: Vault, change: Callable[[Vault], object]
) -> None:
    kept(vault, 1)
    vault.directory.rename(vault.directory.with_name("moved"))
    with pytest.raises(TierUnavailable):
        change(vault)


@pytest.mark.parametrize("change", [*CHANGES, lambda v: v.key(1), lambda v: list(v.generations())])
def test_a_closed_vault_says_so(vault: Vault, change: Callable[[Vault], object]) -> None:
    kept(vault, 1)
    vault.close()
    vault.close()
    with pytest.raises(TierUnavailable):
        change(vault)


def test_no_error_and_no_repr_shows_a_key(vault: Vault) -> None:
    (key,) = kept(vault, 1)
    with pytest.raises(ObjectExists) as refused:
        vault.keep([key])
    for text in (repr(key), repr(refused.value), repr(vault), repr(vault._tenants)):
        assert repr(key.key)[2:-1] not in text
        assert key.key.hex() not in text
