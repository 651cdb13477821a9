"""Short workloads, crashed at every single one of their steps: no chance in where the power fails."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtier.errors import CorruptObject


def _load_crash() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "disk_crash_points_machine", Path(__file__).with_name("test_disk_crash.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


crash = _load_crash()
CrashMachine: Any = crash.CrashMachine


def fill_and_reuse(machine: Any) -> None:
    machine.put(3, 0, 9000)
    machine.remove(1)
    machine.put(1, 4, 30_000)
    machine.remove(0)
    machine.put(2, 1, 4096)


def forget_and_write_again(machine: Any) -> None:
    machine.put(2, 0, 9000)
    machine.forget(0)
    machine.put(1, 0, 4096)
    machine.forget(1)


def restart_in_between(machine: Any) -> None:
    machine.put(2, 2, 30_000)
    machine.restart()
    machine.remove(2)
    machine.put(1, 2, 9000)
    machine.restart()


def leave_and_go_on(machine: Any) -> None:
    machine.put(1, 0, 9000)
    machine.leave_half_done(1)
    machine.put(2, 1, 9000)
    machine.forget(2)


def write_more_rows(machine: Any) -> None:
    machine.put(3, 0, 4096)
    machine.replace(2, 0, 9000)
    machine.replace(2, 1, 30_000)
    machine.leave_half_done(2)
    machine.restart()
    machine.replace(1, 2, 9000)
    machine.forget(0)


def make_room_before_it_is_needed(machine: Any) -> None:
    machine.tier._store.make_ahead()
    machine.put(2, 0, 30_000)
    machine.tier._store.make_ahead()
    machine.restart()
    machine.tier._store.make_ahead()
    machine.put(3, 2, 9000)


WORKLOADS = [
    fill_and_reuse,
    forget_and_write_again,
    restart_in_between,
    leave_and_go_on,
    write_more_rows,
    make_room_before_it_is_needed,
]


def crash_everywhere(machine_class: Any, workload: Callable[[Any], None], seed: int) -> int:
    """Answers how many steps the workload has."""
    for step in range(1000):
        machine = machine_class()
        machine.start()
        machine.ops.left = step
        try:
            workload(machine)
            ended = True
        except crash.Crash:
            ended = False
            machine._power_loss(seed * 1000 + step)
        machine.ops.left = None
        try:
            machine.the_live_tier_is_right()
            machine.the_limit_holds()
            # What comes after a crash works, too.
            machine.put(1, 5, 9000)
            machine.the_live_tier_is_right()
        finally:
            machine.teardown()
        if ended:
            return step
    raise AssertionError("the workload never ended")


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_point_of_a_short_workload(
    workload: Callable[[Any], None], seed: int, record_property: Callable[[str, object], None]
) -> None:
    steps = crash_everywhere(CrashMachine, workload, seed)
    record_property("crash_points", steps)
    assert steps > 15


def test_listing_before_flushing_is_caught() -> None:
    class Eager(CrashMachine):  # type: ignore[misc]
        tier_class = crash.EagerTier

    with pytest.raises((AssertionError, CorruptObject)):
        for seed in range(20):
            crash_everywhere(Eager, fill_and_reuse, seed)


def test_room_ahead_that_is_not_durable_is_caught() -> None:
    class Hasty(CrashMachine):  # type: ignore[misc]
        ops_class = crash.HastyOps

    with pytest.raises((AssertionError, CorruptObject)):
        for seed in range(20):
            crash_everywhere(Hasty, make_room_before_it_is_needed, seed)


def test_removing_before_the_other_is_there_is_caught() -> None:
    class Impatient(CrashMachine):  # type: ignore[misc]
        tier_class = crash.ImpatientTier

    with pytest.raises((AssertionError, CorruptObject)):
        for seed in range(20):
            crash_everywhere(Impatient, write_more_rows, seed)


@pytest.mark.parametrize("seed", range(24))
def test_half_a_replacement_does_not_cost_what_it_was_to_replace(seed: int) -> None:
    """A whole, later write of an object may stand in: the key says what both hold. A torn one may not."""
    machine = CrashMachine()
    machine.start()
    try:
        machine.put(1, 0, crash.LENGTHS[2])
        machine.leave_half_done(0)
        machine.lose_the_index_in_a_crash(seed)
        assert machine.allowed[0] != {None}
    finally:
        machine.teardown()
