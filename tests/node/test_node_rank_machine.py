"""The state machine of ranks among troubles: as it is, and with the core broken on purpose."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.node import plans
from kvtier.node.coverage import longest
from kvtier.node.park_acts import ParkActs
from kvtier.node.park_writes import ParkWrites
from kvtier.node.restore_acts import RestoreActs
from kvtier.testing.machine_settings import CONTROL, LONG, QUICK
from kvtier.testing.rank_machine import RankMachine

pytestmark = pytest.mark.timeout(600)

TestRanks = RankMachine.TestCase
TestRanks.settings = settings(QUICK, max_examples=150)


@pytest.mark.slow
@pytest.mark.timeout(7200)
class TestRanksLong(RankMachine.TestCase):
    settings = LONG


def say_whole_without_a_slice(patch):
    def ready(self, job):
        if job.act is not None:
            job.act.whole = True

    patch.setattr(ParkActs, "ready", ready)


def plan_from_what_one_rank_has(patch):
    def of_the_first(blocks, slices, source_of, at_most):
        shard, geometry = next(iter(slices.items()))
        return longest(blocks, geometry, shard, source_of, at_most) if geometry is not None else []

    patch.setattr(plans, "covered", of_the_first)


def answer_each_rank_by_itself(patch):
    def receipts(self, job):
        if job.held.shared is not None:
            fellows = self._jobs[job.held.shared.plan_id]
            fellows.remove(job)
            if not fellows:
                del self._jobs[job.held.shared.plan_id]
        return [(job, self._ends.receipt(job, self._ends.in_place(job, job.held.plan.load_tokens)))]

    patch.setattr(RestoreActs, "receipts", receipts)


def say_the_most_of_all_ranks(patch):
    def most(self, jobs):
        return max(self._ends.in_place(one, one.held.plan.load_tokens) for one in jobs)

    patch.setattr(RestoreActs, "_common", most)


def count_only_those_who_asked_for_disk(patch):
    def may_record(self, job):
        act = job.act
        if act is None:
            return True
        asked = [one for one in act.jobs if one.ready and one.message.level == "disk"]
        if act.recording or not all(one.durable for one in asked):
            return False
        act.recording = True
        return True

    patch.setattr(ParkWrites, "_may_record", may_record)


CONTROLS = {
    say_whole_without_a_slice: "is said to be",
    plan_from_what_one_rank_has: "a plan of",
    answer_each_rank_by_itself: "ranks were told|are said to be there",
    say_the_most_of_all_ranks: "are wrong",
    count_only_those_who_asked_for_disk: "is said to be|was promised",
}


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_the_machine_notices(control, monkeypatch):
    control(monkeypatch)
    with pytest.raises(AssertionError, match=CONTROLS[control]):
        run_state_machine_as_test(RankMachine, settings=CONTROL)
