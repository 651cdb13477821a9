"""What the tests in network namespaces run inside of one: COMMAND STATE RUN [SETTING=VALUE...]

up, down, drain NAME: as the commands of `kvtier`, with fake services; up-real: with the real ones.  watch:
writes a JSON line whenever the cluster's status changes, until its standard input ends.
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import Any

from kvtier.cluster import record as records
from kvtier.cluster.down import down
from kvtier.cluster.drain_node import drain
from kvtier.cluster.launch import environment_of
from kvtier.cluster.up import up
from kvtier.config.load import load
from kvtier.config.schema import Config

SERVICES = dict.fromkeys(("host", "disk", "gpu"), "fake_tier_service:FakeService")
SETTINGS = {"ray.object_store_bytes": 80 << 20, "node.grace_s": 3.0}


def summary(status: dict[str, Any]) -> dict[str, Any]:
    """By node's name: state and epoch of each role, where its node is seen."""
    names = {node: member["name"] for node, member in status["members"].items()}
    return {
        names[node]: {role: [entry["state"], entry["epoch"]] for role, entry in roles.items()}
        for node, roles in status["nodes"].items()
        if node in names
    }


def watch(config: Config) -> None:
    record = records.load(config.node.state_dir)
    assert record is not None
    os.environ.update(environment_of(config, record))
    import ray

    ray.init(
        address=record.address,
        namespace=record.namespace,
        _node_ip_address=record.address.rpartition(":")[0],
        log_to_driver=False,
        logging_level="error",
    )
    controller = ray.get_actor(record.controller)
    told: Any = None
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        said = summary(ray.get(controller.status.remote(), timeout=30))
        if said != told:
            told = said
            print(json.dumps(said), flush=True)


def main(command: str, state: str, run: str, *rest: str) -> None:
    given = dict(word.split("=", 1) for word in rest if "=" in word)
    config = load(None, SETTINGS | {"node.state_dir": state, "node.runtime_dir": run} | given)
    if command == "up":
        result = up(config, detach=True, services=SERVICES, probe=lambda config: "")  # type: ignore[arg-type]
        print(json.dumps({"address": result.address, "kind": result.kind, "node": result.node_id}))
    elif command == "up-real":
        result = up(config, detach=True)
        print(json.dumps({"address": result.address, "kind": result.kind, "node": result.node_id}))
    elif command == "down":
        print(json.dumps({"graceful": down(config).graceful}))
    elif command == "drain":
        print(json.dumps(drain(config, rest[-1], grace_s=5.0)))
    else:
        watch(config)


if __name__ == "__main__":
    main(*sys.argv[1:])
