"""Memory limits and NUMA nodes, read from trees of files made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.errors import ConfigError
from kvtier.host.limits import MemoryLimit, auto_capacity, check_capacity, memory_limit
from kvtier.host.numa import NumaNode, memory_nodes, parse_list, split_capacity

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n"} | files
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_cgroups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert memory_limit(tree(tmp_path, {})) == MemoryLimit(64 * GIB, "/proc/meminfo", 32 * GIB)


def test_v2_the_lowest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/one/box\n",
            "sys/fs/cgroup/pods/one/box/memory.max": "max\n",
            "sys/fs/cgroup/pods/one/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/pods/one/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/pods/memory.max": f"{16 * GIB}\n",
        },
    )
    assert memory_limit(root) == MemoryLimit(8 * GIB, "/sys/fs/cgroup/pods/one/memory.max", 5 * GIB)


def test_v2_a_parent_may_be_the_tighter_one(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{6 * GIB}\n",
        },
    )
    assert memory_limit(root) == MemoryLimit(4 * GIB, "/sys/fs/cgroup/a/memory.max", 0)


@pytest.mark.parametrize("path", ["/", "/../../kubepods/pod1", "/host/only/path"])
def test_v2_inside_a_container_the_mount_itself_counts(tmp_path: Path, path: str) -> None:
    files = {"proc/self/cgroup": f"0::{path}\n", "sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}
    assert memory_limit(tree(tmp_path, files)).limit_bytes == 2 * GIB


def test_v1(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{6 * GIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{1 * GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    source = "/sys/fs/cgroup/memory/box/memory.limit_in_bytes"
    assert memory_limit(root) == MemoryLimit(6 * GIB, source, 5 * GIB)


def test_v1_unlimited_is_no_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert memory_limit(tree(tmp_path, files)).source == "/proc/meminfo"


def test_a_limit_above_the_machine_is_not_the_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{640 * GIB}\n"}
    assert memory_limit(tree(tmp_path, files)).limit_bytes == 64 * GIB


def test_no_proc_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mount /proc"):
        memory_limit(tmp_path)


def test_this_machine_has_a_limit() -> None:
    limit = memory_limit()
    assert 0 < limit.available_bytes <= limit.limit_bytes


def test_capacity_must_leave_the_headroom() -> None:
    limit = MemoryLimit(8 * GIB, "/sys/fs/cgroup/memory.max", 8 * GIB)
    check_capacity(6 * GIB, 2 * GIB, limit)
    with pytest.raises(ConfigError) as caught:
        check_capacity(6 * GIB + 1, 2 * GIB, limit)
    assert caught.value.field == "host.capacity_bytes"
    assert str(6 * GIB) in caught.value.fix
    assert "/sys/fs/cgroup/memory.max" in str(caught.value)
    with pytest.raises(ConfigError):
        check_capacity(1, 9 * GIB, limit)


def test_auto_takes_half_of_what_is_available() -> None:
    limit = MemoryLimit(16 * GIB, "x", 9 * GIB)
    assert auto_capacity(1 * GIB, limit) == 4 * GIB
    check_capacity(auto_capacity(1 * GIB, limit), 1 * GIB, limit)
    assert auto_capacity(0, MemoryLimit(16 * GIB, "x", 5 << 20)) == 2 << 20
    with pytest.raises(ConfigError):
        auto_capacity(9 * GIB, limit)


# -- NUMA


def test_the_kernels_lists() -> None:
    assert parse_list("0-2,5\n") == [0, 1, 2, 5]
    assert parse_list("3") == [3]
    assert parse_list("\n") == []


def test_nodes_with_memory_that_are_allowed(tmp_path: Path) -> None:
    for node, kib in [(0, 1024), (1, 2048), (2, 0), (10, 4096)]:
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "meminfo").write_text(f"Node {node} MemTotal:    {kib} kB\nNode {node} MemFree: 1 kB\n")
    status = tmp_path / "status"
    status.write_text("Name:\tx\nMems_allowed_list:\t0,2-10\n")
    assert memory_nodes(tmp_path, status) == [NumaNode(0, 1 << 20), NumaNode(10, 4 << 20)]
    assert [n.node_id for n in memory_nodes(tmp_path, tmp_path / "absent")] == [0, 1, 10]
    assert memory_nodes(tmp_path / "absent", status) == []


def test_capacity_is_split_in_whole_units() -> None:
    assert split_capacity(10 * 4096 + 5, 3, 4096) == [4 * 4096, 3 * 4096, 3 * 4096]
    assert split_capacity(4096, 1, 4096) == [4096]
    with pytest.raises(ValueError):
        split_capacity(4096, 2, 4096)
