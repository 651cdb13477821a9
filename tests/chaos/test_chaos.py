"""Kills, stops, cuts and slow links at random, under load from several workers, with every promise held to.

The slow run takes half an hour: scripts/slow tests/chaos.  What is drawn depends on the seed alone; which
turn meets which fault, also on the machine.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos_damage import Excuses
from chaos_faults import GENTLE
from chaos_features import Features
from chaos_nodes import Broken
from chaos_run import Plan, Run

from kvtier.testing.gates import Gate

pytestmark = pytest.mark.timeout(3600)


def left_in_shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def went_well(plan: Plan, folder: Path, record_property: Callable[[str, object], None]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    record_property("seeds", str(plan.seed))
    before = left_in_shared_memory()
    seen = Run(plan, folder).go()
    record_property(f"seen {plan.seed}", json.dumps(seen))
    print(plan.features, json.dumps(seen))
    assert seen["faults"] > plan.rounds
    assert min(seen["promises held"], seen["stayed forgotten"], seen["held elsewhere"]) > plan.rounds
    assert bool(seen.get("bytes encoded")) is plan.features.coded
    assert bool(seen.get("bytes given away")) is plan.features.full
    assert left_in_shared_memory() <= before
    return seen


def test_no_promise_is_broken(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    plan = Plan(seed=16, rounds=2, round_s=12.0, features=Features.drawn(16))
    went_well(plan, tmp_path, record_property)


@pytest.mark.slow
def test_no_promise_is_broken_in_half_an_hour(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """In four parts, so that each feature is there and is not; in the last one services live on."""
    mixed: list[dict[str, Any]] = [
        {"features": Features(tls=True, coded=True, damage=True)},
        {"features": Features(damage=True, full=True, ranks=True)},
        {"features": Features(coded=True, full=True)},
        {"features": Features(tls=True, ranks=True), "kinds": GENTLE},
    ]
    for number, how in enumerate(mixed):
        plan = Plan(seed=2026 + number, rounds=3, round_s=25.0, least_s=450.0, **how)
        seen = went_well(plan, tmp_path / str(number), record_property)
        assert bool(seen.get("excused")) is plan.features.damage
    assert seen["audits of one process"] == seen["rounds"], "some have lived through all of it"


# --- what the run has to notice -----------------------------------------------------------------------------

# The first thing that is noticed ends a run: on a busy machine that takes some rounds more.
SHORT = {"rounds": 12, "round_s": 5.0, "calm": True}


def caught(run: Run) -> str:
    with pytest.raises(Broken) as error:
        run.go()
    return str(error.value)


def test_a_flipped_byte_that_nobody_checks_is_noticed(tmp_path: Path) -> None:
    settings = (("host.verify", "arrival"), ("cluster.wire_codec", "raw"))
    plan = Plan(seed=1, faults=("unchecked_flips",), settings=settings, **SHORT)  # type: ignore[arg-type]
    assert "WRONG BYTES" in caught(Run(plan, tmp_path))


def test_a_receipt_without_its_row_in_the_index_is_noticed(tmp_path: Path) -> None:
    plan = Plan(seed=2, faults=("no_index_row",), **SHORT)  # type: ignore[arg-type]
    assert "LOST" in caught(Run(plan, tmp_path))


def test_a_forgotten_conversation_that_a_peer_keeps_is_noticed(tmp_path: Path) -> None:
    plan = Plan(seed=3, faults=("erased_by_word_alone",), **SHORT)  # type: ignore[arg-type]
    assert "FORGOTTEN" in caught(Run(plan, tmp_path))


class Damaging(Run):
    """Before the audit all nodes lose their memory, and bytes of what they have on their drives."""

    def audit(self, draw: random.Random) -> None:
        for node in self._nodes.all.values():
            node.kill()
            for number in range(40):
                node.damage("flip", number)
        for node in self._nodes.all.values():
            node.heal()
        for chair in self.chairs:
            chair.heal()
        super().audit(draw)


class Unexcused(Damaging):
    """And nobody says that it was done."""

    def _excuse(self) -> None:
        for node in self._nodes.all.values():
            node.excuses = Excuses()
        super()._excuse()


@pytest.mark.slow
def test_damaged_bytes_of_a_drive_that_nobody_checks_are_noticed(tmp_path: Path) -> None:
    settings = (("host.verify", "arrival"),)
    plan = Plan(seed=5, faults=("unchecked_reads",), settings=settings, **SHORT)  # type: ignore[arg-type]
    assert "WRONG BYTES" in caught(Damaging(plan, tmp_path))


@pytest.mark.slow
def test_damage_alone_excuses_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "excused").mkdir()
    assert Damaging(Plan(seed=5, **SHORT), tmp_path / "excused").go()["excused"]  # type: ignore[arg-type]
    (tmp_path / "not").mkdir()
    assert "LOST" in caught(Unexcused(Plan(seed=5, **SHORT), tmp_path / "not"))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_rank_whose_slice_is_not_written_is_noticed(tmp_path: Path) -> None:
    plan = Plan(seed=9, faults=("one_rank_alone",), features=Features(ranks=True), **SHORT)  # type: ignore[arg-type]
    assert "LOST" in caught(Run(plan, tmp_path))


@pytest.mark.slow
def test_a_service_that_leaks_descriptors_is_noticed(tmp_path: Path) -> None:
    plan = Plan(seed=6, rounds=8, round_s=10.0, calm=True, faults=("kept_descriptors",))
    assert re.search("GROWS|descriptors open", caught(Run(plan, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "setting", "said"),
    [
        (Features(coded=True), ("cluster.wire_codec", "raw"), "NOT ENCODED"),
        (Features(full=True), ("cluster.rebalance_bytes_per_s", 0), "NOT GIVEN"),
    ],
)
def test_a_feature_that_is_an_empty_word_is_noticed(
    tmp_path: Path, features: Features, setting: tuple[str, object], said: str
) -> None:
    plan = Plan(seed=8, features=features, settings=(setting,), **SHORT)  # type: ignore[arg-type]
    assert said in caught(Run(plan, tmp_path))


class Holding(Run):
    """Before the audit a worker begins a copy that never ends."""

    def audit(self, draw: random.Random) -> None:
        assert self._plan.held is not None
        Gate(self._plan.held / "copy").shut()
        text = ((77, 100),)
        order = {"tenant": "acme", "name": "held", "level": "host", "timeout_s": 1.0}
        self.chairs[0].do("park", text=text, **order)
        super().audit(draw)


def test_a_worker_that_keeps_its_slots_for_ever_is_noticed(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    found = caught(Holding(Plan(seed=4, held=held, patience_s=6.0, **SHORT), tmp_path))  # type: ignore[arg-type]
    assert re.search(r"in limbo: .*'host'.*?limbo_bytes=[1-9]", found), found
