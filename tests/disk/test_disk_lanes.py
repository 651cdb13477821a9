"""Transfers in parts, and the lanes that carry them out, without a drive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.checksum import PIECE_BYTES
from kvtier.disk.transfers import Lane, Transfer, part_bytes
from kvtier.errors import TierUnavailable
from kvtier.waiting import wait_until

MiB = 1 << 20
STEP = 2 * MiB
PATIENCE_S = 20.0


@given(st.integers(0, 1 << 40), st.integers(1, 64))
def test_a_part_is_whole_pieces_of_bounded_length(left_bytes: int, threads: int) -> None:
    step = part_bytes(left_bytes, threads)
    assert step % PIECE_BYTES == 0
    assert STEP <= step <= 32 * MiB
    assert step * threads >= min(left_bytes, threads * 32 * MiB)


@given(st.integers(0, 200 * MiB), st.lists(st.integers(1, 128), min_size=1), st.booleans())
def test_parts_of_any_length_cover_a_block_once(nbytes: int, pieces: list[int], whole: bool) -> None:
    transfer = Transfer(nbytes, lambda at, end: None, lambda problem: problem, whole=whole)
    taken: list[tuple[int, int]] = []
    while (part := transfer.take(pieces[len(taken) % len(pieces)] * PIECE_BYTES)) is not None:
        taken.append(part)
    assert taken[0][0] == 0
    assert taken[-1][1] == nbytes
    assert all(before[1] == after[0] for before, after in pairwise(taken))
    assert all(at % PIECE_BYTES == 0 for at, _ in taken)
    assert not whole or len(taken) == 1


@given(st.lists(st.integers(0, 100 * MiB), max_size=12), st.integers(1, 4))
def test_a_lane_carries_out_all_of_every_block(lengths: list[int], threads: int) -> None:
    moved: list[tuple[int, int, int]] = []
    ended: list[int] = []

    def transfer(number: int) -> Transfer:
        def end(problem: BaseException | None) -> None:
            assert problem is None
            ended.append(number)

        return Transfer(lengths[number], lambda at, end: moved.append((number, at, end)), end)

    lane = Lane(threads, "test")
    futures = lane.submit([transfer(number) for number in range(len(lengths))])
    lane.close()
    assert all(future.done() for future in futures)
    assert sorted(ended) == list(range(len(lengths)))
    for number, nbytes in enumerate(lengths):
        parts = sorted((at, end) for of, at, end in moved if of == number)
        assert parts[0][0] == 0
        assert parts[-1][1] == nbytes
        assert all(before[1] == after[0] for before, after in pairwise(parts))


def test_parts_become_shorter_towards_the_end() -> None:
    lengths = []

    def note(at: int, end: int) -> None:
        lengths.append(end - at)

    lane = Lane(1, "test")
    lane.submit([Transfer(80 * MiB, note, lambda problem: problem) for _ in range(2)])
    lane.close()
    lane = Lane(4, "test")
    lane.submit([Transfer(32 * MiB, note, lambda problem: problem)])
    lane.close()
    assert lengths[:6] == [32 * MiB, 32 * MiB, 16 * MiB] * 2
    assert max(lengths[6:]) == 8 * MiB
    assert min(lengths[6:]) <= STEP


def test_what_was_read_is_checked_while_its_reader_reads_on() -> None:
    """And a block has not ended before its last check has."""
    go, read_on = threading.Event(), threading.Event()
    checked: list[int] = []

    def part(at: int, end: int) -> Callable[[], None]:
        if at:
            read_on.set()
        return partial(check, at)

    def check(at: int) -> None:
        assert go.wait(PATIENCE_S)
        checked.append(at)

    with ThreadPoolExecutor(1) as checks:
        lane = Lane(1, "test", checks)
        (future,) = lane.submit([Transfer(80 * MiB, part, lambda problem: problem)])
        assert read_on.wait(PATIENCE_S), "the only reader waited for the first check"
        lane.close()
        assert not future.done()
        go.set()
        future.result(PATIENCE_S)
    assert sorted(checked) == [0, 32 * MiB, 64 * MiB]


@pytest.mark.parametrize("where", ["part", "check"])
def test_a_problem_ends_its_block_and_no_other(where: str) -> None:
    def bad() -> None:
        raise OSError(where)

    def part(at: int, end: int) -> Callable[[], None]:
        if where == "part":
            bad()
        return bad

    with ThreadPoolExecutor(1) as checks:
        lane = Lane(1, "test", checks)
        made = [Transfer(3 * MiB, part, lambda problem: problem) for _ in range(3)]
        good = Transfer(3 * MiB, lambda at, end: None, lambda problem: problem)
        futures = lane.submit([*made, good])
        lane.close()
    assert [str(future.exception(PATIENCE_S)) for future in futures[:3]] == [where] * 3
    assert futures[3].result(PATIENCE_S) is None


def test_what_comes_while_a_lane_closes_or_later_is_refused() -> None:
    go, entered = threading.Event(), threading.Event()

    def held(at: int, end: int) -> None:
        entered.set()
        assert go.wait(PATIENCE_S)

    lane, carried_out, ended = Lane(1, "test-lane"), [], []
    first = lane.submit([Transfer(0, held, lambda problem: problem)])[0]
    assert entered.wait(PATIENCE_S)

    def late(number: int) -> Transfer:
        def end(problem: BaseException | None) -> BaseException | None:
            ended.append(number)
            return problem

        return Transfer(9 * MiB, lambda at, end: carried_out.append(number), end)

    with ThreadPoolExecutor(1) as pool:
        before = lane.submit([late(0)])[0]
        closing = pool.submit(lane.close)
        assert wait_until(lambda: lane._closed, PATIENCE_S)
        assert isinstance(lane.submit([late(1)])[0].exception(PATIENCE_S), TierUnavailable)
        assert not closing.done()
        go.set()
        closing.result(PATIENCE_S)
    first.result(0)
    before.result(0)
    assert isinstance(lane.submit([late(2)])[0].exception(0), TierUnavailable)
    assert set(carried_out) == {0}, "what came before the end is carried out, and nothing else"
    assert {0, 1, 2} == set(ended), "every block is told how it ended"


def test_a_transfer_that_has_begun_cannot_be_taken_back() -> None:
    transfer = Transfer(0, lambda at, end: None, lambda problem: problem)
    assert not transfer.future.cancel()
    transfer.run()
    assert transfer.future.done()


def test_what_end_makes_of_a_problem_is_raised() -> None:
    def part(at: int, end: int) -> None:
        raise OSError("raw")

    with pytest.raises(TierUnavailable, match="of the tier"):
        Transfer(9, part, lambda problem: TierUnavailable("of the tier")).run()
