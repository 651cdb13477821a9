"""The one process that speaks to Ray for `up` and `down`: started by them, gone when it is done.

It reads one order from standard input and writes one JSON object per line to the descriptor it was given.
`up` itself never imports Ray: Ray takes over signals, and ends a process that lost its head for a while.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray.exceptions import RayError

from kvtier.cluster.controller import Controller, Plan
from kvtier.cluster.head import literal_addresses, start_head
from kvtier.cluster.orders import Event, Order
from kvtier.errors import KvtierError

_POLL_S = 0.03
_CONNECT_S = 3.0
# Starts in a row that failed: it is no accident.
_DEATHS = 3


class _Reporter:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, event: Event) -> None:
        os.write(self._descriptor, msgspec.json.encode(event) + b"\n")


def main(order: Order, report: _Reporter) -> int:
    """Carry out the order; the exit status is 0 unless it failed."""
    try:
        {"start": _start, "stop": _stop, "status": _show}[order.task](order, report)
        return 0
    except KvtierError as error:
        report(Event(kind="failed", text=error.message, fix=error.fix))
    except (RayError, OSError, ValueError, RuntimeError) as error:
        text = str(error).strip() or repr(error)
        report(Event(kind="failed", text=f"Ray: {text.splitlines()[0]}", fix="see the log for more"))
    return 1


def _start(order: Order, report: _Reporter) -> None:
    address = order.address
    if order.head is not None:
        head = start_head(order.head)
        address = head.address
        report(
            Event(
                kind="head",
                address=address,
                node_id=head.node_id,
                session_dir=head.session_dir,
                pids=head.pids,
            )
        )
    else:
        _check_versions(address)
    with _connected(address, order.namespace):
        node = ray.get_runtime_context().get_node_id()
        name = f"{order.controller}:{node}" if order.only_this_node else order.controller
        _refuse_second(order, name)
        report(Event(kind="connected", address=address, node_id=node, controller=name))
        plan = Plan(
            services=order.services,
            config_text=order.config_text,
            grace_s=order.grace_s,
            nodes=(node,) if order.only_this_node else (),
        )
        _wait_ready(_create(name, plan), node, order, report)


def _refuse_second(order: Order, name: str) -> None:
    """Raise KvtierError where a controller of this node, or of the whole cluster, runs already."""
    for other in {name, order.controller}:
        try:
            ray.get_actor(other)
        except ValueError:
            continue
        raise KvtierError(
            "kvtier runs on this node of the Ray cluster already", fix="use `down` where it was started"
        )


def _create(name: str, plan: Plan) -> Any:
    # Its calls do no harm when asked twice: who asks while it restarts is answered after that.
    options = {
        "name": name,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 4,
    }
    return ray.remote(Controller).options(**options).remote(plan)


def _wait_ready(controller: Any, node: str, order: Order, report: _Reporter) -> None:
    """Tell of each actor as it gets ready, until all of this node's are."""
    deadline_s = time.monotonic() + order.timeout_s
    told: dict[str, str] = {}
    while True:
        left_s = max(0.1, deadline_s - time.monotonic())
        status = ray.get(controller.status.remote(), timeout=left_s)
        roles: dict[str, dict[str, Any]] = status["nodes"].get(node, {})
        for role, entry in roles.items():
            line = f"{role}: {entry['state']}" + _last_end(entry)
            if told.get(role) != line:
                told[role] = line
                report(Event(kind="actor", text=line))
        _give_up_early(roles)
        if all(roles.get(role, {}).get("state") == "ready" for role, _ in order.services):
            pids = {role: int(entry["pid"]) for role, entry in roles.items()} | {"controller": status["pid"]}
            report(Event(kind="ready", node_id=node, pids=pids))
            return
        if time.monotonic() >= deadline_s:
            raise KvtierError(
                f"not ready after {order.timeout_s:.0f} s: {'; '.join(told.values()) or 'no actor started'}",
                fix="see the logs of Ray's workers",
            )
        time.sleep(_POLL_S)


def _give_up_early(roles: dict[str, dict[str, Any]]) -> None:
    for role, entry in roles.items():
        if entry.get("deaths", 0) >= _DEATHS:
            raise KvtierError(
                f"the {role} actor does not start: {entry['last_end']}", fix="mend that and try again"
            )


def _stop(order: Order, report: _Reporter) -> None:
    """End the actors within their grace, then the controller."""
    with _connected(order.address, order.namespace):
        try:
            controller = ray.get_actor(order.controller)
        except ValueError:
            report(Event(kind="stopped", text="no controller runs"))
            return
        deadline_s = time.monotonic() + order.timeout_s
        ray.get(controller.stop.remote(), timeout=order.timeout_s)
        left = True
        while left and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            status = ray.get(controller.status.remote(), timeout=order.timeout_s)
            entries = [entry for roles in status["nodes"].values() for entry in roles.values()]
            left = not status.get("stopping") or any(entry["state"] != "absent" for entry in entries)
        ray.kill(controller, no_restart=True)
        report(Event(kind="stopped", text="some actors did not end in time" if left else ""))


def _show(order: Order, report: _Reporter) -> None:
    with _connected(order.address, order.namespace):
        status = ray.get(ray.get_actor(order.controller).status.remote(), timeout=order.timeout_s)
        report(Event(kind="status", status=status))


@contextmanager
def _connected(address: str, namespace: str) -> Iterator[None]:
    with literal_addresses():
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            configure_logging=False,
            logging_level="error",
        )
    try:
        yield
    finally:
        ray.shutdown()


def _check_versions(address: str) -> None:
    """Raise KvtierError unless the cluster runs this Python and this Ray: actors would not start there."""
    raylet: Any = ray._raylet
    try:
        # Ray itself goes on trying for a minute where nobody listens.
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        metadata = get_cluster_metadata(raylet.GcsClient(address=address))
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise KvtierError(
            f"no Ray cluster answers at {address}: {str(error).strip().splitlines()[0]}",
            fix="give the address that `ray start --head` printed, and the cluster's token if it has one",
        ) from error
    for what, theirs, ours in (
        ("Ray", metadata["ray_version"], ray.__version__),
        ("Python", metadata["python_version"], platform.python_version()),
    ):
        if theirs != ours:
            raise KvtierError(
                f"the cluster at {address} runs {what} {theirs}, this is {what} {ours}",
                fix=f"run `kvtier up` with {what} {theirs}",
            )


def _last_end(entry: dict[str, Any]) -> str:
    return f" ({entry['last_end']})" if entry.get("last_end") and entry["state"] != "ready" else ""


if __name__ == "__main__":
    reporter = _Reporter(int(sys.argv[1]))
    text = sys.stdin.buffer.read()
    # An empty order means that whoever started this process is gone.
    sys.exit(main(msgspec.json.decode(text, type=Order), reporter) if text else 1)
