"""Two real Ray nodes, each in a network namespace of its own, joined by a bridge. Needs root.

pytest -m netns tests/cluster/test_cluster_netns.py
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.cluster import record as records
from kvtier.cluster.down import kill_all
from kvtier.config.load import load

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and the command ip"
    ),
]
HERE = Path(__file__).parent
PORT = 46000


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, timeout=20)


class Side:
    """One node in its namespace. name: of node and namespace."""

    def __init__(self, name: str, number: int, folder: Path, token: Path) -> None:
        self.name, self.number = f"kv{os.getpid()}{name}", number
        self.link = f"kv{name}{os.getpid()}"
        self.address = f"10.213.7.{number}"
        self.folders = [str(folder / f"{name}{kind}") for kind in "sr"]
        self.settings = [f"node.name={name}", f"ray.token_file={token}"]

    def command(self, *words: str) -> list[str]:
        inside = ["ip", "netns", "exec", self.name, sys.executable, str(HERE / "node_in_netns.py"), words[0]]
        return [*inside, *self.folders, *self.settings, *words[1:]]

    def run(self, *words: str) -> dict[str, Any]:
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=120, env=environment(), check=False
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def record(self) -> records.Record | None:
        return records.load(self.folders[0])

    def kill(self) -> None:
        record = self.record()
        if record is not None:
            kill_all(record)
            records.remove(record)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)])}


class Watch:
    """The head's view of the cluster, line by line."""

    def __init__(self, side: Side) -> None:
        self.child = subprocess.Popen(
            side.command("watch"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
        )
        assert self.child.stdout is not None
        self._pending, self._out = b"", self.child.stdout.fileno()
        self.seen: dict[str, Any] = {}

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str, seconds: float = 60.0) -> float:
        """Seconds until the view is like this."""
        began_s = time.monotonic()
        while not condition(self.seen):
            left_s = began_s + seconds - time.monotonic()
            assert left_s > 0 and select.select([self._out], [], [], left_s)[0], f"{what}: {self.seen}"
            chunk = os.read(self._out, 65536)
            assert chunk, "the watch ended"
            *lines, self._pending = (self._pending + chunk).split(b"\n")
            # Ray writes warnings of its own in between.
            for line in (line for line in lines if line.startswith(b"{")):
                self.seen = json.loads(line)
        return time.monotonic() - began_s

    def close(self) -> None:
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()


def ready(seen: dict[str, Any], *names: str) -> bool:
    return all(
        sorted(role for role, (state, _) in seen.get(name, {}).items() if state == "ready")
        == ["disk", "gpu", "host"]
        for name in names
    )


def epochs(seen: dict[str, Any], name: str) -> list[int]:
    return [epoch for _, epoch in seen[name].values()]


@contextlib.contextmanager
def connected(*names: str) -> Iterator[tuple[Side, ...]]:
    """Namespaces that reach each other over a bridge in one of its own; whatever happens, all of it goes.

    The first is where Ray's head will be.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvn-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    made = tuple(Side(name, number, folder, token) for number, name in enumerate(names, 1))
    made[0].settings += [f"ray.listen={made[0].address}", f"ray.port_first={PORT}"]
    for side in made[1:]:
        side.settings += [f"ray.address={made[0].address}:{PORT}"]
    hub = f"kv{os.getpid()}hub"
    try:
        ip("netns", "add", hub)
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for side in made:
            ip("netns", "add", side.name)
            ip("-n", hub, "link", "add", f"to-{side.number}", "type", "veth", "peer", "name", side.link)
            ip("-n", hub, "link", "set", f"to-{side.number}", "master", "bridge", "up")
            ip("-n", hub, "link", "set", side.link, "netns", side.name)
            ip("-n", side.name, "addr", "add", f"{side.address}/24", "dev", side.link)
            ip("-n", side.name, "link", "set", side.link, "up")
            ip("-n", side.name, "link", "set", "lo", "up")
        yield made
    finally:
        for side in reversed(made):
            side.kill()
        for name in (*(side.name for side in made), hub):
            ip("netns", "del", name, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    """Two of them."""
    with connected("a", "b") as (a, b):
        yield a, b


def test_two_nodes_a_loss_a_return_a_drain_and_the_end(
    sides: tuple[Side, Side], record_property: Callable[[str, object], None]
) -> None:
    a, b = sides
    assert a.run("up")["kind"] == "private"
    joined = b.run("up")
    assert (joined["kind"], joined["address"]) == ("joined", f"{a.address}:{PORT}")
    watch = Watch(a)
    try:
        watch.until(lambda seen: ready(seen, "a", "b"), "both are ready")
        of_a, of_b = epochs(watch.seen, "a"), epochs(watch.seen, "b")
        config = load(None)

        held = b.record()
        assert held is not None
        assert kill_all(held) > 0
        noticed_s = watch.until(lambda seen: "b" not in seen, "the loss of b")
        look_s = config.ray.health_check_period_s + config.ray.health_check_timeout_s
        bound_s = config.ray.health_check_failures * look_s
        record_property("loss_noticed_s", noticed_s)
        print(f"loss noticed after {noticed_s:.2f} s; by the settings within {bound_s:.2f} s")
        assert ready(watch.seen, "a"), "the head's own actors had nothing to do with it"

        b.run("up")
        watch.until(lambda seen: ready(seen, "a", "b"), "the return of b")
        assert min(epochs(watch.seen, "b")) > max(of_a + of_b)
        assert epochs(watch.seen, "a") == of_a

        report = a.run("drain", "b")
        assert report["phase"] == "done"
        watch.until(lambda seen: not ready(seen, "b"), "b is drained")
        again = b.run("up")
        assert again["kind"] == "joined"
        watch.until(lambda seen: ready(seen, "a", "b"), "b is back in service")

        ip("-n", b.name, "link", "set", b.link, "down")
        cut_s = watch.until(lambda seen: "b" not in seen, "the cut")
        print(f"cut noticed after {cut_s:.2f} s; by the settings within {bound_s:.2f} s")
        held = b.record()
        assert held is not None
        ip("-n", b.name, "link", "set", b.link, "up")
    finally:
        watch.close()
    b.run("down")
    assert held.running() == []
    held = a.record()
    assert held is not None
    assert a.run("down")["graceful"]
    assert held.running() == []
    for side in sides:
        assert side.record() is None
        assert not [path for path in Path(side.folders[1]).rglob("*")]
