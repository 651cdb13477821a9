"""`kvtier doctor` on a machine with and without a GPU."""

import json
from dataclasses import replace

import pytest

from kvtier.gpu.cuda import inspect

GPU = inspect.GpuFacts("NVIDIA H100", "0000:4F:00.0", 1 << 36, 1 << 36, -1, True, "")


@pytest.fixture
def machine(monkeypatch):
    def become(**facts):
        base = inspect.Facts(13000, "cupy 14", (GPU,), "", None, 1 << 38, None, (0,), (0,), (), "", "advise")
        monkeypatch.setattr(inspect, "gather", lambda: replace(base, **facts))

    return become


def test_a_good_machine(kv, machine):
    machine()
    seen = kv("doctor")
    assert seen.code == 0
    assert "NVIDIA H100" in seen.out and "BAD" not in seen.out


def test_no_gpu_is_said_with_the_fix_and_the_host_is_looked_at(kv, machine):
    machine(gpus=(), no_device="none are visible", driver=0, memlock_bytes=65536)
    seen = kv("doctor")
    assert seen.code == 1
    assert "no CUDA device: none are visible" in seen.out and "LimitMEMLOCK=infinity" in seen.out


def test_every_finding_and_fix_stands_on_a_line(kv, machine):
    machine(
        gpus=(),
        driver=0,
        cupy="",
        memlock_bytes=65536,
        cgroup_bytes=1 << 30,
        foreign_namespaces=("pid", "ipc"),
        allocator="expandable_segments:True",
        huge_pages="never",
    )
    seen, said = kv("doctor"), json.loads(kv("doctor", "--json").out)["findings"]
    assert sum(bool(finding["fix"]) for finding in said) >= 7
    for finding in said:
        assert any(finding["text"] in line and finding["about"] in line for line in seen.out.splitlines())
        assert finding["fix"] in seen.out


def test_json_for_programs(kv, machine):
    machine(cupy="")
    seen = kv("doctor", "--json")
    report = json.loads(seen.out)
    assert seen.code == 1
    assert report["facts"]["driver"] == 13000
    assert [f["about"] for f in report["findings"] if f["grade"] == "bad"] == ["cupy"]


def test_it_runs_on_this_machine(kv):
    assert kv("doctor", "--json").code in (0, 1)
