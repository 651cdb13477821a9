"""What the disk service says and does when a job fails, hangs or cannot be carried out."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.client.client import Client
from kvtier.config.load import load
from kvtier.daemon import disk_service
from kvtier.daemon.disk_service import DiskService
from kvtier.daemon.embedded import Embedded
from kvtier.disk.fileops import Bytes, OsFileOps
from kvtier.disk.fsck import fsck
from kvtier.disk.tier import DiskTier
from kvtier.errors import ConfigError, StaleSlot, TierFull, TierUnavailable
from kvtier.messages.tiers import DiskRead, DiskUsage, WireItem
from kvtier.receipts import TierInfo
from kvtier.testing.gates import Gate, GatedFileOps
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import LocalWorker, forget_all, until

TOKENS = 190
PAGES = pages_for(TOKENS)
MakeDaemon = Callable[..., Embedded]
MakeLocal = Callable[..., LocalWorker]
Start = Callable[..., tuple[Embedded, Client, LocalWorker]]


class Failing(OsFileOps):
    """System calls that fail with the errno set for their kind. flushes: how many were asked for."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.flushes = 0

    def _maybe(self, kind: str) -> None:
        number = self.failing.get(kind)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """See os.preadv."""
        self._maybe("read")
        return super().preadv(fd, buffers, offset)

    def fsync(self, fd: int) -> None:
        """See os.fsync."""
        self.flushes += 1
        self._maybe("flush")
        super().fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """See os.fdatasync."""
        self.flushes += 1
        self._maybe("flush")
        super().fdatasync(fd)


def disk(client: Client) -> TierInfo:
    return next(tier for tier in client.status().tiers if tier.name == "disk")


@pytest.fixture
def start(make_daemon: MakeDaemon, make_local: MakeLocal, client_of: Callable[[Embedded], Client]) -> Start:
    """Starts a daemon, with a client and a worker of it."""

    def started(**how: Any) -> tuple[Embedded, Client, LocalWorker]:
        daemon = make_daemon(**how)
        return daemon, client_of(daemon), make_local(daemon.socket_path)

    return started


def test_a_removal_that_fails_makes_the_tier_degraded_too(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, local = start()
    assert local.park(1, PAGES, TOKENS, level="disk").result().level == "disk"

    def sick(*_: Any, **__: Any) -> None:
        raise TierUnavailable("the drive gave up")

    monkeypatch.setattr(DiskTier, "commit_with_records", sick)
    forgotten = client.forget("chat-1")
    assert (forgotten.durable, "gave up" in forgotten.detail) == (False, True)
    until(lambda: disk(client).state == "degraded", "the status says it")
    monkeypatch.undo()
    until(lambda: disk(client).state == "ready", "the drive works again")


def test_a_write_that_cannot_be_carried_out_is_its_own_parks_loss_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, client, local = start()
    reserve = DiskTier.reserve

    def picky(self: DiskTier, meta: Any, *args: Any, **how: Any) -> Any:
        if meta.tokens < 32:
            raise ValueError("its names do not fit")
        return reserve(self, meta, *args, **how)

    monkeypatch.setattr(DiskTier, "reserve", picky)
    receipt = local.park(1, pages_for(40), 40, level="disk").result()
    assert (receipt.level, receipt.reason, receipt.detail) == ("host", "disk_error", "its names do not fit")
    # Over the same connection, and the drive is not blamed.
    assert local.park(2, pages_for(64, 64), 64, level="disk").result().level == "disk"
    assert disk(client).state == "ready"
    assert daemon.disk is not None and daemon.disk._attempts == 0
    forget_all(client)


def test_a_write_that_lost_against_a_forget_blames_no_drive(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, client, local = start()
    service = daemon.disk
    assert service is not None

    def forgotten(*_: Any, **__: Any) -> None:
        raise StaleSlot("the tenant's keys were destroyed while its blocks were being written")

    monkeypatch.setattr(DiskTier, "commit_with_records", forgotten)
    receipt = local.park(1, pages_for(40), 40, level="disk").result()
    assert (receipt.level, receipt.reason) == ("host", "disk_error")
    assert service._degraded == ""
    monkeypatch.undo()
    assert local.park(2, pages_for(64, 64), 64, level="disk").result().level == "disk"
    forget_all(client)


def test_a_drive_that_cannot_flush_stays_degraded_until_it_can(
    start: Start, with_ops: Callable[[OsFileOps], None]
) -> None:
    ops = Failing()
    with_ops(ops)
    _, client, local = start()
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    ops.failing["flush"] = errno.EIO
    assert local.park(2, PAGES, TOKENS, level="disk").result().reason == "disk_error"
    tried = ops.flushes
    until(lambda: ops.flushes >= tried + 2, "it is tried whether a flush works")
    assert disk(client).state == "degraded"
    ops.failing.clear()
    until(lambda: disk(client).state == "ready", "the drive works again")
    assert local.park(3, PAGES, TOKENS, level="disk").result().level == "disk"
    forget_all(client)


def test_a_drive_that_cannot_flush_is_not_well_for_being_full(
    start: Start, with_ops: Callable[[OsFileOps], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Failing()
    with_ops(ops)
    daemon, client, local = start()
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok

    def full(*_: Any, **__: Any) -> None:
        raise TierFull("no free extent on disk", needed_bytes=1)

    ops.failing["flush"] = errno.EIO
    assert local.park(2, PAGES, TOKENS, level="disk").result().reason == "disk_error"
    monkeypatch.setattr(DiskTier, "reserve", full)
    service, tried = daemon.disk, ops.flushes
    assert service is not None
    until(lambda: ops.flushes >= tried + 2, "it is tried whether a flush works")
    assert service._degraded
    ops.failing.clear()
    until(lambda: disk(client).state == "ready", "the drive works again")
    monkeypatch.undo()
    forget_all(client)


def test_behind_a_job_that_hangs_waits_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    service = DiskService(load())
    service._degraded = "the drive gave up"
    service._tier = SimpleNamespace(is_there=lambda: True)  # type: ignore[assignment]
    service._place = None
    said: Any = object()
    monkeypatch.setattr(service, "_find_place", lambda: None)
    monkeypatch.setattr(service, "_usage", lambda: said)
    monkeypatch.setattr(service, "_works", lambda: False)
    session: Any = SimpleNamespace(said=said)
    asked: list[Callable[[], None]] = []

    def submit(lane: str, work: Callable[..., None], *args: Any) -> None:
        asked.append(lambda: work(*args))

    lanes: Any = SimpleNamespace(submit=submit)
    for _ in range(5):
        service._look_after(session, lanes)
    assert len(asked) == 1
    asked.pop()()
    service._look_after(session, lanes)
    assert len(asked) == 1, "it is tried again once that has ended"


def test_a_drive_that_is_gone_for_reads_is_said(
    start: Start, with_ops: Callable[[OsFileOps], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"the same for both of the daemons")
    secret.chmod(0o600)
    where = {"disk__directory": str(tmp_path / "d"), "access__tenant_secret_file": str(secret)}
    before, _, local = start(**where)
    assert local.park(1, PAGES, TOKENS, level="disk").result().level == "disk"
    before.close()
    ops = Failing()
    with_ops(ops)
    daemon, client, local = start(disk__scrub_bytes_per_s=0, **where)
    ops.failing["read"] = errno.ENODEV
    seen: set[str] = set()
    assert daemon.disk is not None
    say = daemon.disk._usage

    def said() -> DiskUsage:
        usage = say()
        seen.add(usage.detail)
        return usage

    monkeypatch.setattr(daemon.disk, "_usage", said)
    receipt = local.restore(1, PAGES, TOKENS)
    assert (receipt.tokens, receipt.reason) == (0, "disk_error")
    until(lambda: "cannot be read" in " ".join(seen), "it is said")
    ops.failing.clear()
    until(lambda: disk(client).state == "ready", "the drive works again")
    assert local.restore(1, PAGES, TOKENS).sources == {"disk": TOKENS}, "nothing was taken for damaged"
    forget_all(client)


@pytest.mark.parametrize("gone", ["*", "segments", "segments/*"])
def test_a_folder_that_was_emptied_is_said_and_the_store_begins_anew(
    start: Start, tmp_path: Path, gone: str
) -> None:
    """With all of it, or with what its index then says is not there."""
    folder = tmp_path / "d"
    daemon, client, local = start(disk__directory=str(folder))
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    for path in sorted(folder.glob(gone)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    until(lambda: disk(client).objects == 0 and disk(client).state == "ready", "it has begun anew")
    assert local.park(2, PAGES, TOKENS, level="disk").result().level == "disk"
    daemon.close()
    _, client, _ = start(disk__directory=str(folder))
    assert disk(client).objects > 0, "what was parked since is there"


def test_a_deleted_index_is_said_and_nothing_is_promised_until_it_is_made_anew(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "d"
    daemon, client, local = start(disk__directory=str(folder))
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    service = daemon.disk
    assert service is not None
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    until(lambda: "kvtier fsck" in service.health()["failure"], "it is said what to do")
    assert local.park(2, PAGES, TOKENS, level="disk").result().level == "host"

    def is_mended() -> bool:
        try:
            return bool(fsck(folder, repair=True).repaired)
        except TierUnavailable:
            # The service tries the folder again just now.
            return False

    until(is_mended, "the index is made anew")
    until(lambda: disk(client).state == "ready", "it is back")
    assert local.park(3, PAGES, TOKENS, level="disk").result().level == "disk"
    forget_all(client)


def test_control_who_does_not_look_for_the_index_promises_what_a_restart_loses(
    make_daemon: MakeDaemon, make_local: MakeLocal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiskTier, "is_there", lambda self: True)
    folder = tmp_path / "d"
    daemon = make_daemon(disk__directory=str(folder))
    local = make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    assert local.park(2, pages_for(32, 64), 32, level="disk").result().level == "disk"
    daemon.close()
    with pytest.raises(TierUnavailable, match="is missing"):
        make_daemon(disk__directory=str(folder))


def test_a_deleted_folder_of_sealed_blocks_begins_anew_with_the_same_keys(
    start: Start, tmp_path: Path
) -> None:
    folder, key = tmp_path / "d", tmp_path / "master"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    where = {"disk__directory": str(folder), "disk__keys_directory": str(tmp_path / "k")}
    daemon, client, local = start(disk__key_file=str(key), **where)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    shutil.rmtree(folder)
    until(lambda: disk(client).objects == 0 and disk(client).state == "ready", "it has begun anew")
    assert local.park(2, PAGES, TOKENS, level="disk").result().level == "disk"
    daemon.close()
    again, client, _ = start(disk__key_file=str(key), **where)
    assert disk(client).objects > 0
    again.close()
    # A copy from before has nothing of it: its keys are gone.
    shutil.rmtree(folder)
    shutil.copytree(old, folder)
    _, client, _ = start(disk__key_file=str(key), **where)
    assert disk(client).objects == 0


@pytest.mark.parametrize("contents", [False, True])
def test_a_sealed_folder_that_is_moved_away_keeps_its_keys_and_is_waited_for(
    start: Start, tmp_path: Path, contents: bool
) -> None:
    """Nothing comes into its place: an empty store there would destroy the keys of what was moved."""
    folder, away, key = tmp_path / "d", tmp_path / "away", tmp_path / "master"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    where = {"disk__directory": str(folder), "disk__keys_directory": str(tmp_path / "k")}
    _, client, local = start(disk__key_file=str(key), **where)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    there = disk(client).objects
    _move(folder, away, contents)
    until(lambda: disk(client).state == "degraded", "it is said")
    assert local.park(2, PAGES, TOKENS, level="disk").result().level == "host"
    assert not folder.exists() or not list(folder.iterdir())
    _move(away, folder, contents)
    until(lambda: disk(client).state == "ready", "it is back")
    assert local.park(3, PAGES, TOKENS, level="disk").result().level == "disk"
    assert disk(client).objects > there
    forget_all(client)


def _move(folder: Path, to: Path, contents: bool) -> None:
    if not contents:
        folder.rename(to)
        return
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.rename(to / path.name)


def test_a_read_that_breaks_ends_only_after_the_others_of_its_job() -> None:
    """The node takes the slots of a broken connection back: by then nothing writes into them."""
    broken: Future[None] = Future()
    running: Future[None] = Future()
    broken.set_exception(MemoryError("no room to unpack"))
    service = DiskService(load())
    service._tier = SimpleNamespace(  # type: ignore[assignment]
        find=lambda object_id: SimpleNamespace(nbytes=16), read_many=lambda items: [broken, running]
    )
    session: Any = SimpleNamespace(arena=SimpleNamespace(view=lambda address, nbytes: bytearray(nbytes)))
    item = WireItem(0, 0, 16, 0, 0, 1, 0, 0, 16)
    message = DiskRead("r1", 0, [(bytes(32), 0, ""), (bytes(32), 1, "")], [item, item])
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(service._read, session, message)
        until(lambda: reading.done() or bool(running._waiters), "it waits, or is over")
        early = reading.done()
        running.set_result(None)
        assert isinstance(reading.exception(20), MemoryError)
    assert not early


def test_a_drive_that_hangs_is_said_and_recovers_by_itself(
    start: Start, with_ops: Callable[[OsFileOps], None], gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ops(GatedFileOps(gates))
    daemon, client, local = start()
    assert daemon.disk is not None
    gate = Gate(gates / "write")
    gate.shut()
    park = local.park(1, PAGES, TOKENS, level="disk", timeout_s=60.0)
    gate.wait_held()
    assert daemon.disk.health()["oldest_job_s"] > 0
    assert disk(client).state == "ready", "it is only slow as yet"
    monkeypatch.setattr(disk_service, "_HUNG_S", 0.0)
    until(lambda: disk(client).state == "degraded", "the status says it")
    assert "DiskWrite has not ended for" in disk(client).detail
    assert local.park(2, pages_for(32, 64), 32, level="disk").result().reason == "no_disk"
    monkeypatch.undo()
    gate.open()
    park.result()
    until(lambda: disk(client).state == "ready", "the drive answers again")
    assert daemon.disk.health()["oldest_job_s"] == 0
    assert local.park(3, pages_for(32, 64), 32, level="disk").result().level == "disk"
    forget_all(client)


def test_direct_io_on_refuses_to_start_where_the_file_system_does_not_take_it(
    make_daemon: MakeDaemon,
    client_of: Callable[[Embedded], Client],
    with_ops: Callable[[OsFileOps], None],
    tmp_path: Path,
) -> None:
    class Cached(OsFileOps):
        def open(self, path: str, flags: int, mode: int = 0o600) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().open(path, flags, mode)

    with_ops(Cached())
    with pytest.raises(ConfigError, match="does not take O_DIRECT") as refused:
        make_daemon(disk__direct_io="on", disk__directory=str(tmp_path / "d"))
    assert refused.value.field == "disk.direct_io"
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    kinds = {line.partition(" - ")[2].split()[0] for line in mounts}
    assert any(f"lies on {kind}," in refused.value.message for kind in kinds)
    # Nothing holds the folder: as it is, "auto" goes on with it, and says so before the first park.
    client = client_of(make_daemon(disk__direct_io="auto", disk__directory=str(tmp_path / "d")))
    until(lambda: "without O_DIRECT" in " ".join(client.status().warnings), "the status says it")
    assert client.status().counters["disk_direct_io"] == 0
