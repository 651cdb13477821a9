"""What `up` and `down` tell the process that speaks to Ray, and what it tells them. No Ray here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kvtier.cluster.reconciler import TierRole


class RaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of Ray's processes on this node. port_first: first of `port_count` ports that they may use; 0 lets each
    part take a free one.  listen: the address at which others hear them; '' is loopback, or for a node that
    joins the address that faces the head.
    """

    temp_dir: str
    object_store_bytes: int
    listen: str = ""
    port_first: int = 0
    port_count: int = 0


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to do. address: of the cluster that is used; '' starts the head of one.

    ray: for what is started of Ray; None where nothing may be.  node: Ray's id, or for a drain also a name.
    leave: after the drain the node is no member.
    """

    task: Literal["start", "stop", "status", "drain"]
    namespace: str
    controller: str
    address: str = ""
    ray: RaySettings | None = None
    name: str = ""
    node: str = ""
    services: tuple[tuple[TierRole, str], ...] = ()
    config_text: bytes = b""
    grace_s: float = 10.0
    timeout_s: float = 60.0
    leave: bool = False


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happened. pids: by name of the process."""

    kind: Literal["head", "joined", "connected", "actor", "ready", "drained", "stopped", "status", "failed"]
    text: str = ""
    fix: str = ""
    address: str = ""
    node_id: str = ""
    session_dir: str = ""
    controller: str = ""
    pids: dict[str, int] = msgspec.field(default_factory=dict)
    status: dict[str, Any] = msgspec.field(default_factory=dict)
