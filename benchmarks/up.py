"""The deployed daemon: time from `kvtier up` to ready, and what its processes weigh when idle."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvtier.bench.lines import Line
from kvtier.cluster import record

_STARTS = 3
_ARENA_BYTES = 256 << 20
# The name of the arena's mappings: its memory is what the operator gave, and not the daemon's weight.
_ARENA_NAME = "memfd:kvtier"
_KIB = 1024


def up() -> Iterator[Line]:
    """Start and end the daemon a few times; weigh it the last time."""
    seconds: list[float] = []
    for number in range(_STARTS):
        with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
            begun = time.perf_counter()
            _kvtier("up", "--detach", folder)
            seconds.append(time.perf_counter() - begun)
            try:
                if number == _STARTS - 1:
                    yield from _weight(folder)
            finally:
                _kvtier("down", "", folder)
    detail = {"starts_s": [round(s, 2) for s in seconds]}
    yield Line("kvtier up to ready", round(statistics.median(seconds), 2), "s", detail=detail)


def _weight(folder: str) -> Iterator[Line]:
    found = record.load(Path(folder) / "state")
    assert found is not None, "`kvtier up` leaves a record"
    by_name: dict[str, float] = {}
    for process in found.running():
        try:
            by_name_of = Path(f"/proc/{process.pid}/comm").read_text().strip()
            by_name[by_name_of] = by_name.get(by_name_of, 0.0) + pss_bytes(process.pid) / 1e6
        except OSError:
            continue
    rounded = {name: round(mb, 1) for name, mb in sorted(by_name.items(), key=lambda kv: -kv[1])}
    yield Line("idle daemon, PSS without the arena", round(sum(by_name.values()), 1), "MB", detail=rounded)


def pss_bytes(pid: int) -> int:
    """Proportional share of memory of a process, its mappings of the arena left out."""
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            counts = _ARENA_NAME not in line
        elif first == "Pss:" and counts:
            total += int(rest.split()[0]) * _KIB
    return total


def _kvtier(command: str, option: str, folder: str) -> None:
    folders = ["--state-dir", f"{folder}/state"]
    if command == "up":
        folders += ["--runtime-dir", f"{folder}/run", "--host-bytes", str(_ARENA_BYTES)]
    run = "import sys; from kvtier.cli.main import main; sys.exit(main())"
    line = [sys.executable, "-c", run, command, *([option] if option else []), *folders, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"kvtier {command} failed: {done.stdout}{done.stderr}")
    json.loads(done.stdout.splitlines()[-1])
