"""A node whose arena fills most of its memory cgroup: Ray ends nothing for it, and it serves. Needs root.

pytest -m netns tests/cluster/test_cluster_memory.py
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.client.client import connect
from kvtier.cluster import record as records
from kvtier.cluster.down import kill_all
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for
from kvtier.testing.node_bench import LocalWorker

ROOT = Path("/sys/fs/cgroup/memory")
HERE = Path(__file__).parent
LIMIT_BYTES, ARENA_BYTES = 1 << 30, 600 << 20
# Stands for whatever else lives in the cgroup.
BALLAST = """
import sys
held = bytearray(int(sys.argv[1]))
for at in range(0, len(held), 4096):
    held[at] = 1
print("full", flush=True)
sys.stdin.read()
"""
TOKENS = 400
TURNS = 30

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("unshare") is None or not (ROOT / "memory.limit_in_bytes").exists(),
        reason="needs root, unshare and a memory cgroup of version 1",
    ),
]


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline_s = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        select.select([], [], [], 0.05)
    return value


class Cgroup:
    """A memory cgroup below this process's own."""

    def __init__(self) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
        self.folder = ROOT / own.lstrip("/") / f"kvtier-{os.getpid()}-{secrets.token_hex(3)}"
        self.folder.mkdir()
        # Before Ray starts: it reads the limit once.
        (self.folder / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        self._ballast: list[subprocess.Popen[bytes]] = []

    def used_bytes(self) -> int:
        """Without the page cache of files, which is given back when memory is short. Shared memory counts."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        usage = int((self.folder / "memory.usage_in_bytes").read_text())
        return usage - int(stat["total_inactive_file"]) - int(stat["total_active_file"])

    def fill(self, share: float) -> None:
        """Have a process of its own use memory, until this share of the limit is in use."""
        ballast = subprocess.Popen(
            [sys.executable, "-c", BALLAST, str(max(0, int(LIMIT_BYTES * share) - self.used_bytes()))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=self.enter,
        )
        self._ballast.append(ballast)
        assert ballast.stdout is not None
        assert ballast.stdout.readline() == b"full\n"

    def drain(self) -> None:
        """End the processes that fill it."""
        for ballast in self._ballast:
            ballast.communicate()
        self._ballast.clear()

    def kernel_ended(self) -> int:
        """How many processes the kernel ended for want of memory."""
        control = dict(line.split() for line in (self.folder / "memory.oom_control").read_text().splitlines())
        return int(control["oom_kill"])

    def pids(self) -> set[int]:
        return {int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()}

    def enter(self) -> None:
        """For the child, before it becomes the command."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.drain()
        until(lambda: not self.pids(), "the cgroup is empty")
        self.folder.rmdir()


class Node:
    """A private deployment of one node in a cgroup, which it finds where a container would."""

    def __init__(self, cgroup: Cgroup, folder: Path, *options: str) -> None:
        self.cgroup, self._folder = cgroup, folder
        self.up = self.run("up", *options)

    def run(self, command: str, *options: str) -> Any:
        inside = f'mount --make-rprivate / && mount --bind {self.cgroup.folder} {ROOT} && exec "$@"'
        words = [sys.executable, str(HERE / "node_in_cgroup.py"), command]
        words += [str(self._folder / "state"), str(self._folder / "run"), str(ARENA_BYTES), *options]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", inside, "inside", *words],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"PYTHONPATH": str(HERE.parent.parent)},
            preexec_fn=self.cgroup.enter,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def alive(self) -> bool:
        """Whether every process of Ray and every actor that `up` named is still there."""
        return set(self.up["pids"].values()) <= self.cgroup.pids()

    def close(self) -> None:
        record = records.load(str(self._folder / "state"))
        if record is not None:
            kill_all(record)
            records.remove(record)


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    cgroup = Cgroup()
    yield cgroup
    cgroup.remove()


@pytest.fixture
def start(cgroup: Cgroup) -> Iterator[Callable[..., Node]]:
    """Start the node, with the whole arena faulted in."""
    made: list[Node] = []
    with tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp") as folder:

        def make(*options: str) -> Node:
            made.append(Node(cgroup, Path(folder), *options))
            with connect(made[0].up["socket"]) as client:
                until(
                    lambda: all("faulted in" not in tier.detail for tier in client.status().tiers),
                    "the arena is faulted in",
                )
            return made[0]

        yield make
        for node in made:
            node.close()


def test_a_node_at_90_and_97_percent_of_its_limit_loses_nothing_and_serves(
    cgroup: Cgroup, start: Callable[..., Node]
) -> None:
    node = start()
    # The daemon touched the pages first, so they count here, whoever maps them.
    assert cgroup.used_bytes() > ARENA_BYTES
    kv = KvMemory(64)
    with connect(node.up["socket"]) as client, client.attach(kv.model, kv.pool, shard=SHARD) as worker:
        local = LocalWorker(kv, worker)
        for share in (0.90, 0.97):
            cgroup.fill(share)
            assert cgroup.used_bytes() > (share - 0.01) * LIMIT_BYTES
            # Some ten looks of Ray's monitor, were it on.
            began_s, turn = time.monotonic(), 0
            while turn < TURNS or time.monotonic() < began_s + 3.0:
                turn += 1
                assert local.park(turn, pages_for(TOKENS), TOKENS).result().level == "host"
                assert local.restore(turn, pages_for(TOKENS), TOKENS).tokens == TOKENS
            assert node.alive()
            assert cgroup.used_bytes() > (share - 0.02) * LIMIT_BYTES
    assert cgroup.kernel_ended() == 0
    # `down` starts a process that asks Ray, and that has a time limit.
    cgroup.drain()
    assert node.run("down") == {"graceful": True, "detail": ""}


def test_ray_s_own_monitor_would_end_an_actor(cgroup: Cgroup, start: Callable[..., Node]) -> None:
    node = start("monitor")
    assert node.alive()
    cgroup.fill(0.97)
    until(lambda: not node.alive(), "Ray ends an actor")
    assert cgroup.kernel_ended() == 0
