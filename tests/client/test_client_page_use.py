"""When pages are quiet: every order of copies, the node's words and ends of one's own."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.client.page_use import ParkUse, RestoreUse
from kvtier.receipts import ParkReceipt, Plan, RestoreReceipt


class Pages:
    def named_pages(self):
        return frozenset({(0, 3), (0, 4), (1, 3)})


def park(copies_here: bool = True) -> ParkUse:
    limit_s = time.monotonic() + 60
    return ParkUse(1, Pages(), limit_s=limit_s, copies_here=copies_here, names=("c", "t"), level="disk")


def restore(copies_here: bool = True) -> RestoreUse:
    plan = Plan("p", "c", "t", 10, ())
    return RestoreUse(1, Pages(), limit_s=time.monotonic() + 60, copies_here=copies_here, plan=plan)


DONE = ParkReceipt("c", "t", "disk", "disk", True)


class UseMachine(RuleBasedStateMachine):
    """Whatever the order, `released` is never set while a copy runs or may begin, and never taken back."""

    make = staticmethod(park)

    @initialize(copies_here=st.booleans())
    def begin(self, copies_here: bool) -> None:
        self.here = copies_here
        self.use = self.make(copies_here)
        self.running = 0
        self.may_begin = True
        self.node_spoke = False
        self.calls: list[str] = []
        self.use.when_released(lambda: self.calls.append("released"))
        self.use.when_finished(lambda: self.calls.append("finished"))

    @rule(direction=st.sampled_from(["gather", "scatter"]))
    def copy_begins(self, direction: str) -> None:
        took = self.use.admit("j", direction)
        assert took == (self.may_begin and direction == "gather")
        self.running += took

    @precondition(lambda self: self.running)
    @rule()
    def copy_ends(self) -> None:
        self.running -= 1
        self.use.copy_ended()

    @rule()
    def node_says_released(self) -> None:
        self.may_begin, self.node_spoke = False, True
        self.use.said_released()

    @rule()
    def node_says_done(self) -> None:
        self.may_begin, self.node_spoke = False, True
        self.use.said_done(DONE)

    @rule()
    def ended_here(self) -> None:
        self.may_begin = False
        self.use.end("cancelled", "")

    @rule()
    def copies_stop(self) -> None:
        self.may_begin = False
        self.use.stop_copies()

    @invariant()
    def released_only_when_quiet(self) -> None:
        if not hasattr(self, "use"):
            return
        quiet = not self.may_begin and not self.running and (self.here or self.node_spoke)
        assert self.use.released.is_set() == quiet
        assert self.calls.count("released") == self.use.released.is_set()
        if self.use.finished.is_set() and self.here:
            assert self.use.released.is_set(), "a receipt while a copy runs"


TestUseMachine = UseMachine.TestCase


def test_control_a_use_that_forgets_its_copies_is_caught():
    """Negative control: the machine's invariant fails when copies are not counted."""

    class Forgetful(ParkUse):
        def admit(self, job, direction):
            took = super().admit(job, direction)
            self._running = 0
            return took

    use = Forgetful(1, Pages(), limit_s=0, copies_here=True, names=("c", "t"), level="disk")
    use.admit("j", "gather")
    use.said_released()
    assert use.released.is_set()
    sound = park()
    sound.admit("j", "gather")
    sound.said_released()
    assert not sound.released.is_set()


def test_a_receipt_waits_for_running_copies():
    use = park()
    assert use.admit("j", "gather")
    use.said_done(DONE)
    early = use.result(0)
    assert (early.reason, early.level, early.released) == ("deadline", "none", False)
    use.copy_ended()
    assert use.result(0) == DONE


def test_a_local_end_stands_against_a_late_receipt():
    use = restore()
    use.end("deadline", "late")
    use.said_done(RestoreReceipt("c", "t", 10, 10))
    assert (use.result(0).tokens, use.result(0).reason) == (0, "deadline")


def test_a_restore_that_is_not_finished_names_its_pages():
    use = restore()
    assert use.admit("j", "scatter")
    use.end("deadline", "late")
    assert use.result(0).busy == (3, 4)
    use.copy_ended()
    assert use.result(0).busy == ()


def test_a_shared_pool_is_busy_until_the_node_says_otherwise():
    use = restore(copies_here=False)
    use.end("deadline", "late")
    assert use.finished.is_set() and use.result(0).busy == (3, 4)
    use.said_done(RestoreReceipt("c", "t", 10, 10))
    assert use.result(0).busy == () and use.result(0).tokens == 0
    parked = park(copies_here=False)
    parked.end("daemon_unavailable", "gone")
    assert parked.finished.is_set() and not parked.released.is_set() and not parked.result(0).released


@given(st.permutations(["job", "end", "copy"]))
def test_the_node_hears_once_of_every_job_whose_copies_ended(order):
    told: list[list[str]] = []
    use = park()
    assert use.admit("a", "gather")
    for step in order:
        if step == "job":
            use.begun("b", None)
        elif step == "end":
            use.end("cancelled", "", told.append)
        else:
            use.copy_ended()
    assert len(told) == 1 and "a" in told[0]
