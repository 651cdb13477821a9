"""Turns go round among peers."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvtier.peers.fairness import Turns
from kvtier.waiting import wait_until


def until(holds: Callable[[], bool], what: str) -> None:
    assert wait_until(holds, 10.0), what


def test_peers_take_turns_however_many_wait() -> None:
    turns = Turns(1)
    order: list[str] = []
    go = threading.Event()

    def hold() -> None:
        with turns.of("first"):
            assert go.wait(10)

    def take(peer: str) -> None:
        with turns.of(peer):
            order.append(peer)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    until(lambda: turns._free == 0, "the turn is taken")
    for count, peer in enumerate(["greedy"] * 4 + ["modest", "late"], 1):
        threads.append(threading.Thread(target=take, args=(peer,)))
        threads[-1].start()
        until(lambda n=count: sum(map(len, turns._waiting.values())) == n, "it waits")  # type: ignore[misc]
    go.set()
    for thread in threads:
        thread.join(10)
    assert order == ["greedy", "modest", "late", "greedy", "greedy", "greedy"]


def test_no_more_than_the_limit_at_once_and_a_failure_gives_its_turn_back() -> None:
    turns = Turns(3)
    lock, inside, most = threading.Lock(), 0, 0

    def take(number: int) -> None:
        nonlocal inside, most
        try:
            with turns.of(str(number % 4)):
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1
                if number % 5 == 0:
                    raise ValueError(number)
        except ValueError:
            pass

    threads = [threading.Thread(target=take, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most <= 3
    assert turns._free == 3
