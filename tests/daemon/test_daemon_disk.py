"""The disk service: its lanes, the bound on wear, a sick or vanished drive, codecs and keys."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvtier.client.client import Client
from kvtier.daemon import disk_service, disk_writes
from kvtier.daemon.disk_lanes import Lanes
from kvtier.daemon.disk_wear import WearMeter
from kvtier.daemon.embedded import Embedded
from kvtier.disk.fileops import Bytes, OsFileOps
from kvtier.disk.tier import DiskTier
from kvtier.errors import ConfigError
from kvtier.messages.tiers import DiskUsage
from kvtier.receipts import StatusReport, TierInfo
from kvtier.testing.gates import Gate, GatedFileOps
from kvtier.testing.kv_memory import BLOCK_BYTES, pages_for, truth
from kvtier.testing.node_bench import ARENA_BYTES, LocalWorker, forget_all, until

TOKENS = 190
PAGES = pages_for(TOKENS)
MakeDaemon = Callable[..., Embedded]
MakeLocal = Callable[..., LocalWorker]


class Faulty(OsFileOps):
    """System calls that can be made to fail or to wait."""

    def __init__(self) -> None:
        self.failure = 0
        self.syncs: Gate | None = None

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """See os.pwritev."""
        if self.failure:
            raise OSError(self.failure, os.strerror(self.failure))
        return super().pwritev(fd, buffers, offset)

    def fsync(self, fd: int) -> None:
        """See os.fsync."""
        self._sync()
        super().fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """See os.fdatasync."""
        self._sync()
        super().fdatasync(fd)

    def _sync(self) -> None:
        if self.syncs is not None:
            self.syncs.come()


def disk(client: Client) -> TierInfo:
    return next(tier for tier in client.status().tiers if tier.name == "disk")


def counter(client: Client, name: str) -> float:
    return client.status().counters[name]


def only_on_disk(client: Client, local: LocalWorker, seed: int) -> None:
    """Have the conversation there, and nowhere else."""
    assert local.park(seed, PAGES, TOKENS, level="disk").result().level == "disk"
    for filler in range(900, 916):
        local.park(filler, pages_for(192, 32), 192).result()
        info = client.show(f"chat-{seed}")
        if info is not None and info.host_tokens == 0:
            return
    raise AssertionError("the conversation did not leave host memory")


# --- lanes --------------------------------------------------------------------------------------------------


def parked_before(make_daemon: MakeDaemon, make_local: MakeLocal, folder: Path) -> dict[str, Any]:
    """Settings of a daemon that finds two conversations on its disk, and nothing in memory."""
    folder.mkdir()
    secret = folder.with_name("secret")
    secret.write_bytes(b"the same for both of the daemons")
    secret.chmod(0o600)
    where = {"disk__directory": str(folder), "access__tenant_secret_file": str(secret)}
    daemon = make_daemon(**where)
    local = make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    assert local.park(2, pages_for(32, 64), 32, level="disk").result().ok
    daemon.close()
    return where


def read_while_writes_hang(local: LocalWorker, gates: Path, deadline_s: float) -> Any:
    """A restore from disk while more writes wait for the drive than there are threads for them."""
    gate = Gate(gates / "write")
    gate.shut()
    handles = [
        local.park(seed, pages_for(32, 64 + 2 * seed), 32, level="disk", timeout_s=60.0)
        for seed in range(3, 26)
    ]
    gate.wait_held()
    until(lambda: all(handle.released.is_set() for handle in handles), "all are in host memory")
    receipt = local.restore(1, PAGES, TOKENS, deadline_s=deadline_s)
    gate.open()
    for handle in handles:
        handle.result()
    return receipt


def test_a_read_waits_for_no_write(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    with_ops: Callable[[OsFileOps], None],
    gates: Path,
    tmp_path: Path,
) -> None:
    where = parked_before(make_daemon, make_local, tmp_path / "d")
    with_ops(GatedFileOps(gates))
    local = make_local(make_daemon(host__capacity_bytes=2 * ARENA_BYTES, **where).socket_path)
    assert read_while_writes_hang(local, gates, 30.0).sources == {"disk": TOKENS}


def test_with_one_lane_for_all_a_read_would_wait(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    with_ops: Callable[[OsFileOps], None],
    gates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control."""

    class OneLane(Lanes):
        def __init__(self) -> None:
            super().__init__()
            self._pools = dict.fromkeys(self._pools, ThreadPoolExecutor(4))

    where = parked_before(make_daemon, make_local, tmp_path / "d")
    monkeypatch.setattr(disk_service, "Lanes", OneLane)
    with_ops(GatedFileOps(gates))
    local = make_local(make_daemon(host__capacity_bytes=2 * ARENA_BYTES, **where).socket_path)
    assert read_while_writes_hang(local, gates, 0.5).reason == "deadline"


@pytest.mark.parametrize("inline", [False, True], ids=["lane", "control"])
def test_a_read_waits_for_no_removal(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    with_ops: Callable[[OsFileOps], None],
    gates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inline: bool,
) -> None:
    """Forgetting is durable before it is said, and that takes time; inline is how it must not be."""
    where = parked_before(make_daemon, make_local, tmp_path / "d")
    if inline:
        monkeypatch.setattr(Lanes, "submit", _at_once)
    ops = Faulty()
    with_ops(ops)
    daemon = make_daemon(disk__scrub_bytes_per_s=0, **where)
    local = make_local(daemon.socket_path)
    ops.syncs = Gate(gates / "sync")
    ops.syncs.shut()
    with ThreadPoolExecutor(1) as forgetting:
        forgotten = forgetting.submit(client_of(daemon).forget, "chat-2")
        ops.syncs.wait_held()
        receipt = local.restore(1, PAGES, TOKENS, deadline_s=0.5 if inline else 30.0)
        ops.syncs.open()
        assert forgotten.result().durable or inline
    assert receipt.reason == ("deadline" if inline else "")
    assert receipt.tokens == (0 if inline else TOKENS)


def _at_once(lanes: Lanes, lane: str, work: Callable[[Any, Any], None], session: Any, message: Any) -> None:
    work(session, message)


# --- wear ---------------------------------------------------------------------------------------------------

DAY_BYTES = 24 * (BLOCK_BYTES + 4096)


def wear_out(local: LocalWorker, seeds: Sequence[int]) -> list[Any]:
    return [local.park(seed, PAGES, TOKENS, level="disk").result() for seed in seeds]


def test_beyond_the_bound_parks_stay_in_host_memory_and_say_when_to_come_again(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    tmp_path: Path,
) -> None:
    where = {"disk__written_bytes_per_day": DAY_BYTES, "disk__directory": str(tmp_path / "d")}
    daemon = make_daemon(**where)
    client, local = client_of(daemon), make_local(daemon.socket_path)
    receipts = wear_out(local, range(6))
    on_disk = [r for r in receipts if r.level == "disk"]
    assert 3 <= len(on_disk) <= 4
    worn = receipts[-1]
    assert (worn.level, worn.reason) == ("host", "wear")
    assert 80_000 < worn.retry_after_s <= 86400 + 2 * 600
    assert local.restore(5, PAGES, TOKENS).tokens == TOKENS
    written = counter(client, "disk_written_bytes")
    assert written <= DAY_BYTES
    report: StatusReport = client.status()
    assert any("a day" in warning for warning in report.warnings)
    assert counter(client, "disk_wear_limit_bytes") == DAY_BYTES
    assert counter(client, "disk_wear_left_bytes") < BLOCK_BYTES + 4096
    # What has to leave host memory is dropped then, and parks go on.
    for seed in range(100, 116):
        assert local.park(seed, PAGES, TOKENS).result().ok
    assert counter(client, "disk_written_bytes") <= DAY_BYTES
    daemon.close()
    again = make_daemon(**where)
    client, local = client_of(again), make_local(again.socket_path)
    receipts = wear_out(local, range(200, 204))
    assert receipts[-1].reason == "wear"
    assert written + counter(client, "disk_written_bytes") <= DAY_BYTES


def test_without_the_meter_the_bound_is_passed(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control."""
    monkeypatch.setattr(WearMeter, "reserve", lambda self, nbytes: 0.0)
    monkeypatch.setattr(WearMeter, "settle", lambda self, reserved, whole=False: None)
    daemon = make_daemon(disk__written_bytes_per_day=DAY_BYTES)
    client, local = client_of(daemon), make_local(daemon.socket_path)
    assert all(r.level == "disk" for r in wear_out(local, range(6)))
    assert counter(client, "disk_written_bytes") > DAY_BYTES


def test_many_at_once_do_not_pass_the_bound_together(
    make_daemon: MakeDaemon, make_local: MakeLocal, client_of: Callable[[Embedded], Client]
) -> None:
    daemon = make_daemon(disk__written_bytes_per_day=DAY_BYTES, host__capacity_bytes=4 * ARENA_BYTES)
    client, local = client_of(daemon), make_local(daemon.socket_path, pages=256)
    handles = [local.park(seed, pages_for(TOKENS, 12 * seed), TOKENS, level="disk") for seed in range(20)]
    receipts = [handle.result() for handle in handles]
    assert {r.level for r in receipts} == {"disk", "host"}
    assert {r.reason for r in receipts} == {"", "wear"}
    assert counter(client, "disk_written_bytes") <= DAY_BYTES
    forget_all(client)


# --- a drive that does not work -----------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [errno.EIO, errno.EROFS])
def test_a_sick_drive_lowers_the_level_is_said_and_recovers_by_itself(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    with_ops: Callable[[OsFileOps], None],
    failure: int,
) -> None:
    ops = Faulty()
    with_ops(ops)
    daemon = make_daemon()
    client, local = client_of(daemon), make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    ops.failure = failure
    receipt = local.park(2, PAGES, TOKENS, level="disk").result()
    assert (receipt.level, receipt.reason) == ("host", "disk_error")
    until(lambda: disk(client).state == "degraded", "the status says it")
    assert any("degraded" in warning for warning in client.status().warnings)
    for seed in range(3, 12):
        assert local.park(seed, PAGES, TOKENS).result().level == "host"
    assert disk(client).state == "degraded"
    ops.failure = 0
    until(lambda: disk(client).state == "ready", "the drive works again")
    assert local.park(20, PAGES, TOKENS, level="disk").result().level == "disk"
    forget_all(client)


def test_others_fill_the_file_system(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    with_ops: Callable[[OsFileOps], None],
) -> None:
    ops = Faulty()
    with_ops(ops)
    daemon = make_daemon()
    client, local = client_of(daemon), make_local(daemon.socket_path)
    ops.failure = errno.ENOSPC
    receipt = local.park(1, PAGES, TOKENS, level="disk").result()
    assert (receipt.level, receipt.reason) == ("host", "disk_full")
    assert local.restore(1, PAGES, TOKENS).tokens == TOKENS
    until(lambda: any("others fill" in warning for warning in client.status().warnings), "it is said")
    assert "the file system is full" in disk(client).detail
    assert counter(client, "disk_crowded") == 1
    ops.failure = 0
    until(lambda: local.park(2, PAGES, TOKENS, level="disk").result().ok, "there is room again")
    until(lambda: not any("others fill" in warning for warning in client.status().warnings), "and no more")
    assert counter(client, "disk_crowded") == 0
    forget_all(client)


def test_a_deleted_folder_is_said_and_the_store_begins_anew(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "d"
    daemon = make_daemon(disk__directory=str(folder), disk__written_bytes_per_day=1 << 30)
    client, local = client_of(daemon), make_local(daemon.socket_path)
    only_on_disk(client, local, 1)
    left = counter(client, "disk_wear_left_bytes")
    assert left < 1 << 30
    shutil.rmtree(folder)
    until(lambda: disk(client).objects == 0 and disk(client).state == "ready", "it has begun anew")
    assert counter(client, "disk_wear_left_bytes") <= left, "the drive is as worn as it was"
    # What was there is a miss, and the next one is safe.
    assert local.restore(1, PAGES, TOKENS).tokens == 0
    assert local.park(2, PAGES, TOKENS, level="disk").result().level == "disk"
    daemon.close()
    again = make_daemon(disk__directory=str(folder))
    assert make_local(again.socket_path).kv is not None
    assert disk(client_of(again)).objects > 0


def test_a_folder_that_is_moved_away_is_degraded_until_it_is_back(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "d"
    daemon = make_daemon(disk__directory=str(folder))
    client, local = client_of(daemon), make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    folder.rename(tmp_path / "away")
    # Something else is in its place, as when a drive was unmounted.
    folder.mkdir()
    until(lambda: disk(client).state == "degraded", "the status says it")
    assert "not the folder" in disk(client).detail
    assert local.park(2, PAGES, TOKENS, level="disk").result().level == "host"
    assert list(folder.iterdir()) == []
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    until(lambda: disk(client).state == "ready", "it is back")
    assert local.park(3, PAGES, TOKENS, level="disk").result().level == "disk"
    forget_all(client)


# --- counts -------------------------------------------------------------------------------------------------


def test_the_service_tells_its_counts(
    make_daemon: MakeDaemon, make_local: MakeLocal, client_of: Callable[[Embedded], Client]
) -> None:
    daemon = make_daemon(disk__scrub_bytes_per_s=1 << 30)
    client, local = client_of(daemon), make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    counters = client.status().counters
    assert counters["disk_user_bytes"] == BLOCK_BYTES * TOKENS // 32
    assert counters["disk_user_bytes"] < counters["disk_written_bytes"] <= 1.3 * counters["disk_user_bytes"]
    assert counters["disk_flushes"] >= 1
    assert "for each of KV" in disk(client).detail
    forget_all(client)


# --- codecs and keys ----------------------------------------------------------------------------------------


def test_the_codec_is_that_of_the_park_then_of_its_conversation_then_of_the_tenant(
    make_daemon: MakeDaemon, make_local: MakeLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    write_many = DiskTier.write_many

    def watched(self: DiskTier, items: Any, *args: Any, codec: str = "raw", **how: Any) -> Any:
        used.append(codec)
        return write_many(self, items, *args, codec=codec, **how)

    monkeypatch.setattr(DiskTier, "write_many", watched)
    daemon = make_daemon(**{"disk__codec": "lz4", "tenants.acme.codec": "planes-lz4"})
    local = make_local(daemon.socket_path)

    def codecs(seed: int, count: int, **how: Any) -> set[str]:
        used.clear()
        assert local.park(seed, pages_for(count), count, level="disk", **how).result().ok
        return set(used)

    assert codecs(1, 64) == {"lz4"}
    assert codecs(2, 64, tenant="acme") == {"planes-lz4"}
    assert codecs(3, 64, tenant="acme", codec="raw") == {"raw"}
    assert codecs(3, 128, tenant="acme") == {"raw"}
    assert codecs(1, 128, codec="planes-lz4") == {"planes-lz4"}
    with pytest.raises(ConfigError, match="codec"):
        codecs(4, 64, codec="gzip")


def test_a_codec_without_its_package_is_stored_raw(
    make_daemon: MakeDaemon, make_local: MakeLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, **how: Any) -> None:
        raise ConfigError("disk.codec", "its package is not installed")

    monkeypatch.setattr(disk_writes, "check_codec", missing)
    local = make_local(make_daemon().socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk", codec="planes-zstd").result().level == "disk"


def test_what_is_stored_under_a_master_key_cannot_be_read_without_it(
    make_daemon: MakeDaemon, make_local: MakeLocal, client_of: Callable[[Embedded], Client], tmp_path: Path
) -> None:
    key = tmp_path / "master"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    where = {"disk__directory": str(tmp_path / "d"), "disk__keys_directory": str(tmp_path / "k")}
    daemon = make_daemon(disk__key_file=str(key), **where)
    client, local = client_of(daemon), make_local(daemon.socket_path)
    only_on_disk(client, local, 1)
    assert local.restore(1, PAGES, TOKENS).sources == {"disk": TOKENS}
    needle = truth(1, 0, 40)[36].tobytes()
    files = [path for path in (tmp_path / "d").rglob("*") if path.is_file()]
    assert files
    assert not any(needle in path.read_bytes() for path in files)
    daemon.close()
    again = make_daemon(disk__key_file=str(key), **where)
    assert disk(client_of(again)).objects > 0
    again.close()
    other = tmp_path / "other"
    other.write_bytes(os.urandom(32))
    other.chmod(0o600)
    with pytest.raises(ConfigError, match="master key"):
        make_daemon(disk__key_file=str(other), **where)


def test_counts_go_both_ways_between_a_service_and_a_node_of_other_versions() -> None:
    said = DiskUsage(capacity_bytes=1, used_bytes=2, objects=3, quarantined=4, written_bytes=5, crowded=True)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(said))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wire | {"later": 1}), type=DiskUsage) == said
    del wire["crowded"]
    assert not msgspec.msgpack.decode(msgspec.msgpack.encode(wire), type=DiskUsage).crowded
