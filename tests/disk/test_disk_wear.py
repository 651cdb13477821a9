"""The bound on a drive's bytes a day: never passed, in no window, by no crash and no clock."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvtier.disk.wear import DAY_S, SLICE_S, WearBudget

BOUND = 10_000
START_S = 1_700_000_000.0
MiB = 1 << 20


def saved_first(budget, now_s, keep):
    """As the owner does it: what must be saved is saved before the write begins."""
    if budget.must_save:
        keep(budget.to_bytes(now_s))
        budget.saved()


def write(budget, nbytes, now_s, keep=lambda state: None):
    wait_s = budget.reserve(nbytes, now_s)
    if wait_s == 0.0:
        saved_first(budget, now_s, keep)
        budget.settle(nbytes, nbytes, now_s)
    return wait_s


def test_the_bound_is_reached_and_not_passed():
    budget = WearBudget(BOUND, START_S)
    assert [write(budget, 4000, START_S + i) == 0.0 for i in range(3)] == [True, True, False]
    assert budget.left_bytes(START_S + 3) == 2000
    assert write(budget, 2000, START_S + 4) == 0.0
    assert budget.left_bytes(START_S + 5) == 0


def test_it_says_when_there_will_be_room_and_then_there_is():
    budget = WearBudget(BOUND, START_S)
    write(budget, 6000, START_S)
    write(budget, 4000, START_S + 5 * SLICE_S)
    wait_s = budget.reserve(5000, START_S + 6 * SLICE_S)
    at_s = START_S + 6 * SLICE_S + wait_s
    assert START_S + DAY_S < at_s <= START_S + DAY_S + 2 * SLICE_S
    assert budget.reserve(5000, at_s - 1.0) == pytest.approx(1.0)
    assert budget.reserve(5000, at_s) == 0.0


def test_more_than_a_day_is_never_worth_asking_for():
    assert WearBudget(BOUND, START_S).reserve(BOUND + 1, START_S) == math.inf


def test_what_is_reserved_counts_and_what_was_not_written_comes_back():
    budget = WearBudget(BOUND, START_S)
    assert budget.reserve(6000, START_S) == 0.0
    assert budget.reserve(6000, START_S) > DAY_S
    budget.settle(6000, 1000, START_S + 1)
    assert budget.used_bytes(START_S + 1) == 1000
    assert budget.reserve(6000, START_S + 1) == 0.0


def test_settling_what_was_not_reserved_is_a_mistake():
    budget = WearBudget(BOUND, START_S)
    budget.reserve(10, START_S)
    for reserved, written in ((11, 0), (10, 11), (10, -1)):
        with pytest.raises(ValueError, match="reserved"):
            budget.settle(reserved, written, START_S)


def test_a_restart_forgets_nothing():
    kept = []
    budget = WearBudget(BOUND, START_S)
    write(budget, 3000, START_S, kept.append)
    crashed = WearBudget(BOUND, START_S + 60, kept[-1])
    assert 3000 <= crashed.used_bytes(START_S + 60) <= 3000 + BOUND // 256
    closed = WearBudget(BOUND, START_S + 60, budget.to_bytes(START_S + 30, closing=True))
    assert closed.used_bytes(START_S + 60) == 3000
    assert closed.used_bytes(START_S + DAY_S) == 3000
    assert closed.used_bytes(START_S + DAY_S + 2 * SLICE_S) == 0


def test_within_the_allowance_nothing_has_to_be_saved():
    kept = []
    budget = WearBudget(256 * MiB, START_S)
    for _ in range(256):
        write(budget, MiB // 16, START_S, kept.append)
    assert len(kept) <= 17


@pytest.mark.parametrize("back_s", [1.0, 3600.0, DAY_S, 40 * 365 * DAY_S])
def test_a_clock_that_goes_back_frees_nothing_and_goes_on_from_there(back_s):
    budget = WearBudget(BOUND, START_S)
    write(budget, BOUND, START_S)
    early_s = START_S - back_s
    assert budget.left_bytes(early_s) == 0
    assert budget.left_bytes(early_s + DAY_S) == 0
    assert budget.left_bytes(early_s + DAY_S + 2 * SLICE_S) == BOUND
    reopened = WearBudget(BOUND, START_S)
    write(reopened, BOUND, START_S)
    reopened = WearBudget(BOUND, early_s, reopened.to_bytes(START_S, closing=True))
    assert reopened.left_bytes(early_s + DAY_S) == 0
    assert reopened.left_bytes(early_s + DAY_S + 2 * SLICE_S) == BOUND


def test_a_lower_bound_after_a_restart_holds():
    budget = WearBudget(BOUND, START_S)
    write(budget, 8000, START_S)
    lower = WearBudget(5000, START_S + 1, budget.to_bytes(START_S, closing=True))
    assert lower.left_bytes(START_S + 1) == 0
    assert lower.reserve(1, START_S + 1) > 0


@pytest.mark.parametrize("state", [b"\xc1", b"\x90", b"\x80", b"nonsense", b"\xa3abc"])
def test_what_is_no_saved_state_is_refused(state):
    with pytest.raises(ValueError, match="no saved count"):
        WearBudget(BOUND, START_S, state)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "begin", "end", "crash", "close", "back"]),
        st.integers(1, 4000),
        st.sampled_from([0.0, 1.0, 599.0, 600.0, 3600.0, 20_000.0, 86_000.0]),
    ),
    max_size=60,
)


def run(events, make=WearBudget):
    """(true time, bytes) of all that was written; the clock that the budget sees may go back."""
    true_s, clock_s = 0.0, START_S
    kept, written, begun = [b""], [], []
    budget = make(BOUND, clock_s)
    for what, nbytes, passed_s in events:
        if begun and passed_s >= SLICE_S:
            # No write takes as long as a slice.
            for reserved, began_s in begun:
                written.append((began_s, reserved))
                budget.settle(reserved, reserved, clock_s)
            begun.clear()
        true_s, clock_s = true_s + passed_s, clock_s + passed_s
        if what in ("write", "begin") and budget.reserve(nbytes, clock_s) == 0.0:
            saved_first(budget, clock_s, kept.append)
            begun.append((nbytes, true_s))
        if what in ("write", "end"):
            for reserved, began_s in begun:
                written.append((began_s, reserved))
                budget.settle(reserved, reserved, clock_s)
            begun.clear()
        elif what == "crash":
            written += [(began_s, reserved) for reserved, began_s in begun]
            begun.clear()
            budget = make(BOUND, clock_s, kept[-1])
        elif what == "close" and not begun:
            kept.append(budget.to_bytes(clock_s, closing=True))
            budget = make(BOUND, clock_s, kept[-1])
        elif what == "back":
            clock_s -= 5 * nbytes
            budget.left_bytes(clock_s)
    return written


def most_in_a_day(written):
    """The fullest window of 24 hours; it begins with a write."""
    return max(
        (sum(n for at_s, n in written if begin_s <= at_s < begin_s + DAY_S) for begin_s, _ in written),
        default=0,
    )


@given(EVENTS)
@settings(max_examples=400, deadline=None)
def test_no_window_of_a_day_holds_more(events):
    assert most_in_a_day(run(events)) <= BOUND


class Calendar(WearBudget):
    """The control: counts by calendar day, as one would at first."""

    def _move_to(self, now_s):
        super()._move_to(now_s)
        while self._slices and self._slices[0][0] * SLICE_S // DAY_S < self._clock_s // DAY_S:
            self._counted -= self._slices.popleft()[1]


class Forgetful(WearBudget):
    """The control: saves what was written, and nothing ahead."""

    @property
    def must_save(self):
        return False


@pytest.mark.parametrize(
    ("broken", "events"),
    [
        (Calendar, [("write", 4000, 3600.0)] * 2 + [("write", 4000, 20_000.0)] * 6),
        (Forgetful, [("write", 4000, 1.0), ("crash", 1, 1.0)] * 3),
    ],
)
def test_the_check_sees_a_budget_that_is_broken(broken, events):
    assert most_in_a_day(run(events, broken)) > BOUND
    assert most_in_a_day(run(events)) <= BOUND
