"""kill -9 of each service, of the worker and of everything, in the middle of a park and of a restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import Bench, forget_all, until

KEPT, NEW = 1, 2
TOKENS = 190
PAGES = pages_for(TOKENS)
MORE_PAGES = pages_for(TOKENS, 16)
VICTIMS = ("node", "gpu", "disk", "worker", "all")
# What the worker is told, by what was killed; "" is success. The worker itself is told nothing.
PARK_REASONS = {
    ("gather", "node"): "daemon_unavailable",
    ("gather", "gpu"): "copy_failed",
    ("gather", "disk"): "no_disk",
    ("write", "node"): "daemon_unavailable",
    ("write", "gpu"): "",
    ("write", "disk"): "no_disk",
}
RESTORE_REASONS = {
    ("read", "node"): "daemon_unavailable",
    ("read", "gpu"): "copy_failed",
    ("read", "disk"): "disk_error",
    ("scatter", "node"): "daemon_unavailable",
    ("scatter", "gpu"): "copy_failed",
    ("scatter", "disk"): "",
}
GATE_OF = {"gather": "copy", "write": "write", "read": "read", "scatter": "copy"}


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture(autouse=True)
def healed(bench: Bench) -> Iterator[None]:
    """One conversation is promised to be on disk before each test; nothing is left after it."""
    receipt = bench.worker.result(bench.worker.park(KEPT, PAGES, TOKENS, level="disk"))
    assert receipt["ok"], receipt
    yield
    bench.open_gates()
    bench.recover()
    forget_all(bench.client)


def restored(bench: Bench, seed: int, pages: list[int]) -> dict[str, Any]:
    """Restore; what is said to be there is right, and nobody else's bytes are in the pages."""
    found = bench.worker.restore(seed, pages, TOKENS)
    receipt = bench.worker.result(found["handle"])
    seen = bench.worker.look(seed, pages, TOKENS)
    assert seen["front"] >= receipt["tokens"], (receipt, seen)
    assert seen["strange"] == 0
    return receipt


def goes_on(bench: Bench) -> None:
    """After the loss: what was promised is there, the next park works, memory comes back."""
    bench.recover()
    assert restored(bench, KEPT, PAGES)["tokens"] == TOKENS
    # Of what was lost in the middle there is nothing, or a right front.
    restored(bench, NEW, MORE_PAGES)
    receipt = bench.worker.result(bench.worker.park(NEW, MORE_PAGES, TOKENS, level="disk"))
    assert receipt["ok"], receipt
    assert restored(bench, NEW, MORE_PAGES)["tokens"] == TOKENS
    forget_all(bench.client)
    assert restored(bench, KEPT, PAGES)["tokens"] == 0


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("phase", ["gather", "write"])
def test_a_kill_in_the_middle_of_a_park(bench: Bench, phase: str, victim: str) -> None:
    gate = bench.gate(GATE_OF[phase])
    gate.shut(after=1)
    handle = bench.worker.park(NEW, MORE_PAGES, TOKENS, level="disk")
    gate.wait_held()
    if phase == "gather":
        assert not bench.worker.do("released", handle=handle)
    else:
        # Writing begins with the first objects that are there; the gather is to be over.
        until(lambda: bench.worker.do("released", handle=handle), "all is in host memory")
    bench.kill(victim)
    if phase == "gather" and victim in ("node", "gpu"):
        assert not bench.worker.do("released", handle=handle), "a gather still reads these pages"
    gate.open()
    if victim not in ("worker", "all"):
        receipt = bench.worker.result(handle)
        assert receipt["reason"] == PARK_REASONS[phase, victim], receipt
        assert receipt["ok"] is (receipt["reason"] == "")
        assert receipt["released"]
    goes_on(bench)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("phase", ["read", "scatter"])
def test_a_kill_in_the_middle_of_a_restore(bench: Bench, phase: str, victim: str) -> None:
    if phase == "read":
        bench.push_out(KEPT)
    gate = bench.gate(GATE_OF[phase])
    gate.shut(after=1)
    found = bench.worker.restore(KEPT, PAGES, TOKENS)
    assert found["tokens"] == TOKENS
    gate.wait_held()
    bench.kill(victim)
    gate.open()
    if victim not in ("worker", "all"):
        receipt = bench.worker.result(found["handle"])
        assert receipt["reason"] == RESTORE_REASONS[phase, victim], receipt
        assert receipt["ok"] is (receipt["reason"] == "")
        assert not receipt["busy"]
        seen = bench.worker.look(KEPT, PAGES, TOKENS)
        assert seen["front"] >= receipt["tokens"]
        assert seen["strange"] == 0
    goes_on(bench)


def test_everything_that_was_promised_survives_the_loss_of_everything(bench: Bench) -> None:
    seeds = range(10, 20)
    for seed in seeds:
        assert bench.worker.result(bench.worker.park(seed, PAGES, TOKENS, level="disk"))["level"] == "disk"
    bench.kill("all")
    bench.recover()
    until(lambda: len(list(bench.client.conversations())) == len(seeds) + 1, "all are known again")
    for seed in (KEPT, *seeds):
        assert restored(bench, seed, PAGES)["sources"] == {"disk": TOKENS}


def test_what_a_park_left_when_it_failed_is_forgotten_by_its_name(bench: Bench) -> None:
    gate = bench.gate("copy")
    gate.shut(after=5)
    handle = bench.worker.park(NEW, MORE_PAGES, TOKENS, level="disk")
    gate.wait_held()
    bench.kill("gpu")
    gate.open()
    assert bench.worker.result(handle)["level"] == "none"
    bench.recover()
    receipt = bench.client.forget(f"chat-{NEW}")
    assert receipt.found
    assert receipt.erased_objects > 0
    forget_all(bench.client)
    until(lambda: disk_objects(bench) == 0, "nothing of it is on disk")


def disk_objects(bench: Bench) -> int:
    return next(tier.objects for tier in bench.client.status().tiers if tier.name == "disk")
