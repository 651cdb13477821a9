"""Tensor-parallel ranks, each a process of its own with its own pool and page ids, and real services."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvtier.client.client import connect
from kvtier.testing.gates import Gate
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import until
from kvtier.testing.node_cluster import NodeCluster
from kvtier.testing.service_processes import ServiceProcesses, is_stopped
from kvtier.testing.worker_process import WorkerProcess
from kvtier.waiting import wait_until

TOKENS = 190
# Ranks need not use the same pages.
PAGES = [pages_for(TOKENS, 16 * rank) for rank in range(4)]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcesses]:
    folder = tmp_path_factory.mktemp("ranks")
    with ServiceProcesses(folder, {"policy.restore": "load"}) as running:
        yield running


@contextmanager
def engine(services: ServiceProcesses, folder: Path, count: int = 2) -> Iterator[list[WorkerProcess]]:
    """The ranks of one engine."""
    with ExitStack() as stack:
        for rank in range(count):
            (folder / f"gates{rank}").mkdir(exist_ok=True)
        yield [
            stack.enter_context(
                WorkerProcess(services.socket_path, folder / f"gates{rank}", rank=(rank, count))
            )
            for rank in range(count)
        ]


def park_all(ranks: list[WorkerProcess], seed: int, level: str = "disk", **how: Any) -> list[dict[str, Any]]:
    handles = [rank.park(seed, PAGES[i], TOKENS, level=level, **how) for i, rank in enumerate(ranks)]
    return [rank.result(handle) for rank, handle in zip(ranks, handles, strict=True)]


def plan_all(ranks: list[WorkerProcess], seed: int) -> list[dict[str, Any]]:
    planned = ranks[0].do("planned", seed=seed, count=TOKENS)
    return [planned, *(rank.do("join", plan_id=planned["plan_id"]) for rank in ranks[1:])]


def restore_all(ranks: list[WorkerProcess], seed: int, deadline_s: float = 20.0) -> list[dict[str, Any]]:
    plans = plan_all(ranks, seed)
    assert all(plan == plans[0] for plan in plans)
    for i, rank in enumerate(ranks):
        rank.do("poison", pages=PAGES[i])
    handles = [rank.do("go", pages=PAGES[i], deadline_s=deadline_s) for i, rank in enumerate(ranks)]
    return [rank.result(handle) for rank, handle in zip(ranks, handles, strict=True)]


def all_right(ranks: list[WorkerProcess], seed: int, tokens: int) -> bool:
    looks = [rank.look(seed, PAGES[i], TOKENS) for i, rank in enumerate(ranks)]
    return all(look["front"] >= tokens and not look["strange"] for look in looks)


def test_an_engine_that_restarts_finds_what_its_ranks_have_parked(
    services: ServiceProcesses, tmp_path: Path
) -> None:
    with engine(services, tmp_path) as ranks:
        for seed in (1, 2):
            parked = park_all(ranks, seed)
            assert [(one["level"], one["tokens"], one["reason"]) for one in parked] == [
                ("disk", TOKENS, "")
            ] * 2
    with engine(services, tmp_path) as again:
        for seed in (1, 2):
            got = restore_all(again, seed)
            assert [one["tokens"] for one in got] == [TOKENS] * 2
            assert all_right(again, seed, TOKENS)


def test_everything_dies_and_is_there_again(services: ServiceProcesses, tmp_path: Path) -> None:
    with engine(services, tmp_path) as ranks:
        assert [one["level"] for one in park_all(ranks, 3)] == ["disk", "disk"]
        services.kill_all()
    services.start_all()
    with engine(services, tmp_path) as again:
        assert [one["tokens"] for one in restore_all(again, 3)] == [TOKENS] * 2
        assert all_right(again, 3, TOKENS)


def test_workers_attach_again_as_ranks_when_the_node_was_away(
    services: ServiceProcesses, tmp_path: Path
) -> None:
    with engine(services, tmp_path) as ranks:
        assert [one["level"] for one in park_all(ranks, 4)] == ["disk", "disk"]
        services.kill_all()
        services.start_all()
        assert wait_until(lambda: all(rank.do("attached") for rank in ranks), 20.0)
        assert [one["tokens"] for one in restore_all(ranks, 4)] == [TOKENS] * 2


def test_a_rank_that_stands_still_hangs_nobody(services: ServiceProcesses, tmp_path: Path) -> None:
    with engine(services, tmp_path) as ranks:
        park_all(ranks, 5)
        planned = ranks[0].do("planned", seed=5, count=TOKENS)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert wait_until(lambda: is_stopped(ranks[1].pid), 10.0)
        try:
            handle = ranks[0].do("go", pages=PAGES[0], deadline_s=0.5)
            got = ranks[0].result(handle)
            assert (got["tokens"], got["reason"]) == (0, "shard_missing")
            waiting = ranks[0].park(6, PAGES[0], TOKENS, level="host", timeout_s=0.5)
            receipt = ranks[0].result(waiting)
            assert (receipt["level"], receipt["reason"], receipt["released"]) == (
                "none",
                "shard_missing",
                True,
            )
        finally:
            os.kill(ranks[1].pid, signal.SIGCONT)
        late = ranks[1].do("join", plan_id=planned["plan_id"])
        assert (late["plan_id"], late["reason"]) == ("", "lease_expired")


def test_a_rank_is_killed_in_the_middle_of_its_copy(services: ServiceProcesses, tmp_path: Path) -> None:
    with engine(services, tmp_path) as ranks:
        gate = Gate(tmp_path / "gates1" / "copy")
        gate.shut()
        handles = [rank.park(7, PAGES[i], TOKENS, level="disk") for i, rank in enumerate(ranks)]
        gate.wait_held()
        ranks[1].kill()
        receipt = ranks[0].result(handles[0])
        assert (receipt["level"], receipt["reason"]) == ("none", "shard_missing")
        gate.open()
    with engine(services, tmp_path) as again, connect(services.socket_path) as client:
        assert again[0].do("planned", seed=7, count=TOKENS)["tokens"] == 0
        assert [one["level"] for one in park_all(again, 7)] == ["disk", "disk"]
        assert [one["tokens"] for one in restore_all(again, 7)] == [TOKENS] * 2
        # What it left counts: only the other rank's part was stored anew.
        assert client.show("chat-7") is not None


@pytest.mark.timeout(240)
def test_four_ranks_go_on_at_another_node(tmp_path: Path) -> None:
    with NodeCluster(tmp_path / "nodes", policy__restore="load") as cluster, ExitStack() as stack:
        ranks = {}
        for name, bench in cluster.nodes.items():
            (folder := tmp_path / name).mkdir()
            ranks[name] = stack.enter_context(engine(bench.services, folder, 4))

        def known(seed: int) -> bool:
            return bool(ranks["b"][0].do("planned", seed=seed, count=TOKENS)["tokens"] == TOKENS)

        for seed, level in ((1, "host"), (2, "disk"), (3, "disk")):
            assert {one["level"] for one in park_all(ranks["a"], seed, level)} == {level}
            until(lambda seed=seed: known(seed), "the other node has heard of it")  # type: ignore[misc]
        for seed in (1, 2):
            got = restore_all(ranks["b"], seed)
            assert [(one["tokens"], one["sources"]) for one in got] == [(TOKENS, {"peer": TOKENS})] * 4
            assert all_right(ranks["b"], seed, TOKENS)
        # The next turn is parked where it went on, and is known where it began.
        assert {one["level"] for one in park_all(ranks["b"], 2)} == {"disk"}
        assert [one["tokens"] for one in restore_all(ranks["a"], 2)] == [TOKENS] * 4
        a = cluster.nodes["a"]
        plan_all(ranks["b"], 3)
        for rank, pages in zip(ranks["b"], PAGES, strict=True):
            rank.do("poison", pages=pages)
        a.services.signal("node", signal.SIGSTOP)
        handles = [r.do("go", pages=p, deadline_s=30.0) for r, p in zip(ranks["b"], PAGES, strict=True)]
        a.kill("all")
        got = [rank.result(handle) for rank, handle in zip(ranks["b"], handles, strict=True)]
        assert {(one["tokens"], one["reason"]) for one in got} == {(0, "peer_lost")}
        assert all_right(ranks["b"], 3, 0)
        a.services.start_all()
        until(lambda: known(3), "the node is back")
        assert [one["tokens"] for one in restore_all(ranks["b"], 3)] == [TOKENS] * 4
        assert all_right(ranks["b"], 3, TOKENS)
