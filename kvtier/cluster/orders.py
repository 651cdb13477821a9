"""What `up` and `down` tell the process that speaks to Ray, and what it tells them. No Ray here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kvtier.cluster.reconciler import TierRole


class HeadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """port_first: first of `port_count` ports that the cluster may use; 0 lets each part take a free one."""

    temp_dir: str
    object_store_bytes: int
    port_first: int = 0
    port_count: int = 0


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to do. head: to start one; else the cluster at `address` is used."""

    task: Literal["start", "stop", "status"]
    namespace: str
    controller: str
    address: str = ""
    head: HeadSettings | None = None
    services: tuple[tuple[TierRole, str], ...] = ()
    config_text: bytes = b""
    grace_s: float = 10.0
    timeout_s: float = 60.0
    only_this_node: bool = False


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happened. pids: by name of the process."""

    kind: Literal["head", "connected", "actor", "ready", "stopped", "status", "failed"]
    text: str = ""
    fix: str = ""
    address: str = ""
    node_id: str = ""
    session_dir: str = ""
    controller: str = ""
    pids: dict[str, int] = msgspec.field(default_factory=dict)
    status: dict[str, Any] = msgspec.field(default_factory=dict)
