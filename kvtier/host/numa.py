"""NUMA nodes of this machine that this process may take memory from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SYSFS_NODES = Path("/sys/devices/system/node")
PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A node with memory. total_bytes: what it has, of which this process may get less."""

    node_id: int
    total_bytes: int


def parse_list(text: str) -> list[int]:
    """The kernel's list format: '0-2,5' is [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def memory_nodes(sysfs: Path = SYSFS_NODES, status: Path = PROC_STATUS) -> list[NumaNode]:
    """Nodes with memory that the cpuset of this process allows, in ascending order.

    Empty where the kernel was built without NUMA; callers then use one sub-arena without a node.
    """
    allowed = _allowed(status)
    nodes = []
    for folder in sysfs.glob("node[0-9]*"):
        node_id = int(folder.name.removeprefix("node"))
        total_bytes = _node_bytes(folder / "meminfo")
        if total_bytes and (allowed is None or node_id in allowed):
            nodes.append(NumaNode(node_id, total_bytes))
    return sorted(nodes, key=lambda node: node.node_id)


def split_capacity(capacity_bytes: int, parts: int, align_bytes: int) -> list[int]:
    """Cut a capacity into equal parts that are multiples of align_bytes; the first one takes the rest.

    What is left of the rest beyond a multiple of align_bytes is given up.
    """
    units = capacity_bytes // align_bytes
    if units < parts:
        raise ValueError(f"{capacity_bytes} bytes cannot be cut into {parts} parts of {align_bytes} bytes")
    each = units // parts
    return [(each + (units % parts if i == 0 else 0)) * align_bytes for i in range(parts)]


def _allowed(status: Path) -> set[int] | None:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("Mems_allowed_list:"):
            return set(parse_list(line.partition(":")[2]))
    return None


def _node_bytes(meminfo: Path) -> int:
    """Bytes in the line 'Node 0 MemTotal:  32768 kB'; 0 where there is none."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        words = line.split()
        if len(words) >= 4 and words[2] == "MemTotal:":
            return int(words[3]) * 1024
    return 0
