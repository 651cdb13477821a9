"""A directory service that is lost: others have its shards, and it has them again when it is back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.config.load import Config, load
from kvtier.daemon import peer_directory
from kvtier.daemon.directory_service import DirectoryService
from kvtier.directory.routing import services_of
from kvtier.testing.directory_node import Say
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import until
from kvtier.testing.node_cluster import NodeCluster, cluster_settings

NAMES = [f"chat-{number}" for number in range(24)]
TOKENS = 190


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_every_shard_has_an_order_of_all_services(count: int) -> None:
    services = [f"node-{number}:1" for number in range(count)]
    orders = [services_of(services, shard) for shard in range(16 * count)]
    assert all(sorted(order) == sorted(services) for order in orders)
    for lost in services:
        heirs = [order[1] for order in orders if order[0] == lost and count > 1]
        # What one leaves is spread over all others.
        assert {heirs.count(other) for other in services if other != lost} <= {
            len(heirs) // max(count - 1, 1),
            len(heirs) // max(count - 1, 1) + 1,
        }


def test_a_service_that_is_named_twice_is_no_heir_of_its_own() -> None:
    assert services_of(["x:1", "y:1", "x:1"], 2) == ["x:1", "y:1"]


@pytest.fixture
def configs(tmp_path: Path) -> list[Config]:
    """Of two nodes that have a service each."""
    settings = cluster_settings(tmp_path, ("a", "b"), services=2)
    return [load(None, {**own, "cluster.lost_after_s": 1.0}) for own in settings.values()]


@pytest.fixture
def services(configs: list[Config]) -> Iterator[list[DirectoryService]]:
    made = [DirectoryService(config) for config in configs]
    for service in made:
        service.start()
    yield made
    for service in made:
        service.stop(5.0)


@pytest.fixture
def nodes(configs: list[Config]) -> Iterator[list[Say]]:
    made = [Say(config, name) for config, name in zip(configs, ("a", "b"), strict=True)]
    yield made
    for node in made:
        node.directory.close()


def all_known(node: Say, names: list[str]) -> bool:
    return all(node.ends(name) for name in names)


def shards_in(service: DirectoryService) -> int:
    found = service.health()["shards"]
    assert isinstance(found, int)
    return found


def test_the_shards_of_a_lost_service_live_on_at_another_one_until_it_is_back(
    services: list[DirectoryService], configs: list[Config], nodes: list[Say]
) -> None:
    a, b = nodes
    for name in NAMES:
        a.names(name)
    until(lambda: all_known(b, NAMES), "all are known")
    assert [shards_in(service) for service in services] == [2, 2]
    services[0].stop(5.0)
    assert not all_known(b, NAMES)
    until(lambda: all_known(b, NAMES), "the other service was told of its shards")
    assert shards_in(services[1]) == 4
    # What is new goes there, too, and what ends is heard of.
    a.names("late")
    until(lambda: b.ends("late"), "news are known")
    services[0] = DirectoryService(configs[0])
    services[0].start()
    until(lambda: shards_in(services[1]) == 2, "the other one has let go of them")
    until(lambda: all_known(b, [*NAMES, "late"]), "the returned one was told of everything")
    assert services[0].health()["nodes"] == 2


def test_and_with_nobody_in_its_place_they_stay_unknown(
    services: list[DirectoryService], nodes: list[Say], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = nodes
    for node in nodes:
        monkeypatch.setattr(node.directory, "_is_silent", lambda service: None)
    for name in NAMES:
        a.names(name)
    until(lambda: all_known(b, NAMES), "all are known")
    services[0].stop(5.0)
    late = [f"late-{number}" for number in range(8)]
    for name in late:
        a.names(name)
    until(lambda: any(b.ends(name) for name in late), "what the other service has is known")
    until(lambda: a.directory._services[0].down_until_s > 0.0, "the first one was tried in vain")
    assert not all_known(b, late)


def test_a_node_that_tells_elsewhere_again_is_not_known_in_its_place(
    services: list[DirectoryService], nodes: list[Say]
) -> None:
    """One node alone does not reach a service: what it says in its place ends when it does."""
    a, b = nodes
    for name in NAMES:
        a.names(name)
    until(lambda: all_known(b, NAMES), "all are known")
    for service in a.directory._services[:1]:
        service.lost = True
        service.wake.set()
    until(lambda: not a.directory._services[0].lost, "it answers, and is not lost")
    until(lambda: [shards_in(service) for service in services] == [2, 2], "nothing stays in its place")
    until(lambda: all_known(b, NAMES), "all are known where they belong")


def test_another_list_of_services_is_said_in_the_log(
    services: list[DirectoryService], configs: list[Config], caplog: pytest.LogCaptureFixture
) -> None:
    turned = ",".join(reversed(configs[0].cluster.directory))
    settings = {
        "node.name": "turned",
        "cluster.listen": "127.0.0.1:1",
        "cluster.directory": turned,
        "cluster.token_file": configs[0].cluster.token_file,
        "cluster.shards": 4,
        "access.tenant_secret_file": configs[0].access.tenant_secret_file,
    }
    node = Say(load(None, settings), "turned")
    try:
        until(lambda: "another list" in caplog.text, "it is noticed")
        assert "'turned'" in caplog.text
    finally:
        node.directory.close()
    assert peer_directory._PAUSE_S > 0


@pytest.mark.timeout(240)
def test_a_lost_node_takes_its_part_of_the_directory_with_it_for_a_while_only(tmp_path: Path) -> None:
    with NodeCluster(tmp_path, ("a", "b", "d"), services=2) as cluster:
        b = cluster.nodes["b"]
        for seed in (1, 2, 3, 4):
            receipt = b.worker.result(b.worker.park(seed, pages_for(TOKENS), TOKENS, level="disk"))
            assert receipt["level"] == "disk"
            cluster.until_known(seed, "d", TOKENS, TOKENS)
        cluster.nodes["a"].kill("all")
        d = cluster.nodes["d"]
        for seed in (1, 2, 3, 4):
            cluster.until_known(seed, "d", TOKENS, TOKENS)
            got = d.worker.result(d.worker.restore(seed, pages_for(TOKENS), TOKENS)["handle"])
            assert (got["tokens"], got["sources"]) == (TOKENS, {"peer": TOKENS})
            assert d.worker.look(seed, pages_for(TOKENS), TOKENS)["front"] == TOKENS
