"""`kvtier bench`: its figures on this machine at the smallest size, and on a fake device."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.bench.copies import run
from kvtier.bench.gpu import gpu_copies
from kvtier.bench.llama import BLOCK_BYTES
from kvtier.cli.commands import bench
from kvtier.errors import ConfigError, TierUnavailable
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.ways import always
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_gpu import FakeGpu
from kvtier.waiting import wait_until


def test_the_copies_are_held_against_plain_ones(kv):
    seen = kv("bench", "--device", "cpu", "--only", "copies", "--bytes", "32MiB", "--rounds", "1", "--json")
    lines = [json.loads(line) for line in seen.out.splitlines()]
    assert seen.code == 0 and len(lines) == 4
    for line in lines:
        assert line["unit"] == "GB/s" and {"value", "limit"} <= set(line)
        assert line["ratio"] == pytest.approx(line["detail"]["ratios"][0], abs=0.006)
    assert {line["detail"]["limit_is"] for line in lines} == {"best copy", "best copy and hash"}


def test_the_disk_is_held_against_the_drive_and_nothing_is_left(kv, tmp_path):
    (tmp_path / "mine").write_text("stays")
    small = ("--disk-bytes", "32MiB", "--rounds", "1")
    seen = kv("bench", "--only", "disk", *small, "--directory", str(tmp_path / "not"))
    assert seen.code == 0, seen.err
    assert "durable park" in seen.out and "cold restore" in seen.out and "RATIO" in seen.out
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_copy_that_fails_is_no_figure(monkeypatch):
    """Control: the bytes are checked on their way back."""
    device = FakeDevice(gpu=FakeGpu(detect=False))

    def others(*given):
        return [found ^ 1 for found in run(*given)]

    monkeypatch.setattr("kvtier.bench.gpu.run", others)
    with pytest.raises(TierUnavailable, match="corrupt"):
        list(gpu_copies(device, BLOCK_BYTES, 1, Settings(always("staged"), 2, 8 << 20)))
    assert not device.leaks()


def test_what_copies_may_still_write_to_is_not_given_back(monkeypatch):
    device = FakeDevice(gpu=FakeGpu(detect=False))
    monkeypatch.setattr("kvtier.bench.gpu._IN_USE", in_use := [])

    def hangs(*given):
        raise TierUnavailable("copies took longer than 60 s")

    monkeypatch.setattr("kvtier.bench.gpu.run", hangs)
    close, engines = CudaCopyEngine.close, []
    monkeypatch.setattr(CudaCopyEngine, "close", lambda self: engines.append(self))
    with pytest.raises(TierUnavailable, match="longer"):
        list(gpu_copies(device, BLOCK_BYTES, 1, Settings(always("staged"), 2, 8 << 20)))
    assert {"registered", "allocation"} <= set(device.leaks()) and len(in_use) == 1
    assert close(engines[0])
    in_use[0].close()
    assert not device.leaks()
    # Control: an engine that ends gives everything back by itself.
    monkeypatch.setattr(CudaCopyEngine, "close", close)
    other = FakeDevice(gpu=FakeGpu(detect=False))
    with pytest.raises(TierUnavailable, match="longer"):
        list(gpu_copies(other, BLOCK_BYTES, 1, Settings(always("staged"), 2, 8 << 20)))
    assert not other.leaks() and len(in_use) == 1


def test_a_gpu_is_found_or_named(monkeypatch):
    made = []

    class Found:
        def __init__(self, number):
            if number:
                raise TierUnavailable("there is no such device")
            made.append(number)

    monkeypatch.setattr("kvtier.gpu.cuda.cupy_device.CudaDevice", Found)
    assert isinstance(bench.find_gpu("auto"), Found) and isinstance(bench.find_gpu("cuda:0"), Found)
    assert bench.find_gpu("cpu") is None and made == [0, 0]
    with pytest.raises(TierUnavailable):
        bench.find_gpu("cuda:1")
    with pytest.raises(ConfigError, match="cuda:0 or auto"):
        bench.find_gpu("gpu")


def test_without_a_gpu_host_memory_is_measured(monkeypatch):
    def absent(number):
        raise TierUnavailable("no driver")

    monkeypatch.setattr("kvtier.gpu.cuda.cupy_device.CudaDevice", absent)
    assert bench.find_gpu("auto") is None


@pytest.mark.parametrize("wrong", [("--bytes", "1MiB"), ("--disk-bytes", "many"), ("--rounds", "0")])
def test_sizes_are_checked(kv, wrong):
    assert kv("bench", *wrong).code == 2


def test_a_drive_without_room_is_not_filled(kv, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_SPARE_BYTES", 1 << 60)
    seen = kv("bench", "--only", "disk", "--directory", str(tmp_path))
    assert seen.code == 1 and "--disk-bytes" in seen.err


def test_a_file_system_without_direct_io_is_held_against_buffered_files(kv, monkeypatch, tmp_path):
    opened = os.open

    def refuses(path, flags, *args, **how):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return opened(path, flags, *args, **how)

    monkeypatch.setattr(os, "open", refuses)
    small = ("--disk-bytes", "32MiB", "--rounds", "1")
    seen = kv("bench", "--only", "disk", *small, "--directory", str(tmp_path), "--json")
    assert seen.code == 0, seen.err
    ways = {json.loads(line)["detail"]["limit_way"] for line in seen.out.splitlines()}
    assert ways and all(way.startswith("buffered") for way in ways)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_looked_into_is_an_answer(kv, monkeypatch, tmp_path):
    is_dir = Path.is_dir

    def refused(self, **how):
        if self.name == "store":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return is_dir(self, **how)

    monkeypatch.setattr(Path, "is_dir", refused)
    seen = kv("bench", "--only", "disk", "--directory", str(tmp_path / "store"))
    assert seen.code == 1 and "--directory" in seen.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_bench_that_is_ended_leaves_nothing(tmp_path, number):
    command = [sys.executable, "-m", "kvtier", "bench", "--only", "disk", "--rounds", "100"]
    with subprocess.Popen([*command, "--directory", str(tmp_path)], stderr=subprocess.DEVNULL) as child:
        try:
            assert wait_until(lambda: bool(list(tmp_path.glob("*/again"))), 60)
            child.send_signal(number)
            assert child.wait(60) == 130
        finally:
            child.kill()
    assert not list(tmp_path.iterdir())
