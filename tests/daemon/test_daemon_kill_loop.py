"""kill -9 of the daemon's processes again and again while a worker parks, restores and forgets."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvtier.client.client import Client
from kvtier.errors import DaemonNotFound
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import Bench, LocalWorker, status, until

VICTIMS = [("node",), ("disk",), ("gpu",), ("node", "disk"), ("node", "disk", "gpu")]
CHATS = 12
LONGEST = 320
PAGES = pages_for(LONGEST)


@dataclass
class Load:
    """A worker's turns, and what the daemon promised. Conversations that were forgotten get a new number.

    kept: tokens that are on disk for sure.  gone: conversations that can come back no more.
    """

    local: LocalWorker
    client: Client
    draw: random.Random
    kept: dict[int, int] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    turns: int = 0
    fresh: int = CHATS
    names: list[int] = field(default_factory=lambda: list(range(CHATS)))
    stop: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.turn()
                self.turns += 1
        except BaseException as error:
            self.failure = error
            raise

    def turn(self) -> None:
        place = self.draw.randrange(CHATS)
        seed = self.names[place]
        action = self.draw.random()
        if action < 0.15 and seed in self.lengths:
            self.forget(place, seed)
        elif action < 0.4:
            # Whatever the receipt says is there is compared with what was parked.
            self.local.restore(seed, PAGES, max(self.lengths.get(seed, 0), 1), deadline_s=2.0)
        else:
            self.park(seed)

    def park(self, seed: int) -> None:
        count = min(self.lengths.get(seed, 0) + self.draw.randint(1, 80), LONGEST)
        self.lengths[seed] = max(count, self.lengths.get(seed, 0))
        receipt = self.local.park(seed, PAGES, count, level="disk", timeout_s=5.0).result()
        if receipt.level == "disk":
            self.kept[seed] = max(self.kept.get(seed, 0), receipt.tokens)

    def forget(self, place: int, seed: int) -> None:
        kept = self.kept.pop(seed, None)
        try:
            receipt = self.client.forget(f"chat-{seed}", timeout_s=5.0)
            if receipt.durable and receipt.found:
                self.gone[seed] = kept or self.lengths[seed]
        except DaemonNotFound:
            # It may be forgotten, or not: nothing was promised.
            pass
        self.names[place] = self.fresh
        self.fresh += 1

    def check(self) -> None:
        """With a daemon that is whole again: every promise holds."""
        for seed, count in self.kept.items():
            receipt = self.local.restore(seed, PAGES, count)
            assert receipt.tokens == count, f"chat {seed}: {receipt} instead of {count} tokens"
        for seed, count in self.gone.items():
            assert self.local.restore(seed, PAGES, count).tokens == 0, f"chat {seed} was forgotten"


def kill_while_it_works(bench: Bench, load: Load, victims: tuple[str, ...]) -> None:
    load.stop.clear()
    thread = threading.Thread(target=load.run)
    thread.start()
    try:
        wanted = load.turns + load.draw.randint(2, 10)
        until(lambda: load.turns >= wanted or load.failure, "the worker has turns")
        for victim in victims:
            bench.kill(victim)
        wanted = load.turns + load.draw.randint(0, 3)
        until(lambda: load.turns >= wanted or load.failure, "turns go on, with misses")
        bench.services.start_all()
        until(lambda: (report := status(bench.client)) is not None and report.ready, "the node is ready")
        until(lambda: load.local.worker.attached, "the worker has attached again")
    finally:
        load.stop.set()
        thread.join()
    assert load.failure is None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cycles", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_no_promise_is_broken_by_kill_9_under_load(
    make_bench: Callable[..., Bench],
    make_local: Callable[..., LocalWorker],
    cycles: int,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("seeds", f"0 to {cycles - 1}")
    bench = make_bench(disk__capacity_bytes=64 << 20)
    load = Load(make_local(bench.services.socket_path), bench.client, random.Random(0))
    promises = 0
    for cycle in range(cycles):
        load.draw.seed(cycle)
        kill_while_it_works(bench, load, VICTIMS[cycle % len(VICTIMS)] if cycle else VICTIMS[-1])
        load.check()
        promises += len(load.kept) + len(load.gone)
    assert promises > cycles
