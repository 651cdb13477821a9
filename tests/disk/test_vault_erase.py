"""What is destroyed is in no file of the vault; what fails or is cut off in the middle is not half done."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier.disk import vault_rows
from kvtier.disk.fileops import OsFileOps
from kvtier.disk.sealing import NONCE_BYTES, DataKey
from kvtier.disk.vault import Vault
from kvtier.disk.vault_keys import WRAPPED_BYTES
from kvtier.errors import TierUnavailable

STORE = b"s" * 16
MASTER, NEXT_MASTER = b"m" * 32, b"n" * 32
FULL = sqlite3.OperationalError("database or disk is full")
BROKEN = sqlite3.OperationalError("disk I/O error")

Hook = Callable[[str, bool], None]


class WatchedConnection(sqlite3.Connection):
    """Calls `hook(statement, done)` before and after every statement of the vault's connections."""

    hook: Hook | None = None

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        self._tell(statement, False)
        cursor = super().execute(statement, *values)  # type: ignore[arg-type]
        self._tell(statement, True)
        return cursor

    def _tell(self, statement: str, done: bool) -> None:
        hook = type(self).hook
        if hook is not None:
            hook(statement, done)


def watched(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, timeout=0.05, factory=WatchedConnection
    )


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    with mock.patch.object(vault_rows, "_connected", watched):
        yield
    WatchedConnection.hook = None


def on(statement: str, action: Callable[[], None], *, done: bool = False) -> None:
    """Run `action` each time that a statement with this beginning is to run, or has run."""

    def hook(said: str, is_done: bool) -> None:
        if said.startswith(statement) and is_done is done:
            action()

    WatchedConnection.hook = hook


def fail_at(statement: str, problem: Exception) -> None:
    def fail() -> None:
        raise problem

    on(statement, fail)


def kept(vault: Vault, *generations: int, tenant: str = "acme") -> list[DataKey]:
    keys = [vault.new_key(generation, tenant) for generation in generations]
    vault.keep(keys)
    return keys


def wrapped(vault: Vault, *generations: int) -> list[bytes]:
    """The wrapped bytes of keys, without their nonces, as they lie in the file."""
    rows = [vault._rows.key(generation) for generation in generations]
    return [row.wrapped[NONCE_BYTES:] for row in rows if row is not None]


def tenant_wrapped(vault: Vault, tenant: str) -> bytes:
    row = vault._rows.tenant(tenant)
    assert row is not None
    return row.wrapped[NONCE_BYTES:]


def found(folder: Path, secrets: list[bytes]) -> list[bytes]:
    """The secrets of which 16 bytes in a row, from any of three places, are in a file of the folder."""
    files = [path.read_bytes() for path in folder.iterdir()]
    return [
        secret
        for secret in secrets
        if any(secret[at : at + 16] in data for data in files for at in (0, 16, len(secret) - 16))
    ]


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    opened = Vault(tmp_path / "vault", STORE, MASTER)
    yield opened
    WatchedConnection.hook = None
    opened.close()


# -- erased


def test_a_destroyed_keys_bytes_are_in_no_file(vault: Vault) -> None:
    kept(vault, *range(100))
    secrets = wrapped(vault, *range(100))
    assert found(vault.directory, secrets) == secrets
    vault.destroy(range(0, 100, 3))
    assert found(vault.directory, secrets[0::3]) == []
    assert len(found(vault.directory, secrets)) == 66
    assert (vault.directory / "vault.sqlite-wal").stat().st_size == 0


def test_no_key_lies_in_the_vault_unwrapped(vault: Vault) -> None:
    keys = kept(vault, *range(50))
    vault.destroy([0])
    assert found(vault.directory, [key.key for key in keys] + [MASTER]) == []


def test_a_shredded_tenants_bytes_are_in_no_file(vault: Vault) -> None:
    kept(vault, *range(50))
    kept(vault, 50, tenant="other")
    secrets = [*wrapped(vault, *range(50)), tenant_wrapped(vault, "acme")]
    others = [*wrapped(vault, 50), tenant_wrapped(vault, "other")]
    assert len(found(vault.directory, secrets + others)) == 53
    assert vault.destroy_tenant("acme") == 50
    assert found(vault.directory, secrets) == []
    assert found(vault.directory, others) == others


def test_rotation_leaves_nothing_that_the_old_master_key_opens(vault: Vault) -> None:
    kept(vault, 1)
    kept(vault, 2, tenant="other")
    secrets = [tenant_wrapped(vault, "acme"), tenant_wrapped(vault, "other")]
    vault.rotate_master(NEXT_MASTER)
    assert found(vault.directory, secrets) == []


def churn(vault: Vault, seed: int, count: int) -> int:
    """Keep and destroy in random order and size; answers how many destroyed keys were ever found again."""
    draw = random.Random(seed)
    order = draw.sample(range(count * 10), count)
    alive: list[int] = []
    dead: list[bytes] = []
    most = 0
    while order or alive:
        batch, order = order[: draw.randint(1, 90)], order[90:]
        kept(vault, *batch, tenant=draw.choice("abc"))
        alive += batch
        draw.shuffle(alive)
        doomed, alive = alive[:60], alive[60:]
        dead += wrapped(vault, *doomed)
        vault.destroy(doomed)
        most = max(most, len(found(vault.directory, dead)))
        assert len(list(vault.generations())) == len(alive)
    return most


def test_no_order_of_keeping_and_destroying_leaves_bytes_behind(vault: Vault) -> None:
    assert churn(vault, seed=0, count=1500) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 13))
def test_no_order_leaves_bytes_behind_at_length(
    vault: Vault, seed: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("seed", seed)
    assert churn(vault, seed, count=6000) == 0


# -- the search finds what is left behind


def test_a_destruction_without_checkpoint_is_found(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(vault, *range(100))
    secrets = wrapped(vault, *range(100))
    monkeypatch.setattr(vault._rows, "settle", lambda: None)
    vault.destroy(range(100))
    assert found(vault.directory, secrets) != []


def test_a_destruction_that_only_forgets_the_slot_is_found(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(vault, *range(100))
    secrets = wrapped(vault, *range(100))
    monkeypatch.setattr(vault._rows, "_overwrite", lambda slots, wrapped: None)
    vault.destroy(range(100))
    assert found(vault.directory, secrets) == secrets


@pytest.mark.parametrize("secure_delete", ["ON", "OFF"])
def test_deleting_rows_is_not_enough(tmp_path: Path, secure_delete: str) -> None:
    """Why keys lie in slots: rows that are deleted leave copies behind, secure_delete or not."""
    left = 0
    db = sqlite3.connect(tmp_path / "plain.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA secure_delete={secure_delete}")
    db.execute("CREATE TABLE keys (generation INTEGER PRIMARY KEY, wrapped BLOB)")
    draw = random.Random(0)
    secrets = {g: draw.randbytes(WRAPPED_BYTES) for g in draw.sample(range(4000), 4000)}
    db.execute("BEGIN")
    db.executemany("INSERT INTO keys VALUES (?,?)", list(secrets.items()))
    db.execute("COMMIT")
    doomed = draw.sample(range(4000), 4000)
    for start in range(0, len(doomed), 200):
        db.execute("BEGIN")
        db.executemany("DELETE FROM keys WHERE generation = ?", [(g,) for g in doomed[start : start + 200]])
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if start % 800 == 0:
            left += len(found(tmp_path, [secrets[g] for g in doomed[: start + 200]]))
        if left:
            break
    db.close()
    assert left > 0


# -- faults


class FaultyOps(OsFileOps):
    def __init__(self) -> None:
        self.broken = False

    def fsync(self, fd: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        super().fsync(fd)


@pytest.mark.parametrize("problem", [FULL, BROKEN])
@pytest.mark.parametrize("statement", ["BEGIN", "SELECT max(slot)", "COMMIT"])
def test_a_failure_to_keep_keeps_nothing(vault: Vault, statement: str, problem: Exception) -> None:
    before = kept(vault, 1)
    keys = [vault.new_key(generation, "acme") for generation in (2, 3)]
    fail_at(statement, problem)
    with pytest.raises(TierUnavailable, match=str(problem)):
        vault.keep(keys)
    WatchedConnection.hook = None
    assert list(vault.generations()) == [1]
    assert vault.keep(keys) == ()
    assert [vault.key(g) for g in (1, 2, 3)] == before + keys


def test_a_file_that_may_not_grow_is_said_and_nothing_is_kept(vault: Vault) -> None:
    kept(vault, 1)
    vault.destroy([])
    (pages,) = vault._rows._db.execute("PRAGMA page_count").fetchone()
    vault._rows._db.execute(f"PRAGMA max_page_count={pages}")
    keys = [vault.new_key(generation, "acme") for generation in range(2, 2000)]
    with pytest.raises(TierUnavailable, match="full"):
        vault.keep(keys)
    assert list(vault.generations()) == [1]
    vault._rows._db.execute("PRAGMA max_page_count=100000")
    assert vault.keep(keys) == ()


@pytest.mark.parametrize("statement", ["BEGIN", "DELETE FROM keys", "COMMIT"])
def test_a_failure_to_destroy_destroys_nothing(vault: Vault, statement: str) -> None:
    keys = kept(vault, 1, 2)
    fail_at(statement, BROKEN)
    with pytest.raises(TierUnavailable):
        vault.destroy([1, 2])
    WatchedConnection.hook = None
    assert [vault.key(g) for g in (1, 2)] == keys


@pytest.mark.parametrize("kind", ["PASSIVE", "TRUNCATE"])
def test_a_failed_checkpoint_is_made_good_by_the_next_call(vault: Vault, kind: str) -> None:
    kept(vault, *range(20))
    secrets = wrapped(vault, *range(20))
    fail_at(f"PRAGMA wal_checkpoint({kind})", BROKEN)
    with pytest.raises(TierUnavailable):
        vault.destroy(range(20))
    WatchedConnection.hook = None
    assert vault.key(1) is None
    vault.destroy(range(20))
    assert found(vault.directory, secrets) == []


def test_a_failed_flush_of_the_truncation_is_said(tmp_path: Path) -> None:
    ops = FaultyOps()
    vault = Vault(tmp_path / "vault", STORE, MASTER, ops=ops)
    kept(vault, 1)
    ops.broken = True
    with pytest.raises(TierUnavailable, match="Input/output error"):
        vault.destroy([1])
    ops.broken = False
    vault.destroy([1])
    vault.close()


def test_a_foreign_reader_holds_up_the_destruction_and_is_said(vault: Vault) -> None:
    kept(vault, *range(20))
    foreign = sqlite3.connect(vault.directory / "vault.sqlite", isolation_level=None)
    foreign.execute("BEGIN")
    foreign.execute("SELECT count(*) FROM keys").fetchone()
    secrets = wrapped(vault, *range(20))
    with pytest.raises(TierUnavailable, match=r"another process|locked"):
        vault.destroy(range(20))
    foreign.close()
    vault.destroy([])
    assert found(vault.directory, secrets) == []


@pytest.mark.parametrize("statement", ["CREATE TABLE", "COMMIT", "PRAGMA journal_mode"])
def test_a_creation_that_failed_leaves_no_vault(tmp_path: Path, statement: str) -> None:
    folder = tmp_path / "vault"
    plain = sqlite3.connect

    def connect(path: Path, **options: object) -> sqlite3.Connection:
        return plain(path, isolation_level=None, factory=WatchedConnection)

    fail_at(statement, FULL)
    with (
        mock.patch("kvtier.disk.vault_rows.sqlite3.connect", connect),
        pytest.raises(TierUnavailable, match="full"),
    ):
        Vault(folder, STORE, MASTER)
    WatchedConnection.hook = None
    assert not Vault.exists(folder)
    Vault(folder, STORE, MASTER).close()
    assert Vault.exists(folder)


# -- crashes: the files as they are at a moment are what a killed process leaves


class Image:
    """A copy of the vault's files, taken within a statement."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, source: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(source, self.folder)
        self.folder.chmod(0o700)


def test_a_crash_between_commit_and_checkpoint_is_made_good_at_opening(vault: Vault, tmp_path: Path) -> None:
    kept(vault, *range(50))
    secrets = wrapped(vault, *range(50))
    image = Image(tmp_path / "image")
    on("COMMIT", lambda: image.take(vault.directory), done=True)
    vault.destroy(range(50))
    WatchedConnection.hook = None
    assert found(image.folder, secrets) != []
    again = Vault(image.folder, STORE, MASTER)
    assert list(again.generations()) == []
    assert found(image.folder, secrets) == []
    again.close()


@pytest.mark.parametrize("done", [False, True])
def test_a_crash_in_a_rotation_leaves_one_of_the_two_keys(vault: Vault, tmp_path: Path, done: bool) -> None:
    keys = kept(vault, 1) + kept(vault, 2, tenant="other")
    image = Image(tmp_path / "image")
    on("COMMIT", lambda: image.take(vault.directory), done=done)
    vault.rotate_master(NEXT_MASTER)
    WatchedConnection.hook = None
    again = Vault(image.folder, STORE, NEXT_MASTER if done else MASTER)
    assert [again.key(1), again.key(2)] == keys
    again.close()


class VaultMachine(RuleBasedStateMachine):
    """The vault against a dictionary, with crashes before and after the commit of any change."""

    generations = st.lists(st.integers(0, 40), max_size=8, unique=True)
    tenants = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="kvtier-vault-"))
        self.connecting = mock.patch.object(vault_rows, "_connected", watched)
        self.connecting.start()
        self.lives = 0
        self.master = MASTER
        self.model: dict[int, DataKey] = {}
        self.dead: list[bytes] = []

    @initialize()
    def begin(self) -> None:
        self.vault = Vault(self.base / "0", STORE, self.master)

    @rule(generations=generations, tenant=tenants, crash=st.sampled_from([None, False, True]))
    def keep(self, generations: list[int], tenant: str, crash: bool | None) -> None:
        keys = [self.vault.new_key(g, tenant) for g in generations if g not in self.model]
        if self._happens(crash, lambda: self.vault.keep(keys)) or not keys:
            self.model.update({key.generation: key for key in keys})

    @rule(generations=generations, crash=st.sampled_from([None, False, True]))
    def destroy(self, generations: list[int], crash: bool | None) -> None:
        dying = wrapped(self.vault, *generations)
        if self._happens(crash, lambda: self.vault.destroy(generations)):
            self.dead += dying
            for generation in generations:
                self.model.pop(generation, None)

    @rule(tenant=tenants, crash=st.sampled_from([None, False, True]))
    def destroy_tenant(self, tenant: str, crash: bool | None) -> None:
        theirs = [g for g, key in self.model.items() if key.tenant == tenant]
        dying = wrapped(self.vault, *theirs)
        if self._happens(crash, lambda: self.vault.destroy_tenant(tenant)):
            self.dead += dying
            for generation in theirs:
                del self.model[generation]

    @rule(crash=st.sampled_from([None, False, True]))
    def rotate(self, crash: bool | None) -> None:
        new = os.urandom(32)
        if self._happens(crash, lambda: self.vault.rotate_master(new), new):
            self.master = new

    @rule()
    def reopen(self) -> None:
        self.vault.close()
        self.vault = Vault(self.vault.directory, STORE, self.master)

    @invariant()
    def is_the_model(self) -> None:
        if hasattr(self, "vault"):
            assert list(self.vault.generations()) == sorted(self.model)
            assert {g: self.vault.key(g) for g in range(41) if self.vault.key(g)} == self.model
            assert found(self.vault.directory, self.dead) == []

    def teardown(self) -> None:
        WatchedConnection.hook = None
        if hasattr(self, "vault"):
            self.vault.close()
        self.connecting.stop()
        shutil.rmtree(self.base)

    def _happens(self, crash: bool | None, change: Callable[[], object], new: bytes | None = None) -> bool:
        """Make the change; or crash before (False) or after (True) its commit and open what is left."""
        if crash is None:
            change()
            return True
        self.lives += 1
        image = Image(self.base / str(self.lives))
        on("COMMIT", lambda: image.take(self.vault.directory), done=crash)
        change()
        WatchedConnection.hook = None
        if not image.folder.exists():
            return True
        self.vault.close()
        self.vault = Vault(image.folder, STORE, new if crash and new else self.master)
        return crash


VaultMachine.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestVaultMachine = VaultMachine.TestCase
