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

import pytest
from chaos_nodes import Broken
from chaos_run import Plan, Run

from kvtier.testing.gates import Gate

pytestmark = pytest.mark.timeout(3600)


def left_in_shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(seed=7, rounds=3, round_s=12.0), id="slice"),
        pytest.param(
            Plan(seed=2026, rounds=10, round_s=25.0, least_s=1800.0), id="long", marks=pytest.mark.slow
        ),
    ],
)
def test_no_promise_is_broken(
    plan: Plan, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("seeds", str(plan.seed))
    before = left_in_shared_memory()
    seen = Run(plan, tmp_path).go()
    record_property("seen", json.dumps(seen))
    print(json.dumps(seen))
    assert seen["faults"] > plan.rounds
    assert min(seen["promises held"], seen["stayed forgotten"], seen["held elsewhere"]) > plan.rounds
    assert left_in_shared_memory() <= before


# --- what the run has to notice -----------------------------------------------------------------------------

SHORT = {"rounds": 3, "round_s": 5.0, "calm": True}


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
