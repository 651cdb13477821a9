"""Power loss with a codec and a key store: the machine of the raw tier, and old copies put back.

An old copy is the data directory and the index as they were; the key store is not among them.  The key
store's SQLite file is a real one: a crash comes before or after what it does, never within.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from kvtier.disk.keys import Keys
from kvtier.disk.vault import DataKey, Vault
from kvtier.testing.tier_kit import content

MASTER_KEY = bytes(range(32))


def _load_crash() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "disk_crash", Path(__file__).with_name("test_disk_crash.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


crash = _load_crash()
CrashMachine: Any = crash.CrashMachine
INDEXES: int = crash.INDEXES


class CodedMachine(CrashMachine):  # type: ignore[misc]
    """Every block is encoded, and most become smaller."""

    codec = "planes-zstd"

    def content(self, seed: int, length: int) -> bytes:
        data = np.frombuffer(content(seed, length), dtype=np.uint8).copy()
        data[1::2] = 60 + (data[1::2] & 3)
        return data.tobytes()


class SteppingVault(Vault):
    """A key store with points before and after each change at which the power may fail."""

    step: Callable[[], None]

    def keep(self, keys: Sequence[DataKey]) -> tuple[int, ...]:
        self.step()
        answer = super().keep(keys)
        self.step()
        return answer

    def destroy(self, generations: Iterable[int]) -> None:
        self.step()
        super().destroy(generations)
        self.step()


class SealedMachine(CodedMachine):
    """Every block is encoded and sealed."""

    def open_vault(self, store_id: bytes) -> Vault:
        vault = SteppingVault(self.directory / "vault", store_id, MASTER_KEY)
        vault.step = self.ops.step
        return vault

    def __init__(self) -> None:
        super().__init__()
        self.forgotten: dict[int, set[bytes]] = {n: set() for n in range(INDEXES)}
        self.copied: dict[int, set[bytes | None]] = {}

    @rule(index=st.integers(0, INDEXES - 1))
    def forget(self, index: int) -> None:
        gone = {n: set(self.written[n]) for n in self.removed | {index}}
        super().forget(index)
        for n, datas in gone.items():
            self.forgotten[n] |= datas

    @rule()
    def copy_everything_but_the_keys(self) -> None:
        self.restart()
        self.tier.close()
        shutil.rmtree(self.directory / "copy", ignore_errors=True)
        shutil.copytree(self.directory / "store", self.directory / "copy")
        self.copied_files = copy.deepcopy(self.ops.table)
        self.copied = {n: set(allowed) for n, allowed in self.allowed.items()}
        self._open()

    @precondition(lambda self: self.copied)
    @rule()
    def put_the_copy_back(self) -> None:
        """Nothing forgotten returns, nothing is wrong; what was written since, or evicted, is a miss."""
        self.tier.close()
        shutil.rmtree(self.directory / "store")
        shutil.copytree(self.directory / "copy", self.directory / "store")
        self.ops.table = copy.deepcopy(self.copied_files)
        self.ops.durable_table = dict(self.ops.table)
        self._open()
        for index in range(INDEXES):
            there = self._look(index)
            assert there is None or there in self.copied[index], f"object {index} is wrong"
            assert there not in self.forgotten[index], f"object {index} was forgotten, and is back"
            self.allowed[index] = {there}
        assert self.tier.record("t", "c") is None, "a conversation may have been forgotten since"
        self.versions = {0}
        self.removed.clear()


BRIEF = settings(crash.CHECKED, max_examples=12, stateful_step_count=20)

TestCodedMachine = CodedMachine.TestCase
TestCodedMachine.settings = BRIEF
TestSealedMachine = SealedMachine.TestCase
TestSealedMachine.settings = BRIEF


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [CodedMachine, SealedMachine])
def test_coded_and_sealed_crashes_at_length(machine: Any) -> None:
    long = settings(crash.CHECKED, max_examples=400, stateful_step_count=50, derandomize=False)
    run_state_machine_as_test(machine, settings=long)


def workload(machine: Any) -> None:
    """Some of everything, short enough to fail at each of its steps."""
    machine.put(2, 0, 9000)
    machine.put(1, 3, 30_000)
    machine.remove(0)
    machine.forget(3)
    machine.put(2, 3, 4096)
    machine.restart()
    machine.forget(1)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sealed_store_survives_a_crash_at_every_step(seed: int) -> None:
    for step in range(1000):
        machine = SealedMachine()
        machine.start()
        machine.put(1, 5, 9000)
        machine.copy_everything_but_the_keys()
        machine.ops.left = step
        try:
            workload(machine)
            ended = True
        except crash.Crash:
            ended = False
            machine._power_loss(seed * 1000 + step)
        machine.ops.left = None
        machine.the_live_tier_is_right()
        machine.forget(5)
        machine.put_the_copy_back()
        machine.the_live_tier_is_right()
        machine.teardown()
        if ended:
            assert step > 40
            return
    pytest.fail("the workload never ended")


def forget_and_put_back() -> None:
    """Two blocks, a copy, one forgotten after it was evicted and written again; then the copy."""
    machine = SealedMachine()
    machine.start()
    try:
        machine.put(2, 0, 9000)
        machine.copy_everything_but_the_keys()
        machine.remove(0)
        machine.put(1, 0, 9000)
        machine.forget(0)
        machine.put_the_copy_back()
        assert machine._look(1) is not None, "what nobody forgot is there"
    finally:
        machine.teardown()


def test_nothing_forgotten_is_in_an_old_copy() -> None:
    forget_and_put_back()


def test_a_forget_that_destroys_no_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "ended", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="forgotten, and is back"):
        forget_and_put_back()


def test_a_forget_that_leaves_the_key_of_an_evicted_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicted before, and forgotten then: its key waits to be destroyed, and must not wait for longer."""
    ended = Keys.ended

    def careless(self: Keys, generations: Iterable[int], *, now: bool) -> None:
        waiting, self._doomed = self._doomed, []
        ended(self, generations, now=now)
        self._doomed += waiting

    monkeypatch.setattr(Keys, "ended", careless)
    # A close that destroys what waits would hide it; a crash does not.
    monkeypatch.setattr(Keys, "close", lambda self: self.vault.close())
    with pytest.raises(AssertionError, match="forgotten, and is back"):
        forget_and_put_back()
