"""The loop that services run in, and the thread around it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from kvtier.daemon.loop import Loop, LoopThread
from kvtier.testing.node_bench import until


class Kit:
    """A running loop that counts its ticks."""

    def __init__(self) -> None:
        self.ticks = 0
        self.cleaned: list[str] = []
        self.loop = Loop(0.001, self.tick)
        self.thread = LoopThread(self.loop, "test-loop", lambda: self.cleaned.append("cleaned"))

    def tick(self) -> None:
        self.ticks += 1

    def do(self, *work: Callable[[], None]) -> None:
        """Have the loop's thread do it, and wait."""
        done = threading.Event()
        for call in (*work, done.set):
            self.loop.call(call)
        assert done.wait(10)


@pytest.fixture
def kit() -> Iterator[Kit]:
    made = Kit()
    made.thread.start()
    yield made
    made.thread.stop(10)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_ticks_come_also_when_calls_never_pause(kit: Kit) -> None:
    stop = threading.Event()

    def again() -> None:
        if not stop.is_set():
            kit.loop.call(again)

    kit.loop.call(again)
    before = kit.ticks
    until(lambda: kit.ticks > before + 3, "it has ticked")
    stop.set()


def test_calls_are_done_in_order_in_the_loops_thread(kit: Kit) -> None:
    seen: list[tuple[int, str]] = []
    for n in range(100):
        kit.loop.call(lambda n=n: seen.append((n, threading.current_thread().name)))  # type: ignore[misc]
    kit.do(lambda: None)
    assert seen == [(n, "test-loop") for n in range(100)]


def test_a_descriptor_that_was_ended_in_the_same_round_is_not_called(kit: Kit) -> None:
    pairs = [os.pipe() for _ in range(2)]
    called: list[int] = []

    def heard(n: int) -> None:
        called.append(n)
        for reader, _ in pairs:
            kit.loop.unwatch(reader)

    def both_at_once() -> None:
        for n, (reader, writer) in enumerate(pairs):
            os.write(writer, b"x")
            kit.loop.watch(reader, lambda n=n: heard(n))  # type: ignore[misc]

    kit.do(both_at_once)
    until(lambda: called, "one was heard")
    kit.do(lambda: None)
    assert len(called) == 1
    for reader, writer in pairs:
        os.close(reader)
        os.close(writer)


def test_what_came_for_a_closed_descriptor_is_not_told_to_the_next_of_its_number(kit: Kit) -> None:
    pairs = [os.pipe(), os.pipe()]
    silent = os.pipe()
    called: list[str] = []

    def heard(mine: int, other: int) -> None:
        called.append("heard")
        for reader in (mine, other):
            kit.loop.unwatch(reader)
        os.dup2(silent[0], other)
        kit.loop.watch(other, lambda: called.append("told"))

    def both_at_once() -> None:
        (first, first_writer), (second, second_writer) = pairs
        for writer in (first_writer, second_writer):
            os.write(writer, b"x")
        kit.loop.watch(first, lambda: heard(first, second))
        kit.loop.watch(second, lambda: heard(second, first))

    kit.do(both_at_once)
    until(lambda: called, "one was heard")
    kit.do(lambda: None)
    kit.do(lambda: None)
    assert called == ["heard"]
    for fd in (*pairs[0], *pairs[1], *silent):
        os.close(fd)


def test_writable_is_told_only_while_wanted(kit: Kit) -> None:
    reader, writer = os.pipe()
    told = threading.Event()

    def ready() -> None:
        kit.loop.watch_for(writer, readable=True, writable=False)
        told.set()

    kit.do(
        lambda: kit.loop.watch(writer, ready),
        lambda: kit.loop.watch_for(writer, readable=True, writable=True),
    )
    assert told.wait(10)
    kit.do(lambda: kit.loop.unwatch(writer))
    os.close(reader)
    os.close(writer)


def test_its_end_cleans_up_and_gives_the_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    kit = Kit()
    kit.thread.start()
    assert not kit.thread.wait(0)
    assert kit.thread.stop(10)
    assert kit.cleaned == ["cleaned"]
    assert len(os.listdir("/proc/self/fd")) == before
    kit.loop.call(lambda: kit.cleaned.append("too late"))
    assert kit.thread.stop(10)
    assert kit.cleaned == ["cleaned"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_callback_raises_ends_the_loop_and_is_kept() -> None:
    kit = Kit()
    kit.thread.start()
    kit.loop.call(lambda: os.close(-1))
    assert kit.thread.wait(10)
    assert isinstance(kit.thread.failure, OSError)
    assert kit.cleaned == ["cleaned"]
