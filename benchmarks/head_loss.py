"""Ray's head is killed and comes back: what a worker on the node saw, with and without stored state.

    python -m benchmarks.head_loss                       # down for 60 s, both ways; four minutes
    python -m benchmarks.head_loss --down-s 300 --storage folder

One node with its real services.  A worker in this process parks and restores small conversations all the time
and checks every byte.  The head (gcs_server) is killed with SIGKILL and started again by the very same
command, as a supervisor would; where Ray's own processes end after that, `up` is called again, as systemd
would.  JSON lines: times in seconds, counts of what the worker tried, and `wrong` of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.client.client import Client, connect
from kvtier.client.worker import Worker
from kvtier.cluster import record as records
from kvtier.cluster.down import down
from kvtier.cluster.procs import alive, identify, send, wait_ended
from kvtier.cluster.record import Record
from kvtier.cluster.status import cluster_status
from kvtier.cluster.up import up
from kvtier.config.load import load
from kvtier.config.schema import Config
from kvtier.errors import KvtierError
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for, tokens_of

_TOKENS = 256
_PORT_FIRST = 47100
_SETTLED_S = 15.0
_WHOLE_S = 120.0
_EVERY_S = 0.2
_MIB = 1 << 20


@dataclass(slots=True)
class Load:
    """The worker: one park and one restore a turn, and what came of it."""

    kv: KvMemory
    worker: Worker
    seed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def turn(self) -> bool:
        """Whether park and restore did what they should."""
        began_s = time.monotonic()
        self.seed += 1
        well = self._park() and self._restore(self.seed)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
        self.seen["well" if well else "fell short"] += 1
        return well

    def restore_of_before(self, seeds: range) -> int:
        """How many of these conversations, parked before the loss, come back whole."""
        return sum(self._restore(seed) for seed in seeds)

    def run(self, seconds: float) -> dict[str, Any]:
        """Turns for so long; the counts."""
        self.seen.clear()
        self.slowest_s = 0.0
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.turn()
            _pause()
        return dict(self.seen) | {"slowest_s": round(self.slowest_s, 3)}

    def _park(self) -> bool:
        pages = pages_for(_TOKENS)
        self.kv.put(self.seed, pages, _TOKENS)
        try:
            handle = self.worker.park(f"chat-{self.seed}", tokens_of(self.seed, _TOKENS), pages, level="disk")
            return bool(handle.result(timeout_s=10).ok)
        except KvtierError as error:
            self.seen[type(error).__name__] += 1
            return False

    def _restore(self, seed: int) -> bool:
        pages = pages_for(_TOKENS)
        self.kv.poison(pages)
        try:
            plan = self.worker.plan(f"chat-{seed}", tokens_of(seed, _TOKENS))
            receipt = self.worker.restore(plan, pages, deadline_s=10)
        except KvtierError as error:
            self.seen[type(error).__name__] += 1
            return False
        right = self.kv.front(seed, pages, receipt.tokens)
        self.seen["wrong"] += int(right != receipt.tokens)
        return bool(receipt.tokens == _TOKENS and right == _TOKENS)


def head_loss(down_s: float, storage: str) -> Iterator[dict[str, Any]]:
    """One loss and return; storage 'none' or 'folder'."""
    with tempfile.TemporaryDirectory(prefix="kvh-") as folder:
        config = _config(Path(folder), storage)
        up(config, detach=True)
        try:
            with connect(f"{folder}/r/node.sock", required=False) as client:
                yield from _lose(config, client, down_s, storage)
        finally:
            down(config)


def _lose(config: Config, client: Client, down_s: float, storage: str) -> Iterator[dict[str, Any]]:
    kv = KvMemory(64)
    with client.attach(kv.model, kv.pool, shard=SHARD) as worker:
        load_ = Load(kv, worker)
        about: dict[str, Any] = {"storage": storage, "down_s": down_s}
        yield about | {"phase": "before"} | load_.run(5.0)
        before = range(1, load_.seed + 1)
        roles = _roles(config)
        gcs = Gcs(_record(config))
        gcs.kill()
        yield about | {"phase": "head away"} | load_.run(down_s)
        gcs.start(_record(config))
        back_s = time.monotonic()
        try:
            yield about | _until_whole(config, load_, back_s)
            kept = load_.restore_of_before(before)
            yield (
                about
                | {
                    "phase": "after",
                    "of_before": len(before),
                    "restored": kept,
                    "same_actors": _roles(config) == roles,
                }
                | load_.run(5.0)
            )
        finally:
            gcs.end()


def _until_whole(config: Config, load_: Load, back_s: float) -> dict[str, Any]:
    """Work on until turns are well and Ray answers; when a process of Ray's ends, `up` starts all again."""
    load_.seen.clear()
    load_.slowest_s, again, well_from_s = 0.0, 0, time.monotonic()
    while time.monotonic() - back_s < _WHOLE_S:
        if not load_.turn():
            well_from_s = 0.0
        elif not well_from_s:
            well_from_s = time.monotonic()
        known = dict(_record(config).processes)
        if not all(alive(known[name]) for name in ("gcs_server", "raylet")):
            up(config, detach=True)
            again += 1
            # Turns that were well until Ray's processes ended say nothing of afterwards.
            well_from_s = 0.0
        elif well_from_s and time.monotonic() - max(well_from_s, back_s) > _SETTLED_S and _roles(config):
            break
        _pause()
    told = {
        "phase": "head back",
        "whole_after_s": round(max(0.0, well_from_s - back_s), 2),
        "up_again": again,
    }
    return told | dict(load_.seen) | {"slowest_s": round(load_.slowest_s, 3)}


class Gcs:
    """The head's process, and how to start it again. within: the command that runs it, if any."""

    def __init__(self, record: Record, within: Sequence[str] = ()) -> None:
        self.process = dict(record.processes)["gcs_server"]
        proc = Path(f"/proc/{self.process.pid}")
        words = proc.joinpath("cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        self._command = [*map(os.fsencode, within), *words]
        pairs = proc.joinpath("environ").read_bytes().rstrip(b"\0").split(b"\0")
        self._environment = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
        self._folder = os.readlink(proc / "cwd")
        self._child: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        send(self.process, signal.SIGKILL)
        wait_ended([self.process], 10)

    def start(self, record: Record) -> None:
        """By the same command, with the same state; the record of `up` names it from then on."""
        self.end()
        self._child = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        process = identify(self._child.pid)
        assert process is not None, "the head does not start again"
        self.process = process
        records.save(records.with_process(record, "gcs_server", process))

    def end(self) -> None:
        """Only what this object started; what `up` started after that is `down`'s."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
        if self._child is not None:
            self._child.wait()


def _roles(config: Config) -> dict[str, tuple[int, int]]:
    """Pid and epoch by role, when all of them are ready; else nothing."""
    try:
        nodes = cluster_status(config, timeout_s=10.0)["nodes"]
    except (KvtierError, KeyError):
        return {}
    roles: dict[str, Any] = nodes.get(_record(config).node_id, {})
    if len(roles) < 3 or any(entry["state"] != "ready" for entry in roles.values()):
        return {}
    return {role: (entry["pid"], entry["epoch"]) for role, entry in roles.items()}


def _record(config: Config) -> Record:
    found = records.load(config.node.state_dir)
    assert found is not None, "`up` leaves a record"
    return found


def _config(folder: Path, storage: str) -> Config:
    settings: dict[str, Any] = {
        "node.state_dir": f"{folder}/s",
        "node.runtime_dir": f"{folder}/r",
        "host.capacity_bytes": 32 * _MIB,
        "disk.capacity_bytes": 1024 * _MIB,
        "disk.segment_bytes": 32 * _MIB,
        "ray.object_store_bytes": 80 * _MIB,
        "ray.port_first": _PORT_FIRST,
    }
    if storage == "folder":
        (folder / "gcs").mkdir()
        settings["ray.gcs_storage"] = f"{folder}/gcs"
    return load(None, settings)


def _pause() -> None:
    time.sleep(_EVERY_S)


def main() -> None:
    """Print what is measured, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--down-s", type=float, default=60.0, help="how long the head is away")
    parser.add_argument("--storage", choices=("none", "folder", "both"), default="both")
    given = parser.parse_args()
    for storage in ("none", "folder") if given.storage == "both" else (given.storage,):
        for line in head_loss(given.down_s, storage):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
