"""What outlives a controller, in Ray's own key-value store: the members, and the terms of controllers.

With `ray.gcs_storage` set it also outlives Ray's head.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec
from ray.experimental import internal_kv

from kvtier.cluster.members import Member, read_member
from kvtier.cluster.reconciler import next_term

_NAMESPACE = "kvtier"
_MEMBER = "member:"
_TERM = "term:"
_VERSION = "version"
_PRIVATE = "private"


def mark(version: str, *, private: bool) -> None:
    """Say what kvtier is here, for those who come later."""
    internal_kv._internal_kv_put(_VERSION, version, namespace=_NAMESPACE)
    if private:
        internal_kv._internal_kv_put(_PRIVATE, b"1", namespace=_NAMESPACE)


def version(client: Any) -> str:
    """The version of the kvtier that runs in a cluster, '' where none has. client: Ray's GcsClient."""
    found = client.internal_kv_get(_VERSION.encode(), _NAMESPACE.encode())
    return "" if found is None else str(found.decode())


def is_private(client: Any) -> bool:
    """Whether kvtier started the cluster. client: Ray's GcsClient."""
    return client.internal_kv_get(_PRIVATE.encode(), _NAMESPACE.encode()) is not None


def save(member: Member) -> None:
    """Write a member down, over what was known of it."""
    internal_kv._internal_kv_put(_MEMBER + member.node, msgspec.json.encode(member), namespace=_NAMESPACE)


def forget(node: str) -> None:
    """Remove a member; none is no error."""
    internal_kv._internal_kv_del(_MEMBER + node, namespace=_NAMESPACE)


def members() -> dict[str, Member]:
    """All of them, by Ray's node id."""
    found = {}
    for key in internal_kv._internal_kv_list(_MEMBER, namespace=_NAMESPACE):
        data = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        if data is not None:
            member = read_member(data)
            found[member.node] = member
    return found


def claim_term(epochs: Iterable[int]) -> int:
    """Take the next term for this controller, so that all before it have lost theirs."""
    epochs = tuple(epochs)
    while True:
        known = _terms()
        term = next_term(time.time(), known, epochs)
        # Puts of one key are ordered by Ray's head: one of two controllers gets it.
        if not internal_kv._internal_kv_put(f"{_TERM}{term}", b"1", overwrite=False, namespace=_NAMESPACE):
            for old in known:
                internal_kv._internal_kv_del(f"{_TERM}{old}", namespace=_NAMESPACE)
            return term


def latest_term() -> int:
    """The term of the controller that may act; 0 when the store knows of none."""
    return max(_terms(), default=0)


def _terms() -> list[int]:
    keys = internal_kv._internal_kv_list(_TERM, namespace=_NAMESPACE)
    return [int(key.decode().removeprefix(_TERM)) for key in keys]
