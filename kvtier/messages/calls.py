"""Messages between a client or worker and its node. `protocol.py` says how they travel."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from kvtier.explanation import Explanation
from kvtier.geometry import Geometry
from kvtier.receipts import (
    AskedLevel,
    ConversationInfo,
    ForgetReceipt,
    ModelInfo,
    ParkReceipt,
    Plan,
    RestoreReceipt,
    StatusReport,
)

Role: TypeAlias = Literal["client", "events", "disk", "gpu", "copy"]
Mode: TypeAlias = Literal["worker", "shared"]
# Lossless codecs of the disk tier that a park or a tenant may ask for.
CODECS: tuple[str, ...] = ("raw", "lz4", "planes-lz4", "planes-zstd")


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all messages. id: of a request, repeated in its answer; 0 where nothing is answered."""

    id: int = 0


# --- every connection -------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """First message of a connection, with the versions that the sender speaks."""

    role: Role
    oldest: int
    newest: int
    software: str = ""
    token: str = ""
    worker: str = ""


class Welcome(Message, frozen=True, tag="welcome"):
    """Answer to Hello. epoch grows with each start of the node."""

    version: int
    node: str
    epoch: int
    software: str = ""


class Failed(Message, frozen=True, tag="failed"):
    """Answer to any request that was the caller's mistake. error: the class name in kvtier.errors."""

    error: str
    message: str
    fix: str = ""


class Ping(Message, frozen=True, tag="ping"):
    """The empty call."""


class Pong(Message, frozen=True, tag="pong"):
    """Answer to Ping."""


class Done(Message, frozen=True, tag="done"):
    """Answer to a request that has nothing to say."""


# --- worker -----------------------------------------------------------------------------------------


class Attach(Message, frozen=True, tag="attach"):
    """A worker shows its pool. In 'shared' mode the pool's descriptors come with it.

    replaces: what this worker was called before it lost the node; none of the copies of then runs any more.
    config: the model's config.json, from which the node reads what computing a token costs; {} for none.
    device, devices: what computes, as its driver calls it, and how many of them together.  ranks: names of
    the shards of all ranks that park and restore together with this one, itself too; [] for none.  engine,
    place, gpu_bytes: what copies where in the worker's process, and the GPU memory that it takes for that.
    """

    fingerprint: bytes
    model: str
    geometry: Geometry
    shard: str
    layout: str
    pool_pages: int = 0
    mode: Mode = "worker"
    pool: dict[str, Any] = {}
    replaces: str = ""
    config: dict[str, Any] = {}
    device: str = ""
    devices: int = 1
    ranks: list[str] = []
    engine: str = ""
    place: str = ""
    gpu_bytes: int = 0


class Attached(Message, frozen=True, tag="attached"):
    """Descriptors beside it: the arenas in order, then the generation table.

    joins_ranks: whether the node makes one act of what the ranks do.
    """

    worker: str
    arena_bytes: list[int]
    generation_slots: int
    gpu_socket: str
    mode: Mode
    joins_ranks: bool = False


class Detach(Message, frozen=True, tag="detach"):
    """The worker goes; none of its copies runs any more."""

    worker: str


class Park(Message, frozen=True, tag="park"):
    """Store the KV of `tokens`, which lie after the block `after_key` (b'' = from the start).

    tokens: packed uint32, little-endian.  after_tokens: position of tokens[0].  request: the worker's
    number for its page binding.  held_from: for each layer group the first position that the pool still
    holds.  private_from: for share='conversation', from which token on nothing is shared.  codec: one of
    CODECS, for what of the conversation is written to disk from now on; '' for what was asked before.
    stop: why the output ended, such as 'end_turn' or 'tool_use'; '' unknown.  events: of a pool on a GPU that
    the daemon maps, numbers of the worker's events: one that all copies come after, or one for each layer.
    """

    worker: str
    request: int
    conversation: str
    tenant: str
    tokens: bytes
    after_key: bytes = b""
    after_tokens: int = 0
    extras: list[tuple[int, bytes]] = []
    held_from: list[int] = []
    level: AskedLevel = "host"
    share: Literal["prefix", "conversation"] = "prefix"
    private_from: int = 0
    fidelity: str = "exact"
    returns_in_s: float | None = None
    keep_for_s: float | None = None
    timeout_s: float = 30.0
    pages: list[bytes] = []
    codec: str = ""
    stop: str = ""
    events: list[int] = []


class ParkStarted(Message, frozen=True, tag="park_started"):
    """Answer to Park: job is '' and receipt set when it is over already."""

    job: str
    receipt: ParkReceipt | None = None


class MakePlan(Message, frozen=True, tag="make_plan"):
    """What of `tokens` is stored, and how to bring it back. conversation '' looks up by prefix alone.

    deadline_s: for all that is loaded, from now.  waiting: requests in the worker's prefill queue.
    prefill_wait_s: until it could begin to compute this one.  takes: what the engine can use.
    most_tokens: no more than these are loaded.  by_layer: it is going to be restored so.  A rank plans for
    all of its ranks.
    """

    worker: str
    conversation: str
    tenant: str
    tokens: bytes
    after_key: bytes = b""
    after_tokens: int = 0
    extras: list[tuple[int, bytes]] = []
    fidelity: str = "exact"
    lease_s: float = 10.0
    deadline_s: float | None = None
    waiting: int = 0
    prefill_wait_s: float = 0.0
    takes: Literal["all_or_nothing", "fronts", "both"] = "fronts"
    most_tokens: int | None = None
    by_layer: bool = False


class JoinPlan(Message, frozen=True, tag="join_plan"):
    """A rank asks for the plan that another one made for all of them. Answered by Planned."""

    worker: str
    plan_id: str


class Prefilled(Message, frozen=True, tag="prefilled"):
    """A prefill that the worker ran: `tokens` tokens after `past` that were in its cache."""

    worker: str
    past: int
    tokens: int
    seconds: float


class Planned(Message, frozen=True, tag="planned"):
    """Answer to MakePlan. front_key: key of the last full block found, to go on from next time."""

    plan: Plan
    front_key: bytes = b""
    front_tokens: int = 0


class Restore(Message, frozen=True, tag="restore"):
    """Carry out a plan into the pages bound to `request`.

    by_layer: what lies in host memory is copied as one batch, so that layers come first over all of it.
    events: as in Park.  layers: where the GPU service copies, it is to say LayerQueued to the worker.
    """

    worker: str
    request: int
    plan_id: str
    deadline_s: float
    pages: list[bytes] = []
    by_layer: bool = False
    events: list[int] = []
    layers: bool = False


class RestoreStarted(Message, frozen=True, tag="restore_started"):
    """Answer to Restore: job is '' and receipt set when it is over already."""

    job: str
    receipt: RestoreReceipt | None = None


class DropPlan(Message, frozen=True, tag="drop_plan"):
    """The plan will not be used; its leases end."""

    plan_id: str


class CopiesEnded(Message, frozen=True, tag="copies_ended"):
    """The worker proves that no copy of these jobs runs or will run (its GPU service was lost)."""

    worker: str
    jobs: list[str]


class Released(Message, frozen=True, tag="released"):
    """Event: the pages of the park may be reused."""

    request: int


class ParkDone(Message, frozen=True, tag="park_done"):
    """Event: the park is over."""

    request: int
    receipt: ParkReceipt


class RestoreDone(Message, frozen=True, tag="restore_done"):
    """Event: the restore is over; no copy into its pages runs but into the pages named busy."""

    request: int
    receipt: RestoreReceipt


# --- client -----------------------------------------------------------------------------------------


class Hint(Message, frozen=True, tag="hint"):
    """When the conversation is expected back, and how long it is worth keeping."""

    conversation: str
    tenant: str
    returns_in_s: float | None = None
    keep_for_s: float | None = None


class Forget(Message, frozen=True, tag="forget"):
    """Erase the conversation, every branch of it. Answered when that is durable."""

    conversation: str
    tenant: str


class Forgotten(Message, frozen=True, tag="forgotten"):
    """Answer to Forget."""

    receipt: ForgetReceipt


class Locate(Message, frozen=True, tag="locate"):
    """Which nodes hold the conversation. tokens: of the next turn, packed uint32, to be compared; or b''."""

    conversation: str
    tenant: str
    tokens: bytes = b""


class Located(Message, frozen=True, tag="located"):
    """Answer to Locate: (node, tokens held, expected seconds to the first token or 0.0), best first."""

    nodes: list[tuple[str, int, float]]


class ListConversations(Message, frozen=True, tag="list"):
    """A page of conversations in order of (tenant, conversation), after the given one."""

    tenant: str = ""
    after: tuple[str, str] | None = None
    limit: int = 1000


class Conversations(Message, frozen=True, tag="conversations"):
    """Answer to ListConversations and Show."""

    conversations: list[ConversationInfo]
    more: bool = False


class Show(Message, frozen=True, tag="show"):
    """One conversation."""

    conversation: str
    tenant: str


class Explain(Message, frozen=True, tag="explain"):
    """Why a conversation lies where it lies."""

    conversation: str
    tenant: str


class Explained(Message, frozen=True, tag="explained"):
    """Answer to Explain."""

    explanation: Explanation


class ListModels(Message, frozen=True, tag="list_models"):
    """Model fingerprints known here."""


class Retire(Message, frozen=True, tag="retire"):
    """KV of this model is worth nothing from now on, until a worker serves it again. Answered by Models.

    fingerprint: in hexadecimal digits, or the beginning of one that no other model's has.
    """

    fingerprint: str


class Models(Message, frozen=True, tag="models"):
    """Answer to ListModels, and to Retire."""

    models: list[ModelInfo]


class Status(Message, frozen=True, tag="status"):
    """The node, at this instant."""


class StatusIs(Message, frozen=True, tag="status_is"):
    """Answer to Status."""

    report: StatusReport
