"""kill -9 while keys are kept and destroyed: what was promised holds, in the files as they are left.

Run as a program, this file is the process that is killed:  test_vault_kill.py FOLDER FIRST SEED [WORD]

Its lines: 'kept g ...' when keep returned; 'dying g=hex ...' before a destruction, with wrapped bytes;
'destroyed g ...' when destroy returned.  WORD: 'eager' says so before it is so, 'once' stops after the first
destruction, and 'once-unflushed' leaves the truncation of the WAL unflushed: two negative controls.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtier.disk.fileops import OsFileOps
from kvtier.disk.sealing import NONCE_BYTES, DataKey
from kvtier.disk.vault import Vault

STORE, MASTER = b"s" * 16, b"m" * 32
# The latest destroyed keys are searched for; all of them would take longer with every life.
_SEARCHED = 2000
Record = Callable[[str, object], None]


def tenant_of(generation: int) -> str:
    return "abc"[generation % 3]


def fixed(key: DataKey) -> DataKey:
    """The key with bytes that follow from its generation, so that another process knows them."""
    return replace(key, key=hashlib.sha256(str(key.generation).encode()).digest())


# -- the process that is killed


class Unflushed(OsFileOps):
    def fsync(self, fd: int) -> None:
        pass


def say(word: str, things: list[object]) -> None:
    print(word, *things, flush=True)


def keep_some(vault: Vault, first: int, draw: random.Random, eager: bool) -> int:
    """Keep the next generations, in any order; answers the one after them."""
    count = draw.choice((1, 3, 200))
    order: list[object] = [*draw.sample(range(first, first + count), count)]
    keys = [fixed(vault.new_key(g, tenant_of(g))) for g in draw.sample(range(first, first + count), count)]
    if eager:
        say("kept", order)
    vault.keep(keys)
    if not eager:
        say("kept", order)
    return first + count


def destroy_some(vault: Vault, draw: random.Random, eager: bool) -> None:
    """Destroy some keys, or all of a tenant."""
    alive = list(vault.generations())
    doomed = draw.sample(alive, min(len(alive), draw.choice((1, 3, 150))))
    shred = draw.random() < 0.05
    if shred:
        doomed = [g for g in alive if tenant_of(g) == "a"]
    rows = [row for g in doomed if (row := vault._rows.key(g)) is not None]
    say("dying", [f"{row.generation}={row.wrapped[NONCE_BYTES:].hex()}" for row in rows])
    if eager:
        say("destroyed", [*doomed])
    if shred:
        vault.destroy_tenant("a")
    else:
        vault.destroy(doomed)
    if not eager:
        say("destroyed", [*doomed])


def work(folder: Path, first: int, seed: int, word: str) -> None:
    """Keep and destroy until killed."""
    vault = Vault(folder, STORE, MASTER, ops=Unflushed() if word == "once-unflushed" else None)
    draw = random.Random(seed)
    if word.startswith("once"):
        keep_some(vault, first, draw, eager=False)
        destroy_some(vault, draw, eager=False)
        sys.stdin.read()
    while True:
        first = keep_some(vault, first, draw, word == "eager")
        if draw.random() < 0.6:
            destroy_some(vault, draw, word == "eager")


# -- the one that kills and looks


@dataclass
class Promises:
    """What the processes said over their lives."""

    kept: set[int] = field(default_factory=set)
    dying: dict[int, bytes] = field(default_factory=dict)
    destroyed: set[int] = field(default_factory=set)
    next_generation: int = 0

    def hear(self, line: str) -> None:
        word, *things = line.split()
        if word == "kept":
            self.kept.update(map(int, things))
        elif word == "dying":
            pairs = [thing.split("=") for thing in things]
            self.dying.update({int(g): bytes.fromhex(text) for g, text in pairs})
        elif word == "destroyed":
            self.destroyed.update(map(int, things))


def run_and_kill(
    folder: Path, seed: int, promises: Promises, *words: str, end: Callable[[], None] | None = None
) -> None:
    """Let a process run until it said a seeded number of lines, call `end`, and kill it."""
    lines = 3 if words and words[0].startswith("once") else random.Random(seed).randint(1, 30)
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(promises.next_generation), str(seed), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            promises.hear(line)
            lines -= 1
            if lines == 0:
                break
        if end is not None:
            end()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read()
        process.stdout.close()
        process.stdin.close()
        process.wait()
    assert lines == 0, "the process ended by itself"
    for line in rest.splitlines(keepends=True):
        # A flush that is under way while the file system stops may be answered as if it had succeeded.
        if line.endswith("\n") and (end is None or line.startswith("dying")):
            promises.hear(line)
    promises.next_generation = (promises.next_generation // 100_000 + 1) * 100_000


def broken(folder: Path, promises: Promises) -> list[str]:
    """Which promises do not hold, first in the files as the kill left them, then in the open vault."""
    data = [path.read_bytes() for path in folder.iterdir()]
    said = [
        f"bytes of {g} are left"
        for g in sorted(promises.destroyed & set(promises.dying))[-_SEARCHED:]
        if any(promises.dying[g][:24] in file or promises.dying[g][24:] in file for file in data)
    ]
    vault = Vault(folder, STORE, MASTER)
    there = set(vault.generations())
    said += [f"{g} is lost" for g in promises.kept - set(promises.dying) - there]
    said += [f"{g} is back" for g in promises.destroyed & there]
    for generation in there:
        key = vault.key(generation)
        if key != fixed(DataKey(generation, tenant_of(generation), b"", key.tenant_key if key else 0)):
            said.append(f"{generation} has another key")
    vault.close()
    return said


def kill_cycles(folder: Path, seeds: range) -> None:
    promises = Promises()
    for seed in seeds:
        run_and_kill(folder, seed, promises)
        assert broken(folder, promises) == [], f"seed {seed}"
    assert promises.kept - set(promises.dying)
    assert promises.destroyed


def test_promises_hold_after_kill_9(tmp_path: Path, record_property: Record) -> None:
    record_property("seeds", "0 to 6")
    kill_cycles(tmp_path / "vault", range(7))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", [1000, 1050, 1100, 1150])
def test_promises_hold_after_kill_9_at_length(tmp_path: Path, start: int, record_property: Record) -> None:
    record_property("seeds", f"{start} to {start + 49}")
    kill_cycles(tmp_path / "vault", range(start, start + 50))


def test_promises_made_too_early_are_caught(tmp_path: Path) -> None:
    promises = Promises()
    folder = tmp_path / "vault"
    for seed in range(60):
        run_and_kill(folder, seed, promises, "eager")
        if broken(folder, promises):
            return
    pytest.fail("no early promise was broken in 60 kills")


# -- power loss, as far as a file system can act it


def _disk_kill() -> ModuleType:
    path = Path(__file__).with_name("test_disk_kill.py")
    spec = importlib.util.spec_from_file_location("disk_kill_for_vault", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def loop_ext4(tmp_path: Path) -> Iterator[Any]:
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    try:
        made = _disk_kill().LoopExt4(tmp_path)
        made.mount()
    except OSError as refusal:
        pytest.skip(f"no loop-mounted ext4 here: {refusal}")
    yield made
    made.unmount()


def power_cycle(disk: Any, seed: int, promises: Promises, *words: str) -> list[str]:
    """Run a process, stop the file system under it, mount it again; answers the broken promises."""
    folder = disk.mount_point / "vault"
    run_and_kill(folder, seed, promises, *words, end=disk.shut_down)
    disk.unmount()
    disk.mount()
    return broken(folder, promises)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cycles", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_promises_hold_after_a_stopped_file_system(
    loop_ext4: Any, cycles: int, record_property: Record
) -> None:
    record_property("seeds", f"0 to {cycles - 1}")
    promises = Promises()
    for seed in range(cycles):
        assert power_cycle(loop_ext4, seed, promises) == [], f"seed {seed}"
    assert promises.kept - set(promises.dying)


def test_promises_before_the_flush_are_caught(loop_ext4: Any) -> None:
    promises = Promises()
    assert any(power_cycle(loop_ext4, seed, promises, "eager") for seed in range(30))


def test_the_old_wal_does_not_come_back(loop_ext4: Any) -> None:
    assert power_cycle(loop_ext4, 1, Promises(), "once") == []


def test_without_flushing_its_truncation_the_old_wal_comes_back(loop_ext4: Any) -> None:
    assert power_cycle(loop_ext4, 1, Promises(), "once-unflushed") != []


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "".join(sys.argv[4:]))
