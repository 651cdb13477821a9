"""The doctor's findings: judged from facts, and gathered from trees of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.errors import TierUnavailable
from kvtier.gpu.cuda import inspect
from kvtier.gpu.cuda.inspect import Facts, Finding, GpuFacts, cgroup_limit, cpu_list, gather, judge, meminfo

GIB = 1 << 30
H100 = GpuFacts("NVIDIA H100", "0000:4F:00.0", 79 * GIB, 80 * GIB, 1, True, "")
GOOD = Facts(13000, "cupy-cuda13x 14.2.0", (H100,), "", None, 512 * GIB, None, (0, 1), (1,), (), "", "advise")


def about(facts: Facts, name: str) -> Finding:
    (found,) = [finding for finding in judge(facts) if finding.about == name]
    return found


def test_a_good_machine_has_nothing_to_fix() -> None:
    assert {finding.grade for finding in judge(GOOD)} == {"good"}
    assert about(GOOD, "device").text == "NVIDIA H100 at 0000:4F:00.0, 79.0 of 80.0 GiB free"
    assert about(GOOD, "driver").text == "the driver is for CUDA 13.0"


@pytest.mark.parametrize(
    ("name", "change", "grade", "words"),
    [
        ("driver", {"driver": 0}, "bad", "--gpus all"),
        ("driver", {"driver": 12060}, "note", "12.8"),
        ("cupy", {"cupy": ""}, "bad", "kvtier[cuda13]"),
        ("cupy", {"cupy": "", "driver": 12080}, "bad", "kvtier[cuda12]"),
        ("device", {"gpus": (), "no_device": "none are visible"}, "bad", "no CUDA device: none are visible"),
        ("pinned memory", {"gpus": (replace(H100, pinned="out of memory"),)}, "bad", "ulimit -l"),
        ("memlock", {"memlock_bytes": 65536}, "note", "limited to 64 KiB"),
        ("memlock", {"memlock_bytes": 8 << 20}, "note", "limited to 8.0 MiB"),
        ("memlock", {"memlock_bytes": 3 * GIB}, "note", "limited to 3.0 GiB"),
        ("memlock", {"memlock_bytes": 0}, "note", "LimitMEMLOCK"),
        ("memory", {"cgroup_bytes": 64 * GIB}, "note", "64.0 of 512.0 GiB"),
        ("huge pages", {"huge_pages": "never"}, "note", "echo advise > /sys/kernel/mm"),
        ("huge pages", {"huge_pages": ""}, "note", "small pages"),
        ("numa", {"cpu_nodes": (0,)}, "note", "--cpunodebind=1"),
        ("ipc", {"foreign_namespaces": ("pid", "ipc")}, "note", "--pid=host --ipc=host"),
        ("allocator", {"allocator": "a:1,expandable_segments: True"}, "note", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_each_fault_has_its_fix(name: str, change: dict[str, object], grade: str, words: str) -> None:
    finding = about(replace(GOOD, **change), name)  # type: ignore[arg-type]
    assert finding.grade == grade and finding.fix
    assert words in finding.text + finding.fix
    assert about(GOOD, name).grade == "good" if name != "pinned memory" else True


def test_direct_storage_is_told_and_never_missed(tmp_path: Path) -> None:
    able = replace(GOOD, nvidia_fs=True, cufile=True)
    assert "is possible here" in about(able, "direct storage").text
    for lacking in (replace(able, nvidia_fs=False), replace(able, cufile=False), GOOD):
        found = about(lacking, "direct storage")
        assert found.grade == "good" and "not possible here" in found.text
    assert not gather(tmp_path).nvidia_fs
    (tmp_path / "sys/module/nvidia_fs").mkdir(parents=True)
    assert gather(tmp_path).nvidia_fs


def test_what_does_not_lower_anything_is_no_fault() -> None:
    assert about(replace(GOOD, cgroup_bytes=600 * GIB), "memory").grade == "good"
    assert about(replace(GOOD, gpus=(replace(H100, numa_node=-1),), cpu_nodes=(0,)), "numa").grade == "good"
    assert about(replace(GOOD, numa_nodes=(0,), cpu_nodes=(0,)), "numa").text == "one NUMA node"


def test_the_kernel_s_lists() -> None:
    assert cpu_list("0-2,5\n") == (0, 1, 2, 5)
    assert cpu_list("") == ()


def test_memory_and_cgroups_of_a_tree(tmp_path: Path) -> None:
    def put(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert cgroup_limit(tmp_path) is None
    assert meminfo("MemTotal:       1024 kB\n") == 1 << 20 and meminfo("") == 0
    put("proc/self/cgroup", "0::/pod/app\n")
    put("sys/fs/cgroup/pod/app/memory.max", "max\n")
    assert cgroup_limit(tmp_path) is None
    put("sys/fs/cgroup/pod/memory.max", "4096\n")
    assert cgroup_limit(tmp_path) == 4096
    put("proc/self/cgroup", "9:memory:/x\n8:cpu:/y\n")
    put("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "8192\n")
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{(1 << 63) - 4096}\n")
    assert cgroup_limit(tmp_path) == 8192


def test_namespaces_and_nodes_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[4026532000]")
    (tmp_path / "proc/self/ns/ipc").symlink_to(f"ipc:[{inspect.FIRST_NAMESPACES['ipc']}]")
    for node, cpus in ((0, "0-3"), (1, "4-7")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    (tmp_path / "sys/devices/system/node/online").write_text("0-1\n")
    setting = tmp_path / inspect.SHMEM_SETTING
    setting.parent.mkdir(parents=True)
    setting.write_text("always within_size [advise] never deny force\n")
    monkeypatch.setattr(inspect.os, "sched_getaffinity", lambda pid: {5, 6})
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    facts = gather(tmp_path)
    assert facts.foreign_namespaces == ("pid",)
    assert (facts.numa_nodes, facts.cpu_nodes) == ((0, 1), (1,))
    assert about(facts, "allocator").grade == "note"
    assert facts.huge_pages == "advise" and about(facts, "huge pages").grade == "good"


def test_a_machine_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(number: int) -> None:
        raise TierUnavailable("there is no CUDA device 0; 0 are visible")

    monkeypatch.setattr(inspect, "CudaDevice", none)
    facts = gather()
    assert facts.gpus == () and "0 are visible" in facts.no_device
    assert about(facts, "device").grade == "bad" and facts.memory_bytes > 0
