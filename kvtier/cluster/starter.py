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
from ray.exceptions import RayActorError, RayError

import kvtier
from kvtier.cluster import store
from kvtier.cluster.controller import RESOURCE, SHARE, Controller
from kvtier.cluster.head import literal_addresses, start_head, start_node
from kvtier.cluster.members import Member
from kvtier.cluster.orders import Event, Order, RaySettings
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
        {"start": _start, "stop": _stop, "status": _show, "drain": _drain}[order.task](order, report)
        return 0
    except KvtierError as error:
        report(Event(kind="failed", text=error.message, fix=error.fix))
    except (RayError, OSError, ValueError, RuntimeError) as error:
        text = str(error).strip() or repr(error)
        report(Event(kind="failed", text=f"Ray: {text.splitlines()[0]}", fix="see the log for more"))
    return 1


def _start(order: Order, report: _Reporter) -> None:
    address, node = _start_ray(order, report)
    own = None if order.address == "" else _facing(address)
    joins = order.address != "" and node != ""
    with _connected(address, order.namespace, own if joins else None):
        node = node or ray.get_runtime_context().get_node_id()
        _need_resource(node)
        _refuse_second(order, node)
        report(Event(kind="connected", address=address, node_id=node, controller=order.controller))
        store.mark(kvtier.__version__, private=order.address == "")
        member = Member(
            node=node,
            name=order.name,
            services=order.services,
            config_text=order.config_text,
            grace_s=order.grace_s,
        )
        _wait_ready(_join(member, order), node, order, report)


def _start_ray(order: Order, report: _Reporter) -> tuple[str, str]:
    """Start what is to be started of Ray here: the cluster's address, and the node's id if it is ours."""
    if order.node:
        return order.address, order.node
    if order.address == "":
        started, kind = start_head(_ray(order)), "head"
    else:
        client = _check_versions(order.address)
        if not store.is_private(client):
            return order.address, ""
        settings = _ray(order)
        listen = settings.listen or _facing(order.address)
        started, kind = start_node(settings, order.address, listen), "joined"
    report(
        Event(
            kind="head" if kind == "head" else "joined",
            address=started.address,
            node_id=started.node_id,
            session_dir=started.session_dir,
            pids=started.pids,
        )
    )
    return started.address, started.node_id


def _ray(order: Order) -> RaySettings:
    if order.ray is None:
        raise KvtierError(
            f"{order.address} is a private cluster of kvtier's, and its token is not known here",
            fix="set ray.token_file to a copy of the file that its head has",
        )
    return order.ray


def _need_resource(node: str) -> None:
    """Raise KvtierError where Ray's node was not started for kvtier."""
    here = next((entry for entry in ray.nodes() if entry["NodeID"] == node), None)
    if here is None or not here["Resources"].get(RESOURCE):
        raise KvtierError(
            f"Ray's node here does not have the resource {RESOURCE!r}",
            fix=f"start it with `ray start ... --resources='{{\"{RESOURCE}\": 1}}'`",
        )


def _refuse_second(order: Order, node: str) -> None:
    """Raise KvtierError where another `up` runs this node."""
    try:
        controller = ray.get_actor(order.controller)
    except ValueError:
        return
    status = ray.get(controller.status.remote(), timeout=order.timeout_s)
    if not status["members"].get(node, {"drained": True})["drained"]:
        raise KvtierError(
            "kvtier runs on this node of the Ray cluster already",
            fix="use `kvtier status`, or `kvtier down` where it was started",
        )


def _join(member: Member, order: Order) -> Any:
    """Have the cluster's controller, a new one if there is none, take this node in."""
    deadline_s = time.monotonic() + order.timeout_s
    while True:
        controller = _create(order.controller)
        try:
            why = ray.get(controller.join.remote(msgspec.json.encode(member)), timeout=order.timeout_s)
        except RayActorError:
            why = "closed"
        if not why:
            return controller
        # It was about to end, as the last node had left; the next one is new.
        if why != "closed" or time.monotonic() >= deadline_s:
            raise KvtierError(f"the controller does not take this node in: {why}", fix="try again")
        time.sleep(_POLL_S)


def _create(name: str) -> Any:
    # Its calls do no harm when asked twice: who asks while it restarts is answered after that.
    options = {
        "name": name,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": {RESOURCE: SHARE},
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 4,
    }
    return ray.remote(Controller).options(**options).remote()


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
            report(Event(kind="ready", node_id=node, pids={role: int(e["pid"]) for role, e in roles.items()}))
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
    """Drain this node within its grace and take it out; with the last one the controller ends."""
    with _connected(order.address, order.namespace):
        try:
            controller = ray.get_actor(order.controller)
        except ValueError:
            report(Event(kind="stopped", text="no controller runs"))
            return
        status = ray.get(controller.status.remote(), timeout=order.timeout_s)
        if order.node in status["members"]:
            status = _drained(controller, order)
        if ray.get(controller.close.remote(), timeout=order.timeout_s):
            ray.kill(controller, no_restart=True)
        drain = status.get("drains", {}).get(order.node, {})
        over = order.node not in status["members"]
        report(Event(kind="stopped", text="" if over else "some actors did not end in time", status=drain))


def _drain(order: Order, report: _Reporter) -> None:
    """Drain any node of the cluster; it stays a member that runs nothing."""
    with _connected(order.address, order.namespace):
        controller = ray.get_actor(order.controller)
        status = _drained(controller, order)
        node = ray.get(controller.drain.remote(order.node, order.grace_s, False), timeout=order.timeout_s)
        report(Event(kind="drained", node_id=node, status=status["drains"].get(node, {})))


def _drained(controller: Any, order: Order) -> dict[str, Any]:
    """Begin to drain, and wait for its end or the order's time; answers the last status."""
    deadline_s = time.monotonic() + order.timeout_s
    node = ray.get(controller.drain.remote(order.node, order.grace_s, order.leave), timeout=order.timeout_s)
    while True:
        status: dict[str, Any] = ray.get(controller.status.remote(), timeout=order.timeout_s)
        phase = status["drains"].get(node, {}).get("phase")
        over = node not in status["members"] if order.leave else phase == "done"
        if phase is None and not over:
            # The controller was started again in between.
            ray.get(controller.drain.remote(node, order.grace_s, order.leave), timeout=order.timeout_s)
        if over or time.monotonic() >= deadline_s:
            return status
        time.sleep(_POLL_S)


def _show(order: Order, report: _Reporter) -> None:
    with _connected(order.address, order.namespace):
        status = ray.get(ray.get_actor(order.controller).status.remote(), timeout=order.timeout_s)
        report(Event(kind="status", status=status))


@contextmanager
def _connected(address: str, namespace: str, own: str | None = None) -> Iterator[None]:
    """own: the address of Ray's node here, where it is ours; else Ray looks for one."""
    with literal_addresses():
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            configure_logging=False,
            logging_level="error",
            _node_ip_address=own,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _facing(address: str) -> str:
    """The address of this machine that the cluster sees when it is called from here."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_CONNECT_S) as connection:
        return str(connection.getsockname()[0])


def _check_versions(address: str) -> Any:
    """A client of the cluster's head. Raises KvtierError unless it runs this Python, Ray and kvtier."""
    raylet: Any = ray._raylet
    try:
        # Ray itself goes on trying for a minute where nobody listens.
        _facing(address)
        client = raylet.GcsClient(address=address)
        metadata = get_cluster_metadata(client)
        theirs = store.version(client)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise KvtierError(
            f"no Ray cluster answers at {address}: {str(error).strip().splitlines()[0]}",
            fix="give the address that `ray start --head` printed, and the cluster's token if it has one",
        ) from error
    for what, remote, ours in (
        ("Ray", metadata["ray_version"], ray.__version__),
        ("Python", metadata["python_version"], platform.python_version()),
        ("kvtier", theirs or kvtier.__version__, kvtier.__version__),
    ):
        if remote != ours:
            raise KvtierError(
                f"the cluster at {address} runs {what} {remote}, this is {what} {ours}",
                fix=f"run `kvtier up` with {what} {remote}",
            )
    return client


def _last_end(entry: dict[str, Any]) -> str:
    return f" ({entry['last_end']})" if entry.get("last_end") and entry["state"] != "ready" else ""


if __name__ == "__main__":
    reporter = _Reporter(int(sys.argv[1]))
    text = sys.stdin.buffer.read()
    # An empty order means that whoever started this process is gone.
    sys.exit(main(msgspec.json.Decoder(Order).decode(text), reporter) if text else 1)
