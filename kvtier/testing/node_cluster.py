"""Several nodes of real processes with one directory, on loopback and without Ray, for fault tests.

The first of them run the directory's services too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from kvtier.testing.node_bench import Bench, until

# Below those that the kernel gives to connections; each process begins elsewhere.
_FIRST_PORT, _PORT_COUNT = 12000, 20000
_PORTS = itertools.count(os.getpid() * 101)
_TOKEN, _SECRET = "token of a test's cluster", "secret of a test's cluster, 32 bytes"


def free_port() -> int:
    """A port of loopback that nobody listens on, and that no connection is given while its node is away."""
    for number in _PORTS:
        port = _FIRST_PORT + number % _PORT_COUNT
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("the numbers do not end")


def cluster_settings(folder: Path, names: tuple[str, ...], services: int = 1) -> dict[str, dict[str, Any]]:
    """Settings by node. folder: for the secrets that they share. services: so many have the directory's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("token", _TOKEN), ("secret", _SECRET)):
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(text)
    directory = [f"127.0.0.1:{free_port()}" for _ in names[:services]]
    settings = {
        name: {
            "node.name": name,
            "cluster.listen": f"127.0.0.1:{free_port()}",
            "cluster.directory": ",".join(directory),
            "cluster.token_file": str(folder / "token"),
            "cluster.shards": 4,
            # They are on one machine, and not meant to be.
            "cluster.failure_domain": name,
            # Other tests run beside this one: what is too late here would be right on time elsewhere.
            "cluster.ask_s": 2.0,
            "cluster.lost_after_s": 3.0,
            "access.tenant_secret_file": str(folder / "secret"),
            "disk.scrub_bytes_per_s": 0,
        }
        for name in names
    }
    for name, address in zip(names, directory, strict=False):
        settings[name]["cluster.directory_listen"] = address
    return settings


class NodeCluster:
    """Nodes by name, each a Bench. Ended, with all that it holds, at the end of a `with`."""

    def __init__(
        self, folder: Path, names: tuple[str, ...] = ("a", "b"), services: int = 1, **settings: Any
    ) -> None:
        more = {name.replace("__", "."): value for name, value in settings.items()}
        self.nodes: dict[str, Bench] = {}
        try:
            for name, own in cluster_settings(folder / "shared", names, services).items():
                self.nodes[name] = Bench(folder / name, {**own, **more})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NodeCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        for bench in self.nodes.values():
            bench.close()

    def until_known(self, seed: int, at: str, tokens: int, count: int) -> None:
        """Until another node's plan for a conversation of `count` tokens reaches as far."""
        worker = self.nodes[at].worker
        until(
            lambda: worker.do("planned", seed=seed, count=count)["tokens"] == tokens,
            f"'{at}' knows {tokens} tokens of conversation {seed}",
        )
