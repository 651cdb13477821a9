"""Two nodes, 'a' and 'b', and a directory, all in the test's process, with a worker at each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtier.client.client import Client, connect
from kvtier.config.load import load
from kvtier.daemon.directory_service import DirectoryService
from kvtier.daemon.embedded import Embedded
from kvtier.testing.kv_memory import SHARD, KvMemory, tokens_of
from kvtier.testing.node_bench import SETTINGS, LocalWorker
from kvtier.testing.node_cluster import cluster_settings


class EmbeddedNodes:
    """Nothing runs before `start`; `close` ends what did, whatever came of it. more: settings of both."""

    def __init__(self, folder: Path, more: dict[str, Any] | None = None) -> None:
        settings = cluster_settings(folder, ("a", "b"))
        self.settings = {name: {**SETTINGS, **own, **(more or {})} for name, own in settings.items()}
        self.service = DirectoryService(load(None, self.settings["a"]))
        self.daemons: dict[str, Embedded] = {}
        self.clients: dict[str, Client] = {}
        self.workers: dict[str, LocalWorker] = {}

    def start(self) -> None:
        """The directory, then each node and its worker."""
        self.service.start()
        for name, own in self.settings.items():
            daemon = self.daemons[name] = Embedded(own)
            self.begin(name, daemon)
            kv, client = KvMemory(), connect(daemon.socket_path)
            self.clients[name] = client
            self.workers[name] = LocalWorker(kv, client.attach(kv.model, kv.pool, shard=SHARD))

    def begin(self, name: str, daemon: Embedded) -> None:
        """Start one node."""
        daemon.start()

    def close(self) -> None:
        """Workers first, the directory last."""
        for local in self.workers.values():
            local.worker.close()
        for client in self.clients.values():
            client.close()
        for daemon in self.daemons.values():
            daemon.close()
        self.service.stop(5.0)

    def planned(self, name: str, seed: int, count: int) -> int:
        """Of the conversation's tokens, how many a plan at the node would load."""
        worker = self.workers[name].worker
        plan = worker.plan(f"chat-{seed}", tokens_of(seed, count))
        worker.drop(plan)
        return plan.load_tokens
