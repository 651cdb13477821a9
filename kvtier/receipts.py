"""What park, plan, restore and forget answer: facts, never exceptions.

Levels, lowest first: 'none' (nothing was kept), 'host' (in this node's memory: survives the worker),
'disk' (survives kill -9 of everything and power loss), 'copies=n' (n nodes in failure domains of their own
have it, in memory or on disk: survives the loss of n - 1 of them).  A reason is one of the words in `Reason`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvtier.errors import LevelNotReached

AskedLevel: TypeAlias = Literal["host", "disk", "copies=2", "copies=3", "copies=4"]
ASKED_LEVELS: tuple[AskedLevel, ...] = ("host", "disk", "copies=2", "copies=3", "copies=4")
Level: TypeAlias = Literal["none", "host", "disk", "copies=2", "copies=3", "copies=4"]
LEVELS: tuple[Level, ...] = ("none", *ASKED_LEVELS)


def copies_level(nodes: int) -> Level:
    """The level of what so many nodes have, this one included; 'host' for none but this one."""
    return LEVELS[min(nodes + LEVELS.index("disk") - 1, len(LEVELS) - 1)] if nodes > 1 else "host"


Reason: TypeAlias = Literal[
    "",
    "backpressure",  # no room now; retry_after_s says when
    "too_large",  # would not fit even into empty tiers
    "no_disk",  # this node has no disk tier, or it does not work
    "disk_full",
    "disk_error",
    "unknown_conversation",
    "no_match",  # nothing of these tokens is stored for this model, tenant and fidelity
    "incomplete",  # layers or shards of it are missing
    "corrupt",  # a check failed: quarantined, recompute
    "deadline",  # what came too late was cut off: recompute
    "lease_expired",
    "copy_failed",
    "cancelled",
    "daemon_unavailable",  # absent, hung, restarting: the circuit is open
    "forgotten",
    "shard_missing",  # a rank of it did not come, or went, so the whole is not there
    "peer_lost",  # the node that had it is gone, or has it no longer
    "no_peer",  # fewer other nodes took a copy than were asked for
    "wear",
    "recompute",  # computing is expected to be sooner than loading, or cheaper with others waiting
]


@dataclass(frozen=True, slots=True)
class ParkReceipt:
    """What became of a park.

    released: the pages may be reused.  tokens: the conversation can be restored up to here at `level`.
    stored/shared: objects copied now / found already stored.  version: of the conversation's record.
    relative_error: of what was stored now at a lossy fidelity: rms of the error over rms of the values.
    cost_per_hour: of keeping the conversation where it lies now, in the currency of the node's prices; None
    without prices.
    copies: other nodes that keep it, each with where all of it is: 'host' or 'disk'.
    """

    conversation: str
    tenant: str
    level: Level
    requested: Level
    released: bool
    tokens: int = 0
    objects_stored: int = 0
    objects_shared: int = 0
    bytes_stored: int = 0
    relative_error: float = 0.0
    version: int = 0
    reason: Reason = ""
    detail: str = ""
    retry_after_s: float | None = None
    copies: dict[str, str] = field(default_factory=dict)
    cost_per_hour: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the asked level was reached."""
        return LEVELS.index(self.level) >= LEVELS.index(self.requested)

    def raise_for_level(self) -> ParkReceipt:
        """Raise LevelNotReached unless `ok`; for those who prefer exceptions."""
        if not self.ok:
            raise LevelNotReached(
                f"park of {self.tenant}/{self.conversation} reached '{self.level}' of "
                f"'{self.requested}': {self.reason} {self.detail}".rstrip()
            )
        return self


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens [start, end) and where they come from: 'host', 'disk', 'peer' (another node) or 'compute'."""

    start: int
    end: int
    source: Literal["host", "disk", "peer", "compute"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to bring a conversation back: contiguous ranges that cover all the given tokens.

    plan_id: '' when there is nothing to load.  eta_s: of loading; one restore in ten is sooner than the
    first, one in ten later than the second.  eta_mid_s: half of them are sooner.  why: what was weighed.
    load_ttft_s, recompute_ttft_s: expected time to the first token by loading all that is stored, and by
    computing everything; 0 where not known.  lease_s: how long the stored blocks are held for the plan.
    cost_per_hour: of keeping what is stored of it, see ParkReceipt.  saved_gpu_s: seconds of a worker's GPUs
    that the load spares; 0 where not known.
    """

    plan_id: str
    conversation: str
    tenant: str
    tokens: int
    ranges: tuple[TokenRange, ...]
    eta_s: tuple[float, float] = (0.0, 0.0)
    lease_s: float = 0.0
    bytes: int = 0
    version: int = 0
    reason: Reason = ""
    detail: str = ""
    eta_mid_s: float = 0.0
    why: str = ""
    load_ttft_s: float = 0.0
    recompute_ttft_s: float = 0.0
    cost_per_hour: float | None = None
    saved_gpu_s: float = 0.0

    @property
    def load_tokens(self) -> int:
        """Where what is to be loaded ends."""
        return max((r.end for r in self.ranges if r.source != "compute"), default=0)

    @property
    def load_from(self) -> int:
        """Where what is to be loaded begins: 0, or the end of what is computed meanwhile."""
        return min((r.start for r in self.ranges if r.source != "compute"), default=0)


@dataclass(frozen=True, slots=True)
class RestoreReceipt:
    """What is in the named pages now.

    tokens: KV of [loaded_from, tokens) is in place; compute the rest.  loaded_from: 0, or where the plan's
    front ends that is computed meanwhile.  sources: tokens by tier.  busy: pages that cannot be proven quiet;
    do not reuse them before `busy_until_end` (the worker's or actor's end).  read_s, copy_s: what its reads
    from disk and its copies took, one by one; many run at once, so their sums may be more than seconds.
    """

    conversation: str
    tenant: str
    tokens: int
    requested_tokens: int
    sources: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    reason: Reason = ""
    detail: str = ""
    busy: tuple[int, ...] = ()
    loaded_from: int = 0
    read_s: float = 0.0
    copy_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether all that was planned to be loaded is in place; of a plan that loads nothing nothing is."""
        return 0 < self.requested_tokens <= self.tokens


@dataclass(frozen=True, slots=True)
class ForgetReceipt:
    """What was erased, and what stays because another conversation of the tenant names it too.

    *_bytes: of the objects, each once; *_host_bytes and *_disk_bytes: of their copies in each tier.
    durable: whether nothing of it can come back, by whatever crash; if not, ask again.
    """

    conversation: str
    tenant: str
    found: bool
    erased_objects: int = 0
    erased_bytes: int = 0
    kept_shared_objects: int = 0
    kept_shared_bytes: int = 0
    durable: bool = True
    reason: Reason = ""
    detail: str = ""
    erased_host_bytes: int = 0
    erased_disk_bytes: int = 0
    kept_shared_host_bytes: int = 0
    kept_shared_disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ConversationInfo:
    """One parked conversation, as `ls` and `show` tell it. Times are Unix seconds.

    host_tokens, disk_tokens, bytes, version: at the node that was asked.  nodes: that have a branch of it;
    none where a node is alone.
    cost_per_hour: of keeping it where it lies, see ParkReceipt.  saves_gpu_s: seconds of a worker's GPUs that
    its return would spare, times the chance of that by the time for which it is best kept; None where nobody
    reckons.
    """

    conversation: str
    tenant: str
    version: int
    tokens: int
    branches: int
    model: str
    parked_at_s: float
    host_tokens: int
    disk_tokens: int
    bytes: int
    returns_at_s: float | None = None
    keep_until_s: float | None = None
    share: str = "prefix"
    nodes: tuple[str, ...] = ()
    cost_per_hour: float | None = None
    saves_gpu_s: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model fingerprint that has objects here or workers attached."""

    fingerprint: str
    model: str
    workers: int
    conversations: int
    objects: int
    host_bytes: int
    disk_bytes: int
    retired: bool = False


@dataclass(frozen=True, slots=True)
class TierInfo:
    """One tier's capacity and use."""

    name: str
    state: Literal["ready", "starting", "degraded", "absent"]
    capacity_bytes: int
    used_bytes: int
    limbo_bytes: int
    objects: int
    quarantined: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One attached worker.

    engine, place: what copies its pool ('cpu' or 'cuda'), and where ('cpu', 'cuda:0 NVIDIA H100').
    gpu_bytes: GPU memory that the copies take, without the process's CUDA context.
    """

    worker: str
    model: str
    shard: str
    mode: str
    pid: int
    running_jobs: int
    engine: str = ""
    place: str = ""
    gpu_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StatusReport:
    """The node, at one instant. metrics_url: where /metrics is served; '' when it is not.

    transport: by which it speaks to other nodes: 'tcp', or 'tcp+tls'; '' on a node alone.  peers: (node, how
    it was reached last: 'tcp' or 'ray') of those that were asked since the start.
    """

    node: str
    epoch: int
    version: str
    ready: bool
    uptime_s: float
    tiers: tuple[TierInfo, ...]
    workers: tuple[WorkerInfo, ...]
    conversations: int
    waiting_parks: int
    counters: dict[str, float]
    warnings: tuple[str, ...] = ()
    metrics_url: str = ""
    transport: str = ""
    peers: tuple[tuple[str, str], ...] = ()
