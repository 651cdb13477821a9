"""Mode 'shared': the GPU service maps the worker's pool and copies by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import Bench, forget_all, host, until

TOKENS = 190
PAGES = pages_for(TOKENS)
MORE_PAGES = pages_for(TOKENS, 16)


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench(mode="shared")


@pytest.fixture(autouse=True)
def healed(bench: Bench) -> Iterator[None]:
    yield
    bench.open_gates()
    bench.recover()
    forget_all(bench.client)


def mapped_pools(bench: Bench) -> int:
    """How many mappings of a worker's pool the GPU service's process has."""
    maps = Path(f"/proc/{bench.services.pid('gpu')}/maps").read_text()
    return sum("kvtier-pool" in line for line in maps.splitlines())


def held_pools(bench: Bench) -> int:
    """How many descriptors of pools the node's and the GPU service's processes have."""
    found = 0
    for name in ("node", "gpu"):
        for entry in Path(f"/proc/{bench.services.pid(name)}/fd").iterdir():
            found += "kvtier-pool" in str(entry.readlink())
    return found


def restored(bench: Bench, seed: int, pages: list[int]) -> dict[str, Any]:
    """Restore, and compare what is said to be there."""
    found = bench.worker.restore(seed, pages, TOKENS)
    receipt = bench.worker.result(found["handle"])
    seen = bench.worker.look(seed, pages, TOKENS)
    assert seen["front"] >= receipt["tokens"], (receipt, seen)
    assert seen["strange"] == 0
    return receipt


def parked(bench: Bench, seed: int, pages: list[int]) -> dict[str, Any]:
    return bench.worker.result(bench.worker.park(seed, pages, TOKENS, level="disk"))


def test_park_and_restore(bench: Bench) -> None:
    receipt = parked(bench, 1, PAGES)
    assert (receipt["level"], receipt["released"]) == ("disk", True)
    assert restored(bench, 1, MORE_PAGES)["sources"] == {"host": TOKENS}
    bench.push_out(1)
    assert restored(bench, 1, MORE_PAGES)["sources"] == {"disk": TOKENS}


def test_a_worker_that_is_gone_has_no_pool_here(bench: Bench) -> None:
    assert parked(bench, 1, PAGES)["ok"]
    assert restored(bench, 1, MORE_PAGES)["tokens"] == TOKENS
    assert mapped_pools(bench) == 1
    bench.kill("worker")
    until(lambda: mapped_pools(bench) == 0, "the pool is unmapped")
    until(lambda: held_pools(bench) == 0, "nobody holds the pool's descriptor")


def test_a_pool_is_let_go_also_when_the_gpu_service_is_away(bench: Bench) -> None:
    assert bench.worker.do("attached")
    until(lambda: mapped_pools(bench) == 1, "the pool is mapped")
    assert held_pools(bench) > 1
    bench.kill("gpu")
    bench.kill("worker")
    bench.services.start("gpu")
    until(lambda: held_pools(bench) == 0, "nobody holds the pool's descriptor")


@pytest.mark.parametrize("what", ["park", "restore"])
def test_the_worker_is_killed_in_the_middle_of_a_copy(bench: Bench, what: str) -> None:
    if what == "restore":
        assert parked(bench, 1, PAGES)["ok"]
    gate = bench.gate("copy")
    gate.shut(after=1)
    if what == "park":
        bench.worker.park(1, PAGES, TOKENS)
    else:
        bench.worker.restore(1, PAGES, TOKENS)
    gate.wait_held()
    bench.kill("worker")
    # The copy runs on here: neither its slots nor its pool may go.
    until(lambda: not bench.client.status().workers, "the node knows")
    assert mapped_pools(bench) == 1
    assert host(bench.client).used_bytes > 0
    gate.open()
    until(lambda: mapped_pools(bench) == 0, "the pool is unmapped")
    until(lambda: host(bench.client).limbo_bytes == 0, "the slots are free")
    found = restored(bench, 1, PAGES)
    assert found["tokens"] == (TOKENS if what == "restore" else 0)
    assert parked(bench, 1, PAGES)["ok"]


def test_the_gpu_service_is_killed_in_the_middle_of_a_park(bench: Bench) -> None:
    gate = bench.gate("copy")
    gate.shut(after=1)
    handle = bench.worker.park(1, PAGES, TOKENS)
    gate.wait_held()
    bench.kill("gpu")
    receipt = bench.worker.result(handle)
    assert (receipt["level"], receipt["reason"]) == ("none", "copy_failed")
    until(lambda: bench.worker.do("released", handle=handle), "its end has proven the pages quiet")
    gate.open()
    bench.recover()
    assert restored(bench, 1, PAGES)["tokens"] == 0
    assert parked(bench, 1, PAGES)["ok"]


def test_the_gpu_service_is_killed_in_the_middle_of_a_restore(bench: Bench) -> None:
    assert parked(bench, 1, PAGES)["ok"]
    gate = bench.gate("copy")
    gate.shut(after=1)
    found = bench.worker.restore(1, MORE_PAGES, TOKENS)
    gate.wait_held()
    bench.kill("gpu")
    receipt = bench.worker.result(found["handle"])
    assert (receipt["tokens"], receipt["reason"]) == (0, "copy_failed")
    assert set(receipt["busy"]) <= set(MORE_PAGES)
    gate.open()
    bench.recover()
    assert restored(bench, 1, PAGES)["tokens"] == TOKENS


def test_a_restore_that_is_late_names_its_pages_busy(bench: Bench) -> None:
    """The GPU service hangs in the middle of a copy: nobody can say when it will write to these pages."""
    assert parked(bench, 1, PAGES)["ok"]
    gate = bench.gate("copy")
    gate.shut(after=1)
    bench.worker.do("poison", pages=MORE_PAGES)
    found = bench.worker.do("restore", seed=1, pages=MORE_PAGES, count=TOKENS, deadline_s=1.0)
    gate.wait_held()
    receipt = bench.worker.result(found["handle"])
    assert (receipt["tokens"], receipt["reason"]) == (0, "deadline")
    assert set(receipt["busy"]) == set(MORE_PAGES)
    gate.open()
    assert restored(bench, 1, PAGES)["tokens"] == TOKENS
