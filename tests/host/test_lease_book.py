"""LeaseBook against a model of dictionaries, and the promises that the model does not show."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvtier.leases import LeaseBook

SLOTS = st.integers(0, 3)
HOLDERS = st.sampled_from(["a", "b", "c"])
INFINITE = float("inf")


class LeaseMachine(RuleBasedStateMachine):
    book_class = LeaseBook

    def __init__(self) -> None:
        super().__init__()
        self.book = self.book_class()
        self.active: dict[tuple[int, str], float] = {}
        self.limbo: set[tuple[int, str]] = set()
        self.now_s = 0.0

    @rule(slot_id=SLOTS, holder=HOLDERS, for_s=st.integers(1, 6))
    def lease(self, slot_id: int, holder: str, for_s: int) -> None:
        until_s = self.now_s + for_s
        self.book.lease(slot_id, holder, until_s)
        before = self.active.get((slot_id, holder), 0.0)
        self.active[slot_id, holder] = until_s if before == INFINITE else max(before, until_s)
        self.limbo.discard((slot_id, holder))

    @rule(slot_id=SLOTS, holder=HOLDERS)
    def hold(self, slot_id: int, holder: str) -> None:
        self.book.hold(slot_id, holder)
        self.active[slot_id, holder] = INFINITE
        self.limbo.discard((slot_id, holder))

    @rule(slot_id=SLOTS, holder=HOLDERS)
    def release(self, slot_id: int, holder: str) -> None:
        was_in = self.active.pop((slot_id, holder), None) is not None or (slot_id, holder) in self.limbo
        self.limbo.discard((slot_id, holder))
        assert self.book.release(slot_id, holder) == was_in

    @rule(slot_id=SLOTS)
    def withdraw(self, slot_id: int) -> None:
        self.book.withdraw(slot_id)
        for key in [key for key in self.active if key[0] == slot_id]:
            del self.active[key]
            self.limbo.add(key)

    @rule(passed_s=st.integers(0, 4))
    def expire(self, passed_s: int) -> None:
        self.now_s += passed_s
        ended = sorted((end_s, *key) for key, end_s in self.active.items() if end_s < self.now_s)
        assert self.book.expire(self.now_s) == [(slot_id, holder) for _, slot_id, holder in ended]
        for _, slot_id, holder in ended:
            del self.active[slot_id, holder]
            self.limbo.add((slot_id, holder))

    @rule(holder=HOLDERS)
    def holder_ended(self, holder: str) -> None:
        gone = {key for key in [*self.active, *self.limbo] if key[1] == holder}
        assert self.book.holder_ended(holder) == sorted(slot_id for slot_id, _ in gone)
        self.active = {key: end_s for key, end_s in self.active.items() if key not in gone}
        self.limbo -= gone

    @invariant()
    def same_as_the_model(self) -> None:
        for slot_id in range(4):
            mine = {h for s, h in self.active if s == slot_id}
            assert self.book.active(slot_id) == bool(mine)
            inside = mine | {h for s, h in self.limbo if s == slot_id}
            assert set(self.book.holders(slot_id)) == inside
            assert self.book.held(slot_id) == bool(inside)
        assert (self.book.lease_count, self.book.limbo_count) == (len(self.active), len(self.limbo))
        ends = [end_s for end_s in self.active.values() if end_s != INFINITE]
        assert self.book.next_end_s() == min(ends, default=None)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=60, stateful_step_count=40)


class ForgetsLimbo(LeaseBook):
    def expire(self, now_s: float) -> list[tuple[int, str]]:
        ended = super().expire(now_s)
        for slot_id, holder in ended:
            self.release(slot_id, holder)
        return ended


class ExpiresExtended(LeaseBook):
    def lease(self, slot_id: int, holder: str, until_s: float) -> None:
        if not self.active(slot_id):
            super().lease(slot_id, holder, until_s)


@pytest.mark.parametrize("broken", [ForgetsLimbo, ExpiresExtended])
def test_the_machine_catches_a_broken_book(broken: type[LeaseBook]) -> None:
    machine = type("Broken", (LeaseMachine,), {"book_class": broken})
    quick = settings(max_examples=3000, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=quick)


def test_the_end_is_the_last_moment_of_the_right() -> None:
    book = LeaseBook()
    book.lease(1, "a", 10.0)
    assert book.expire(10.0) == []
    assert book.expire(10.001) == [(1, "a")]


def test_a_shorter_lease_changes_nothing() -> None:
    book = LeaseBook()
    book.lease(1, "a", 10.0)
    book.lease(1, "a", 5.0)
    assert book.expire(9.0) == []


def test_a_lease_puts_an_end_to_a_hold() -> None:
    book = LeaseBook()
    book.hold(1, "writer")
    assert book.expire(1e12) == []
    book.lease(1, "writer", 5.0)
    assert book.expire(6.0) == [(1, "writer")]


def test_endless_extensions_keep_the_book_small() -> None:
    book = LeaseBook()
    for turn in range(10_000):
        book.lease(turn % 8, "a", float(turn + 1))
    assert len(book._heap) < 200
    assert len(book.expire(1e9)) == 8


def test_ends_come_in_the_order_of_time() -> None:
    book = LeaseBook()
    for slot_id, end_s in [(3, 5.0), (1, 7.0), (2, 5.0)]:
        book.lease(slot_id, "a", end_s)
    assert book.expire(8.0) == [(2, "a"), (3, "a"), (1, "a")]
