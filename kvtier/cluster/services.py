"""Which service each role runs, named as 'module:Class' so that only its own actor imports it."""

from __future__ import annotations

import importlib
from typing import Any

from kvtier.cluster.reconciler import TierRole
from kvtier.config.schema import Config
from kvtier.errors import KvtierError

SERVICES: dict[TierRole, str] = {
    "host": "kvtier.daemon.node_service:NodeService",
    "directory": "kvtier.daemon.directory_service:DirectoryService",
    "disk": "kvtier.daemon.disk_service:DiskService",
    "gpu": "kvtier.daemon.gpu_service:GpuService",
}


def services_for(config: Config) -> dict[TierRole, str]:
    """The services of a node with these settings, in the order in which they start."""
    wanted = {"disk": config.disk.enabled, "directory": bool(config.cluster.directory_listen)}
    return {role: path for role, path in SERVICES.items() if wanted.get(role, True)}


def load_service(path: str) -> Any:
    """The class that `path` names. Raises KvtierError if there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise KvtierError(
            f"the service {path} cannot be loaded: {error}",
            fix="install kvtier with the same extras on every node of the cluster",
        ) from error
