"""How much memory this process may have, and what of it the arena may take.

The arena is charged to the memory cgroup of whoever touches a page first, which is this process; one page
above the limit and the kernel ends it.  So the limit is found before anything is mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import ConfigError

FIELD = "host.capacity_bytes"
# "auto" takes half of what is available: the model's weights on their way to the GPU, the page cache and
# the engine's own pinned buffers live in the other half.
AUTO_FRACTION = 0.5
AUTO_STEP_BYTES = 2 << 20
# cgroup v1 says "no limit" as the greatest multiple of the page size in 63 bits.
_V1_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The least limit that applies. source: the file that names it. available_bytes: not in use now."""

    limit_bytes: int
    source: str
    available_bytes: int


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """The least of the machine's memory and every memory cgroup from this process's one upwards.

    root: where /proc and /sys are; tests pass a tree of their own.  Raises ConfigError when the machine's
    memory cannot be read.
    """
    total, available = _meminfo(root / "proc/meminfo")
    best = MemoryLimit(total, "/proc/meminfo", available)
    for limit_file, usage_file in _cgroup_files(root):
        limit = _number(limit_file)
        if limit is None:
            continue
        used = _number(usage_file) or 0
        source, least = best.source, best.limit_bytes
        if limit < least:
            source, least = "/" + str(limit_file.relative_to(root)), limit
        best = MemoryLimit(least, source, min(best.available_bytes, max(0, limit - used)))
    return best


def check_capacity(capacity_bytes: int, headroom_bytes: int, limit: MemoryLimit) -> None:
    """Raise ConfigError when an arena of capacity_bytes leaves less than headroom_bytes of the limit."""
    highest = max(0, limit.limit_bytes - headroom_bytes)
    if capacity_bytes > highest:
        raise ConfigError(
            FIELD,
            f"{capacity_bytes} bytes are above the memory limit of {limit.limit_bytes} bytes "
            f"({limit.source}) minus {headroom_bytes} bytes of headroom",
            fix=f"set {FIELD} to {highest} or less, or raise the limit",
        )


def auto_capacity(headroom_bytes: int, limit: MemoryLimit) -> int:
    """The capacity for "auto": half of what is available beyond the headroom, in steps of 2 MiB.

    Never above what `check_capacity` allows.  Raises ConfigError when less than one step is left.
    """
    room = min(limit.available_bytes, limit.limit_bytes) - headroom_bytes
    steps = int(max(0, room) * AUTO_FRACTION) // AUTO_STEP_BYTES
    if steps == 0:
        raise ConfigError(
            FIELD,
            f"{limit.available_bytes} bytes of memory are available ({limit.source}) "
            f"and {headroom_bytes} bytes of them are headroom: nothing is left for the arena",
            fix=f"free memory, or set {FIELD} to a number",
        )
    return steps * AUTO_STEP_BYTES


def _meminfo(path: Path) -> tuple[int, int]:
    """(MemTotal, MemAvailable) in bytes."""
    fields = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(FIELD, f"cannot read {path}: {error}", fix="mount /proc") from error
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    total = fields["MemTotal"]
    return total, fields.get("MemAvailable", total)


def _cgroup_files(root: Path) -> list[tuple[Path, Path]]:
    """(limit file, usage file) of this process's memory cgroups, v1 and v2, from the leaf upwards."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files: list[tuple[Path, Path]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        names = ("memory.max", "memory.current")
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            mount = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        files.extend((folder / names[0], folder / names[1]) for folder in _upwards(mount, path))
    return files


def _upwards(mount: Path, path: str) -> list[Path]:
    """The cgroup's folder and its parents up to the mount.

    Inside a container the path may be one of the host's that is not mounted here ('/../x', or a pod's
    path): its files are not found then, and the mount's own, which are the container's, count.
    """
    parts = [part for part in path.split("/") if part and part != ".."]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _number(path: Path) -> int | None:
    """The file's number, or None when it is absent, 'max', or v1's way to say no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    if not text.isdigit() or int(text) >= _V1_UNLIMITED:
        return None
    return int(text)
