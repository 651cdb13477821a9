"""What this machine can do for the GPU tier, and what is wrong: facts gathered, findings judged from them.

judge() is pure.  gather() reads /proc and /sys, and asks cupy where it is installed; it works without a GPU.
The parts that ask a device have not run on a GPU yet.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kvtier.errors import TierUnavailable
from kvtier.gpu.cuda import driver
from kvtier.gpu.cuda.cupy_device import CudaDevice

Grade = Literal["good", "note", "bad"]

CUPY_WHEELS = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
BATCHED_COPIES = 12080
# The kernel gives the first namespaces of a machine fixed numbers (include/uapi/linux/nsfs.h).
FIRST_NAMESPACES = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}
PROBE_BYTES = 64 << 20
NVIDIA_FS = Path("sys/module/nvidia_fs")
SHMEM_SETTING = Path("sys/kernel/mm/transparent_hugepage/shmem_enabled")
UNLIMITED_V1 = 1 << 62
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU. numa_node: -1 where nothing says it. pinned: '' or why host memory cannot be locked."""

    name: str
    identity: str
    free_bytes: int
    all_bytes: int
    numa_node: int
    can_batch: bool
    pinned: str


@dataclass(frozen=True, slots=True)
class Facts:
    """driver: as CUDA counts, 13000 for 13.0; 0 where there is none. no_device: why there are no GPUs.

    memlock_bytes, cgroup_bytes: None where there is no limit.  cpu_nodes: NUMA nodes of the CPUs that this
    process may use.  foreign_namespaces: those that are not the machine's own.  allocator: torch's settings.
    huge_pages: what the kernel's shmem_enabled says; '' where it has no such setting.  nvidia_fs: whether the
    kernel module for GPUDirect Storage is loaded; cufile: whether its library is installed.
    """

    driver: int
    cupy: str
    gpus: tuple[GpuFacts, ...]
    no_device: str
    memlock_bytes: int | None
    memory_bytes: int
    cgroup_bytes: int | None
    numa_nodes: tuple[int, ...]
    cpu_nodes: tuple[int, ...]
    foreign_namespaces: tuple[str, ...]
    allocator: str
    huge_pages: str
    nvidia_fs: bool = False
    cufile: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What the doctor says. grade: 'bad' keeps the GPU tier from working; 'note' costs speed or a mode."""

    about: str
    grade: Grade
    text: str
    fix: str = ""


# -- judging


def judge(facts: Facts) -> list[Finding]:
    """Every finding, the device's first. Pure."""
    found = [_driver(facts), _cupy(facts), *_devices(facts)]
    found += [_memlock(facts), _cgroup(facts), _huge_pages(facts), _placement(facts)]
    return [*found, _namespaces(facts), _allocator(facts), _direct_storage(facts)]


def _driver(facts: Facts) -> Finding:
    if not facts.driver:
        return Finding(
            "driver",
            "bad",
            "no CUDA driver",
            "install the NVIDIA driver; in a container start it with --gpus all or the nvidia runtime",
        )
    version = f"{facts.driver // 1000}.{facts.driver % 1000 // 10}"
    if facts.driver < BATCHED_COPIES:
        text = f"the driver is for CUDA {version}: no batched copies"
        return Finding("driver", "note", text, "a driver for CUDA 12.8 or later has them (570 and up)")
    return Finding("driver", "good", f"the driver is for CUDA {version}")


def _cupy(facts: Facts) -> Finding:
    if facts.cupy:
        return Finding("cupy", "good", f"{facts.cupy} is installed")
    extra = "cuda12" if 0 < facts.driver < 13000 else "cuda13"
    return Finding("cupy", "bad", "cupy is not installed", f"pip install 'kvtier[{extra}]'")


def _devices(facts: Facts) -> list[Finding]:
    if not facts.gpus:
        return [Finding("device", "bad", f"no CUDA device: {facts.no_device}", "see driver and cupy above")]
    found = []
    for gpu in facts.gpus:
        room = f"{gpu.free_bytes / GIB:.1f} of {gpu.all_bytes / GIB:.1f} GiB free"
        found.append(Finding("device", "good", f"{gpu.name} at {gpu.identity}, {room}"))
        if gpu.pinned:
            fix = "raise the container's memory limit and `ulimit -l`, or lower host.capacity_bytes"
            found.append(Finding("pinned memory", "bad", f"the driver cannot lock memory: {gpu.pinned}", fix))
    return found


def _memlock(facts: Facts) -> Finding:
    if facts.memlock_bytes is None:
        return Finding("memlock", "good", "locked memory is not limited")
    # NVIDIA's driver locks by itself and does not count against it; virtual GPUs and WSL may.
    return Finding(
        "memlock",
        "note",
        f"locked memory is limited to {_size(facts.memlock_bytes)}; some drivers count the arena against it",
        "ulimit -l unlimited; LimitMEMLOCK=infinity for systemd; --ulimit memlock=-1 for containers",
    )


def _size(nbytes: int) -> str:
    """`ulimit -l` counts in KiB, and a usual limit is 64 KiB or 8 MiB."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 1024:.0f} KiB"


def _cgroup(facts: Facts) -> Finding:
    if facts.cgroup_bytes is None or facts.cgroup_bytes >= facts.memory_bytes:
        return Finding("memory", "good", f"{facts.memory_bytes / GIB:.1f} GiB of memory, no lower limit")
    return Finding(
        "memory",
        "note",
        f"a cgroup limits memory to {facts.cgroup_bytes / GIB:.1f} of {facts.memory_bytes / GIB:.1f} GiB; "
        "the arena counts in full, locked or not",
        "give the container the arena's size and the headroom on top",
    )


def _huge_pages(facts: Facts) -> Finding:
    if facts.huge_pages in ("", "never", "deny"):
        return Finding(
            "huge pages",
            "note",
            "the arena gets small pages, which makes direct I/O and faulting it in slower",
            f"echo advise > /{SHMEM_SETTING} as root, before kvtier up",
        )
    return Finding("huge pages", "good", f"the arena may have them: shmem_enabled is {facts.huge_pages}")


def _placement(facts: Facts) -> Finding:
    if len(facts.numa_nodes) < 2:
        return Finding("numa", "good", "one NUMA node")
    far = sorted({g.numa_node for g in facts.gpus} - {-1} - set(facts.cpu_nodes))
    if far:
        return Finding(
            "numa",
            "note",
            f"a GPU is on NUMA node {far[0]}, and this process runs on node {facts.cpu_nodes}: copies cross "
            "the sockets' link",
            f"numactl --cpunodebind={far[0]} --preferred={far[0]} for the worker",
        )
    where = ", ".join(f"{g.identity} on node {g.numa_node}" for g in facts.gpus) or "no GPU"
    return Finding("numa", "good", f"{len(facts.numa_nodes)} NUMA nodes; {where}")


def _namespaces(facts: Facts) -> Finding:
    if not facts.foreign_namespaces:
        return Finding("ipc", "good", "the machine's own pid and ipc namespaces: CUDA IPC can work")
    names = " and ".join(facts.foreign_namespaces)
    return Finding(
        "ipc",
        "note",
        f"in a {names} namespace of its own: CUDA IPC, and so an IpcPool, works only among processes in "
        "the same one",
        "attach plain pools, or run both in the host's (--pid=host --ipc=host)",
    )


def _allocator(facts: Facts) -> Finding:
    if "expandable_segments:true" in facts.allocator.lower().replace(" ", ""):
        return Finding(
            "allocator",
            "note",
            "torch allocates expandable segments, which cannot be mapped by another process",
            "attach plain pools, or unset expandable_segments in PYTORCH_ALLOC_CONF",
        )
    return Finding("allocator", "good", "torch's allocator is one that CUDA IPC can share")


def _direct_storage(facts: Facts) -> Finding:
    """Never a fault: kvtier's way to the drive is through host memory. See docs/gpu.md."""
    lacking = [] if facts.nvidia_fs else ["the kernel module nvidia-fs is not loaded"]
    lacking += [] if facts.cufile else ["libcufile is not installed"]
    can = (
        f"not possible here: {' and '.join(lacking)}"
        if lacking
        else "possible here, where a drive takes part"
    )
    return Finding("direct storage", "good", f"GPUDirect Storage is {can}; kvtier does not use it")


# -- gathering


def gather(root: Path = Path("/")) -> Facts:
    """This machine's facts. root: where /proc and /sys are. Never raises for what is missing."""
    gpus, no_device = _gpus(root)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Facts(
        driver=_driver_version(),
        cupy=_cupy_version(),
        gpus=tuple(gpus),
        no_device=no_device,
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        memory_bytes=meminfo(_text(root / "proc/meminfo")),
        cgroup_bytes=cgroup_limit(root),
        numa_nodes=cpu_list(_text(root / "sys/devices/system/node/online")),
        cpu_nodes=_cpu_nodes(root),
        foreign_namespaces=_foreign(root),
        allocator=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "",
        huge_pages=_text(root / SHMEM_SETTING).partition("[")[2].partition("]")[0],
        nvidia_fs=(root / NVIDIA_FS).exists(),
        cufile=ctypes.util.find_library("cufile") is not None,
    )


def cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's lists: '0-2,5' is (0, 1, 2, 5)."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def meminfo(text: str) -> int:
    """MemTotal in bytes; 0 when it is not there."""
    words = next((line.split() for line in text.splitlines() if line.startswith("MemTotal:")), [])
    return int(words[1]) * 1024 if len(words) > 1 else 0


def cgroup_limit(root: Path) -> int | None:
    """The least memory limit of this process's cgroups, v1 and v2; None where there is none."""
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            said = _text(mount.joinpath(*parts[:depth]) / name).strip()
            limits += [int(said)] if said.isdigit() and int(said) < UNLIMITED_V1 else []
    return min(limits, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cpu_nodes(root: Path) -> tuple[int, ...]:
    mine = os.sched_getaffinity(0)
    nodes = []
    for node in cpu_list(_text(root / "sys/devices/system/node/online")):
        cpus = cpu_list(_text(root / f"sys/devices/system/node/node{node}/cpulist"))
        nodes += [node] if mine & set(cpus) else []
    return tuple(nodes)


def _foreign(root: Path) -> tuple[str, ...]:
    found = []
    for name, first in FIRST_NAMESPACES.items():
        try:
            link = os.readlink(root / f"proc/self/ns/{name}")
        except OSError:
            continue
        found += [name] if link != f"{name}:[{first}]" else []
    return tuple(found)


def _driver_version() -> int:
    try:
        return driver.version()
    except TierUnavailable:
        return 0


def _cupy_version() -> str:
    if importlib.util.find_spec("cupy") is None:
        return ""
    for wheel in CUPY_WHEELS:
        try:
            return f"{wheel} {importlib.metadata.version(wheel)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "cupy"


def _gpus(root: Path) -> tuple[list[GpuFacts], str]:
    """(the GPUs, why there are none)."""
    found: list[GpuFacts] = []
    while True:
        try:
            device = CudaDevice(len(found))
            free, whole = device.memory_info()
        except TierUnavailable as error:
            return found, "" if found else error.message
        node = _text(root / "sys/bus/pci/devices" / device.identity.lower() / "numa_node").strip()
        number = int(node) if node.lstrip("-").isdigit() else -1
        facts = (free, whole, number, device.can_batch, _pin(device))
        found.append(GpuFacts(device.name, device.identity, *facts))


def _pin(device: CudaDevice) -> str:
    """Why memory cannot be registered, or ''."""
    memory = np.zeros(PROBE_BYTES, np.uint8)
    try:
        device.register(memory)
        device.unregister(memory)
    except TierUnavailable as error:
        return error.message
    return ""
