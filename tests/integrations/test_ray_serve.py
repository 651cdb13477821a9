"""The request router for Ray Serve: replicas are stand-ins, the daemon it asks is real."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve.request_router", reason="needs ray[serve]")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import PendingRequest

from kvtier.client.client import Client, connect
from kvtier.daemon.embedded import Embedded
from kvtier.integrations.ray_serve import NODE, StickyRouter, replica_metadata, sticky
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for
from kvtier.testing.node_bench import SETTINGS, LocalWorker

TOKENS = 190
# Nothing is waited for here that does not answer; a busy machine must not look like that.
PATIENT_S = 20.0


@pytest.fixture(scope="module")
def daemon() -> Iterator[Embedded]:
    daemon = Embedded({**SETTINGS, "node.name": "node-b"})
    daemon.start()
    kv = KvMemory(64)
    with connect(daemon.socket_path) as client, client.attach(kv.model, kv.pool, shard=SHARD) as worker:
        assert LocalWorker(kv, worker).park(1, pages_for(TOKENS), TOKENS).result().level == "host"
        yield daemon
    daemon.close()


def replica(name: str, node: str | None) -> Any:
    return SimpleNamespace(name=name, replica_metadata={} if node is None else {NODE: node})


REPLICAS = [replica("a1", "node-a"), replica("b1", "node-b"), replica("b2", "node-b"), replica("x", None)]


def make(path: str, *, deadline_s: float = PATIENT_S, **options: Any) -> StickyRouter:
    configured = sticky(socket=path, deadline_s=deadline_s, **options)
    router = StickyRouter(DeploymentID(name="Chat", app_name="app"), DeploymentHandleSource.REPLICA)
    router.initialize_state(**configured.request_router_kwargs)
    return router


def choose(router: StickyRouter, session: str | None, replicas: list[Any] = REPLICAS) -> list[list[str]]:
    async def run() -> list[list[Any]]:
        if session is None:
            return await router.choose_replicas(replicas, None)
        request = PendingRequest([], {}, SimpleNamespace(session_id=session))
        groups = await router.choose_replicas(replicas, request)
        assert request.routing_context.should_backoff
        return groups

    return [[one.name for one in group] for group in asyncio.run(run())]


def test_the_replicas_of_the_conversation_s_node_come_first_then_any_two(daemon: Embedded) -> None:
    first, last = choose(make(daemon.socket_path), "chat-1")
    assert first == ["b1", "b2"]
    assert len(set(last)) == 2


@pytest.mark.parametrize("session", ["", "chat-2", "x" * 2000, None])
def test_without_a_known_conversation_two_replicas_are_drawn(daemon: Embedded, session: str | None) -> None:
    ((one, other),) = choose(make(daemon.socket_path), session)
    assert one != other


def test_a_program_that_seeds_the_common_random_numbers_neither_draws_them_nor_is_drawn_from() -> None:
    many = [replica(f"r{number}", None) for number in range(100)]
    router = make("")
    random.seed(7)
    state = random.getstate()
    drawn = [tuple(choose(router, None, many)[0]) for _ in range(8)]
    assert random.getstate() == state
    assert len(set(drawn)) > 1


def test_another_tenant_s_conversation_is_not_found(daemon: Embedded) -> None:
    assert len(choose(make(daemon.socket_path, tenant="another"), "chat-1")) == 1


def test_a_node_without_replicas_leaves_no_empty_group(daemon: Embedded) -> None:
    assert choose(make(daemon.socket_path), "chat-1", REPLICAS[:1]) == [["a1"]]
    assert choose(make(daemon.socket_path), "chat-1", []) == []


def test_nodes_are_tried_in_the_order_of_the_answer(
    daemon: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Client,
        "locate",
        lambda self, name, tenant: [("node-c", 9, 0.1), ("node-b", 5, 0.2), ("node-a", 0, 0.9)],
    )
    assert choose(make(daemon.socket_path), "chat-1")[:-1] == [["b1", "b2"], ["a1"]]


@pytest.mark.parametrize("deadline_s", [0.0, PATIENT_S])
def test_without_an_answer_any_two_replicas_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, deadline_s: float
) -> None:
    router = make(str(tmp_path / "node.sock"), deadline_s=deadline_s)
    for _ in range(3):
        assert len(choose(router, "chat-1")) == 1
    assert sum("any replica" in record.message for record in caplog.records) == 1


def test_a_replica_says_on_which_node_it_runs(daemon: Embedded) -> None:
    with connect(daemon.socket_path) as client:
        assert replica_metadata(client) == {NODE: "node-b"}


def test_serve_finds_the_router_by_its_path(daemon: Embedded) -> None:
    config = sticky(socket=daemon.socket_path)
    found: Callable[..., Any] = config.get_request_router_class()
    assert found is StickyRouter
