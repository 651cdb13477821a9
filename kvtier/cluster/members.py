"""Which nodes are of the cluster, each with the settings of its own: what `up` says to the controller."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from kvtier.cluster.reconciler import TierRole
from kvtier.config.schema import Config
from kvtier.errors import KvtierError


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node. node: Ray's id of it.  services: 'module:Class' by role.  drained: it is to run nothing."""

    node: str
    name: str
    services: tuple[tuple[TierRole, str], ...]
    config_text: bytes
    grace_s: float
    drained: bool = False

    @property
    def digest(self) -> str:
        """Names configuration and services in the actors' names."""
        return hashlib.sha256(repr(self.services).encode() + self.config_text).hexdigest()[:12]

    @property
    def roles(self) -> tuple[TierRole, ...]:
        """What runs there, in the order of its starts."""
        return tuple(role for role, _ in self.services)


_MEMBER, _CONFIG = msgspec.json.Decoder(Member), msgspec.json.Decoder(Config)


def read_member(data: bytes) -> Member:
    """A Member from JSON. Raises msgspec.DecodeError."""
    return _MEMBER.decode(data)


def read_config(text: bytes) -> Config:
    """A Member's configuration. Raises msgspec.DecodeError."""
    return _CONFIG.decode(text)


def find(members: Iterable[Member], wanted: str) -> Member:
    """The member of this name, or with a Ray id that begins so. Raises KvtierError unless there is one."""
    known = sorted(members, key=lambda member: member.name)
    found = [member for member in known if member.name == wanted]
    found = found or [member for member in known if wanted and member.node.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{member.name} ({member.node[:8]})" for member in known) or "none"
    raise KvtierError(
        f"{len(found) or 'no'} nodes of this cluster are called {wanted!r}", fix=f"name one of: {names}"
    )
