"""kvtier: parks the KV cache of idle conversations, and has it back when the next turn comes.

    import kvtier

    kv = kvtier.connect()                       # this node's daemon; "embedded:" runs one in this process
    worker = kv.attach(fingerprint, pool, shard=shard)
    park = worker.park("chat-42", tokens, pages, tenant="acme", level="disk")
    plan = worker.plan("chat-42", tokens, tenant="acme")
    got = worker.restore(plan, pages, deadline_s=0.4)

Nothing is imported before it is used: a process that only asks for a status loads neither numpy nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvtier.client.aio import AsyncClient, AsyncWorker, connect_async
    from kvtier.client.client import Client, connect
    from kvtier.client.shards import Shards
    from kvtier.client.worker import Worker
    from kvtier.errors import KvtierError
    from kvtier.model.fingerprint import Fingerprint
    from kvtier.model.spec import ModelSpec
    from kvtier.objects import Shard
    from kvtier.receipts import (
        ForgetReceipt,
        ParkReceipt,
        Plan,
        RestoreReceipt,
        StatusReport,
    )

_HOMES = {
    "AsyncClient": "client.aio",
    "AsyncWorker": "client.aio",
    "Client": "client.client",
    "Fingerprint": "model.fingerprint",
    "ForgetReceipt": "receipts",
    "KvtierError": "errors",
    "ModelSpec": "model.spec",
    "ParkReceipt": "receipts",
    "Plan": "receipts",
    "RestoreReceipt": "receipts",
    "Shard": "objects",
    "Shards": "client.shards",
    "StatusReport": "receipts",
    "Worker": "client.worker",
    "connect": "client.client",
    "connect_async": "client.aio",
}

__all__ = [
    "AsyncClient",
    "AsyncWorker",
    "Client",
    "Fingerprint",
    "ForgetReceipt",
    "KvtierError",
    "ModelSpec",
    "ParkReceipt",
    "Plan",
    "RestoreReceipt",
    "Shard",
    "Shards",
    "StatusReport",
    "Worker",
    "connect",
    "connect_async",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvtier' has no attribute '{name}'")
    return getattr(importlib.import_module(f"kvtier.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
