"""When a node gives to another one, and what that one takes: nothing goes back and forth."""

from hypothesis import given
from hypothesis import strategies as st

from kvtier.policy.balance import gives, pays, takes_bytes

BYTES = st.integers(0, 1 << 50)


@given(BYTES, BYTES)
def test_who_took_all_that_it_takes_gives_nothing(used: int, capacity: int) -> None:
    taken = takes_bytes(used, capacity)
    assert taken >= 0
    assert not (taken and gives(used + taken, capacity))
    assert not (taken and gives(used, capacity))


@given(BYTES, BYTES)
def test_who_gives_takes_nothing(used: int, capacity: int) -> None:
    assert not (gives(used, capacity) and takes_bytes(used, capacity))


def test_a_tier_without_bytes_neither_gives_nor_takes() -> None:
    assert not gives(0, 0) and not takes_bytes(0, 0)


def test_what_is_dropped_has_to_be_worth_two_ways() -> None:
    assert pays(0.5, 10.0, 1.0)
    assert not pays(0.5, 3.0, 1.0)
    assert not pays(0.0, 1e9, 0.001)
