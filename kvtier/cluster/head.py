"""The nodes of a private Ray cluster, with only the parts that a kvtier node uses.

Ray's `start` command also runs a dashboard server, two agents and a supervisor: about 230 MiB and most of
its six seconds.  kvtier uses no dashboard, no job submission, no runtime environments and no Ray metrics,
so here a process of 3 MiB stands in for each agent (Ray insists on there being one) and the rest is left
out: 0.3 seconds.  A head also listens on loopback alone unless it is told otherwise, where the command takes
the machine's outer address.

What is changed are details inside Ray, so only releases that were tried are used; `supported()` says which.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import _raylet
from ray._private import services
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.resource_isolation_config import ResourceIsolationConfig

from kvtier.cluster.controller import RESOURCE
from kvtier.cluster.orders import RaySettings
from kvtier.errors import KvtierError

LOOPBACK = "127.0.0.1"
# tests/cluster/test_cluster_ray.py passed with each; before 2.55 Ray lacks parts of what is used.
RELEASES = ("2.55", "2.56", "2.57", "2.58", "2.59", "2.60")
# Lives as long as its parent, the raylet, and costs nothing in between.
_STAND_IN = "import os,select;select.select([os.pidfd_open(os.getppid())],[],[])"
# Its names are compiled in, which type checkers cannot see.
_RAYLET: Any = _raylet
_AGENT_OPTIONS = ("--dashboard_agent_command=", "--runtime_env_agent_command=")


@dataclass(frozen=True, slots=True)
class RayNode:
    """Ray's processes of one node. address: of the cluster.  pids: by Ray's name of the process."""

    address: str
    node_id: str
    session_dir: str
    pids: dict[str, int]


def supported() -> None:
    """Raise KvtierError unless this release of Ray is one whose insides are known."""
    if not ray.__version__.startswith(tuple(f"{release}." for release in RELEASES)):
        raise KvtierError(
            f"Ray {ray.__version__} is installed; private clusters are known to work with "
            f"{RELEASES[0]} to {RELEASES[-1]}",
            fix=f"install 'ray=={RELEASES[-1]}.*', or start Ray yourself and use `kvtier up --address`",
        )


def start_head(settings: RaySettings) -> RayNode:
    """Start the head's processes; they outlive this one. Raises KvtierError."""
    return _start(_parameters(settings, settings.listen or LOOPBACK, settings.port_first), head=True)


def start_node(settings: RaySettings, address: str, listen: str) -> RayNode:
    """Start one more node of the cluster at `address`, heard at `listen`. Raises KvtierError."""
    parameters = _parameters(settings, listen, 0)
    parameters.gcs_address = address
    # Nothing is served over HTTP; Ray would ask the head where.
    parameters.webui = ""
    return _start(parameters, head=False)


def _parameters(settings: RaySettings, listen: str, gcs_port: int) -> RayParams:
    first, count = settings.port_first, settings.port_count
    return RayParams(
        node_ip_address=listen,
        gcs_server_port=gcs_port,
        node_manager_port=first + 1 if first else 0,
        object_manager_port=first + 2 if first else 0,
        min_worker_port=first + 3 if first else 0,
        max_worker_port=first + count - 1 if first else 0,
        # No worker is started before an actor needs it, and none is kept idle.
        num_cpus=0,
        num_gpus=0,
        resources={RESOURCE: 1},
        object_store_memory=settings.object_store_bytes,
        temp_dir=settings.temp_dir,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        resource_isolation_config=ResourceIsolationConfig(enable_resource_isolation=False),
    )


def _start(parameters: RayParams, *, head: bool) -> RayNode:
    supported()
    with _lean_raylet():
        node = _LeanNode(parameters, head=head, shutdown_at_exit=False, spawn_reaper=False)
    pids = {name: infos[0].process.pid for name, infos in node.all_processes.items()}
    return RayNode(node.address, node.node_id, node.get_session_dir_path(), pids)


@contextmanager
def literal_addresses() -> Iterator[None]:
    """Inside, `ray.init` connects to the very address it is given.

    It otherwise replaces loopback by the machine's outer address, where a head on loopback is not heard.
    """
    with _replaced("resolve_ip_for_localhost", lambda host: host):
        yield


class _LeanNode(Node):  # type: ignore[misc]
    """Ray's node without the server of the dashboard, and with the agents' ports said in advance."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """Nothing here is served over HTTP."""
        self._webui_url = ""

    def start_raylet(self, *args: Any, **kwargs: Any) -> None:
        """The raylet waits until each agent has written its port; -1 is a minimal installation's 'none'."""
        for name, port in (
            (_RAYLET.METRICS_AGENT_PORT_NAME, -1),
            (_RAYLET.METRICS_EXPORT_PORT_NAME, -1),
            (_RAYLET.DASHBOARD_AGENT_LISTEN_PORT_NAME, -1),
            # Has to look like a port; only actors with a runtime environment would ask there.
            (_RAYLET.RUNTIME_ENV_AGENT_PORT_NAME, 1),
        ):
            _RAYLET.persist_port(self.get_session_dir_path(), self.node_id, name, port)
        super().start_raylet(*args, **kwargs)


@contextmanager
def _lean_raylet() -> Iterator[None]:
    """Inside, the raylet is told to start the stand-in in place of its agents."""
    start = services.start_ray_process
    stand_in = subprocess.list2cmdline([sys.executable, "-I", "-S", "-c", _STAND_IN])

    def lean(command: list[str], *args: Any, **kwargs: Any) -> Any:
        return start([_replace(argument) for argument in command], *args, **kwargs)

    def _replace(argument: str) -> str:
        option = next((option for option in _AGENT_OPTIONS if argument.startswith(option)), None)
        return argument if option is None else option + stand_in

    with _replaced("start_ray_process", lean):
        yield


@contextmanager
def _replaced(name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Inside, a function of Ray's `services` module is another one."""
    before = getattr(services, name)
    setattr(services, name, value)
    try:
        yield
    finally:
        setattr(services, name, before)
