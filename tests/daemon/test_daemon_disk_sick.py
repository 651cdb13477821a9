"""What the disk service says and does when a job fails, hangs or cannot be carried out."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtier.client import Client
from kvtier.daemon import disk_service
from kvtier.daemon.embedded import Embedded
from kvtier.disk.fileops import OsFileOps
from kvtier.disk.tier import DiskTier
from kvtier.errors import ConfigError, TierUnavailable
from kvtier.receipts import TierInfo
from kvtier.testing.gates import Gate, GatedFileOps
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import LocalWorker, forget_all, until

TOKENS = 190
PAGES = pages_for(TOKENS)
MakeDaemon = Callable[..., Embedded]
MakeLocal = Callable[..., LocalWorker]


def disk(client: Client) -> TierInfo:
    return next(tier for tier in client.status().tiers if tier.name == "disk")


def test_a_removal_that_fails_makes_the_tier_degraded_too(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = make_daemon()
    client, local = client_of(daemon), make_local(daemon.socket_path)
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
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = make_daemon()
    client, local = client_of(daemon), make_local(daemon.socket_path)
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


def test_a_drive_that_hangs_is_said_and_recovers_by_itself(
    make_daemon: MakeDaemon,
    make_local: MakeLocal,
    client_of: Callable[[Embedded], Client],
    with_ops: Callable[[OsFileOps], None],
    gates: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_ops(GatedFileOps(gates))
    daemon = make_daemon()
    client, local = client_of(daemon), make_local(daemon.socket_path)
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
