"""Four real Ray nodes with the real services, in network namespaces: any finds what any parked.

pytest -m netns tests/cluster/test_cluster_four_nodes.py
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_cluster_netns import connected, pytestmark  # noqa: F401  # the marks
from test_cluster_two_nodes import TOKENS, Node, set_up

from kvtier.cluster.down import kill_all
from kvtier.testing.node_bench import until


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """The first has Ray's head and the directory."""
    gates = tmp_path / "gates"
    gates.mkdir()
    with connected("a", "b", "c", "d") as sides:
        set_up(sides, tmp_path)
        for side in sides:
            side.settings += [f"cluster.failure_domain={side.name}"]
        found = [Node(side, gates) for side in sides]
        found[0].up()
        with ThreadPoolExecutor(len(found)) as pool:
            list(pool.map(Node.up, found[1:]))
        yield found
        for node in found:
            node.away()


def test_any_finds_what_any_parked_and_a_copy_outlives_its_node(nodes: list[Node]) -> None:
    for seed, node in enumerate(nodes):
        node.park(seed)
    for place, node in enumerate(nodes):
        theirs = (place + 1) % len(nodes)
        node.knows(theirs)
        assert node.restored(theirs) == TOKENS
        assert node.restored(place) == TOKENS

    # Copies are at two nodes, and a node that dies takes no promise with it.
    *others, lost = nodes
    for seed in (10, 11):
        lost.park(seed, level="copies=2")
    lost.park(12)
    held = lost.side.record()
    assert held is not None
    kill_all(held)
    lost.away()
    for node in others:
        for seed in (10, 11):
            node.knows(seed)
            assert node.restored(seed) == TOKENS
        assert node.restored(12) == 0
    assert others[0].client.forget("chat-12").durable

    # It returns with its disk, and has heard of what was forgotten.
    lost.up()
    until(lambda: lost.client.show("chat-12") is None, "the returned node has erased it")
    assert lost.restored(12) == 0
    others[1].park(13)
    lost.knows(13)
    assert lost.restored(13) == TOKENS
