"""What a worker brings along: a model's identity, a pool, tokens, pages. Checked before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import msgspec

from kvtier.client.shards import Shards
from kvtier.errors import FingerprintError, GeometryError, TokensError
from kvtier.messages.calls import Attach, Mode, Planned
from kvtier.objects import KEY_BYTES, Shard
from kvtier.receipts import Plan

if TYPE_CHECKING:
    from kvtier.client.page_use import CopyOrder
    from kvtier.gpu.engine import Place
    from kvtier.gpu.layers import LayerEvents
    from kvtier.gpu.layout import PoolLayout
    from kvtier.gpu.places import MakeEngine
    from kvtier.gpu.pool import Binding, Pool
    from kvtier.gpu.shared_pool import MappablePool, SharedPool

    AnyPool: TypeAlias = Pool | PoolLayout | SharedPool | MappablePool

TOKEN_BYTES = 4


class ModelIdentity(Protocol):
    """What `attach` has to know of a model: kvtier.model.fingerprint.Fingerprint has it."""

    @property
    def digest(self) -> bytes:
        """32 bytes."""

    @property
    def describe(self) -> str:
        """A name for people."""


class Front(NamedTuple):
    """A known full block: the next lookup or park may go on after it. tokens: up to its end."""

    key: bytes = b""
    tokens: int = 0


NO_FRONT = Front()


@dataclass(frozen=True, slots=True)
class WorkerPlan(Plan):
    """A plan for one worker's restore. front: the last full block that was found.

    era: of the attachment that made it; another attachment knows nothing of it.
    """

    front: Front = NO_FRONT
    era: int = 0

    @classmethod
    def of(cls, answer: Planned, era: int) -> WorkerPlan:
        """From the node's answer to the attachment of `era`."""
        found = {field: getattr(answer.plan, field) for field in _PLAN_FIELDS}
        return cls(**found, front=Front(answer.front_key, answer.front_tokens), era=era)


_PLAN_FIELDS = tuple(field.name for field in fields(Plan))


class WorkerPool:
    """The pool that a worker attaches with, of any kind.

    pool: a Pool; a SharedPool or MappablePool, which the daemon maps; or the layout of a contiguous cache.
    Raises GeometryError for anything else.
    """

    def __init__(self, pool: AnyPool) -> None:
        from kvtier.gpu.layout import PoolLayout
        from kvtier.gpu.pool import Pool
        from kvtier.gpu.shared_pool import MappablePool, SharedPool

        self.mode: Mode = "worker"
        self.description: dict[str, Any] = {}
        self.fds: list[int] = []
        self.mapped: MappablePool | None = None
        if isinstance(pool, SharedPool):
            self.mode = "shared"
            self.description, self.fds = pool.export()
            pool = pool.pool
        elif isinstance(pool, MappablePool):
            self.mode, self.mapped = "shared", pool
            self.description = pool.export()
            pool = pool.pool
        self._pool: Pool | None = pool if isinstance(pool, Pool) else None
        layout = pool.layout if isinstance(pool, Pool) else pool
        if not isinstance(layout, PoolLayout):
            raise GeometryError(f"{type(pool).__name__} is neither a pool nor a layout")
        self.layout: PoolLayout = layout

    def bind(self, pages: Any, tokens: int) -> Binding:
        """Where `tokens` tokens lie: page ids, or a Binding as it is. Raises GeometryError."""
        from kvtier.gpu.pool import Binding

        if not isinstance(pages, Binding):
            if self._pool is None:
                raise GeometryError("a contiguous cache has no pages", fix="pass what bind_sequence() gives")
            return self._pool.bind(pages, tokens=tokens)
        if pages.layout is not self.layout and pages.layout != self.layout:
            raise GeometryError("these pages were bound with another layout than the attached one")
        if min(pages.ends) < tokens:
            raise GeometryError(f"{min(pages.ends)} positions are bound, too few for {tokens} tokens")
        return pages

    def place(self, make: MakeEngine | None) -> Place:
        """What copies there. make: the caller's own. Raises GeometryError, TierUnavailable."""
        from kvtier.gpu.places import choose

        if self.mapped is not None:
            return self.mapped.place
        return choose(self._pool, make)

    def copy_here(self) -> None:
        """The daemon cannot map it: from the next attach on this process copies."""
        self.mode, self.mapped, self.description = "worker", None, {}

    def event_numbers(self, order: CopyOrder) -> list[int]:
        """Of a pool on a GPU that the daemon maps, what its copies come after: see messages.Park."""
        mapped = self.mapped
        if mapped is None:
            return []
        events = order.after_layers or ((order.after,) if order.after is not None else ())
        return [mapped.relay(event) for event in events]

    def check_place(self, binding: Binding, place: Place) -> None:
        """Raise GeometryError unless the place's engine reaches what was bound."""
        found = binding.views[0][0].location
        if found != place.location:
            raise GeometryError(
                f"the KV is on {found}, and the worker's engine copies on {place.location}",
                fix=f"attach with make_engine=kvtier.gpu.places.place_of({found!r})",
            )

    def check_layers(self, events: int, stream: Any) -> None:
        """Raise GeometryError unless so many events order a park layer by layer."""
        layers = sum(len(group.layers) for group in self.layout.groups)
        if stream is not None:
            raise GeometryError("a park comes after a stream or after events of its layers, not both")
        if events != layers:
            raise GeometryError(f"{events} events for a pool of {layers} layers")

    def layer_events(self, place: Place) -> LayerEvents:
        """For a restore into this pool."""
        from kvtier.gpu.layers import LayerEvents

        return LayerEvents(self.layout, place.stream)


class Computing(NamedTuple):
    """What a worker computes with. config: the model's; device: as its driver calls it; devices: together."""

    config: dict[str, Any]
    device: str
    devices: int

    @classmethod
    def of(cls, config: Mapping[str, Any] | str | Path | None, device: str, devices: int) -> Computing:
        """Checked. config: itself, its file or its folder. Raises ModelSpecError, GeometryError."""
        if devices < 1:
            raise GeometryError(f"a worker computes on at least one device, not {devices}")
        if config is None:
            return cls({}, device, devices)
        from kvtier.model.config_json import load_config

        return cls(load_config(config)[0], device, devices)


NOTHING_KNOWN = Computing({}, "", 1)


def attach_request(
    model: ModelIdentity,
    pool: WorkerPool,
    shard: Shard,
    computing: Computing = NOTHING_KNOWN,
    ranks: Shards | None = None,
) -> Attach:
    """The request that shows the worker to its node. Raises FingerprintError, GeometryError."""
    digest = getattr(model, "digest", None)
    if not isinstance(digest, bytes) or len(digest) != KEY_BYTES:
        raise FingerprintError(
            "the model has no identity of its weights",
            fix="pass kvtier.model.fingerprint.Fingerprint.of_directory(...) or .of_revision(...)",
        )
    if not isinstance(shard, Shard):
        raise GeometryError(f"{shard!r} is not a shard", fix="pass kvtier.objects.Shard(...)")
    names = ranks.names if ranks is not None else []
    if names and shard.name not in names:
        raise GeometryError(
            f"{shard.name} is none of the slices of its ranks",
            fix="attach with shard=ranks[rank], ranks=ranks",
        )
    layout = pool.layout
    return Attach(
        id=1,
        fingerprint=digest,
        model=model.describe,
        geometry=layout.geometry,
        shard=shard.name,
        layout=layout.layout_id,
        pool_pages=max(layout.pages(group) for group in range(len(layout.groups))),
        mode=pool.mode,
        pool=pool.description,
        config=computing.config,
        device=computing.device,
        devices=computing.devices,
        ranks=names if len(names) > 1 else [],
    )


def shown(request: Attach, pool: WorkerPool, place: Place) -> Attach:
    """The request with what copies the worker's pool; its GPU is what computes, unless something was said."""
    return msgspec.structs.replace(
        request,
        mode=pool.mode,
        pool=pool.description,
        device=request.device or place.device,
        engine=place.engine,
        place=f"{place.location} {place.device}".strip(),
        gpu_bytes=place.device_bytes if pool.mode == "worker" else 0,
    )


def page_bytes(binding: Binding) -> list[bytes]:
    """Page ids of each layer group as packed uint32, for a node that copies by itself."""
    return [b"" if table is None else table.astype("<u4").tobytes() for table in binding.tables]


def pack(tokens: Any, after: Front) -> tuple[bytes, int]:
    """The packed tokens behind the front, and the number of all. Raises TokensError."""
    from kvtier.keys import pack_tokens

    if after.tokens and len(after.key) != KEY_BYTES:
        raise TokensError(f"the key of a front has {KEY_BYTES} bytes, not {len(after.key)}")
    if after.tokens and len(tokens) < after.tokens:
        raise TokensError(f"{len(tokens)} tokens do not reach beyond a front of {after.tokens}")
    packed = pack_tokens(tokens[after.tokens :] if after.tokens else tokens)
    count = after.tokens + len(packed) // TOKEN_BYTES
    if not count:
        raise TokensError("there are no tokens")
    return packed, count


def extras_list(extras: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Checked (position, digest) pairs. Raises TokensError."""
    for position, digest in extras:
        if position < 0 or not isinstance(digest, bytes) or not digest:
            raise TokensError(f"({position!r}, {digest!r}) is not a position and a digest")
    return list(extras)
