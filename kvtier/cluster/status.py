"""What the controller sees: which actor of which epoch runs where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtier.cluster import record as records
from kvtier.cluster.launch import Starter, environment_of
from kvtier.cluster.orders import Order
from kvtier.config.schema import Config
from kvtier.errors import DaemonNotFound

_LOG = "status.log"


def cluster_status(config: Config, timeout_s: float = 10.0) -> dict[str, Any]:
    """The controller's last round: {'nodes': {node id: {role: {'state', 'epoch', 'pid', ...}}}, ...}.

    Raises DaemonNotFound where nothing was started, KvtierError where Ray does not answer.
    """
    record = records.load(config.node.state_dir)
    if record is None:
        raise DaemonNotFound(
            f"no daemon was started with its state in {config.node.state_dir}", fix="run `kvtier up`"
        )
    environment = environment_of(config, record)
    order = Order(
        task="status",
        namespace=record.namespace,
        controller=record.controller,
        address=record.address,
        timeout_s=timeout_s,
    )
    status: dict[str, Any] = {}
    with Starter(environment, Path(record.state_dir) / _LOG) as starter:
        starter.order(order)
        for event in starter.events(timeout_s):
            status = event.status
    return status
