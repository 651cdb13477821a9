"""Ask the cluster to take one of its nodes out of service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtier.cluster import record as records
from kvtier.cluster.launch import Starter, environment_of
from kvtier.cluster.orders import Order
from kvtier.config.schema import Config
from kvtier.errors import DaemonNotFound

_LOG = "drain.log"
_CONNECT_S = 15.0


def drain(config: Config, node: str, grace_s: float) -> dict[str, Any]:
    """Drain a node of this node's cluster, by its name or the begin of Ray's id, and wait for its end.

    Answers a DrainReport's fields (drain.py); `phase` is 'done' unless it took longer than the grace and a
    little.  Nothing runs on that node until `up` is called there again.  Raises DaemonNotFound where nothing
    was started here, KvtierError for an unknown node or where Ray does not answer.
    """
    record = records.load(config.node.state_dir)
    if record is None:
        raise DaemonNotFound(
            f"no daemon was started with its state in {config.node.state_dir}",
            fix="run it on a node of the cluster",
        )
    order = Order(
        task="drain",
        namespace=record.namespace,
        controller=record.controller,
        address=record.address,
        node=node,
        grace_s=grace_s,
        # An actor that does not end within the grace is ended by force some time later.
        timeout_s=grace_s + 20.0,
    )
    report: dict[str, Any] = {}
    with Starter(environment_of(config, record), Path(record.state_dir) / _LOG) as starter:
        starter.order(order)
        for event in starter.events(order.timeout_s + _CONNECT_S):
            report = event.status
    return report
