"""The chaos run with real Ray nodes in network namespaces. Needs root: pytest -m netns tests/chaos"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_ledger import Chat
from chaos_nodes import SETTINGS
from chaos_ray import HEAD, RayNodes
from chaos_run import Plan, Run
from chaos_text import Text
from test_cluster_netns import Side, pytestmark, sides  # noqa: F401  # the marks and the fixture

SEATS = (("a", 0), ("b", 0), ("a", 1), ("b", 1))


def joined(sides: tuple[Side, Side], folder: Path) -> tuple[Side, Side]:  # noqa: F811
    """With the settings of one cluster."""
    a, b = sides
    for name in ("secret", "peers"):
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(f"{name} of two nodes in their namespaces")
    directory = f"{a.address}:47201"
    shared = {
        **SETTINGS,
        "cluster.directory": directory,
        "cluster.token_file": folder / "peers",
        "access.tenant_secret_file": folder / "secret",
        "metrics.enabled": "false",
    }
    for side in sides:
        side.settings += [f"{name}={value}" for name, value in shared.items()]
        side.settings += [f"cluster.listen={side.address}:47200", f"cluster.failure_domain={side.name}"]
    head = folder / "gcs"
    head.mkdir()
    a.settings += [f"cluster.directory_listen={directory}", f"ray.gcs_storage={head}"]
    return a, b


class Headless(Run):
    """After each audit Ray's head dies too: all are served without it, and it finds everything as it was."""

    def audit(self, draw: random.Random) -> None:
        super().audit(draw)
        a, b = (self._nodes.all[name] for name in ("a", "b"))
        before = [node.processes() for node in (a, b)]
        self._note("the head dies")
        a.kill(HEAD)
        for seed, chair in enumerate(self.chairs):
            chat, text = Chat(chair.model, "acme", f"headless-{chair.name}", Text(())), Text(((seed, 100),))
            name = {"tenant": chat.tenant, "name": chat.name}
            chair.do("park", text=text.pieces, level="disk", timeout_s=30.0, **name)
            assert chair.do("finish")["level"] == "disk"
            assert chair.restore(chat, text, deadline_s=20.0)["tokens"] == text.count
            self._forget(chair.node, chat)
        assert HEAD not in a.processes()
        a.back()
        for node in (a, b):
            node.heal()
        left = [{name: pid for name, pid in pids.items() if name != HEAD} for pids in before]
        assert all(pids.items() <= node.processes().items() for node, pids in zip((a, b), left, strict=True))
        # Only a head that is whole has the reconciler start what dies from now on.
        b.kill("gpu")
        b.heal()
        self._note("the head is back, and whole")
        self.seen["losses of the head"] += 1


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("rounds", "least_s"), [(1, 0.0), pytest.param(3, 900.0, marks=pytest.mark.slow)], ids=["slice", "long"]
)
def test_no_promise_is_broken_by_real_nodes(
    sides: tuple[Side, Side],  # noqa: F811
    tmp_path: Path,
    rounds: int,
    least_s: float,
    record_property: Callable[[str, object], None],
) -> None:
    plan = Plan(seed=11, rounds=rounds, round_s=25.0, least_s=least_s)
    record_property("seeds", str(plan.seed))
    run = Headless(plan, tmp_path, RayNodes(joined(sides, tmp_path)), SEATS)  # type: ignore[arg-type]
    seen = run.go()
    record_property("seen", json.dumps(seen))
    print(json.dumps(seen))
    assert seen["faults"] > 0 and seen["losses of the head"] == seen["rounds"]
    assert seen["promises held"] > 0
