"""kill -9 and power loss over a real file system, in the middle of writes and commits."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from kvtier.disk.tier import DiskTier
from kvtier.testing.tier_kit import get
from kvtier.waiting import wait_until

WORKER = Path(__file__).with_name("disk_worker.py")
# _IOR('X', 125, u32): ext4 stops at once; 2 means without flushing its journal.
EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("disk_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()

Record = Callable[[str, object], None]


@dataclass
class Promises:
    """What a worker said over its lives."""

    committed: set[int] = field(default_factory=set)
    removed: set[int] = field(default_factory=set)
    records: set[int] = field(default_factory=set)
    next_index: int = 0

    def hear(self, line: str) -> None:
        word, *numbers = line.split()
        indexes = [int(n) for n in numbers]
        if word == "commit":
            self.committed.update(indexes)
            self.records.add(indexes[0])
        elif word == "remove":
            self.removed.update(indexes)


def run_worker(directory: Path, seed: int, promises: Promises, end: Callable[[], None], *words: str) -> None:
    """Let a worker run until it said a seeded number of commits, call `end`, and kill it."""
    draw = random.Random(seed)
    commits = draw.randint(1, 25)
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(directory), str(promises.next_index), str(seed), *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            promises.hear(line)
            commits -= line.startswith("commit")
            if commits == 0:
                break
        end()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read()
        process.stdout.close()
        process.wait()
    assert commits == 0, "the worker ended by itself"
    if "eager" not in words:
        for line in rest.splitlines(keepends=True):
            if line.endswith("\n"):
                promises.hear(line)
    # Above anything the worker may have begun.
    promises.next_index = (promises.next_index // 10_000 + 1) * 10_000


def broken_promises(tier: DiskTier, promises: Promises, *, sealed: bool = False) -> list[int]:
    """Check every object that is there; answers the promised ones that are not."""
    there = {meta.start: meta for meta in tier.objects()}
    for index, meta in there.items():
        slot = tier.find(meta.object_id)
        assert slot is not None
        assert get(tier, slot) == worker.payload_of(index, sealed=sealed), f"object {index} is wrong"
    lost = sorted(promises.committed - promises.removed - set(there))
    return lost + [n for n in promises.records if tier.record("t", str(n)) is None]


def kill_cycles(directory: Path, seeds: range, *, sealed: bool = False) -> None:
    promises = Promises()
    for seed in seeds:
        run_worker(directory, seed, promises, lambda: None, *(["sealed"] if sealed else []))
        tier = worker.open_tier(directory, sealed=sealed)
        try:
            assert broken_promises(tier, promises, sealed=sealed) == [], f"seed {seed}"
            assert tier.stats().lost_at_open == 0
            assert tier.usage().filling_bytes == 0
        finally:
            tier.close()
    assert promises.committed
    assert promises.removed, "the tier was never full"


def test_nothing_promised_is_lost_to_kill_9(tmp_path: Path) -> None:
    kill_cycles(tmp_path / "store", range(8))


def test_nothing_encoded_and_sealed_is_lost_to_kill_9(tmp_path: Path) -> None:
    kill_cycles(tmp_path / "store", range(10), sealed=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_promised_is_lost_to_kill_9_at_length(tmp_path: Path, record_property: Record) -> None:
    record_property("seeds", "1000 to 1099")
    kill_cycles(tmp_path / "store", range(1000, 1100))


# -- power loss, as far as a file system can act it


class LoopExt4:
    """An ext4 in a file, mounted by a loop device, that can be stopped as if the power had failed."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "image"
        self.mount_point = folder / "mount"
        self.mount_point.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(96 << 20)
        _run("mkfs.ext4", "-q", "-F", str(self.image))
        self.mounted = False

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.mount_point))
        self.mounted = True

    def shut_down(self) -> None:
        fd = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, sys.byteorder))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        if self.mounted:
            _run("umount", str(self.mount_point))
            self.mounted = False
            # While a process with mounts of its own sees it, it would be mounted again as it is: stopped.
            free = wait_until(lambda: not _run("losetup", "-j", str(self.image)), 60.0)
            assert free, "somebody else holds the file system"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.returncode, f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def loop_ext4(tmp_path: Path) -> Iterator[LoopExt4]:
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    try:
        made = LoopExt4(tmp_path)
        made.mount()
    except OSError as refusal:
        pytest.skip(f"no loop-mounted ext4 here: {refusal}")
    yield made
    made.unmount()


def power_cycle(disk: LoopExt4, seed: int, promises: Promises, *words: str) -> list[int]:
    """Run a worker, stop the file system under it, mount it again; answers the broken promises."""
    directory = disk.mount_point / "store"
    run_worker(directory, seed, promises, disk.shut_down, *words)
    disk.unmount()
    disk.mount()
    tier = worker.open_tier(directory)
    try:
        return broken_promises(tier, promises)
    finally:
        tier.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cycles", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_promised_is_lost_to_a_stopped_file_system(
    loop_ext4: LoopExt4, cycles: int, record_property: Record
) -> None:
    record_property("seeds", f"0 to {cycles - 1}")
    promises = Promises()
    for seed in range(cycles):
        assert power_cycle(loop_ext4, seed, promises) == [], f"seed {seed}"
    assert len(promises.committed) > cycles


def test_a_promise_before_the_flush_is_caught(loop_ext4: LoopExt4) -> None:
    promises = Promises()
    assert any(power_cycle(loop_ext4, seed, promises, "eager") for seed in range(20))
